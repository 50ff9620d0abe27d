"""The experts seam and its fast path against the reference: odd loads, undefined tails, dtypes, layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moeweave.kernels_ext.tolerance import assert_close
from moeweave.moe.experts import Experts, ExpertWeights, local_experts
from moeweave.moe.reference import moe_forward

T, D, I, E, K = 63, 16, 24, 6, 3  # noqa: E741
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def build(dtype: torch.dtype = torch.float64, **options: bool | str) -> Experts:
    """Experts with weights of order one, so that every term matters."""
    experts = Experts(D, I, E, **options)
    for param in experts.parameters():
        nn.init.normal_(param, std=0.3)
    return experts.to(dtype)


def routes(kind: str, num_tokens: int = T) -> Tensor:
    ids = torch.rand(num_tokens, E).topk(K).indices
    if kind == "some":
        ids[::3] = -1
        ids[ids == 4] = E  # as not routed as -1
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    elif kind == "hot":
        ids[:] = -1
        ids[:, 1] = 2
    return ids


def expected(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of x, weights and every parameter, by the reference in float64."""
    twin = copy.deepcopy(experts).double()
    x, weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    packed = twin.weights()
    y = moe_forward(
        x,
        ids,
        weights,
        packed.gate_up,
        packed.down,
        up_bias_EF=packed.gate_up_bias,
        down_bias_ED=packed.down_bias,
        activation=twin.act_fn,
        gated=twin.has_gate,
    )
    inputs = (x, weights, *twin.parameters())
    grads = torch.autograd.grad(y, inputs, grad.double(), allow_unused=True)
    return [y, *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))]


def compare(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype) -> None:
    grad = torch.randn_like(x)
    x.requires_grad_()
    weights.requires_grad_()
    y = experts(x, ids, weights)
    names = ("x", "weights", *dict(experts.named_parameters()))
    got = [y, *torch.autograd.grad(y, (x, weights, *experts.parameters()), grad)]
    for name, a, b in zip(("y", *names), got, expected(experts, x, ids, weights, grad), strict=True):
        assert_close(name, a, b, dtype)
    assert y.dtype == dtype


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gated": False, "activation": "relu"}], ids=str)
@pytest.mark.parametrize("kind", ["all", "some", "none", "hot"])
def test_forward_and_gradients(kind: str, options: dict, dtype: torch.dtype) -> None:
    experts, x, ids = build(dtype, **options), torch.randn(T, D, dtype=dtype), routes(kind)
    compare(experts, x, ids, torch.rand(T, K, dtype=dtype), dtype)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens_and_all_gradients(num_tokens: int) -> None:
    experts, ids = build(bias=True), routes("all", num_tokens)
    compare(experts, torch.randn(num_tokens, D).double(), ids, torch.rand(num_tokens, K).double(), torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-1, E), min_size=2, max_size=2), max_size=12))
def test_any_routes(ids: list[list[int]]) -> None:
    torch.manual_seed(len(ids))
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    x, weights = torch.randn(len(ids), D).double(), torch.rand(len(ids), 2).double()
    compare(build(bias=True), x, ids_TK, weights, torch.float64)


def test_two_runs_are_bit_identical() -> None:
    experts, x, ids, weights = build(torch.float32, bias=True), torch.randn(T, D), routes("some"), torch.rand(T, K)

    def run() -> list[Tensor]:
        y = experts(x, ids, weights)
        return [y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


class Scale(nn.Module):
    """A post-norm with a parameter and an output for every input, zero rows included."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1.0) * self.weight


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_undefined_tails_reach_nothing(bias: bool, post_norm: bool) -> None:
    """NaN rows past the end, and NaN gradients for their outputs, change no bit of anything."""
    experts, norm = build(torch.float32, bias=bias), Scale()
    packed = experts.weights()
    if post_norm:
        packed = ExpertWeights(**{**vars(packed), "post_norm": norm})
    offsets = torch.tensor([3, 3, 9, 9, 10, 12], dtype=torch.int32)
    params = [*experts.parameters(), *(norm.parameters() if post_norm else [])]
    nan = torch.full((5, D), float("nan"))
    rows, grad = torch.randn(12, D), torch.randn(12, D)

    def run(rows: Tensor, grad: Tensor, exact: bool) -> tuple[Tensor, ...]:
        rows = rows.clone().requires_grad_()
        out = local_experts(packed, rows, offsets, exact=exact)
        return out, *torch.autograd.grad(out, (rows, *params), grad)

    want = run(rows, grad, exact=True)
    got = run(torch.cat([rows, nan]), torch.cat([grad, nan]), exact=False)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[:12], b)
        assert torch.equal(a[12:], torch.zeros(5, D))


def test_transposed_weights_are_the_same_experts() -> None:
    experts = build(bias=True)
    packed = experts.weights()
    turned = {name: getattr(packed, name).transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    rows, offsets = torch.randn(12, D).double(), torch.tensor([3, 3, 9, 9, 10, 12], dtype=torch.int32)
    transposed = ExpertWeights(**{**vars(packed), **turned, "is_transposed": True})
    assert_close("transposed", local_experts(transposed, rows, offsets), local_experts(packed, rows, offsets))


def test_compiles_to_one_graph_with_the_same_bits() -> None:
    experts, x, ids, weights = build(torch.float32, bias=True), torch.randn(T, D), routes("some"), torch.rand(T, K)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")

    def run(module: nn.Module) -> list[Tensor]:
        y = module(x, ids, weights)
        return [y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(run(compiled), run(experts), strict=True))


def test_weights_start_small_and_biases_at_zero() -> None:
    experts = Experts(256, 128, 8, bias=True)
    for name, param in experts.named_parameters():
        assert param.std().item() == (0.0 if "bias" in name else pytest.approx(0.02, rel=0.05)), name


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ((0, 8, 4), {}, r"Experts\.dim \(0\) must be at least 1"),
        ((8, -1, 4), {}, r"Experts\.hidden_dim \(-1\)"),
        ((8, 8, 0), {}, r"Experts\.num_experts \(0\)"),
        ((8, 8, 4), {"activation": "swish"}, r"Experts\.activation \('swish'\) is unknown.*silu, gelu, relu"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(*sizes, **options)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_packing_is_that_of_transformers(model_type: str) -> None:
    """The same call and the same fast path give what the Hugging Face experts give, on their own weights."""
    if model_type == "mixtral":
        module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        config = module.MixtralConfig(hidden_size=D, intermediate_size=I, num_local_experts=E)
        theirs = module.MixtralExperts(config)
    else:
        module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
        config = module.GptOssConfig(hidden_size=D, intermediate_size=I, num_local_experts=E)
        theirs = module.GptOssExperts(config)
    config._experts_implementation = "eager"
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.3)
    x, ids, weights = torch.randn(T, D), routes("all"), torch.rand(T, K)
    want = theirs(x, ids, weights)

    packed = ExpertWeights(
        gate_up=theirs.gate_up_proj,
        down=theirs.down_proj,
        apply_gate=theirs._apply_gate,
        gate_up_bias=theirs.gate_up_proj_bias if theirs.has_bias else None,
        down_bias=theirs.down_proj_bias if theirs.has_bias else None,
        is_transposed=theirs.is_transposed,
    )
    ours = build(torch.float32)
    ours.weights = lambda: packed  # type: ignore[method-assign]
    assert_close("y", ours(x, ids, weights), want)
    params = list(theirs.parameters())
    grads = [torch.autograd.grad(y.square().sum(), params) for y in (ours(x, ids, weights), theirs(x, ids, weights))]
    for got, expected_grad in zip(*grads, strict=True):
        assert_close("gradient", got, expected_grad)
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "num_experts")
    assert all(hasattr(ours, flag) for flag in flags)
    if model_type == "mixtral":
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
