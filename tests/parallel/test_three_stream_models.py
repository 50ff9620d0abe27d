"""The three-stream schedule on wrapped models: the bits of the unscheduled model, forward, gradients and tokens."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hf_zoo
from faked_nodes import write_nodes
from moeweave.moe.layer import MoELayer
from moeweave.parallel.mesh import Mesh, MeshSizes
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from overlapped import gradients
from run_ranks import RankError, run_ranks

THREE = dict(overlap="three_stream", push_share=0.4)
GATHERED, ROUTED = dict(dispatcher="allgather"), dict(dispatcher="alltoall", three_stream_form="routed")


def both(name: str, sizes: dict[str, int], plan: dict[str, Any], rows: tuple[int, ...]) -> list[dict[str, Tensor]]:
    plain = gradients(name, sizes, plan, 1, rows, 2)
    found = gradients(name, sizes, {**plan, **THREE}, 1, rows, 2)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("dma"):
            thread.join(10)
            assert not thread.is_alive(), "the helper thread outlives its model"
    return [found, plain]


CASES = [
    pytest.param("deepseek_v3", dict(dp=2, ep=2), GATHERED, (2, 3), id="shared-after"),
    pytest.param("qwen2_moe", dict(dp=2, ep=2), {**GATHERED, "codec": "int8"}, (2, 1), id="shared-before-int8"),
    pytest.param("deepseek_v3", dict(dp=4, ep=2), {**ROUTED, "codec": "fp8"}, (2,), id="routed-fp8"),
    pytest.param("packed", dict(dp=2, ep=2), {**GATHERED, "recompute": True}, (2, 1), id="recompute"),
    pytest.param("deepseek_v3", dict(tp=2, ep=2), {**GATHERED, "tp_sequence": True}, (2,), id="tp-sequence"),
    pytest.param("registered", dict(dp=2, ep=2), {**ROUTED, "data": "ddp"}, (2,), id="registered"),
]


@pytest.mark.parametrize("name, sizes, plan, rows", CASES)
def test_same_bits_as_unscheduled(
    name: str, sizes: dict[str, int], plan: dict[str, Any], rows: tuple[int, ...]
) -> None:
    pytest.importorskip("transformers")
    for rank, (found, plain) in enumerate(run_ranks(MeshSizes(**sizes).world, both, name, sizes, plan, rows)):
        assert found.keys() == plain.keys() and len(found) > 5
        differing = [key for key in plain if not torch.equal(found[key], plain[key])]
        assert not differing, f"rank {rank}"


BY_NODE = dict(dispatcher="hierarchical", three_stream_form="hierarchical")
BY_NODE_CASES = [
    pytest.param("deepseek_v3", dict(dp=4, ep=4), {**BY_NODE, "codec": "fp8"}, (2,), id="fp8"),
    pytest.param("qwen2_moe", dict(dp=4, ep=4), {**BY_NODE, "recompute": True}, (2,), id="recompute"),
    pytest.param(
        "packed", dict(dp=4, ep=4), dict(dispatcher="auto"), (2, 1, 1, 3), id="both-auto", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("name, sizes, plan, rows", BY_NODE_CASES)
def test_same_bits_between_nodes(
    name: str, sizes: dict[str, int], plan: dict[str, Any], rows: tuple[int, ...], tmp_path: Path
) -> None:
    test_same_bits_as_unscheduled(name, sizes, {**plan, "topology": write_nodes(tmp_path, (0, 0, 1, 1))}, rows)


def forms(plan: dict[str, Any]) -> list[str]:
    """Of the schedule of each layer."""
    model = nn.Sequential(*[MoELayer(16, 24, 8, 3) for _ in range(2)])
    parallelize(model, Mesh(dp=4, ep=4), Plan(overlap="three_stream", **plan))
    schedules = [call.route.__self__.schedule for call in vars(model)["_moeweave"].calls]
    return ["hierarchical" if s.by_node else "gathered" if s.gathered else "routed" for s in schedules]


def test_auto_takes_the_form_of_the_nodes(tmp_path: Path) -> None:
    two, one = (write_nodes(tmp_path, nodes) for nodes in ((0, 0, 1, 1), (0, 0, 0, 0)))
    for plan, form in (
        (dict(topology=two), "hierarchical"),
        (dict(topology=two, combine="exact"), "gathered"),
        (dict(topology=one), "gathered"),
        (dict(), "routed"),
    ):
        assert run_ranks(4, forms, plan) == [[form] * 2] * 4


def own_layer(plan: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of two `MoELayer`s with gated shared experts, without a Hugging Face model around."""
    mesh = Mesh(dp=2, ep=2)
    layers = [MoELayer(16, 24, 8, 3, shared_hidden_dim=32, shared_gate=True, aux_coef=0.01) for _ in range(2)]
    model = parallelize(nn.Sequential(*layers), mesh, Plan(**plan))
    x = torch.randn(3 + mesh.rank, 5, 16, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    found = [y.detach(), x.grad, *(param.grad for param in model.parameters())]
    return [each.to_local() if isinstance(each, DTensor) else each for each in found]


def test_layers_of_our_own() -> None:
    plain, found = (run_ranks(2, own_layer, {**GATHERED, **plan}) for plan in ({}, THREE))
    for got, want in zip(found, plain, strict=True):
        assert len(got) > 10 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def tokens(name: str, plan: dict[str, Any]) -> Tensor:
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(hf_zoo.build(name).eval(), mesh, Plan(**plan))
    model.config.output_router_logits = False
    prompt = torch.randint(3, 60, (1 + mesh.rank, 5), generator=torch.Generator().manual_seed(mesh.rank))
    options = dict(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    return model.generate(prompt, max_new_tokens=3 + 2 * mesh.rank, **options)


@pytest.mark.parametrize("form", ["gathered", "routed"])
def test_generate(form: str) -> None:
    pytest.importorskip("transformers")
    found = run_ranks(2, tokens, "deepseek_v3", {**THREE, "three_stream_form": form})
    for got, want in zip(found, run_ranks(2, tokens, "deepseek_v3", {}), strict=True):
        assert torch.equal(got, want)


def test_generate_in_fixed_sizes() -> None:
    pytest.importorskip("transformers")
    agreed = {**THREE, "combine": "prereduced", "codec": "int8"}
    found = run_ranks(2, tokens, "qwen2_moe", {**agreed, "max_tokens": 12})
    for got, want in zip(found, run_ranks(2, tokens, "qwen2_moe", agreed), strict=True):
        assert torch.equal(got, want)


def wrap_with_tp() -> None:
    parallelize(hf_zoo.build("qwen3_moe"), Mesh(tp=2, ep=2), Plan(**THREE))


def test_tensor_parallel_ranks_hold_the_same_tokens() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RankError, match=r"three_stream.*tokens of their own.*Set tp=1"):
        run_ranks(2, wrap_with_tp)
