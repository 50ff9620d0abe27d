"""moeweave-train as the user runs it: what a run leaves, that a killed one goes on bit by bit, that errors are read."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from programs import fresh, run, start

TINY = [
    "model=qwen3_moe",
    "mesh.dp=2",
    "mesh.ep=2",
    "mesh.device=cpu",
    "data.seq_length=16",
    "batch_size=4",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    assert [line["step"] for line in metrics(folder)] == list(range(1, len(metrics(folder)) + 1))
    return [line["loss"] for line in metrics(folder)]


def test_a_run_trains_proves_and_leaves_its_folder(tmp_path):
    done = run("train", *TINY, "steps=12", "microbatches=2", "log.every=6", "name=first", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-first")
    assert losses(folder)[-1] < losses(folder)[0]
    assert "model.source" not in (folder / "config.yaml").read_text()
    assert "source: qwen3_moe" in (folder / "config.yaml").read_text()
    started = json.loads((folder / "started.jsonl").read_text())
    assert started["command"].startswith("moeweave-train model=qwen3_moe mesh.dp=2")
    assert started["versions"]["torch"]
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["ok"]
    assert len(proof["errors"]) > 20
    assert (folder / "curves.png").stat().st_size > 10_000
    last = metrics(folder)[-1]
    assert last["tokens"] == 12 * 4 * 16
    loads = [sum(load) for line in metrics(folder) if "load" in line for load in line["load"].values()]
    assert set(loads) == {4 * 16 * 2}  # tokens of a step times experts of a token, over both ranks
    for shown in ("step 1/12", "step 12/12", "tok/s", "balance", "proof   passed: largest relative error", "runs/"):
        assert shown in done.out


def test_a_gradient_that_differs_fails_the_run(tmp_path):
    done = run("launch_cases", "train", "scale_one_gradient", *TINY, "steps=1", cwd=tmp_path)
    assert done.code == 1
    assert "proof   FAILED: largest relative error 1.00e-03 (tolerance 1e-05)" in done.out
    assert "worst: model.layers.1.self_attn.q_proj.weight 1.00e-03" in done.out


def test_the_load_of_every_pipeline_stage_is_logged(tmp_path):
    arguments = ["mesh.dp=1", "mesh.ep=1", "mesh.pp=2", "microbatches=2", "steps=2", "log.load_every=1"]
    done = run("train", *TINY, *arguments, "name=stages", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    (folder,) = (tmp_path / "runs").iterdir()
    for line in metrics(folder):
        assert len(line["load"]) == 3  # layers, which two stages cannot share evenly
        assert {sum(load) for load in line["load"].values()} == {4 * 16 * 2}


# ---- resume


def kill_at(step: int, folder: Path, *arguments: str, cwd: Path) -> None:
    """Starts a run and sends SIGKILL to all of it once it has logged `step`."""
    running = start("train", *arguments, f"run.dir={folder}", cwd=cwd)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics_safely(folder)) < step:
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.005)
    running.kill()
    assert running.wait().code < 0, "it ended before it could be killed"


def metrics_safely(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().split("\n")[:-1]


def test_a_run_that_was_killed_goes_on_bit_by_bit(tmp_path):
    arguments = [*TINY, "steps=36", "checkpoint.every=7", "proof=false"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("train", *arguments, f"run.dir={whole}", cwd=tmp_path).code == 0
    kill_at(10, broken, *arguments, cwd=tmp_path)
    kill_at(20, broken, *arguments, cwd=tmp_path)
    assert len(metrics_safely(broken)) < 36
    done = run("train", *arguments, f"run.dir={broken}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "resume  step " in done.out
    assert losses(broken) == losses(whole)  # as floats: every bit
    assert [line["grad_norm"] for line in metrics(broken)] == [line["grad_norm"] for line in metrics(whole)]
    assert len((broken / "started.jsonl").read_text().splitlines()) == 3
    assert len(list((broken / "checkpoints").iterdir())) == 2  # checkpoint.keep


def test_ranks_that_are_restarted_go_on_by_themselves(tmp_path):
    arguments = [*TINY, "steps=8", "checkpoint.every=3", "proof=false"]
    assert run("train", *arguments, "run.dir=whole", cwd=tmp_path).code == 0
    case = ["launch_cases", "train", "lose_a_rank_once", *arguments, "run.dir=broken"]
    failed = run(*case, cwd=tmp_path)
    assert failed.code == 1
    assert "rank 1 failed: the process was killed from outside" in failed.err
    shutil.rmtree(tmp_path / "broken")
    done = run(*case, "ranks.max_restarts=1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "resume  step 3 of 8" in done.out
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_run_goes_on_over_other_ranks(tmp_path):
    arguments = [*TINY, "checkpoint.every=5", "proof=false", f"run.dir={tmp_path / 'run'}"]
    assert run("train", *TINY, "steps=10", "proof=false", f"run.dir={tmp_path / 'whole'}", cwd=tmp_path).code == 0
    assert run("train", *arguments, "steps=10", "ranks.max_restarts=0", cwd=tmp_path).code == 0
    for folder in (tmp_path / "run/checkpoints").iterdir():
        if not folder.name.endswith("5"):
            shutil.rmtree(folder)
    done = run("train", *arguments, "steps=10", "mesh.dp=1", "mesh.ep=1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "resume  step 5 of 10" in done.out
    assert "changed since: dp: 1" in done.out
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_more_steps_go_on_from_the_end(tmp_path):
    folder = f"run.dir={tmp_path / 'run'}"
    assert run("train", *TINY, "steps=2", "proof=false", folder, cwd=tmp_path).code == 0
    done = run("train", *TINY, "steps=4", "batch_size=8", "proof=false", folder, cwd=tmp_path)
    assert "resume  step 2 of 4" in done.out
    assert len(losses(tmp_path / "run")) == 4
    assert [line["tokens"] for line in metrics(tmp_path / "run")] == [64, 128, 256, 384]  # 4, then 8 times 16 a step
    before = (tmp_path / "run/config.yaml").read_text()
    refused = run("train", *TINY, "steps=4", "resume=never", folder, cwd=tmp_path)
    assert refused.code == 2
    assert "holds a run, and resume=never would overwrite it" in refused.err
    other = run("train", *TINY, "steps=6", "proof=false", folder, "seed=1", cwd=tmp_path)
    assert other.code == 1
    assert "seed=0, this run seed=1" in other.err
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_a_run_begins_from_the_checkpoint_of_another(tmp_path):
    assert run("train", *TINY, "steps=4", "proof=false", f"run.dir={tmp_path / 'a'}", cwd=tmp_path).code == 0
    (checkpoint,) = (tmp_path / "a/checkpoints").iterdir()
    done = run(
        "train", *TINY, "steps=6", "proof=false", f"run.dir={tmp_path / 'b'}", f"resume={checkpoint}", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics(tmp_path / "b")] == [5, 6]
    again = run(
        "train", *TINY, "steps=7", "proof=false", f"run.dir={tmp_path / 'b'}", f"resume={checkpoint}", cwd=tmp_path
    )
    assert "resume  step 6 of 7" in again.out, again.err
    assert [line["step"] for line in metrics(tmp_path / "b")] == [5, 6, 7]
    older = run("train", *TINY, "steps=8", "run.dir=a", "checkpoint.every=5", "proof=false", cwd=tmp_path)
    assert older.code == 0, older.err
    done = run("train", *TINY, "steps=8", "run.dir=a", "resume=a/checkpoints/step-00000005", cwd=tmp_path)
    assert done.code == 1
    assert "run.dir holds a newer checkpoint, step-00000008" in done.err
    done = run(
        "train", *TINY, "steps=8", f"run.dir={tmp_path / 'b'}", "resume=a/checkpoints/step-00000008", cwd=tmp_path
    )
    assert done.code == 1
    assert "run.dir holds a checkpoint of its own, step-00000007, that this run would leave behind" in done.err


@pytest.mark.parametrize("kind", ["foreign", "corrupt"])
def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path, kind):
    assert run("train", *TINY, "steps=1", "proof=false", f"run.dir={tmp_path / 'a'}", cwd=tmp_path).code == 0
    (checkpoint,) = (tmp_path / "a/checkpoints").iterdir()
    if kind == "foreign":
        checkpoint = tmp_path / "foreign"
        checkpoint.mkdir()
        (checkpoint / "model.pt").write_bytes(b"something else")
    else:
        for path in checkpoint.rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run("train", *TINY, "steps=2", f"resume={checkpoint}", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.seconds < 90  # far below the timeouts that would end it otherwise
    assert done.err.startswith("moeweave-train: error: rank ")
    assert str(checkpoint) in done.err


# ---- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stps=3"], "unknown config key stps"),
        (["plan.dispatchr=alltoall"], "Did you mean plan.dispatcher?"),
        (["plan.dispatcher=alltol"], "alltoall"),
        (["plan.codec=fp9"], "Did you mean 'fp8'?"),
        (["mesh.dp=6", "mesh.ep=4", "batch_size=12"], "ep can be 1, 2, 3, 6"),
        (["mesh.dp=16", "mesh.ep=16", "batch_size=16"], "ep (16) must divide the number of experts (8)"),
        (["mesh.pp=2"], "microbatches (1) must be at least 2"),
        (["mesh.pp=8", "microbatches=8", "batch_size=16"], "the model has 3 layers: every stage needs one"),
        (["mesh.dp=5", "mesh.ep=1", "mesh.etp=5", "batch_size=10"], "etp (5) must divide the columns of"),
        (["mesh.tp=3", "mesh.dp=1", "mesh.ep=1"], "tp (3) must divide the heads of"),
        (["mesh.sp=3"], "sp (3) must divide the 4 heads of model.layers.0.self_attn under Plan(sequence='ulysses')"),
        (["data.path=nowhere.txt"], "data.path=nowhere.txt: no such file"),
        (["model=qwen3_mo"], "Nearest: qwen3_moe"),
        (["model=nowhere/config.json"], "does not exist"),
        (["model.overrides.num_expert=4"], "Nearest: num_experts"),
        (["model.overrides.vocab_size=100"], "Set model.overrides.vocab_size=256 or more"),
        (["model=llama"], "has no experts to share out. Set mesh.ep=1"),
        (["model=switch_transformers"], "SwitchTransformersExperts"),
        (["mesh.device=npu"], "mesh.device=npu: this machine's accelerator is "),
        (["model.weights=true"], "model.source=qwen3_moe is no folder to read them from"),
        (["run.dir=/proc/nothing"], "/proc/nothing"),
        (["resume=nowhere"], "resume=nowhere: no such folder"),
        (["plan.topology=nowhere.json"], "topology (nowhere.json) must be a file"),
        (["--stpes"], "unknown option --stpes"),
    ],
)
def test_a_bad_config_fails_before_anything_starts(tmp_path, arguments, message):
    done = run("train", *TINY, *arguments, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("moeweave-train: error: ")
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_raises_stops_the_run_and_is_read_first(tmp_path):
    """A token beyond the vocabulary, met by rank 1 alone, while rank 0 waits for it in a collective."""
    ids = np.zeros(16 * 4 * 50, dtype=np.uint16)
    ids[-16 * 4 * 20 :] = 999
    np.save(tmp_path / "ids.npy", ids)
    done = run("train", *TINY, "data.path=ids.npy", "steps=50", "batch_size=2", cwd=tmp_path)
    assert (done.code, done.left) == (1, ())
    assert done.seconds < 90  # far below the timeouts that would end it otherwise
    lines = done.err.splitlines()
    assert lines[0].startswith("moeweave-train: error: rank ")
    assert "ValueError: data.path=ids.npy: holds token 999, but the model has ids 0 to 255." in lines[0]
    assert "data.py:" in lines[1]
    assert len(lines) == 3, done.err
    assert "Traceback" in Path(lines[2].split(": ", 1)[1]).read_text()


def test_ctrl_c_ends_a_run(tmp_path):
    running = start("train", *TINY, "steps=100000", f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.05)
    second = run("train", *TINY, "steps=100000", f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert second.code == 2
    assert "another run is writing into it" in second.err
    running.interrupt()
    done = running.wait(30)
    assert (done.code, done.left) == (130, ())
    assert done.err == "moeweave-train: error: stopped by SIGINT\n"


# ---- with DeepSpeed


@pytest.mark.slow
def test_a_run_with_zero_resumes_bit_by_bit_and_is_proven(tmp_path):
    pytest.importorskip("deepspeed")
    zero = [*TINY, "plan.data=zero2", "plan.ds_config.zero_optimization.overlap_comm=false", "microbatches=2"]
    whole = run("train", *zero, "steps=4", "run.dir=whole", cwd=tmp_path)
    assert (whole.code, whole.left) == (0, ()), whole.err
    assert "proof   passed" in whole.out
    for steps in (2, 4):
        part = run("train", *zero, f"steps={steps}", "run.dir=parts", "proof=false", cwd=tmp_path)
        assert (part.code, part.left) == (0, ()), part.err
    # The schedule of the learning rate depends on the number of steps, its warm-up does not.
    assert losses(tmp_path / "parts")[:3] == losses(tmp_path / "whole")[:3]
    refused = run("train", *zero, "steps=4", "run.dir=none", "mesh.dp_replicate=2", "batch_size=8", cwd=tmp_path)
    assert refused.code == 2
    assert "dp_replicate (2) must be 1 with Plan(data='zero2')" in refused.err


# ---- under torchrun, and from a fresh interpreter


@pytest.mark.timeout(400)
def test_the_ranks_of_torchrun_are_used_and_share_a_folder(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = fresh([*torchrun, "-m", "moeweave.launch.train", *TINY, "steps=2"], cwd=tmp_path, timeout=350)
    assert (done.code, done.left) == (0, ()), done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(losses(folder)) == 2
    assert done.out.count("proof   passed") == 1
    assert (folder / "logs/rank1.log").exists()


@pytest.mark.timeout(400)
def test_help_and_the_resolved_config_come_from_the_module_too(tmp_path):
    done = fresh(
        [sys.executable, "-m", "moeweave.launch.train", "--cfg", "experiment=quickstart"], cwd=tmp_path, timeout=350
    )
    assert done.code == 0, done.err
    assert "num_experts: 8" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"out.txt", "err.txt"}  # what the test itself captured
