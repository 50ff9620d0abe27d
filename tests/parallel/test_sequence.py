"""Sequences shared over sp and over tp: gradients, norm, updates and tokens of one process, and refusals by name."""

from __future__ import annotations

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
import plain_models
import sequence_models
from moeweave.parallel.verify import ParityReport, gradient_parity
from run_ranks import run_ranks
from train_steps import Steps, check, train_each

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3")
ULYSSES, RING, MEGATRON = dict(sequence="ulysses"), dict(sequence="ring"), dict(tp_sequence=True)
Sizes, Fields = dict[str, int], dict[str, Any]
# What CI runs; the whole matrix is slow.
CASES: list[tuple[Sizes, Fields]] = [
    (dict(sp=2), ULYSSES),
    (dict(sp=2, ep=2), RING),
    (dict(tp=2, ep=2), MEGATRON),
]
WIDE: list[tuple[Sizes, Fields]] = [
    (dict(sp=2), RING),
    (dict(sp=4), RING),
    (dict(sp=4, ep=2), ULYSSES),
    (dict(dp=2, sp=2, ep=4), ULYSSES),
    (dict(dp=2, sp=2, ep=2), dict(RING, recompute=True)),
    (dict(dp=2, sp=2, ep=2), dict(ULYSSES, data="ddp")),
    (dict(dp_replicate=2, sp=2, ep=2), ULYSSES),
    (dict(tp=2), dict(MEGATRON, recompute=True)),
    (dict(dp=2, tp=2, ep=4), MEGATRON),
    (dict(tp=2, sp=2), ULYSSES),
    (dict(tp=2, sp=2, ep=2), RING),
    (dict(tp=2, sp=2, ep=4), dict(RING, tp_sequence=True)),
    (dict(tp=2, sp=2, ep=4), dict(ULYSSES, tp_sequence=True, recompute=True)),
    (dict(pp=2, sp=2, ep=2), ULYSSES),
    (dict(pp=2, sp=2), dict(RING, schedule="gpipe")),
    (dict(pp=2, tp=2, ep=2), MEGATRON),
    (dict(sp=2, dp=2, ep=2, etp=2), ULYSSES),
    (dict(tp=2, sp=2, etp=2), dict(RING, tp_sequence=True)),
]


def ranks_of(sizes: Sizes) -> int:
    product = 1
    for axis, size in sizes.items():
        product *= 1 if axis in ("ep", "etp") else size
    return product


@pytest.fixture(autouse=True)
def _ring_has_masks(request: pytest.FixtureRequest) -> None:
    """Ring asks transformers for masks by q_length and q_offset, which 5.0 does not make."""
    asked = repr(getattr(request.node, "callspec", None) and request.node.callspec.params) + request.node.name
    rings = "ring" in asked or request.node.name in ("test_micro_batches", "test_logits_without_and_with_labels")
    if rings and Version(metadata.version("transformers")) < Version("5.9"):
        pytest.skip("ring needs transformers 5.9 for its masks")


def shown(case: tuple[Sizes, Fields]) -> str:
    sizes, plan = case
    parts = [f"{axis}{size}" for axis, size in sizes.items()]
    return "-".join([*parts, *(str(value) if value is not True else name for name, value in plan.items())])


def parity(name: str, sizes: Sizes, plan: Fields, length: int = 15) -> ParityReport:
    """With another padding in every row, an odd number of positions, and the balance loss on."""
    batch = partial(hf_zoo.make_batch, name, rows=4, length=length)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes), mw.Plan(**plan))


def assert_parity(name: str, sizes: Sizes, plan: Fields) -> None:
    for report in run_ranks(ranks_of(sizes), parity, name, sizes, plan):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.loss_error <= 1e-6
        assert report.norm_error <= 1e-6
        assert set(report.errors) == {key for key, _ in hf_zoo.ZOO[name]().named_parameters()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=shown)
def test_every_gradient_and_the_norm_are_those_of_one_process(name: str, case: tuple[Sizes, Fields]) -> None:
    assert_parity(name, *case)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", WIDE, ids=shown)
def test_every_gradient_under_every_combination(name: str, case: tuple[Sizes, Fields]) -> None:
    assert_parity(name, *case)


@pytest.mark.parametrize(
    "steps",
    [
        Steps("mixtral", dict(dp=2, sp=2, ep=4), RING),
        Steps("deepseek_v3", dict(tp=2, sp=2, ep=2), MEGATRON),
        pytest.param(Steps("qwen3_moe", dict(sp=4, ep=4), ULYSSES), marks=pytest.mark.slow),
    ],
    ids=lambda steps: steps.name,
)
def test_clipped_sgd_steps_are_those_of_one_process(steps: Steps) -> None:
    for (found,) in run_ranks(4, train_each, [steps]):
        check(found, 1e-5)


# ---- what a rank computes


def routed(name: str, sizes: Sizes, plan: Fields, length: int) -> list[int]:
    """Routes that a rank's tokens take in each layer."""
    model = mw.parallelize(hf_zoo.ZOO[name](), mw.Mesh(**sizes), mw.Plan(**plan))
    batch = {"input_ids": torch.randint(8, 96, (2, length), generator=torch.Generator().manual_seed(1))}
    mw.forward_backward(model, {**batch, "labels": batch["input_ids"]})
    return [int(load_E.sum()) for load_E in mw.expert_load(model).values()]


@pytest.mark.parametrize(
    ("sizes", "plan", "length", "tokens"),
    [
        (dict(sp=4, ep=4), ULYSSES, 9, [4, 4, 4, 6]),
        (dict(sp=4), RING, 9, [6, 4, 4, 4]),
        (dict(sp=4, ep=2), RING, 5, [2, 2, 2, 4]),
        (dict(sp=2, tp=2, ep=4), dict(ULYSSES, tp_sequence=True), 7, [2, 4, 4, 4]),
    ],
)
def test_each_token_is_routed_once_and_by_one_rank(sizes: Sizes, plan: Fields, length: int, tokens: list[int]) -> None:
    found = run_ranks(4, routed, "qwen3_moe", sizes, plan, length)
    assert found == [[hf_zoo.TOP_K * count] * 2 for count in tokens]
    assert sum(tokens) == 2 * length


def nudged(sizes: Sizes, plan: Fields) -> list[float]:
    """The router biases after one update, by the load of the whole batch."""
    model = mw.parallelize(hf_zoo.ZOO["deepseek_v3"](), mw.Mesh(**sizes), mw.Plan(**plan))
    mw.forward_backward(model, hf_zoo.make_batch("deepseek_v3", 0))
    mw.update_router_bias(model, rate=0.5)
    biases = [value for name, value in model.named_buffers() if "e_score_correction_bias" in name]
    return torch.cat([bias.flatten() for bias in biases]).tolist()


def test_biases_move_by_the_load_of_all_tokens() -> None:
    (want,) = run_ranks(1, nudged, {}, {})
    for sizes, plan in ((dict(sp=2), ULYSSES), (dict(tp=2, ep=2), MEGATRON)):
        for got in run_ranks(2, nudged, sizes, plan):
            assert got == pytest.approx(want)


# ---- masks, dtypes, accumulation


def masked(kind: str, plan: Fields) -> ParityReport:
    """Left padding, packed sequences, or a mask [B, 1, S, S] of the user's own, through torch's attention."""

    def build() -> Any:
        model = hf_zoo.build("qwen3_moe", use_sliding_window=kind == "window", max_window_layers=0)
        model.set_attn_implementation("sdpa")
        return model

    def batch(rank: int) -> dict[str, torch.Tensor]:
        found = hf_zoo.make_batch("qwen3_moe", rank, rows=2, length=15)
        at = torch.arange(15)
        if kind == "left":
            found = {key: value.flip(1) for key, value in found.items()}
        elif kind == "packed":
            del found["attention_mask"]
            found["position_ids"] = torch.stack([at % 7, torch.where(at < 4, at, at - 4)])
        elif kind == "own":
            causal = at.unsqueeze(1) >= at
            found["attention_mask"] = (causal & (at.unsqueeze(1) - at != 2)).expand(2, 1, 15, 15)
        return found

    def without_balance(model: Any) -> None:
        model.config.output_router_logits = kind == "packed"

    return gradient_parity(build, batch, mw.Mesh(sp=2, ep=2), mw.Plan(**plan), prepare=without_balance)


@pytest.mark.parametrize("kind", ["left", "packed", "own", "window"])
@pytest.mark.parametrize("plan", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_masks(kind: str, plan: Fields) -> None:
    for report in run_ranks(2, masked, kind, plan):
        assert report.ok, (report.worst_name, report.worst)


def accumulated(plan: Fields) -> ParityReport:
    batch = partial(hf_zoo.make_batch, "mixtral", rows=4, length=11)
    return gradient_parity(hf_zoo.ZOO["mixtral"], batch, mw.Mesh(sp=2, ep=2), mw.Plan(**plan), microbatches=2)


def test_micro_batches() -> None:
    assert all(report.ok for report in run_ranks(2, accumulated, RING))


def in_bf16() -> ParityReport:
    batch = partial(hf_zoo.make_batch, "qwen3_moe", length=15)
    return gradient_parity(hf_zoo.ZOO["qwen3_moe"], batch, mw.Mesh(sp=2, ep=2), mw.Plan(dtype="bfloat16"))


def test_computing_in_bf16() -> None:
    for report in run_ranks(2, in_bf16):
        assert report.ok, (report.worst_name, report.worst)


# ---- models


def plain(sizes: Sizes, plan: Fields, options: dict[str, Any]) -> ParityReport:
    build = partial(sequence_models.build, **options)
    return gradient_parity(build, plain_models.make_batch, mw.Mesh(**sizes), mw.Plan(**plan))


@pytest.mark.parametrize(
    ("sizes", "plan", "options"),
    [
        (dict(sp=2), ULYSSES, {}),
        (dict(sp=2, ep=2), dict(RING, recompute=True), dict(window=3)),
        (dict(tp=2, ep=2), MEGATRON, dict(own=True)),
        pytest.param(dict(sp=4, ep=2), RING, {}, marks=pytest.mark.slow),
        pytest.param(dict(sp=2, ep=2), ULYSSES, dict(own=True, window=4), marks=pytest.mark.slow),
        pytest.param(
            dict(sp=2, tp=2, ep=4), dict(ULYSSES, **MEGATRON), dict(own=True, window=4), marks=pytest.mark.slow
        ),
        pytest.param(dict(dp=2, sp=2, ep=4), dict(ULYSSES, data="ddp"), dict(window=4), marks=pytest.mark.slow),
    ],
)
def test_a_plain_model(sizes: Sizes, plan: Fields, options: dict[str, Any]) -> None:
    for report in run_ranks(ranks_of(sizes), plain, sizes, plan, options):
        assert report.ok, (report.worst_name, report.worst)
        assert report.norm_error <= 1e-6


def compare_zoo(names: list[str], sizes: Sizes, plan: Fields) -> dict[str, str]:
    """Of each architecture "ok", why it is refused, or the parameter whose gradient is wrong."""
    found = {}
    for name in names:
        batch = partial(hf_zoo.make_batch, name, length=15)
        try:
            report = gradient_parity(
                hf_zoo.ZOO[name],
                batch,
                mw.Mesh(**sizes),
                mw.Plan(**plan),
                prepare=partial(torch.nn.Module.train, mode=hf_zoo.SPECS[name].training),
            )
        except mw.UnsupportedModel as error:
            found[name] = f"refused: {error}"
        else:
            found[name] = "ok" if report.ok else f"{report.worst_name} {report.worst:.1e}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [(dict(sp=2), ULYSSES), (dict(sp=2), RING), (dict(tp=2), MEGATRON)], ids=shown)
def test_every_architecture_has_the_gradients_of_one_process_or_is_refused(case: tuple[Sizes, Fields]) -> None:
    sizes, plan = case
    names = [name for name in hf_zoo.ZOO if name not in hf_zoo.NOT_WRAPPABLE]
    # Its fp32 gradients are noise at the tolerance, see test_ill_conditioned.py.
    names.remove("muse_spark")
    found = run_ranks(2, compare_zoo, names, sizes, plan, timeout=600)[0]
    assert not {name: what for name, what in found.items() if what != "ok" and not what.startswith("refused")}
    assert sum(what == "ok" for what in found.values()) >= 0.4 * len(names)


# ---- inference and checkpoints


def generated(name: str, sizes: Sizes, plan: Fields, cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, of ranks and of one process; data ranks have prompts of other lengths and end at other steps."""
    mesh = mw.Mesh(**sizes)
    model, solo = mw.parallelize(hf_zoo.ZOO[name]().eval(), mesh, mw.Plan(**plan)), hf_zoo.ZOO[name]().eval()
    prompt = hf_zoo.make_batch(name, mesh.data_rank)["input_ids"][:, : 5 + mesh.data_rank]
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    for each in (model, solo):
        each.config.output_router_logits = False
    options = {"max_new_tokens": 5 + mesh.data_rank, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": mask, "use_cache": cached}
    return model.generate(prompt * mask, **options), solo.generate(prompt * mask, **options)


@pytest.mark.parametrize(
    ("name", "sizes", "plan", "cached"),
    [
        ("qwen3_moe", dict(dp=2, sp=2, ep=4), RING, True),
        ("deepseek_v3", dict(sp=2), ULYSSES, True),
        ("deepseek_v3", dict(tp=2, ep=2), MEGATRON, False),
        pytest.param("mixtral", dict(sp=2), ULYSSES, True, marks=pytest.mark.slow),
        pytest.param("mixtral", dict(sp=2, ep=2), RING, False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", dict(tp=2, sp=2, ep=2), dict(ULYSSES, **MEGATRON), True, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_one_process(name: str, sizes: Sizes, plan: Fields, cached: bool) -> None:
    for got, want in run_ranks(ranks_of(sizes), generated, name, sizes, plan, cached):
        assert torch.equal(got, want)


def logits(plan: Fields) -> tuple[float, list[int]]:
    """Without labels a model returns all logits; with them those of a rank's positions."""
    model, solo = mw.parallelize(hf_zoo.ZOO["qwen3_moe"](), mw.Mesh(sp=2), mw.Plan(**plan)), hf_zoo.ZOO["qwen3_moe"]()
    batch = hf_zoo.make_batch("qwen3_moe", 0, length=9)
    labels = batch.pop("labels")
    with torch.no_grad():
        got, want = model(**batch), solo(**batch)
        assert got.aux_loss == pytest.approx(want.aux_loss.item(), rel=1e-5)
        shard = model(**batch, labels=labels).logits
    return float((got.logits - want.logits).norm() / want.logits.norm()), list(shard.shape)


def test_logits_without_and_with_labels() -> None:
    for plan, held in ((ULYSSES, [4, 5]), (RING, [5, 4])):
        found = run_ranks(2, logits, plan)
        assert all(error <= 1e-5 for error, _ in found)
        assert [shape[1] for _, shape in found] == held


def saved(folder: str, save: tuple[Sizes, Fields], load: tuple[Sizes, Fields]) -> list[bool]:
    """Whether all of a model comes back through `mw.load` on another mesh and from a Hugging Face folder."""
    want = hf_zoo.ZOO["deepseek_v3"]()
    model = mw.parallelize(hf_zoo.ZOO["deepseek_v3"](), mw.Mesh(**save[0]), mw.Plan(**save[1]))
    mw.forward_backward(model, hf_zoo.make_batch("deepseek_v3", 0))
    mw.save(f"{folder}/own", model)
    mw.save_pretrained(model, f"{folder}/hf")
    other = hf_zoo.ZOO["deepseek_v3"]()
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    own = mw.parallelize(other, mw.Mesh(**load[0]), mw.Plan(**load[1]))
    mw.load(f"{folder}/own", own)
    read = mw.from_pretrained(f"{folder}/hf", mw.Mesh(**load[0]), mw.Plan(**load[1]))
    found = [dict(each.named_parameters()) for each in (own, read)]
    same = []
    for key, param in want.named_parameters():
        for state in found:
            got = state[key]
            same.append(torch.equal(got.full_tensor() if isinstance(got, DTensor) else got, param))
    return [*same, type(want).from_pretrained(f"{folder}/hf").config._attn_implementation != "moeweave_sdpa"]


@pytest.mark.parametrize(
    ("save", "load"),
    [
        ((dict(sp=2, tp=2, ep=4), dict(tp_sequence=True)), (dict(dp=4, ep=2), {})),
        pytest.param((dict(dp=4, ep=2), {}), (dict(dp=2, sp=2, ep=2), RING), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_change_the_mesh(tmp_path: Path, save: Any, load: Any) -> None:
    for same in run_ranks(4, saved, str(tmp_path), save, load):
        assert all(same)


# ---- refusals


def refuse(name: str, sizes: Sizes, plan: Fields, length: int) -> str:
    model = plain_models.build("packed") if name == "plain" else hf_zoo.ZOO[name]()
    try:
        wrapped = mw.parallelize(model, mw.Mesh(**sizes), mw.Plan(**plan))
        mw.forward_backward(wrapped, hf_zoo.make_batch(name, 0, length=length))
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("name", "sizes", "plan", "text"),
    [
        ("qwen3_moe", dict(sp=3), ULYSSES, "sp (3) must divide the 4 heads of model.layers.0.self_attn under"),
        ("qwen3_moe", dict(sp=3), ULYSSES, "sp can be 1, 2, 4; Plan(sequence='ring') takes any."),
        (
            "gpt_oss",
            dict(sp=2),
            RING,
            "model.layers.0.self_attn (GptOssAttention) has sinks, which Plan(sequence='ring",
        ),
        ("qwen3_next", dict(sp=2), ULYSSES, "(Qwen3NextDecoderLayer) mixes the positions of a sequence"),
        ("deepseek_v32", dict(tp=2), MEGATRON, "self_attn.indexer (DeepseekV32Indexer) mixes the positions"),
        ("gemma4", dict(tp=2), MEGATRON, "Gemma4TextDecoderLayer takes per_layer_input"),
        ("plain", dict(sp=2), ULYSSES, "set `splits_sequence = True` on the model"),
        ("mixtral", dict(sp=2), dict(aux="rank"), "Plan.aux ('rank') must be 'global' where ranks share sequences"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(name: str, sizes: Sizes, plan: Fields, text: str) -> None:
    hf_zoo.needs(name)
    for message in run_ranks(ranks_of(sizes), refuse, name, sizes, plan, 16):
        assert text in message


def test_sequences_shorter_than_the_ranks_are_refused() -> None:
    for message in run_ranks(4, refuse, "qwen3_moe", dict(sp=2, tp=2), MEGATRON, 3):
        assert message.startswith("A sequence of 3 positions cannot be shared by sp * tp (4) ranks")
