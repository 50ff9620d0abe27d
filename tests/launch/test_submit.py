"""moeweave-submit: what each launcher would run, word for word, and that no value of a config is ever run itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moeweave.launch import jobs, submit_schema
from moeweave.launch.job import Job
from moeweave.launch.launchers import hostfile
from moeweave.launch.launchers.kubernetes import Kubernetes
from moeweave.launch.launchers.local import Local
from moeweave.launch.launchers.skypilot import Skypilot
from moeweave.launch.launchers.slurm import Slurm
from moeweave.launch.launchers.ssh import Ssh
from moeweave.launch.schema import BenchConfig, ConfigError
from moeweave.launch.submit_schema import SubmitConfig

RENDERED = Path(__file__).parent / "rendered"
JOB = Job(
    name="Tiny run",
    command=("-m", "moeweave.launch.train", "--config", "/runs/tiny/submit/0/config.yaml"),
    folder="/runs/tiny/submit/0",
    run_dir="/runs/tiny",
    directory="/home/me/work",
    nodes=2,
    ranks_per_node=8,
    min_nodes=2,
    max_restarts=3,
    token="0123456789abcdef0123456789abcdef",
    port=29400,
    python="/venv/bin/python",
    config="name: tiny\nsteps: 3\n",
    config_path="/runs/tiny/submit/0/config.yaml",
    config_source="/here/runs/tiny/submit/0/config.yaml",
    env={"NCCL_DEBUG": "INFO"},
    interface="eth1",
    code_dir="/home/me/moeweave",
)
ONE = dataclasses.replace(JOB, nodes=1, min_nodes=1)
IN_IMAGE = dataclasses.replace(JOB, container="lab/image:1", run_dir="/runs/a,readonly")
SCRIPT = dataclasses.replace(JOB, command=("/home/me/my.py", "--lr", "3e-4"), config="", config_path="", min_nodes=1)
CASES = {
    "local.sh": (Local(), ONE),
    "local_script.sh": (Local(), dataclasses.replace(SCRIPT, nodes=1)),
    "ssh.sh": (Ssh(hosts=["node-a", "me@node-b"], port=2222, options=["ProxyJump=login"]), JOB),
    "ssh_rsync_docker.sh": (
        Ssh(hosts=["node-a", "node-b", "node-c"], identity="/home/me/.ssh/id"),
        dataclasses.replace(SCRIPT, code="rsync", container="lab/image:1", setup="/home/me/setup.sh"),
    ),
    "slurm.sbatch": (Slurm(partition="gpu", time="12:00:00", cpus_per_task=64, options=["--mail-type=END"]), JOB),
    "slurm_elastic_container.sbatch": (
        Slurm(requeue=False, exclusive=True),
        dataclasses.replace(SCRIPT, container="lab/image:1", setup="/home/me/setup.sh"),
    ),
    "slurm_rsync.sbatch": (
        Slurm(grace_seconds=600),
        dataclasses.replace(JOB, code="rsync", run_dir="/home/me/moeweave/r"),
    ),
    "kubernetes.yaml": (
        Kubernetes(claim="runs", cpu="64", memory="512Gi"),
        dataclasses.replace(JOB, container="lab/image:1", code_dir=None, python="python"),
    ),
    "kubernetes_cpu.yaml": (
        Kubernetes(),
        dataclasses.replace(SCRIPT, container="lab/image:1", cpu=True, code_dir=None),
    ),
    "skypilot.yaml": (
        Skypilot(accelerators="H100:8", infra="aws/us-east-1", use_spot=True, storage="s3://runs"),
        dataclasses.replace(JOB, code="rsync", directory=None, python="python", container="lab/image:1"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_would_run_is_what_the_file_shows(name):
    """After a wanted change: `python tests/launch/test_submit.py` writes the files anew; read the difference."""
    launcher, job = CASES[name]
    assert launcher.render(job) == (RENDERED / name).read_text()


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(".yaml")])
def test_rendered_scripts_are_whole_shell(name):
    done = subprocess.run(["bash", "-n", RENDERED / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_config_reaches_pods_as_it_is():
    documents = list(yaml.safe_load_all((RENDERED / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["ConfigMap", "TrainJob"]
    assert documents[0]["data"]["config.yaml"] == JOB.config
    assert documents[0]["metadata"]["name"] == "tiny-run-01234567"


# ---- hostile values


HOSTILE = [
    "a; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "' ; touch ran; '",
    '" ; touch ran; "',
    "a\ntouch ran\n",
    "x && touch ran",
    "${HOME}",
    "~ * ? [a] {b,c} # !",
    "\\'; touch ran #",
]


def hostile_job(value: str, folder: Path) -> Job:
    """A job whose every free value is hostile; the interpreter only notes what it is given."""
    place = folder / value.replace("/", "")
    place.mkdir()
    python = place / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(folder / 'seen.jsonl')!r}, 'a').write(json.dumps([sys.argv[1:], os.environ.get('X'), os.getcwd(), "
        "os.environ.get('PYTHONPATH'), os.environ.get('GLOO_SOCKET_IFNAME')]) + '\\n')\n"
    )
    python.chmod(0o755)
    return dataclasses.replace(
        JOB,
        name=value,
        command=(value, value),
        folder=f"{place}/submit",
        directory=str(place),
        python=str(python),
        env={"X": value},
        interface=value,
        code_dir=value,
        config=value,
        config_path=f"/{value}",
        setup=None,
        nodes=1,
        min_nodes=1,
    )


def check_seen(job: Job, value: str, folder: Path, where: Path | None = None) -> None:
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    assert lines
    for argv, variable, directory, path, interface in lines:
        assert argv[:2] == ["-m", "moeweave.launch.agent"]
        assert argv[argv.index("--log-dir") + 1] == f"{job.folder}/ranks"
        assert argv[-2:] == [value, value]
        assert (variable, directory, path, interface) == (value, str(where or job.directory), value, value)
    assert not list(folder.rglob("ran")), "a value of the config was run"


def run_shell(text: str, folder: Path, **environment: str) -> None:
    variables = {**os.environ, **environment}
    done = subprocess.run(["bash", "-s"], input=text, text=True, cwd=folder, env=variables, check=False, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("value", HOSTILE)
def test_ssh_never_runs_a_value(value, tmp_path):
    job = hostile_job(value, tmp_path)
    (command,) = Ssh(hosts=["a"])._commands(job)
    assert value not in " ".join(command.words)
    run_shell(command.script, tmp_path)
    check_seen(job, value, tmp_path)


@pytest.mark.parametrize("value", HOSTILE)
def test_local_shows_a_script_that_never_runs_a_value(value, tmp_path):
    job = hostile_job(value, tmp_path)
    run_shell(Local().render(job), tmp_path)
    check_seen(job, value, tmp_path)


@pytest.mark.parametrize("value", HOSTILE)
def test_slurm_never_runs_a_value(value, tmp_path):
    """The script is run by bash with an srun that runs its command on the spot, as Slurm does on every node."""
    job = hostile_job(value, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "scontrol": "echo node-a",
        "srun": 'while [ "$1" != bash ]; do shift; done\nSLURM_NODEID=0 exec "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    with_copy = Slurm().render(dataclasses.replace(job, code="rsync"))
    script = Slurm().render(job)
    assert script.splitlines()[1] == f"#SBATCH --job-name={'-'.join(_letters(value)) or 'job'}"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "1"}
    run_shell(script, Path(job.directory), **environment)
    check_seen(job, value, tmp_path)
    run_shell(with_copy, Path(job.directory), **environment)
    assert not list(tmp_path.rglob("ran"))


def _letters(text: str) -> list[str]:
    return "".join(c.lower() if c.isalnum() and c.isascii() else " " for c in text).split()


@pytest.mark.parametrize("value", HOSTILE)
def test_skypilots_task_never_runs_a_value(value, tmp_path):
    job = hostile_job(value, tmp_path)
    task = yaml.safe_load(Skypilot(accelerators="H100:8").render(dataclasses.replace(job, directory=None)))
    environment = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PYTHONPATH": value}
    run_shell(task["run"], Path(str(job.directory)), **environment)
    check_seen(job, value, tmp_path)
    assert set(task["file_mounts"]) == {f"/{value}"}


@pytest.mark.parametrize("value", HOSTILE)
def test_pods_get_values_as_they_are(value, tmp_path):
    """No shell is involved; Kubernetes' own $(NAME) is written so that it stays as it is."""
    job = dataclasses.replace(hostile_job(value, tmp_path), container="image")
    config_map, train_job = yaml.safe_load_all(Kubernetes().render(job))
    trainer = train_job["spec"]["trainer"]
    shown = [_as_kubernetes_reads(word) for word in trainer["args"]]
    assert shown[-2:] == [value, value]
    assert {one["name"]: _as_kubernetes_reads(one["value"]) for one in trainer["env"]}["X"] == value
    assert config_map["data"]["config.yaml"] == value


def _as_kubernetes_reads(text: str) -> str:
    """$$ is a dollar, and $(NAME) a variable's value: there must be none of those left."""
    assert "$(" not in text.replace("$$", "")
    return text.replace("$$", "$")


@pytest.mark.parametrize("name", ["-oProxyCommand=touch ran", "a;touch ran", "$(touch ran)", "a b", "%h`x`"])
def test_a_host_that_is_no_name_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="is no host's name"):
        Ssh(hosts=["good", name]).render(JOB)
    (tmp_path / "hosts").write_text(f"good slots=2\n{name} slots=2\n")
    with pytest.raises(ConfigError, match=r"hosts:2: .* must be `host slots=n`"):
        hostfile.read(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Slurm(partition="gpu\n#SBATCH --wrap=x").render(JOB), "launcher.partition=.*may only hold letters"),
        (lambda: Slurm(options=["--wrap=a b"]), "launcher.options: '--wrap=a b' must be --name"),
        (lambda: Slurm(options=["touch"]), "must be --name"),
        (lambda: Kubernetes(namespace="a\n- b"), "launcher.namespace="),
        (lambda: Skypilot(cluster="-x"), "launcher.cluster="),
        (lambda: Ssh(options=["-oProxyCommand=x"]), "launcher.options: '-oProxyCommand=x' must be Name=value"),
        (lambda: SubmitConfig(env={"A;touch ran": "1"}), "is no name of an environment variable"),
        (lambda: SubmitConfig(container="--privileged"), "container='--privileged': must not"),
        (lambda: SubmitConfig(port=22), "port=22: must be a port above"),
        (lambda: Kubernetes().render(JOB), "container=null: launcher=kubernetes needs an image"),
        (lambda: Skypilot().render(JOB), "launcher.accelerators=null"),
        (lambda: Ssh().render(JOB), "launcher=ssh needs one of them"),
        (lambda: Ssh(hosts=["a"]).render(JOB), "nodes=2: launcher=ssh has 1 hosts"),
        (lambda: Ssh(hosts=["a", "a"]).render(JOB), "names a twice"),
        (lambda: Ssh(hosts=["a", "b\nc"]).render(JOB), "'b.nc' is no host's name"),
        (lambda: Ssh(hosts=["a", ""]).render(JOB), "'' is no host's name"),
        (lambda: Ssh(hosts=["a", "b"]).render(IN_IMAGE), "run.dir.*may not hold"),
        (lambda: Slurm().render(IN_IMAGE), "run.dir.*may not hold"),
        (lambda: Local().render(JOB), "nodes=2: launcher=local is this machine alone"),
        (lambda: Local().render(dataclasses.replace(ONE, container="x")), "container=x .*runs in this very process"),
        (lambda: Local().render(dataclasses.replace(ONE, code="rsync")), "code=rsync: .*runs in this very process"),
        (lambda: Kubernetes().render(dataclasses.replace(JOB, code="rsync")), "code=rsync .*what their image holds"),
    ],
)
def test_what_cannot_be_written_safely_or_cannot_run_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- hosts and ranks


def test_deepspeeds_hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# cluster\nnode-a slots=4\n\nme@node-b slots=4   # second\n")
    assert hostfile.read(str(path)) == [hostfile.Host("node-a", 4), hostfile.Host("me@node-b", 4)]
    assert Ssh(hostfile=str(path)).hosts_and_slots() == (2, 4)
    path.write_text("node-a slots=4\nnode-b slots=8\n")
    with pytest.raises(ConfigError, match=r"slots differ \(4, 8\)"):
        Ssh(hostfile=str(path)).hosts_and_slots()
    with pytest.raises(ConfigError, match="no such file"):
        hostfile.read(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "config, launcher, world, expected",
    [
        ({}, Local(), 4, (1, 4)),
        ({}, Ssh(hosts=["a", "b"]), 4, (2, 2)),
        ({"nodes": 1}, Ssh(hosts=["a", "b"]), 4, (1, 4)),
        ({"ranks_per_node": 2}, Ssh(hosts=["a", "b", "c"]), 4, (2, 2)),
        ({"ranks_per_node": 8}, Slurm(), 64, (8, 8)),
        ({}, Slurm(gpus_per_node=8), 16, (2, 8)),
        ({}, Slurm(gpus_per_node=8), 4, (1, 4)),
        ({}, Skypilot(accelerators="H100:8"), 256, (32, 8)),
        ({"nodes": 4}, Kubernetes(), 32, (4, 8)),
        ({"nodes": 2, "ranks_per_node": 3}, Kubernetes(), None, (2, 3)),
    ],
)
def test_hosts_and_ranks_follow_from_the_mesh(config, launcher, world, expected):
    assert jobs.shape(SubmitConfig(**config), launcher, world) == expected


@pytest.mark.parametrize(
    "config, launcher, world, message",
    [
        ({}, Ssh(hosts=["a", "b", "c"]), 4, "make 3 ranks, and the config has 4.*nodes can be 1, 2"),
        ({"nodes": 3, "ranks_per_node": 2}, Slurm(), 4, "nodes=3 ranks_per_node=2: make 6.*Set nodes=2"),
        ({"program": "my.py"}, Slurm(), None, "how many ranks it takes is not known. Set ranks_per_node"),
    ],
)
def test_hosts_and_ranks_that_do_not_fit_are_refused(config, launcher, world, message):
    with pytest.raises(ConfigError, match=message):
        jobs.shape(SubmitConfig(**config), launcher, world)


def test_each_job_has_a_token_of_its_own_and_a_port_from_it(tmp_path):
    made = [
        jobs.make(SubmitConfig(program="bench"), Local(), BenchConfig(), [], tmp_path, tmp_path, token)
        for token in ("00" * 16, "ff" * 16)
    ]
    assert [job.token for job in made] == ["00" * 16, "ff" * 16]
    assert all(20000 <= job.port < 30000 for job in made) and made[0].port != made[1].port
    for job in made:
        assert job.token not in " ".join(job.agent("a:1", 0))  # everyone on a host reads command lines


def test_launchers_are_the_ones_of_the_config_group():
    assert set(submit_schema.LAUNCHERS) == {"local", "ssh", "slurm", "kubernetes", "skypilot"}


if __name__ == "__main__":
    for case, (chosen, wanted) in CASES.items():
        (RENDERED / case).write_text(chosen.render(wanted))
