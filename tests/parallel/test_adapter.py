"""What is found in a model, by structure; and which models are refused, by name and with the reason."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plain_models
from hf_zoo import CORE, ZOO, tiny_config
from moeweave.moe.layer import MoELayer
from moeweave.parallel.adapter import MoEAdapter, MoEBlock, UnsupportedModel, find_moe_blocks, register_moe
from plain_models import DIM, HIDDEN, NUM_EXPERTS, ListedExperts, OwnRoutingBlock, build, mlp


def only(blocks: list[MoEBlock], path: str) -> MoEBlock:
    (block,) = [block for block in blocks if block.path == path]
    return block


GATED = ("gate_up_proj", "down_proj")
BIASED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
FOUND: dict[str, dict[str, Any]] = {
    "mixtral": dict(path="model.layers.0.mlp.experts", router="gate", params=GATED),
    "qwen2_moe": dict(path="model.layers.1.mlp.experts", router="gate", params=GATED, shared=("shared_expert",)),
    "deepseek_v3": dict(
        path="model.layers.2.mlp.experts", router="gate", params=GATED, shared=("shared_experts",), bias="gate"
    ),
    "glm4_moe": dict(
        path="model.layers.1.mlp.experts", router="gate", params=GATED, shared=("shared_experts",), bias="gate"
    ),
    "gpt_oss": dict(path="model.layers.0.mlp.experts", router="router", params=BIASED),
    "gemma4": dict(path="model.layers.0.experts", router="router", params=GATED),
    "nemotron_h": dict(
        path="model.layers.1.mixer.experts",
        router="gate",
        params=("up_proj", "down_proj"),
        shared=("shared_experts",),
        bias="gate",
    ),
    "step3p7": dict(path=None, router="gate", params=GATED, kind="stacked"),
}


@pytest.mark.parametrize("name", [name for name in FOUND if name in ZOO])
def test_finds_the_blocks_of_hugging_face_models(name: str) -> None:
    model, want = ZOO[name](), FOUND[name]
    blocks = find_moe_blocks(model)
    block = only(blocks, want["path"]) if want["path"] else blocks[0]
    assert block.experts is model.get_submodule(block.path)
    assert block.kind == want.get("kind", "packed")
    assert block.num_experts == 8
    assert sorted(block.params) == sorted(want["params"])
    parent = block.block_path
    assert block.path == f"{parent}.experts"
    assert block.router_path == f"{parent}.{want['router']}"
    if "shared" in want:
        assert block.shared_paths == tuple(f"{parent}.{shared}" for shared in want["shared"])
    if "bias" in want:
        assert block.correction_bias == (f"{parent}.{want['bias']}", "e_score_correction_bias")
    elif name != "step3p7":
        assert block.correction_bias is None


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in CORE else pytest.mark.slow) for name in ZOO])
def test_claims_every_expert_parameter_of_the_zoo(name: str) -> None:
    model = ZOO[name]()
    blocks = find_moe_blocks(model)
    assert blocks
    claimed = {f"{block.path}.{param}" for block in blocks for param in block.params}
    stacked = {key for key, param in model.named_parameters() if ".experts." in key and param.dim() == 3}
    assert stacked <= claimed
    assert all(model.get_parameter(key).shape[0] == 8 for key in claimed)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "kind, path, params",
    [
        ("packed", "moe.experts", ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")),
        ("stacked", "moe.experts", ("up", "down", "down_bias")),
        ("modulelist", "moe.experts", ()),
        ("registered", "moe.mlps", ()),
    ],
)
def test_finds_the_blocks_of_plain_models(kind: str, path: str, params: tuple[str, ...], flat: bool) -> None:
    model = build(kind, flat)
    blocks = find_moe_blocks(model)
    homes = ["layer."] if flat else ["layers.0.", "layers.1."]
    assert [block.path for block in blocks] == [home + path for home in homes]
    for block, home in zip(blocks, homes, strict=True):
        assert block.kind == ("modulelist" if kind == "registered" else kind)
        assert (block.num_experts, block.params, block.block_path) == (NUM_EXPERTS, params, f"{home}moe")
        assert (block.adapter is not None) == (kind == "registered")
        if kind != "registered":
            assert block.router_path == f"{home}moe.gate"


def test_finds_experts_that_are_the_model_itself() -> None:
    (block,) = find_moe_blocks(ListedExperts())
    assert (block.path, block.block_path, block.router_path) == ("", "", None)
    (block,) = find_moe_blocks(OwnRoutingBlock())
    assert (block.path, block.block_path) == ("mlps", "")
    (block,) = find_moe_blocks(MoELayer(DIM, HIDDEN, NUM_EXPERTS, 2, shared_hidden_dim=4))
    assert (block.path, block.router_path, block.shared_paths) == ("experts", "router", ("shared_experts",))


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Transformer(8, 2, 1, 1, 8), nn.Conv1d(8, 8, 3)])
def test_finds_nothing_in_a_dense_model(model: nn.Module) -> None:
    assert find_moe_blocks(model) == []


# ---- refusals


def tiny(name: str, model_class: str, config_class: str, **overrides: Any) -> nn.Module:
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    config = tiny_config(getattr(configuration, config_class), overrides)
    return getattr(modeling, model_class)._from_config(config)


SEQ2SEQ = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_sparse_encoder_layers=1
)
LLAMA4 = dict(intermediate_size_mlp=48, interleave_moe_layer_step=1, no_rope_layers=[1, 1])
DBRX = dict(
    d_model=32, n_heads=4, n_layers=2, attn_config=dict(kv_n_heads=2, rope_theta=1e4),
    ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2),
)  # fmt: skip
LONGCAT = dict(ffn_hidden_size=48, expert_ffn_hidden_size=24, num_layers=2, n_routed_experts=8, zero_expert_num=4)
NLLB = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_sparse_step=2, decoder_sparse_step=2,
)  # fmt: skip

NOT_THE_SEAM = "is not called as experts"
REFUSED: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, "Llama4TextExperts", NOT_THE_SEAM),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig", DBRX, "DbrxExperts", NOT_THE_SEAM),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", dict(kv_channels=8), "JetMoeParallelExperts", NOT_THE_SEAM),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        SEQ2SEQ,
        "SwitchTransformersExperts",
        NOT_THE_SEAM,
    ),
    "nllb_moe": ("NllbMoeForConditionalGeneration", "NllbMoeConfig", NLLB, "NllbMoeExperts", NOT_THE_SEAM),
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", LONGCAT, "LongcatFlashExperts", "disagree"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.transformers("5.1", "5.0 cannot build it") if name == "jetmoe" else ())
        for name in REFUSED
    ],
)
def test_refuses_models_that_cannot_be_wrapped_by_name(name: str) -> None:
    pytest.importorskip("transformers")
    model_class, config_class, overrides, experts, reason = REFUSED[name]
    model = tiny(name, model_class, config_class, **overrides)
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        find_moe_blocks(model)
    assert experts in str(refusal.value)


class ParallelSwitch(nn.Module):
    """Experts without the seam, in a list called so."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).sum(0)


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.zeros(6, 3, 3))
        self.down = nn.Parameter(torch.zeros(4, 3, 3))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        return x


class ListBesideNorm(ListedExperts):
    """Its own forward does more than the list: leaving that out would be another model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)


class HalfNested(nn.Module):
    """One expert parameter lies a level down: the forward would index the whole of it with this rank's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 3, 3))
        self.second = nn.Module()
        self.second.down = nn.Parameter(torch.zeros(4, 3, 3))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        return x


class NestedExperts(nn.Module):
    """Follows the call, but its parameters lie a level down, where nobody would shard them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.zeros(4, 3, 3))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "model, text",
    [
        (ParallelSwitch(), r"experts \(ModuleList\) looks like experts but is not called as"),
        (nn.Sequential(Uneven()), r"0 \(Uneven\): its expert parameters disagree on the number of experts"),
        (nn.Sequential(ListBesideNorm()), r"0 \(ListBesideNorm\).*norm\.weight.*register_moe"),
        (nn.Sequential(HalfNested()), r"0 \(HalfNested\).*second\.down.*register_moe"),
        (nn.Sequential(NestedExperts()), r"0 \(NestedExperts\) looks like experts but"),
    ],
    ids=lambda value: type(value[0] if isinstance(value, nn.Sequential) else value).__name__,
)
def test_refuses_plain_experts_that_it_would_get_wrong(model: nn.Module, text: str) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        find_moe_blocks(model)


class MixtureOfExperts(plain_models.Block):
    """A block, not experts, in spite of its name."""


def test_a_block_may_be_called_experts() -> None:
    (block,) = find_moe_blocks(nn.Sequential(MixtureOfExperts(plain_models.StackedExperts)))
    assert (block.path, block.block_path) == ("0.experts", "0")


def test_register_moe_takes_a_class_and_an_adapter() -> None:
    adapter = MoEAdapter("experts", lambda block, x: (x, x))
    with pytest.raises(TypeError, match=r"register_moe needs an nn\.Module class, got"):
        register_moe(nn.Linear(1, 1), adapter)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="register_moe needs a MoEAdapter for Linear, got function"):
        register_moe(nn.Linear, lambda block: block)  # type: ignore[arg-type]


def test_an_adapter_must_name_a_list_of_experts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(2, 2)

    class Odder(nn.Module):
        pass

    register_moe(Odd, MoEAdapter("experts", lambda block, x: (x, x)))
    register_moe(Odder, MoEAdapter("experts", lambda block, x: (x, x)))
    with pytest.raises(UnsupportedModel, match=r"0\.experts \(Linear\) must be a ModuleList: the adapter .* Odd names"):
        find_moe_blocks(nn.Sequential(Odd()))
    with pytest.raises(UnsupportedModel, match=r"0 \(Odder\) has no experts, which the adapter .* Odder names"):
        find_moe_blocks(nn.Sequential(Odder()))


def test_subclasses_of_a_registered_block_are_cut_alike() -> None:
    class Special(OwnRoutingBlock):
        pass

    (block,) = find_moe_blocks(nn.Sequential(Special()))
    assert block.adapter is not None
