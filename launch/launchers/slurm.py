"""A Slurm cluster: one sbatch script, whose srun starts one agent on each node.

Slurm sends the script USR1 some time before the job's end: at its time limit, and, where the cluster's
preemption is set to send_user_signal, before it is preempted. The script then ends the ranks by TERM and asks for the
same job again; with resume=auto it goes on from the newest checkpoint. A job that the user cancels stays cancelled.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeweave.launch import probe
from moeweave.launch.job import Job, Layout, label, quoted, safe
from moeweave.launch.launchers.copies import not_code, run_copy
from moeweave.launch.launchers.shell import exports, mounted, same_paths
from moeweave.launch.schema import ConfigError, at_least
from moeweave.launch.submission import Submission

# torch elastic kills ranks that have not ended so many seconds after they were told to; 30 unless this is set.
STOP_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# Runs an agent on one node: Slurm's number of the node is torchrun's.
ON_NODE = 'PET_NODE_RANK="$SLURM_NODEID" exec "$@"'


@dataclass(frozen=True)
class Slurm:
    """Options of launcher=slurm; each but the last four is sbatch's own of that name."""

    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = False
    gpus_per_node: int | None = None
    requeue: bool = True
    grace_seconds: int = 120
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least(1, launcher__grace_seconds=self.grace_seconds)
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[A-Za-z0-9._:@/+=,%-]+)?", option):
                raise ConfigError(
                    f"launcher.options: {option!r} must be --name or --name=value without spaces or quotes."
                )

    def hosts_and_slots(self) -> tuple[int | None, int | None]:
        return None, self.gpus_per_node or None

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        return same_paths(folder, run_dir, code_dir, container)

    def render(self, job: Job) -> str:
        # A path may hold a new line, which must not end the comment.
        copied = [f"# copied first: {quoted(words)}".replace("\n", "\n# ") for words in self._copies(job)]
        job = self._with_copy(job)
        header = "\n".join(f"#SBATCH {option}" for option in self._options(job))
        alone = ["--kill-on-bad-exit=1"] if job.min_nodes in (0, job.nodes) else ["--kill-on-bad-exit=0", "--no-kill"]
        node = quoted(["srun", *alone, *self._container(job), "bash", "-c", ON_NODE, "agent"])
        setup = [] if job.setup is None else [f"source {shlex.quote(job.setup)}"]
        # The endpoint is known on the cluster alone, so it goes by torchrun's variable.
        lines = [
            "#!/bin/bash",
            header,
            *copied,
            "",
            *exports({STOP_SECONDS: str(self._stop_seconds())} | job.variables()),
            *setup,
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f'export PET_RDZV_ENDPOINT="$head:{job.port}"',
            "",
            f"{node} {quoted(job.agent(None))} &",
            "srun_pid=$!",
            *self._on_signals(),
            'wait "$srun_pid"; code=$?',
            "# A trap ends the wait early: the ranks may still be stopping.",
            'while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; code=$?; done',
            'if [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi' if self.requeue else "",
            'exit "$code"',
        ]
        return "\n".join(lines) + "\n"

    def check(self, job: Job) -> list[str]:
        if shutil.which("sbatch") is None:
            return ["this machine has no sbatch: run moeweave-submit on a login node of the cluster"]
        done = _run([*self._sbatch(job), "--test-only"], self.render(job))
        if done.returncode:
            return [f"sbatch --test-only: {_last(done)}"]
        if shutil.which("srun") is None:
            return []
        resources = [
            option for option in self._options(job) if not option.startswith(("--signal", "--requeue", "--open"))
        ]
        asked = ["srun", *resources, "--time=5", "--label", *self._container(job), *probe.words(job, node_rank=1)]
        done = _run(asked, "")
        answers = [probe.read(line.partition(": ")[2]) for line in done.stdout.splitlines()]
        found = [f"{one['host']} {text}" for one in answers if one is not None for text in probe.problems(one)]
        return found if any(answers) else [f"srun could not ask the nodes: {_last(done)}"]

    def submit(self, job: Job, submission: Submission) -> int:
        if shutil.which("sbatch") is None:
            raise ConfigError("launcher=slurm: this machine has no sbatch. Run moeweave-submit on a login node.")
        for words in self._copies(job):
            run_copy(words)
        done = _run(self._sbatch(job), self.render(job))
        if done.returncode:
            raise ConfigError(f"sbatch refused the job: {_last(done)}")
        number = done.stdout.strip().split(";")[0]
        submission.record(id=number)
        print(f"job {number} is in the queue; moeweave-submit logs {shlex.quote(job.run_dir)} shows its output")
        return 0

    def status(self, submission: Submission) -> str:
        """As the accounting has it; where there is none, as the controller remembers it for some minutes."""
        number = str(submission.state["id"])
        done = _run(["sacct", "-X", "-n", "-P", "-j", number, "-o", "JobID,State,ExitCode,Elapsed,NodeList"], "")
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
        done = _run(["scontrol", "--oneliner", "show", "job", number], "")
        wanted = ("JobId", "JobState", "Reason", "ExitCode", "Restarts", "RunTime", "NodeList")
        words = [word for word in done.stdout.split() if word.partition("=")[0] in wanted]
        return " ".join(words) or f"job {number} is unknown to Slurm: {_last(done)}"

    def logs(self, submission: Submission) -> str:
        return submission.logs()

    def stop(self, submission: Submission) -> str:
        number = str(submission.state["id"])
        done = _run(["scancel", number], "")
        return f"job {number} is cancelled" if done.returncode == 0 else f"scancel {number}: {_last(done)}"

    # ----

    def _copies(self, job: Job) -> list[list[str]]:
        """What keeps the code as it is now, for the job to run whenever its turn comes."""
        if job.code != "rsync" or job.code_dir is None:
            return []
        return [["rsync", "--archive", *not_code(job, job.code_dir), "--", f"{job.code_dir}/", f"{job.folder}/code/"]]

    def _with_copy(self, job: Job) -> Job:
        return replace(job, code_dir=f"{job.folder}/code") if self._copies(job) else job

    def _stop_seconds(self) -> int:
        """What an agent gives its ranks to save and end: most of the grace, for the script then asks for the job."""
        return max(1, self.grace_seconds - min(20, self.grace_seconds // 4))

    def _options(self, job: Job) -> list[str]:
        own = {
            name: getattr(self, name)
            for name in ("partition", "account", "qos", "time", "constraint", "reservation", "cpus_per_task", "mem")
        }
        named = {name.replace("_", "-"): str(value) for name, value in own.items() if value is not None}
        gpus = self.gpus_per_node if self.gpus_per_node is not None else 0 if job.cpu else job.ranks_per_node
        found = [f"--job-name={label(job.name)}", f"--nodes={job.nodes}", "--ntasks-per-node=1"]
        found += [f"--{name}={safe(f'launcher.{name}', value)}" for name, value in named.items()]
        found += [f"--gpus-per-node={gpus}"] if gpus else []
        found += ["--exclusive"] if self.exclusive else []
        found += ["--requeue", "--open-mode=append"] if self.requeue else ["--no-requeue"]
        found += [] if job.min_nodes in (0, job.nodes) else ["--no-kill"]  # the others go on without a lost node
        return [*found, f"--signal=B:USR1@{self.grace_seconds}", *self.options]

    def _on_signals(self) -> list[str]:
        # To the agents, which give their ranks time; srun itself, given TERM, has them killed at once.
        stop = 'scancel --signal=TERM "$SLURM_JOB_ID"'
        return ["again=", f"trap 'again=1; {stop}' USR1", f"trap '{stop}' TERM"]

    def _container(self, job: Job) -> list[str]:
        """Options of pyxis, which runs a step of Slurm in an image."""
        if job.container is None:
            return [f"--chdir={job.directory}"]
        mounts = ",".join(f"{path}:{path}" for path in mounted(job))
        return [
            f"--container-image={job.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={job.directory}",
        ]

    def _sbatch(self, job: Job) -> list[str]:
        """Paths go here, as words of their own: lines of #SBATCH have no quoting that all releases agree on."""
        output = f"{job.folder.replace('%', '%%')}/slurm.log"
        return ["sbatch", "--parsable", f"--chdir={job.directory}", f"--output={output}"]


def _run(words: list[str], text: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}, and no word"
