"""The first example of the README, run as a reader would: under torchrun, on a folder on disk and on a plain model."""

import re
import sys
from pathlib import Path

import pytest

from programs import ROOT, fresh

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The Python block below the comment `<!-- example: name -->`."""
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n+```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no block marked {name}"
    return found[1]


def lines_of_code(source: str) -> int:
    return sum(1 for line in source.splitlines() if line.strip() and not line.lstrip().startswith(("#", '"""')))


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_accelerators", "2")


def run_script(tmp_path: Path, argument: str, launcher: tuple[str, ...] = TORCHRUN, plan: str = "") -> list[float]:
    """The losses that the script prints on two ranks."""
    for name in ("train.py", "plain_model.py"):
        source = block(name)
        assert name != "train.py" or "mw.Plan()" in source
        (tmp_path / name).write_text(source.replace("mw.Plan()", f"mw.Plan({plan})"))
    done = fresh([*launcher, "train.py", argument], cwd=tmp_path, timeout=350, CUDA_VISIBLE_DEVICES="")
    assert (done.code, done.left) == (0, ()), done.err
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.out)]
    assert len(losses) == 20, done.out
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert (tmp_path / "checkpoint").is_dir()
    return losses


def test_the_script_has_about_twenty_lines():
    assert 15 <= lines_of_code(block("train.py")) <= 22


def make_folder(tmp_path: Path) -> str:
    import torch

    from moeweave.parallel.hf.build import build_model

    torch.manual_seed(0)
    build_model("qwen3_moe").save_pretrained(tmp_path / "folder")
    return "folder"


@pytest.mark.timeout(400)
def test_on_a_hugging_face_folder(tmp_path):
    run_script(tmp_path, make_folder(tmp_path))


@pytest.mark.timeout(400)
def test_on_a_plain_model(tmp_path):
    run_script(tmp_path, "plain_model.py")


@pytest.mark.timeout(400)
def test_with_deepspeed_under_its_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    run_script(tmp_path, "plain_model.py", DEEPSPEED, "data='zero2'")


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_with_deepspeed_under_torchrun_and_its_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    folder = make_folder(tmp_path)
    torchrun = run_script(tmp_path, folder, TORCHRUN, "data='zero3'")
    assert run_script(tmp_path, folder, DEEPSPEED, "data='zero3'") == torchrun
