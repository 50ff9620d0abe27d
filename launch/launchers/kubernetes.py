"""Kubernetes: a TrainJob of Kubeflow Trainer v2 (2.2 or newer), with the config beside it as a ConfigMap.

The runtime's controller tells each pod its rank and the first pod's name by torchrun's variables (PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT), which the agent reads. Nothing in a pod passes through a shell.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeweave.launch.job import AGENT, Job, Layout, label, safe
from moeweave.launch.launchers import yaml_text
from moeweave.launch.schema import ConfigError
from moeweave.launch.submission import Submission

CONFIG = "/etc/moeweave"
MANAGER = "moeweave.org/submit"


@dataclass(frozen=True)
class Kubernetes:
    """Options of launcher=kubernetes."""

    kind: str = "kubernetes"
    namespace: str = "default"
    runtime: str = "torch-distributed"
    resource: str = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    claim: str | None = None
    mount: str = "/mnt/moeweave"

    def __post_init__(self) -> None:
        for name in ("namespace", "runtime"):
            safe(f"launcher.{name}", getattr(self, name), r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
        if self.claim is not None:
            safe("launcher.claim", self.claim, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")

    def hosts_and_slots(self) -> tuple[int | None, int | None]:
        return None, None

    def layout(self, folder: Path, run_dir: Path, code_dir: str | None, container: str | None) -> Layout:
        """Pods have the image's code, and the claim's folder in place of run.root."""
        del code_dir, container
        far = f"{self.mount if self.claim else '/tmp'}/{run_dir.name}"
        return Layout(far, f"{far}/submit/{folder.name}", f"{CONFIG}/config.yaml", None, None, "python")

    def render(self, job: Job) -> str:
        if job.code != "shared" or job.setup is not None:
            raise ConfigError(
                f"code={job.code} setup={job.setup}: pods have what their image holds. Put it into the image, and "
                "leave code=shared and setup=null."
            )
        if job.container is None:
            raise ConfigError("container=null: launcher=kubernetes needs an image. Set container=<image>.")
        documents = [self._config_map(job)] if job.config else []
        return yaml_text.dump(*documents, self._train_job(job))

    def check(self, job: Job) -> list[str]:
        if shutil.which("kubectl") is None:
            return ["this machine has no kubectl"]
        done = self._kubectl(["create", "--dry-run=server", "-f", "-"], self.render(job))
        return [] if done.returncode == 0 else [f"kubectl: {_last(done)}"]

    def submit(self, job: Job, submission: Submission) -> int:
        done = self._kubectl(["create", "-f", "-"], self.render(job))
        if done.returncode:
            raise ConfigError(f"kubectl refused the job: {_last(done)}")
        submission.record(id=_name(job))
        print(done.stdout.strip())
        return 0

    def status(self, submission: Submission) -> str:
        name = str(submission.state["id"])
        shown = "{.metadata.name}{range .status.conditions[*]} {.type}={.status} {.reason}{end}"
        done = self._kubectl(["get", "trainjob", name, "-o", f"jsonpath={shown}"])
        return done.stdout.strip() or _last(done)

    def logs(self, submission: Submission) -> str:
        name = str(submission.state["id"])
        words = [
            "logs",
            "--prefix",
            "--tail=-1",
            "--max-log-requests=256",
            "-l",
            f"jobset.sigs.k8s.io/jobset-name={name}",
        ]
        done = self._kubectl(words)
        return done.stdout or _last(done)

    def stop(self, submission: Submission) -> str:
        name = str(submission.state["id"])
        done = self._kubectl(["delete", f"trainjob/{name}", f"configmap/{name}", "--ignore-not-found"])
        return done.stdout.strip() or _last(done)

    # ----

    def _config_map(self, job: Job) -> dict[str, Any]:
        metadata = {"name": _name(job), "namespace": self.namespace}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": job.config}}

    def _train_job(self, job: Job) -> dict[str, Any]:
        trainer: dict[str, Any] = {"image": job.container, "numNodes": job.nodes}
        # Of the agent's words, where the pods meet is left to the runtime's variables.
        trainer["command"] = [_literal(word) for word in [job.python, *AGENT]]
        trainer["args"] = [_literal(word) for word in job.agent(None)[1 + len(AGENT) :]]
        trainer["env"] = [{"name": name, "value": _literal(value)} for name, value in job.variables().items()]
        if resources := self._resources(job):
            trainer["resourcesPerNode"] = {"requests": resources, "limits": resources}
        spec: dict[str, Any] = {"runtimeRef": {"name": self.runtime}, "trainer": trainer}
        if pod := self._pod(job):
            spec["runtimePatches"] = [{"manager": MANAGER, "trainingRuntimeSpec": _patch(pod)}]
        metadata = {"name": _name(job), "namespace": self.namespace}
        return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}

    def _resources(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = {} if job.cpu else {self.resource: job.ranks_per_node}
        found |= {} if self.cpu is None else {"cpu": self.cpu}
        return found | ({} if self.memory is None else {"memory": self.memory})

    def _pod(self, job: Job) -> dict[str, Any]:
        """Volumes: the config, the claim that holds the run folder, and shared memory for the ranks of a pod."""
        volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
        mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
        if job.config:
            volumes.append({"name": "config", "configMap": {"name": _name(job)}})
            mounts.append({"name": "config", "mountPath": CONFIG})
        if self.claim is not None:
            volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}})
            mounts.append({"name": "runs", "mountPath": self.mount})
        return {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}

    def _kubectl(self, words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        command = ["kubectl", "--namespace", self.namespace, *words]
        try:
            return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 127, "", str(error))


def _patch(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod's part of a runtime, as deep as the runtime has it."""
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}


def _literal(text: str) -> str:
    """Kubernetes puts variables in place of $(NAME) in commands and values; $$ is a dollar."""
    return text.replace("$", "$$") if "$(" in text or "$$" in text else text


def _name(job: Job) -> str:
    """A name of its own for each submission."""
    return f"{label(job.name)}-{job.token[:8]}"


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}, and no word"
