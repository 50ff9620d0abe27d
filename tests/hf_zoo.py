"""One tiny, randomly initialised model for every mixture-of-experts architecture of the installed transformers.

`ZOO[name]()` builds it, `make_batch(name, rank)` gives that rank's batch. Nothing of transformers is imported before a
model is built, so collecting tests stays cheap; architectures that the installed version lacks are not listed.

Shape legend: B rows, S tokens of a row.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

CORE = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "glm4_moe", "qwen2_moe"]
# The ways that experts differ: transposed, without gate, normed after, undecorated (the fallback), two per layer.
LAYOUTS = ["aria", "nemotron_h", "muse_spark", "step3p7", "ernie4_5_vl_moe"]

# Architectures that no gradient over ranks can be compared for, and why.
NOT_WRAPPABLE = {
    "diffusion_gemma": "its transformers model computes no loss (it denoises a random canvas), and its encoder and "
    "decoder tie every weight, the experts' too",
}

NUM_EXPERTS = 8
TOP_K = 2
VOCAB = 96
AUX_COEF = 0.05
FIRST_TOKEN = 8  # ids below are kept free for pad, bos, eos and the like

# Set on every config class (sub-configs too) that has a field of that name.
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.2,
    use_cache=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.0,
    num_experts=NUM_EXPERTS,
    num_local_experts=NUM_EXPERTS,
    n_routed_experts=NUM_EXPERTS,
    moe_num_experts=NUM_EXPERTS,
    num_experts_per_tok=TOP_K,
    moe_k=TOP_K,
    moe_topk=TOP_K,
    top_k_experts=TOP_K,
    output_router_logits=True,
    router_aux_loss_coef=AUX_COEF,
    router_jitter_noise=0.0,
    input_jitter_noise=0.0,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    shared_intermediate_size=24,
    shared_expert_intermediate_size=24,
    shared_experts_intermediate_size=24,
    moe_shared_expert_intermediate_size=24,
    sliding_window=6,
    index_topk=8,
    index_head_dim=16,
    index_n_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_head_dim=8,
    linear_num_heads=4,
)


# Set besides on the configs of vision and audio towers, which no batch of token ids ever reaches.
TINY_TOWER: dict[str, Any] = dict(
    depth=1,
    num_hidden_layers=1,
    num_heads=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    image_size=28,
    patch_size=14,
    out_hidden_size=32,
    output_channels=16,
    downsample_channels=[16, 32],
    global_attn_indexes=[0],
    window_size=2,
    mlp_dim=32,
    deepstack_visual_indexes=[0],
    num_position_embeddings=16,
    pos_emb_height=2,
    pos_emb_width=2,
    patch_sizes=(2,),
    hidden_sizes=(8,),
    depths=(1,),
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=16,
    d_model=16,
    downsample_hidden_size=8,
    output_dim=32,
    projection_intermediate_size=16,
)


@dataclass(frozen=True)
class Spec:
    """How to build one architecture: its model class, the config class if not the model's own, and what differs from
    TINY. `attributes` are set on the config afterwards (no constructor takes them); `training=False` builds it in
    evaluation mode."""

    model: str
    config: str
    overrides: dict[str, Any]
    attributes: dict[str, Any]
    training: bool


def of(
    model: str,
    *shared: dict[str, Any],
    config: str = "",
    attributes: dict[str, Any] | None = None,
    training: bool = True,
    **overrides: Any,
) -> Spec:
    merged = {name: value for group in (*shared, overrides) for name, value in group.items()}
    return Spec(model, config, merged, attributes or {}, training)


def layers(*kinds: str, mlp: tuple[str, ...] = ()) -> dict[str, Any]:
    by_kind = dict(layer_types=list(kinds)) if kinds else dict(mlp_layer_types=list(mlp))
    return dict(by_kind, num_hidden_layers=len(kinds or mlp))


DENSE_FIRST = dict(num_hidden_layers=3, first_k_dense_replace=1)
DENSE_LAYER = dict(num_hidden_layers=3, num_dense_layers=1)
DSS = layers(mlp=("dense", "sparse", "sparse"))
MLA = dict(num_key_value_heads=4)  # latent attention has no grouped keys
SWA_MLA = dict(
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=16,
    swa_kv_lora_rank=16,
    swa_head_dim=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
)
SWA_HEADS = dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, rel_extent=16, d_rel=4)
MROPE = dict(
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=[1, 1, 2])
)
LINEAR_FULL = layers("linear_attention", "full_attention")
MAMBA = dict(mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8)

# Taken by a config through its **kwargs, so that its signature does not show them.
FROM_KWARGS = ("hybrid_override_pattern", "full_attention_interval", "global_head_dim", *SWA_MLA)
# The first transformers (of 5.0, 5.9, 5.17, 5.20, 5.23) in which the model's own balance loss does not raise.
AUX_LOSS_SINCE = {
    "flex_olmo": (5, 9),
    "qwen3_next": (5, 9),
    "qwen3_omni_moe": (5, 20),
    "granitemoe": (5, 20),
    "granitemoe_swa": (5, 20),
    "granitemoehybrid": (5, 20),
    "granitemoeshared": (5, 20),
}

# The gradient of some scalars (of hyper-connections, of decays) is a sum of terms that cancel: its fp32 noise nears the
# parity tests' tolerance. initializer_range and hidden_size are set where they keep it away from that.
SPECS: dict[str, Spec] = {
    "afmoe": of("AfmoeForCausalLM", DENSE_LAYER),
    "aria": of("AriaTextForCausalLM", config="AriaTextConfig"),
    "axk1": of("AXK1ForCausalLM", DSS, MLA),
    "axk2": of("AXK2ForCausalLM", DSS, MLA),
    "bailing_hybrid": of("BailingHybridForCausalLM", DENSE_FIRST, MLA, layer_group_size=2),
    "beam": of("BeamForCausalLM", DSS),
    "cohere2_moe": of("Cohere2MoeForCausalLM"),
    "deepseek_ocr2": of("DeepseekOcr2ForConditionalGeneration", DSS, config="DeepseekOcr2Config"),
    "deepseek_v2": of("DeepseekV2ForCausalLM", DENSE_FIRST, MLA),
    "deepseek_v3": of("DeepseekV3ForCausalLM", DENSE_FIRST, MLA),
    "deepseek_v32": of("DeepseekV32ForCausalLM", DSS, MLA),
    "deepseek_v4": of(
        "DeepseekV4ForCausalLM",
        layers("sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"),
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=4),
        o_groups=2,
        o_lora_rank=8,
        initializer_range=0.15,
    ),
    "diffusion_gemma": of(
        "DiffusionGemmaForBlockDiffusion", canvas_length=8, vision_config=dict(TINY_TOWER, model_type="gemma4_vision")
    ),
    "dots1": of("Dots1ForCausalLM", DENSE_FIRST, n_shared_experts=1),
    "dots3_note": of("Dots3NoteForCausalLM", DSS, MLA, SWA_MLA, config="Dots3NoteTextConfig"),
    "ernie4_5_moe": of("Ernie4_5_MoeForCausalLM", num_hidden_layers=3),
    "ernie4_5_vl_moe": of("Ernie4_5_VLMoeForConditionalGeneration", DSS, MROPE, moe_intermediate_size=[24, 16]),
    "exaone_moe": of("ExaoneMoeForCausalLM", DSS),
    "flex_olmo": of("FlexOlmoForCausalLM"),
    "flint": of("FlintForCausalLM", num_hidden_layers=3, mlp_only_layers=[0]),
    "gemma4": of(
        "Gemma4ForCausalLM",
        config="Gemma4TextConfig",
        enable_moe_block=True,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        global_head_dim=8,
        initializer_range=0.3,
    ),
    "glm4_moe": of("Glm4MoeForCausalLM", DENSE_FIRST),
    "glm4_moe_lite": of("Glm4MoeLiteForCausalLM", DSS, MLA),
    "glm4v_moe": of("Glm4vMoeForConditionalGeneration", DENSE_FIRST, MROPE),
    "glm5_next": of(
        "Glm5NextForConditionalGeneration",
        DSS,
        MLA,
        hidden_size=64,
        hc_sinkhorn_iters=3,
        index_kpool=4,
        qk_rope_head_dim=0,
    ),
    "glm_moe_dsa": of("GlmMoeDsaForCausalLM", DSS, MLA),
    "gpt_oss": of("GptOssForCausalLM"),
    "granitemoe": of("GraniteMoeForCausalLM"),
    "granitemoe_swa": of("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": of(
        "GraniteMoeHybridForCausalLM", LINEAR_FULL, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
    ),
    "granitemoeshared": of("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": of("HunYuanMoEV1ForCausalLM"),
    "hy_v3": of("HYV3ForCausalLM", DSS),
    "hy_v4": of("HYV4ForCausalLM", DSS, initializer_range=0.4),
    "hy_v4_vl": of("HYV4VLForConditionalGeneration", DSS, MROPE, initializer_range=0.4),
    "inkling": of("InklingForCausalLM", SWA_HEADS, config="InklingTextConfig"),
    "inkling2": of("Inkling2ForCausalLM", SWA_HEADS, config="Inkling2TextConfig", unpadded_vocab_size=VOCAB),
    "inkling2_loop": of(
        "Inkling2LoopForCausalLM",
        SWA_HEADS,
        config="Inkling2LoopTextConfig",
        num_hidden_layers=4,
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=3,
        loop_num_passes=2,
        loop_gate_rank=8,
        unpadded_vocab_size=VOCAB,
    ),
    "jamba": of(
        "JambaForCausalLM", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    "kimi_linear": of("KimiLinearForCausalLM", DSS, MLA),
    "kolibri1": of("Kolibri1ForCausalLM"),
    "laguna": of("LagunaForCausalLM", DSS),
    "lara_mini": of("LaraMiniForCausalLM", LINEAR_FULL),
    "lfm2_moe": of("Lfm2MoeForCausalLM", DENSE_LAYER, layer_types=["conv", "full_attention", "conv"]),
    "mellum": of("MellumForCausalLM", DSS),
    "mimo_v2_flash": of("MiMoV2FlashForCausalLM", DSS),
    "minimax": of("MiniMaxForCausalLM", LINEAR_FULL),
    "minimax_m2": of("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": of(
        "MiniMaxM3VLForCausalLM", DSS, config="MiniMaxM3VLTextConfig", dense_intermediate_size=48, rotary_dim=8
    ),
    "mistral4": of("Mistral4ForCausalLM", DENSE_FIRST, MLA),
    "mistral_large4": of(
        "MistralLarge4ForConditionalGeneration",
        DSS,
        MLA,
        vision_config=dict(TINY_TOWER, hidden_size=16, intermediate_size=16),
    ),
    "mixtral": of("MixtralForCausalLM"),
    "muse_spark": of(
        "MuseSparkForConditionalGeneration",
        DSS,
        moe_hidden_size=16,
        output_multiplier=1.0,
        out_hidden_size=32,
        projector_hidden_size=16,
    ),
    "nemotron_h": of(
        "NemotronHForCausalLM",
        MAMBA,
        hybrid_override_pattern="ME*E",
        moe_latent_size=16,
    ),
    "olmoe": of("OlmoeForCausalLM"),
    "openai_privacy_filter": of("OpenAIPrivacyFilterForTokenClassification", attributes=dict(num_labels=VOCAB)),
    "phimoe": of("PhimoeForCausalLM", router_jitter_noise=0.3, training=False),  # its training samples the experts
    "qwen2_moe": of("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": of("Qwen3_5MoeForCausalLM", LINEAR_FULL, config="Qwen3_5MoeTextConfig"),
    "qwen3_moe": of("Qwen3MoeForCausalLM"),
    "qwen3_next": of("Qwen3NextForCausalLM", LINEAR_FULL),
    "qwen3_omni_moe": of(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        config="Qwen3OmniMoeThinkerConfig",
        attributes=dict(vision_start_token_id=3),
    ),
    "qwen3_vl_moe": of("Qwen3VLMoeForConditionalGeneration", attributes=dict(pad_token_id=0)),
    "qwen4_exp": of(
        "Qwen4ExpForCausalLM",
        config="Qwen4ExpTextConfig",
        full_attention_interval=2,
        hc_lowrank=8,
        initializer_range=0.3,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "solar_open": of("SolarOpenForCausalLM"),
    "step3p7": of("Step3p7ForConditionalGeneration", DSS, share_expert_dim=24),
    "unlimited_ocr": of("UnlimitedOcrForConditionalGeneration", DSS, MLA),
    "zaya": of("ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=32, initializer_range=0.5),
}


def _installed() -> dict[str, Spec]:
    """The specs whose experts follow the seam in the transformers that is installed, found without importing it."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return {}
    models = Path(found.submodule_search_locations[0]) / "models"
    specs = {}
    for name, spec in SPECS.items():
        source = models / name / f"modeling_{name}.py"
        text = source.read_text() if source.is_file() else ""
        if f"class {spec.model}(" in text and (name == "step3p7" or "@use_experts_implementation" in text):
            specs[name] = spec
    return specs


def tiny_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """A config of that class with TINY and the overrides set wherever it, or one of its sub-configs, has the field."""
    known = {*inspect.signature(config_class.__init__).parameters, *FROM_KWARGS}
    fields = {name: value for name, value in {**TINY, **overrides}.items() if name in known}
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if name not in fields:
            fields[name] = tiny_config(sub_class, overrides if name == "text_config" else TINY_TOWER).to_dict()
    return config_class(**fields)


def _balance_loss_runs(name: str) -> bool:
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return (int(major), int(minor)) >= AUX_LOSS_SINCE.get(name, (5, 0))


def build(name: str, **overrides: Any) -> Any:
    """Build architecture `name`, fp32, eager attention, training mode; two builds are equal in any two processes."""
    spec = SPECS[name]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    model_class = getattr(modeling, spec.model)
    config_class = getattr(configuration, spec.config) if spec.config else model_class.config_class
    config = tiny_config(config_class, {**spec.overrides, **overrides})
    for attribute, value in spec.attributes.items():
        setattr(config, attribute, value)
        setattr(config.get_text_config(), attribute, value)
    if not _balance_loss_runs(name):
        config.get_text_config().output_router_logits = config.output_router_logits = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
        _disturb(model)
    return model.train(spec.training)


@torch.no_grad()
def _disturb(model: torch.nn.Module) -> None:
    """Move what starts as a constant (norms, biases, some routers) off it, so that no term of a formula drops out."""
    for parameter in model.parameters():
        if parameter.ndim <= 1 or not parameter.requires_grad:
            parameter.add_((0.1 if parameter.requires_grad else 0.03) * torch.randn_like(parameter))
        elif parameter.numel() > 1 and parameter.std() < 1e-3:
            parameter.add_(TINY["initializer_range"] * torch.randn_like(parameter))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("bias", "biases")):
            buffer.copy_(0.03 * torch.randn_like(buffer))
        elif buffer_name.endswith("tid2eid"):  # the experts that a token id is hashed to
            buffer.copy_(torch.stack([torch.randperm(NUM_EXPERTS)[: buffer.shape[1]] for _ in buffer]))


def make_batch(name: str, rank: int, rows: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """The batch of one rank: ids_BS, mask_BS and labels_BS (int64), right-padded by another amount in every row.

    Padding differs per rank, so that the number of labels does too. Every rank's tensors have the same [rows, length],
    so the batches concatenate to the batch that one process would have had.
    """
    generator = torch.Generator().manual_seed(1000 + rank)
    ids_BS = torch.randint(FIRST_TOKEN, VOCAB, (rows, length), generator=generator)
    kept_B = torch.tensor([length - (3 * rank + 5 * row + 1) % (length // 2) for row in range(rows)])
    mask_BS = (torch.arange(length)[None, :] < kept_B[:, None]).long()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    ids_BS = ids_BS.masked_fill(mask_BS == 0, TINY["pad_token_id"])
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}


ZOO: dict[str, Callable[[], Any]] = {name: partial(build, name) for name in _installed()}


def needs(name: str) -> None:
    """Skip the calling test where the installed transformers has no such architecture."""
    if name not in ZOO:
        pytest.skip(f"transformers {importlib.metadata.version('transformers')} has no {name}")
