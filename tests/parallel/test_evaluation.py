"""Passes without a backward leave the model as they found it: what trains, what is cleared, clipped and saved."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import hf_zoo
from moeweave.parallel.checkpoint import load, save
from moeweave.parallel.data import fsdp_modules
from moeweave.parallel.grad_norm import clip_grad_norm_
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.prepare_optimizer import prepare_optimizer
from run_ranks import run_ranks
from train_steps import whole

MODES: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "eval": nullcontext}


def evaluate(model: Any, how: str, rank: int) -> None:
    model.eval()
    batch = hf_zoo.make_batch("mixtral", rank + 50)
    if how == "generate":
        model.generate(input_ids=batch["input_ids"][:, :4], attention_mask=None, max_new_tokens=2 + rank)
    else:
        with MODES[how]():
            model(**batch)
    model.train()


def trained(sizes: dict[str, int], how: str, folder: str) -> dict[str, Any]:
    """Two steps with an evaluation before the optimizer is made, before each clipping and before each `zero_grad`."""
    mesh = Mesh(**sizes)
    model: Any = parallelize(hf_zoo.build("mixtral", num_hidden_layers=1).train(), mesh)
    before = {name: whole(param).clone() for name, param in model.named_parameters()}
    if how:
        evaluate(model, how, mesh.rank)
    optimizer = prepare_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.5))
    norms = []
    for step in range(2):
        forward_backward(model, hf_zoo.make_batch("mixtral", mesh.data_rank + 10 * step))
        if how:
            evaluate(model, how, mesh.rank)
        norms.append(float(clip_grad_norm_(model, 0.7)))
        optimizer.step()
        if how:
            evaluate(model, how, mesh.rank)
        model.zero_grad()
    if how:
        evaluate(model, how, mesh.rank)
        save(f"{folder}/step", model, optimizer)
        load(f"{folder}/step", model, optimizer)
    after = {name: whole(param) for name, param in model.named_parameters()}
    return {
        "weights": after,
        "norms": norms,
        "moved": [name for name in after if not torch.equal(after[name], before[name])],
        "sharded": len(fsdp_modules(model)),
    }


CASES = [
    *(pytest.param(dict(dp=2, ep=2), how, id=f"ep-{how}") for how in ("generate", "no_grad", "inference_mode", "eval")),
    # Nothing but the experts is sharded by FSDP here: each of them is an outermost module.
    pytest.param(dict(tp=2), "no_grad", id="tp-no_grad"),
]


@pytest.mark.parametrize(("sizes", "how"), CASES)
def test_an_evaluation_changes_no_bit_of_training(sizes: dict[str, int], how: str, tmp_path: Any) -> None:
    plain, evaluated = (run_ranks(2, trained, sizes, each, str(tmp_path))[0] for each in ("", how))
    assert plain["sharded"] > 0
    assert plain["moved"] == list(plain["weights"]) == evaluated["moved"]
    assert evaluated["norms"] == plain["norms"]
    for name, weight in plain["weights"].items():
        assert torch.equal(evaluated["weights"][name], weight), name


def made_while_gathered() -> str:
    mesh = Mesh(dp=2, ep=2)
    model: nn.Module = parallelize(hf_zoo.build("mixtral", num_hidden_layers=1).train(), mesh)
    model(**hf_zoo.make_batch("mixtral", mesh.rank))  # in training mode, and no backward follows
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="left parameters gathered, and would train copies") as refused:
        prepare_optimizer(model, optimizer)
    return str(refused.value)


def test_an_optimizer_over_gathered_parameters_is_refused() -> None:
    assert all("mw.param_groups(model)" in message for message in run_ranks(2, made_while_gathered))
