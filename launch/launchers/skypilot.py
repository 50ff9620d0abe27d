"""SkyPilot: a task that it runs on machines of a cloud or a Kubernetes cluster, one agent on each."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeweave.launch.job import Job, Layout, label, quoted, safe
from moeweave.launch.launchers import yaml_text
from moeweave.launch.launchers.shell import host_script
from moeweave.launch.schema import ConfigError
from moeweave.launch.submission import Submission

TASK = "job.yaml"
STORAGE = "/mnt/moeweave"
# SkyPilot's variables, in torchrun's words. The first address is the first node's.
MEET = """\
export PET_NODE_RANK="$SKYPILOT_NODE_RANK"
export PET_RDZV_ENDPOINT="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{port}"
"""


@dataclass(frozen=True)
class Skypilot:
    """Options of launcher=skypilot."""

    kind: str = "skypilot"
    accelerators: str | None = None
    infra: str | None = None
    use_spot: bool = False
    cluster: str | None = None
    disk_size: int | None = None
    storage: str | None = None
    down: bool = True

    def __post_init__(self) -> None:
        if self.cluster is not None:
            safe("launcher.cluster", self.cluster, r"[a-z]([a-z0-9-]*[a-z0-9])?")

    def hosts_and_slots(self) -> tuple[int | None, int | None]:
        count = (self.accelerators or "").rpartition(":")[2]
        return None, int(count) if count.isdigit() else None

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        """Machines start with nothing of this one; SkyPilot puts the code into the folder in which the ranks start."""
        del container
        far = f"{STORAGE if self.storage else '/tmp/moeweave'}/{run_dir.name}"
        config = f"/tmp/moeweave-config/{run_dir.name}-{folder.name}/config.yaml"
        return Layout(far, f"{far}/submit/{folder.name}", config, None, code_dir, "python")

    def render(self, job: Job) -> str:
        if not job.cpu and self.accelerators is None:
            raise ConfigError(
                "launcher.accelerators=null: name the machines, for example launcher.accelerators=H100:8."
            )
        resources: dict[str, Any] = {"use_spot": self.use_spot}
        for name in ("accelerators", "infra", "disk_size"):
            if getattr(self, name) is not None:
                resources[name] = getattr(self, name)
        if job.container is not None:
            resources["image_id"] = f"docker:{job.container}"
        task: dict[str, Any] = {"name": label(job.name), "num_nodes": job.nodes, "resources": resources}
        mounts: dict[str, Any] = {job.config_path: job.config_source} if job.config else {}
        if self.storage is not None:
            mounts[STORAGE] = {"source": self.storage, "mode": "MOUNT"}
        if job.code == "rsync" and job.code_dir is not None:
            task["workdir"] = job.code_dir
        task |= {"file_mounts": mounts} if mounts else {}
        # SkyPilot runs the task inside the image itself, in the folder that it copied the code to.
        plain = replace(job, container=None, code_dir="." if "workdir" in task else None)
        return yaml_text.dump(task | {"run": self._run_text(plain)})

    def check(self, job: Job) -> list[str]:
        if shutil.which("sky") is None:
            return ["this machine has no sky: pip install skypilot"]
        with tempfile.TemporaryDirectory() as folder:
            task, config = Path(folder, TASK), Path(folder, "config.yaml")
            config.write_text(job.config)
            task.write_text(self.render(replace(job, config_source=str(config))))
            done = _sky(["launch", "--dryrun", "--yes", str(task)])
        return [] if done.returncode == 0 else [f"sky launch --dryrun: {_last(done)}"]

    def submit(self, job: Job, submission: Submission) -> int:
        name = self.cluster or f"{label(job.name)[:20]}-{job.token[:6]}"
        words = ["launch", "--yes", "--detach-run", "--cluster", name, *(["--down"] if self.down else [])]
        done = _sky([*words, str(submission.path / TASK)])
        if done.returncode:
            raise ConfigError(f"sky refused the task: {_last(done)}")
        submission.record(id=name)
        print(f"cluster {name} runs the task; moeweave-submit logs {submission.path.parents[1]} shows its output")
        return 0

    def status(self, submission: Submission) -> str:
        done = _sky(["queue", str(submission.state["id"])])
        return done.stdout.strip() or _last(done)

    def logs(self, submission: Submission) -> str:
        done = _sky(["logs", "--no-follow", str(submission.state["id"])])
        return done.stdout or _last(done)

    def stop(self, submission: Submission) -> str:
        name = str(submission.state["id"])
        done = _sky(["cancel", "--yes", "--all", name])
        return f"the jobs of {name} are cancelled" if done.returncode == 0 else _last(done)

    def _run_text(self, job: Job) -> str:
        return MEET.format(port=job.port) + host_script(job, job.agent(None))


def _sky(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = ["sky", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", f"{quoted(command)}: {error}")


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}, and no word"
