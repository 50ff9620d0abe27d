"""Experts whose width is split: gradients of one process in every layout, and refusals that say what would fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
import plain_models
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.expert_width import placements_of, slice_of
from moeweave.parallel.hf.boxes import local_pieces, whole_tensor
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import run_ranks

# Gate and up one after the other; alternating, transposed, with biases; transposed; no gate; a norm of the outputs.
LAYOUTS = ["mixtral", "gpt_oss", "aria", "nemotron_h", "muse_spark"]


def parity(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> ParityReport:
    batch = partial(hf_zoo.make_batch, name, rows=2, length=15)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes), mw.Plan(**plan))


@pytest.mark.parametrize(
    ("name", "sizes", "plan"),
    [
        *((name, dict(dp=4, ep=2, etp=2), {}) for name in LAYOUTS),
        ("mixtral", dict(dp=4, ep=2, etp=2), dict(data="ddp", dispatcher="allgather")),
        ("gpt_oss", dict(dp=4, etp=2), {}),
        ("qwen3_moe", dict(dp=2, tp=2, etp=4), dict(recompute=True)),
        ("deepseek_v3", dict(dp=2, tp=2, ep=2, etp=2), {}),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_every_gradient_and_the_norm_are_those_of_one_process(
    name: str, sizes: dict[str, int], plan: dict[str, Any]
) -> None:
    hf_zoo.needs(name)
    for report in run_ranks(4, parity, name, sizes, plan):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.loss_error <= 1e-6
        assert report.norm_error <= 1e-6


def held(name: str) -> list[tuple[str, bool, float]]:
    """Of every parameter of the experts: whether this rank's slice is the one its placement says, and its share."""
    whole = {block.path: block.experts for block in find_moe_blocks(hf_zoo.ZOO[name]())}
    model = mw.parallelize(hf_zoo.ZOO[name](), mw.Mesh(dp=2, etp=2))
    found = []
    for block in find_moe_blocks(model):
        for key in block.params:
            param, want = block.experts.get_parameter(key), whole[block.path].get_parameter(key)
            assert isinstance(param, DTensor)
            same = all(torch.equal(view, want[tuple(slice(*r) for r in box)]) for box, view in local_pieces(param))
            found.append(
                (key, same and torch.equal(whole_tensor(param), want), param.to_local().numel() / want.numel())
            )
    return found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_rank_holds_its_columns(name: str) -> None:
    for found in run_ranks(2, held, name):
        assert found
        for key, same, share in found:
            assert same
            assert share == (1.0 if "bias" in key else 0.5)


def test_gate_and_up_are_split_as_they_lie() -> None:
    rows = torch.arange(8).view(1, 8, 1)
    for name, want in (("mixtral", [0, 1, 4, 5]), ("gpt_oss", [0, 1, 2, 3])):
        block = find_moe_blocks(hf_zoo.ZOO[name]())[0]
        dim = 2 if block.experts.is_transposed else 1
        placement = placements_of(block, 2)["gate_up_proj"]
        packed = rows.transpose(1, dim).contiguous()
        assert slice_of(packed, placement, 0, 2).flatten().tolist() == want


def uneven(tokens: list[int], forced: bool) -> list[float]:
    """Errors of a layer's outputs and gradients where ranks have other numbers of tokens, against one process."""
    torch.manual_seed(3)
    layers = [mw.MoELayer(16, 24, num_experts=4, top_k=2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    if forced:
        for layer in layers:
            with torch.no_grad():
                layer.router.weight.zero_()[0].add_(1.0)
    mesh = mw.Mesh(dp=len(tokens), etp=len(tokens))
    wrapped = mw.parallelize(layers[1], mesh, mw.Plan(data="ddp"))
    x_TD = torch.randn(sum(tokens), 16)
    own_TD = x_TD.split(tokens)[mesh.data_rank]
    y_TD = layers[0](x_TD)
    y_TD.square().sum().backward()
    got_TD = wrapped(own_TD)
    # The mean over ranks of the losses is the whole loss.
    (got_TD.square().sum() * mesh.data_size).backward()
    errors = [float((got_TD - y_TD.split(tokens)[mesh.data_rank]).detach().norm())]
    wanted = {key: param.grad for key, param in layers[0].named_parameters()}
    for key, param in wrapped.named_parameters():
        grad = whole_tensor(param.grad)
        want = wanted[key]
        errors.append(float((grad - want).norm() / want.norm().clamp(min=1e-6)))
    return errors


@pytest.mark.parametrize(("tokens", "forced"), [([5, 0], False), ([0, 0], False), ([1, 6], True)])
def test_ranks_with_other_numbers_of_tokens(tokens: list[int], forced: bool) -> None:
    for errors in run_ranks(2, uneven, tokens, forced):
        assert max(errors) <= 1e-5, errors


def refuse(what: str) -> str:
    mesh = mw.Mesh(dp=2, etp=2)
    build: Any = partial(hf_zoo.build, "mixtral")
    if what == "columns":
        build = partial(hf_zoo.build, "mixtral", intermediate_size=9)
    elif what == "listed":
        build = partial(plain_models.build, "modulelist")
    elif what == "dense":
        build = partial(torch.nn.Linear, 4, 4)
    with pytest.raises(ValueError) as caught:
        mw.parallelize(build(), mesh)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("columns", "etp (2) must divide the columns of model.layers.0.mlp.experts (9). etp can be 1, 3, 9."),
        (
            "listed",
            (
                "layers.0.moe.experts (ListedExperts) does not say how its experts' weights are laid out, so etp (2) "
                "cannot split them. Set etp=1 and use the ranks for ep."
            ),
        ),
        ("dense", "etp (2) needs experts, and Linear has none. Set etp=1."),
    ],
)
def test_what_etp_cannot_split_is_refused_by_name(what: str, text: str) -> None:
    assert run_ranks(2, refuse, what) == [text] * 2
