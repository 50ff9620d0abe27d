"""Checkpoints and Hugging Face folders from any mesh to any other: every number comes back, bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
from moeweave.parallel.hf.boxes import whole_tensor
from moeweave.parallel.names import named_params, named_state
from run_ranks import run_ranks

MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "tp2-ep2": dict(tp=2, ep=2),
    "dp2-etp2": dict(dp=2, etp=2),
    "pp2": dict(pp=2),
    "dp4-ep2-etp2": dict(dp=4, ep=2, etp=2),
    "dp2-tp2-etp2": dict(dp=2, tp=2, etp=2),
    "pp2-tp2-ep2": dict(pp=2, tp=2, ep=2),
    "pp2-tp2-etp2": dict(pp=2, tp=2, etp=2),
    "pp2-dp2-ep2": dict(pp=2, dp=2, ep=2),
    "dp4-ep4": dict(dp=4, ep=4),
    "pp2-dp2-tp2-ep2-etp2": dict(pp=2, dp=2, tp=2, ep=2, etp=2),
    "rep2-dp2-tp2-ep4": dict(dp_replicate=2, dp=2, tp=2, ep=4),
    "pp4-dp2-ep2": dict(pp=4, dp=2, ep=2),
}
PAIRS = [
    ("gpt_oss", "tp2-ep2", "dp2-etp2"),
    ("deepseek_v3", "dp4-ep2-etp2", "pp2-tp2-ep2"),
    ("qwen3_moe", "pp2-tp2-etp2", "dp2-etp2"),
    ("tied", "dp2-tp2-etp2", "pp2-dp2-ep2"),
]
MORE = [
    ("gpt_oss", "dp2-etp2", "pp2"),
    ("qwen3_moe", "pp2-dp2-ep2", "one"),
    ("tied", "pp2-tp2-ep2", "tp2-ep2"),
    ("deepseek_v3", "dp4-ep4", "pp2-tp2-etp2"),
    ("gpt_oss", "pp2-dp2-tp2-ep2-etp2", "rep2-dp2-tp2-ep4"),
    ("deepseek_v3", "pp4-dp2-ep2", "pp2-dp2-tp2-ep2-etp2"),
    ("tied", "rep2-dp2-tp2-ep4", "pp4-dp2-ep2"),
]
CASES = [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]


def ranks_of(mesh: str) -> int:
    sizes = MESHES[mesh]
    count = 1
    for axis in ("pp", "dp_replicate", "dp", "tp"):
        count *= sizes.get(axis, 1)
    return count


def build(name: str) -> Any:
    if name == "tied":
        return hf_zoo.build("qwen3_moe", num_hidden_layers=4, tie_word_embeddings=True)
    return hf_zoo.build(name, num_hidden_layers=4)


def whole(tensor: Tensor) -> Tensor:
    return whole_tensor(tensor).clone()


def prepared(name: str, mesh: str) -> tuple[Any, torch.optim.Optimizer, mw.Mesh]:
    ranks = mw.Mesh(**MESHES[mesh])
    model = mw.parallelize(build(name), ranks)
    return model, torch.optim.AdamW(mw.param_groups(model, lr=0.01)), ranks


def everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: whole(tensor) for name, tensor in named_state(model).items()}
    for name, param in named_params(model).items():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}/{key}"] = whole(value)
    return found


def step_and_save(name: str, mesh: str, folder: str) -> dict[str, Tensor]:
    model, optimizer, ranks = prepared(name, mesh)
    pp = ranks.sizes.pp
    batch = hf_zoo.make_batch("qwen3_moe", ranks.data_rank, rows=2 * pp)
    mw.forward_backward(model, batch, microbatches=2 * pp if pp > 1 else 1)
    optimizer.step()
    mw.save(f"{folder}/own", model, optimizer, step=1)
    mw.save_pretrained(model, f"{folder}/hf", max_shard_size="30KB")
    return everything(model, optimizer)


def load_and_tell(name: str, mesh: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer, ranks = prepared(name, mesh)
    with torch.no_grad():
        for param in model.parameters():
            (param.to_local() if isinstance(param, DTensor) else param).fill_(9.0)
    mw.load(f"{folder}/own", model, optimizer)
    folder_model = mw.from_pretrained(f"{folder}/hf", ranks)
    return everything(model, optimizer), {key: whole(value) for key, value in named_state(folder_model).items()}


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ranks hold together; what several have must be the same."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            assert torch.equal(found.setdefault(name, value), value), name
    return found


@pytest.mark.parametrize(("name", "before", "after"), CASES)
def test_every_number_comes_back_on_another_mesh(name: str, before: str, after: str, tmp_path: Path) -> None:
    saved = merged(run_ranks(ranks_of(before), step_and_save, name, before, str(tmp_path)))
    found = run_ranks(ranks_of(after), load_and_tell, name, after, str(tmp_path))
    own, folder = merged([one for one, _ in found]), merged([two for _, two in found])
    params = {key for key in saved if "/" not in key}
    assert params >= set(build(name).state_dict())
    assert len(saved) > 2 * len(params)  # with the optimizer's moments
    assert own.keys() == saved.keys()
    assert params == folder.keys()
    for key, value in saved.items():
        assert torch.equal(own[key], value), key
        if key in params:
            assert torch.equal(folder[key], value), key
    theirs = type(build(name)).from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    assert all(torch.equal(theirs[key], saved[key]) for key in params)


def peak_share(folder: str) -> float:
    """Bytes of the largest part of the model that a rank has whole while it writes a folder, over those of all."""
    from moeweave.parallel.hf import writer

    model = mw.parallelize(build("gpt_oss"), mw.Mesh(dp=2, tp=2, ep=2, etp=2))
    most = 0
    own = writer._Writing.take

    def take(self: Any, name: str, pieces: Any) -> None:
        nonlocal most
        own(self, name, pieces)
        kept = [piece for held in self.export.stock.values() for _, piece in held]
        kept += [tensor for file in self.full.values() for tensor in file.values()]
        most = max(most, sum(tensor.numel() for tensor in kept))

    writer._Writing.take = take  # type: ignore[method-assign]
    try:
        mw.save_pretrained(model, folder, max_shard_size="30KB")
    finally:
        writer._Writing.take = own  # type: ignore[method-assign]
    return most / sum(param.numel() for param in model.parameters())


def test_no_rank_gathers_the_model_to_write_it(tmp_path: Path) -> None:
    assert max(run_ranks(4, peak_share, str(tmp_path / "hf"))) < 0.25


def from_other_keys(path: str, mesh: dict[str, int]) -> bool:
    """A folder written by transformers, read into stages."""
    model = mw.from_pretrained(path, mw.Mesh(**mesh))
    want = build("qwen3_moe").state_dict()
    return all(torch.equal(whole(value), want[key]) for key, value in named_state(model).items())


def test_folders_of_transformers_are_read_into_stages(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "hf")
    read = partial(from_other_keys, str(tmp_path / "hf"))
    assert all(run_ranks(4, read, dict(pp=2, tp=2, ep=2)))
