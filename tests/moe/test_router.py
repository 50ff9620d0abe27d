"""Routers: equal to those of transformers given the same weights, and refusing what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeweave.kernels_ext.tolerance import assert_close
from moeweave.moe.router import Router

T, D, E, K = 63, 32, 16, 4
DTYPES = [torch.float32, torch.bfloat16]


def transformers_router(family: str, **options: Any) -> nn.Module:
    """The router class of a Hugging Face model family, weights of order one."""
    if family == "mixtral":
        module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        config = module.MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K, **options)
        router = module.MixtralTopKRouter(config)
    elif family == "qwen3_moe":
        module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = module.Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, **options)
        router = module.Qwen3MoeTopKRouter(config)
    elif family == "gpt_oss":
        module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
        config = module.GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K, **options)
        router = module.GptOssTopKRouter(config)
    else:
        module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
        config = module.DeepseekV3Config(hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, **options)
        router = module.DeepseekV3TopkRouter(config)
        nn.init.normal_(router.e_score_correction_bias, std=0.1)
    for param in router.parameters():
        nn.init.normal_(param, std=0.5)
    return router


FAMILIES = {
    "mixtral": ("mixtral", {}, {}),
    "qwen3_moe renormalised": ("qwen3_moe", {"norm_topk_prob": True}, {}),
    "qwen3_moe as they are": ("qwen3_moe", {"norm_topk_prob": False}, {"renormalize": False}),
    "gpt_oss": ("gpt_oss", {}, {"kind": "topk_softmax", "bias": True}),
    "deepseek_v3 grouped": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {"kind": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5},
    ),
    "deepseek_v3 one group": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
        {"kind": "sigmoid", "renormalize": False},
    ),
}


@pytest.mark.transformers("5.1", "routers return probabilities in place of logits in 5.0")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FAMILIES)
def test_equal_to_transformers(case: str, dtype: torch.dtype) -> None:
    """In float32 bit for bit, gradients within the table; in bfloat16 the same choice, weights within the table."""
    family, theirs_options, ours_options = FAMILIES[case]
    theirs = transformers_router(family, **theirs_options)
    ours = Router(D, E, K, **ours_options)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    if family == "deepseek_v3":
        # transformers casts it; its models keep it by a list of names, which a lone router has not.
        theirs.e_score_correction_bias = ours.e_score_correction_bias.clone()
    x = torch.randn(T, D, dtype=dtype)

    logits, weights, ids = ours(x)
    answer = theirs(x)
    if isinstance(answer, Tensor) or len(answer) != 3:
        pytest.skip("routers of the installed transformers do not return logits, weights and ids")
    want_logits, want_weights, want_ids = answer
    assert torch.equal(ids, want_ids)
    assert torch.equal(logits, want_logits)
    assert weights.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(weights, want_weights)
    assert_close("weights", weights, want_weights, dtype)

    factor = torch.randn(T, K)
    got_grads, want_grads = (
        torch.autograd.grad((w.float() * factor).sum(), list(router.parameters()))
        for w, router in ((weights, ours), (want_weights, theirs))
    )
    for got, want in zip(got_grads, want_grads, strict=True):
        assert_close("gradient", got, want, dtype)


@pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "sigmoid"])
def test_no_token_still_gives_gradients(kind: str) -> None:
    router = Router(D, E, K, kind=kind)
    logits, weights, ids = router(torch.empty(0, D))
    assert (logits.shape, weights.shape, ids.shape) == ((0, E), (0, K), (0, K))
    weights.sum().backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, D))


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    router, x = Router(D, E, 1, kind="sigmoid", renormalize=False), torch.randn(T, D)
    router.e_score_correction_bias[5] = 10.0
    logits, weights, ids = router(x)
    assert (ids == 5).all()
    assert torch.equal(weights, logits.sigmoid()[:, 5:6])


def test_only_the_best_groups_compete() -> None:
    """Scores by group [.9 .1], [.6 .5], [.2 .2], [.3 .0]: the second group's sum is best, so .9 is out."""
    router = Router(8, 8, 2, kind="sigmoid", renormalize=False, num_groups=4, top_groups=1)
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.2, 0.3, 1e-6]])
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    _, weights, ids = router(torch.logit(scores))
    assert sorted(ids[0].tolist()) == [2, 3]
    assert sorted(weights[0].tolist()) == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "sigmoid"])
def test_probabilities_sum_to_one(kind: str) -> None:
    router = Router(D, E, K, kind=kind)
    probs = router.probabilities(torch.randn(T, E).bfloat16())
    assert_close("sum", probs.sum(1), torch.ones(T))


def test_casts_leave_the_correction_bias_as_it_is() -> None:
    router = Router(D, E, K, kind="sigmoid")
    steps: Tensor = torch.full((E,), 1e-3) + torch.arange(E) * 1e-6
    router.e_score_correction_bias.copy_(steps)
    for cast in (copy.deepcopy(router).to(torch.bfloat16), copy.deepcopy(router).half()):
        assert cast.weight.dtype != torch.float32
        assert torch.equal(cast.e_score_correction_bias, steps)
    assert "e_score_correction_bias" in router.state_dict()
    assert router.to("meta").e_score_correction_bias.is_meta


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ((0, E, K), {}, r"Router\.dim \(0\) must be at least 1"),
        ((D, E, E + 1), {}, r"Router\.top_k \(17\) must not exceed num_experts \(16\)"),
        ((D, E, K), {"kind": "hash"}, r"Router\.kind \('hash'\) is unknown.*softmax, topk_softmax, sigmoid"),
        ((D, E, K), {"num_groups": 4}, r"Router\.num_groups \(4\) needs kind='sigmoid', not 'softmax'"),
        ((D, E, K), {"kind": "sigmoid", "num_groups": 5}, r"Router\.num_groups \(5\).*Use one of: 1, 2, 4, 8\."),
        ((D, E, K), {"kind": "sigmoid", "num_groups": 16}, r"equal groups of at least 2"),
        ((D, E, K), {"kind": "sigmoid", "num_groups": 4, "top_groups": 5}, r"Router\.top_groups \(5\) must be at most"),
        ((D, E, K), {"kind": "sigmoid", "num_groups": 8, "top_groups": 1}, r"leave at least top_k \(4\) experts, 2 a"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(*sizes, **options)
