"""`MoELayer` against the NumPy oracle and the reference: losses in the graph, capacity, counting, compile, meta."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeweave.kernels_ext.tolerance import TOLERANCE, assert_close, relative_error
from moeweave.moe.balance import aux_loss, bias_update, z_loss
from moeweave.moe.layer import MoELayer
from moeweave.moe.reference import moe_forward
from moeweave.moe.router import Router
from numpy_oracle import Experts, SoftmaxRouter

T, D, I, E, K = 63, 16, 24, 6, 2  # noqa: E741


def build(**options: Any) -> MoELayer:
    """A float64 layer with weights of order one."""
    layer = MoELayer(D, I, E, K, **options)
    for param in layer.parameters():
        nn.init.normal_(param, std=0.3)
    return layer.double()


def grads_of(layer: nn.Module, x: Tensor, grad: Tensor, **kwargs: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = layer(x, **kwargs)
    return [y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)]


def test_equals_the_numpy_oracle_with_both_losses() -> None:
    layer = build(bias=True, aux_coef=0.3, z_coef=0.2)
    x, grad = torch.randn(T, D).double(), torch.randn(T, D).double()
    got = dict(zip(("y", "x", *dict(layer.named_parameters())), grads_of(layer, x, grad), strict=True))

    own = {name: param.detach().numpy() for name, param in layer.named_parameters()}
    router = SoftmaxRouter(own["router.weight"], K, 0.3, 0.2)
    halves = [slice(None, I), slice(I, None)]
    experts = Experts(
        *(own["experts.gate_up_proj"][:, half] for half in halves),
        own["experts.down_proj"],
        *(own["experts.gate_up_proj_bias"][:, half] for half in halves),
        own["experts.down_proj_bias"],
    )
    w_TE, aux, z = router.forward(x.numpy())
    y = experts.forward(x.numpy(), w_TE)
    d = experts.backward(grad.numpy())
    d_x, d_router = router.backward(d["w"])
    want = {
        "y": y,
        "x": d["x"] + d_x,
        "router.weight": d_router,
        "experts.gate_up_proj": np.concatenate([d["gate"], d["up"]], 1),
        "experts.gate_up_proj_bias": np.concatenate([d["gate_bias"], d["up_bias"]], 1),
        "experts.down_proj": d["down"],
        "experts.down_proj_bias": d["down_bias"],
    }
    assert set(want) == set(got)
    for name, array in want.items():
        assert_close(name, got[name], torch.from_numpy(array))
    stats = layer.stats()
    assert (stats["aux_loss"], stats["z_loss"]) == (pytest.approx(aux, rel=1e-6), pytest.approx(z, rel=1e-6))
    assert stats["load_E"].tolist() == router.mask_TE.sum(0).tolist()


KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "topk_softmax": {"router": "topk_softmax", "gated": False, "activation": "relu"},
    "sigmoid": {"router": "sigmoid", "shared_hidden_dim": 8},
    "shared gate": {"shared_hidden_dim": 8, "shared_gate": True, "bias": True},
    "capacity": {"capacity": 0.8},
    "capacity by position": {"capacity": 0.5, "drop": "position", "shared_hidden_dim": 8, "gated": False},
}


def by_hand(layer: MoELayer, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the weighted balance losses as a plain scalar, from the layer's parts and the reference."""
    logits, weights, ids = layer.router(x)
    probs = layer.router.probabilities(logits)
    loss = layer.aux_coef * aux_loss(probs, ids, mask) + layer.z_coef * z_loss(logits, mask)
    if layer.capacity is not None:
        room = [-(-int(layer.capacity * x.shape[0] * K * 1000) // (1000 * E))] * E
        ids = ids.clone()
        order = range(ids.numel())
        if layer.drop == "probability":
            order = sorted(order, key=lambda route: -weights.view(-1)[route].item())
        for route in order:
            expert = int(ids.view(-1)[route])
            room[expert] -= 1
            if room[expert] < 0:
                ids.view(-1)[route] = -1
    packed = layer.experts.weights()
    y = moe_forward(
        x,
        ids,
        weights,
        packed.gate_up,
        packed.down,
        up_bias_EF=packed.gate_up_bias,
        down_bias_ED=packed.down_bias,
        activation=layer.experts.act_fn,
        gated=layer.experts.has_gate,
    )
    if layer.shared_experts is not None:
        shared = layer.shared_experts(x)
        gate = layer.shared_expert_gate
        y = y + (shared if gate is None else torch.sigmoid(gate(x)) * shared)
    return y, loss


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_parts_and_the_injected_losses_are_real(kind: str, masked: bool) -> None:
    layer = build(aux_coef=0.3, z_coef=0.2, **KINDS[kind])
    x, grad = torch.randn(3, 21, D).double(), torch.randn(3, 21, D).double()
    mask = torch.rand(3, 21) > 0.3 if masked else None
    got = grads_of(layer, x, grad, **({} if mask is None else {"mask": mask}))

    x_TD = x.view(-1, D).requires_grad_()
    y, loss = by_hand(layer, x_TD, None if mask is None else mask.view(-1))
    total = (y * grad.view(-1, D)).sum() + loss
    want = [y, *torch.autograd.grad(total, (x_TD, *layer.parameters()))]
    for name, a, b in zip(("y", "x", *dict(layer.named_parameters())), got, want, strict=True):
        assert_close(name, a.reshape(b.shape), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_stays_within_the_table(dtype: torch.dtype) -> None:
    """Against float64 with the choices made in `dtype`, which rounding may change."""
    layer = build(shared_hidden_dim=8, shared_gate=True).to(dtype)
    x, grad = torch.randn(T, D, dtype=dtype), torch.randn(T, D, dtype=dtype)
    got = grads_of(layer, x, grad)
    twin = copy.deepcopy(layer).double()
    ids = layer.router(x)[2]
    monkey = twin.router.forward

    def same_choice(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = monkey(x_TD)[0]
        weights = logits.softmax(-1).gather(1, ids)
        return logits, weights / weights.sum(1, keepdim=True), ids

    twin.router.forward = same_choice
    want = grads_of(twin, x.double(), grad.double())
    for name, a, b in zip(("y", "x", *dict(layer.named_parameters())), got, want, strict=True):
        assert a.dtype == dtype
        assert_close(name, a, b, dtype)


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D), (D,)])
def test_few_tokens_of_any_rank_give_every_gradient(shape: tuple[int, ...]) -> None:
    layer = build(aux_coef=0.1, z_coef=0.1, shared_hidden_dim=8, capacity=1.0)
    got = grads_of(layer, torch.randn(shape).double(), torch.ones(shape).double())
    assert got[0].shape == shape
    for value in got:
        assert torch.isfinite(value).all()


def test_the_last_micro_batches_share_of_the_losses() -> None:
    """aux_share halves what `backward` adds, and nothing else."""
    layer, x = build(aux_coef=0.3), torch.randn(T, D).double()
    zero = torch.zeros(T, D).double()
    whole = grads_of(layer, x, zero)
    layer.aux_share = 0.5
    half = grads_of(layer, x, zero)
    assert whole[2].abs().max() > 0
    for a, b in zip(half[1:], whole[1:], strict=True):
        assert_close("half", a, b / 2)


def test_reduce_makes_the_loss_global() -> None:
    """Two ranks, played one after the other: the mean of their gradients is the whole batch's."""
    layer, x = build(aux_coef=0.3, z_coef=0.2), torch.randn(T, D).double()
    parts, zero = [x[:40], x[40:]], torch.zeros(T, D).double()
    want = grads_of(layer, x, zero)[2]
    whole = layer.stats()
    handed: list[list[Tensor]] = []
    for part in parts:
        handed.append([])
        layer.reduce = lambda value: handed[-1].append(value.clone()) or value
        layer(part)
    sums = [a + b for a, b in zip(*handed, strict=True)]
    layer.reduce = lambda value: next(total for total in sums if total.shape == value.shape)
    layer.reset_stats()
    got = sum(grads_of(layer, part, zero[: len(part)])[2] for part in parts) / 2
    assert_close("router gradient", got, want)
    for name in ("aux_loss", "z_loss"):
        assert layer.stats()[name] == pytest.approx(whole[name], rel=1e-6)


def test_evaluation_counts_nothing_and_adds_no_loss() -> None:
    layer, x = build(aux_coef=0.3, capacity=0.5).eval(), torch.randn(T, D).double()
    zero = torch.zeros(T, D).double()
    assert not any(grad.any() for grad in grads_of(layer, x, zero)[1:])
    stats = layer.stats()
    assert stats["load_E"].sum() == 0
    assert (stats["dropped"], stats["aux_loss"]) == (0, 0.0)


def test_drops_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    layer, x = build(capacity=0.5), torch.randn(T, D).double()
    room = -(-T * K // (2 * E))
    with torch.no_grad():
        ids = layer.router(x)[2]
        layer(x)
        layer(x)
    want = 2 * sum(max(0, count - room) for count in ids.view(-1).bincount(minlength=E).tolist())
    with caplog.at_level(logging.INFO, logger="moeweave"):
        assert layer.stats()["dropped"] == want > 0
    assert f"dropped {want} of {2 * T * K} routes" in caplog.text
    assert layer.load_E.sum() == 2 * T * K


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_nothing_again_and_changes_no_bit(use_reentrant: bool) -> None:
    layer, x, grad = build(aux_coef=0.3, capacity=0.8), torch.randn(T, D).double(), torch.randn(T, D).double()
    want = grads_of(layer, x, grad)
    once = layer.stats()
    layer.reset_stats()
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(grad)
    twice = layer.stats()
    got = [y, x.grad, *(param.grad for param in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(twice.pop("load_E"), once.pop("load_E"))
    assert twice == once


def test_bias_updates_even_out_the_load() -> None:
    """Without a loss: a skewed router becomes balanced by its choice-only bias."""
    layer, x = build(router="sigmoid"), torch.randn(128, D).double() + 1.0
    with torch.no_grad():
        layer.router.weight[0] += 0.5

        def imbalance() -> float:
            layer.reset_stats()
            layer(x)
            return (layer.load_E.max() / layer.load_E.double().mean()).item()

        before = imbalance()
        for _ in range(40):
            layer.router.e_score_correction_bias += bias_update(layer.load_E, 0.04)
            after = imbalance()
    assert before > 1.8
    assert after < 1.3


@pytest.mark.parametrize("kind", ["shared gate", "sigmoid", "capacity"])
def test_compiles_to_one_graph_with_the_same_bits(kind: str) -> None:
    layer, x, grad = (
        build(aux_coef=0.3, z_coef=0.2, **KINDS[kind]),
        torch.randn(T, D).double(),
        torch.randn(T, D).double(),
    )
    want = grads_of(layer, x, grad)
    stats = layer.stats()
    layer.reset_stats()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = grads_of(compiled, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    again = layer.stats()
    assert torch.equal(again.pop("load_E"), stats.pop("load_E"))
    assert again == stats


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_stays_within_the_table(kind: str) -> None:
    layer = build(aux_coef=0.3, z_coef=0.2, **KINDS[kind]).float()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for num_tokens in (T, 64, 65, 0, 1):
        x, grad = torch.randn(num_tokens, D), torch.randn(num_tokens, D)
        for a, b in zip(grads_of(compiled, x, grad), grads_of(layer, x, grad), strict=True):
            assert relative_error(a, b) <= TOLERANCE[torch.float32]


def test_built_on_meta_it_counts_for_real() -> None:
    with torch.device("meta"):
        layer = MoELayer(D, I, E, K, router="sigmoid")
    assert all(param.is_meta for param in layer.parameters())
    assert not layer.load_E.is_meta
    real = build(router="sigmoid")
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(T, D).double()
    assert torch.equal(layer(x), real(x))
    assert torch.equal(layer.load_E, real.load_E)


def test_the_checkpoint_holds_parameters_and_the_correction_bias_only() -> None:
    names = set(MoELayer(D, I, E, K, router="sigmoid", shared_hidden_dim=8).state_dict())
    assert names == {
        "router.weight",
        "router.e_score_correction_bias",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
    }


def test_example_of_the_docstring() -> None:
    with torch.device("meta"):
        layer = MoELayer(dim=2048, hidden_dim=768, num_experts=64, top_k=8, aux_coef=1e-3)
    assert layer.experts.gate_up_proj.shape == (64, 1536, 2048)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 2048 + 64 * 3 * 768 * 2048


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_equals_the_blocks_of_transformers(family: str) -> None:
    """Whole blocks, shared experts included, given the same weights."""
    if family == "qwen2_moe":
        module = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
        sizes = {"moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False}
        config = module.Qwen2MoeConfig(hidden_size=D, shared_expert_intermediate_size=8, **sizes)
        block = module.Qwen2MoeSparseMoeBlock(config)
        router = Router(D, E, K, renormalize=False)
        names = {"gate.": "router.", "shared_expert.": "shared_experts."}
    else:
        module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
        sizes = {"moe_intermediate_size": 8, "n_routed_experts": E, "num_experts_per_tok": K, "n_shared_experts": 1}
        config = module.DeepseekV3Config(hidden_size=D, n_group=3, topk_group=2, routed_scaling_factor=2.5, **sizes)
        block = module.DeepseekV3MoE(config)
        router = Router(D, E, K, kind="sigmoid", num_groups=3, top_groups=2, scale=2.5)
        names = {"gate.": "router."}
    config._experts_implementation = "eager"
    for param in block.parameters():
        nn.init.normal_(param, std=0.3)
    hidden = I if family == "qwen2_moe" else 8
    gated = family == "qwen2_moe"
    layer = MoELayer(D, hidden, E, K, router=router, shared_hidden_dim=8, shared_gate=gated)
    state = block.state_dict()
    for theirs, ours in names.items():
        state = {ours + name.removeprefix(theirs) if name.startswith(theirs) else name: v for name, v in state.items()}
    layer.load_state_dict(state)
    x, grad = torch.randn(3, 21, D), torch.randn(3, 21, D)
    got = dict(zip(("y", "x", *dict(layer.named_parameters())), grads_of(layer, x, grad), strict=True))
    want = dict(zip(("y", "x", *dict(block.named_parameters())), grads_of(block, x, grad), strict=True))
    for name, value in want.items():
        for theirs, ours in names.items():
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        assert_close(name, got[name], value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 9}, r"Router\.top_k \(9\) must not exceed num_experts \(6\)"),
        ({"hidden_dim": 0}, r"Experts\.hidden_dim \(0\)"),
        ({"router": "hash"}, r"Router\.kind \('hash'\)"),
        ({"router": Router(8, E, K)}, r"MoELayer\.router \(dim, num_experts, top_k = \(8, 6, 2\)\).*\(16, 6, 2\)"),
        ({"shared_gate": True}, r"MoELayer\.shared_gate \(True\) needs a shared expert"),
        ({"shared_hidden_dim": -1}, r"MoELayer\.shared_hidden_dim \(-1\)"),
        ({"aux_coef": -0.1}, r"MoELayer\.aux_coef \(-0.1\) must not be negative"),
        ({"z_coef": -0.1}, r"MoELayer\.z_coef \(-0.1\)"),
        ({"capacity": 0.0}, r"MoELayer\.capacity \(0.0\) must be positive"),
        ({"drop": "random"}, r"MoELayer\.drop \('random'\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(**{"dim": D, "hidden_dim": I, "num_experts": E, "top_k": K, **options})


def test_wrong_shapes_are_refused() -> None:
    layer = MoELayer(D, I, E, K)
    with pytest.raises(ValueError, match=r"x \(3, 8\) must end in dim \(16\)"):
        layer(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"mask \(2,\) must be \(3,\)"):
        layer(torch.ones(3, D), mask=torch.ones(2).bool())
