"""Whole models side by side: the words that name methods, the figures, and the program on two CPU ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from moeweave.launch.compare import figures, models, quickstart
from moeweave.launch.compare.methods import check, defaults, parse
from moeweave.launch.compare.on_ranks import Job, measure
from moeweave.launch.schema import ConfigError
from moeweave.parallel.footprint import Footprint, Unit
from moeweave.parallel.mesh import MeshSizes
from programs import run
from run_ranks import run_ranks

SMALL = dict(vocab_size=64, hidden_size=32, moe_intermediate_size=16, intermediate_size=32, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2)


def test_words_name_meshes_and_plans() -> None:
    assert parse("dp2tp2ep4").sizes == MeshSizes(dp=2, tp=2, ep=4)
    assert parse("rep2dp4ep2etp2").sizes == MeshSizes(dp_replicate=2, dp=4, ep=2, etp=2)
    overlapped = parse("dp4ep4:overlap=microbatch,overlap_min_tokens=0")
    assert overlapped.plan == {"overlap": "microbatch", "overlap_min_tokens": 0} and not overlapped.rival
    assert parse("hf:dp4ep2").rival and parse("hf:dp4ep2").sizes == MeshSizes(dp=4, ep=2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dp4xp2", "must be axes with sizes"),
        ("dp2dp2", "must be axes with sizes"),
        ("", "must be axes with sizes"),
        ("dp4ep3", "with etp=1, ep can be 1, 2, 4"),
        ("dp4ep4:overlap=both", "Plan.overlap ('both') must be one of"),
        ("dp4ep4:dispacher=alltoall", "dispatcher"),
        ("dp2ep2", "must equal the number of ranks"),
        ("hf:pp2dp2", "transformers has no pp"),
    ],
)
def test_what_cannot_run_is_refused_by_name(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match="method") as caught:
        check(parse(word), 4, "train")
    assert said.lower() in str(caught.value).lower() and repr(word) in str(caught.value)


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (models.main, ["--show", "missing.json"], "No such file"),
        (models.main, ["--show", "other.json"], "holds no methods"),
        (models.main, ["--show", "."], "Is a directory"),
        (models.main, ["--out", "missing/found.json"], "no file can be written there"),
        (quickstart.main, ["ep", "--out", "."], "no file can be written there"),
    ],
)
def test_files_are_checked_before_anything_is_measured(main, words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["train", "prefill"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_kept_methods_fit_their_ranks(ranks: int, what: str) -> None:
    methods = [parse(word) for word in defaults(ranks, what)]
    for method in methods:
        check(method, ranks, what)
    if (ranks, what) == (4, "train"):
        assert len({method.sizes for method in methods}) >= 6


def test_tokens_need_what_the_model_is_made_of() -> None:
    found = Footprint(Unit(whole=1000), [Unit(whole=10, active=5)] * 3, Unit(whole=7), 4, 9, 2, 1, 2)
    config = SimpleNamespace(num_attention_heads=2, head_dim=3)
    attention = 3 * 2 * (2 * 3) * 100  # scores and sums, 2 products each, over half of 100 positions, in 3 layers
    assert figures.flops_of_token(found, config, 100, "train") == 3 * (2 * (3 * 15 + 7) + attention)
    assert figures.flops_of_token(found, config, 100, "prefill") == 2 * 45 + attention


def rows() -> list[dict[str, Any]]:
    common = dict(loss=2.0, norm=1.0, peak_bytes=3_000_000_000, device="NVIDIA H100 80GB HBM3")
    return [
        {"name": "hf:dp2ep2", "seconds": [4.0, 4.0, 4.0], **common},
        {"name": "dp2ep2:overlap=microbatch", "seconds": [1.0, 1.0, 1.0], **common},
        {"name": "dp2ep2", "seconds": [2.0, 2.0, 2.0], **common},
        {"name": "tp2", "seconds": [1.0, 1.0, 1.0], **common, "norm": 1.1},
        {"name": "pp2", "reason": "out of | memory"},
        {"name": f"hf:dp2ep2{figures.AGAIN}", "seconds": [5.0, 5.0, 5.0], **common},
    ]


def test_ratios_are_of_medians_and_both_runs_of_the_rival_count() -> None:
    found = rows()
    figures.complete(found, tokens=1000, flops=1e9, dtype="bfloat16")
    rival, overlapped, plain, off, failed, again = found
    assert plain["tokens_per_second"] == 500 and plain["utilisation"] == pytest.approx(500e9 / 989e12)
    assert plain["over_rival"]["ratio"] == pytest.approx(2.25) and 2 <= plain["over_rival"]["low"] <= 2.25
    assert overlapped["over_plain"] == {"ratio": 2.0, "low": 2.0, "high": 2.0} and "over_plain" not in plain
    assert again["over_first"]["ratio"] == 0.8 and "over_rival" not in rival
    assert "norm 1.1" in off["reason"] and "over_rival" not in off and "over_rival" not in failed


def test_the_table_has_a_line_for_each_method_and_says_why_one_is_missing() -> None:
    found = rows()
    figures.complete(found, tokens=1000, flops=1e9, dtype="bfloat16")
    about = dict(what="train", model="m", layers=2, sequences=2, seq_length=8, dtype="bfloat16", recompute=True)
    text = figures.markdown({**about, "ranks": 2, "steps": 3, "methods": found})
    assert "m with 2 layers, 2 sequences of 8 a rank, bfloat16, recompute, 2 x NVIDIA H100" in text
    assert "| dp2ep2, overlap=microbatch | 1,000 | 3.0 | 0.1 % | 4.50 | 4.00 - 5.00 | 2.00 |" in text
    assert "| pp2 | out of / memory |  |  |  |  |  |" in text
    assert text.count("\n|") == 2 + len(found)


def test_the_program_compares_and_goes_on_past_what_fails(tmp_path) -> None:
    sizes = ["--ranks", "2", "--device", "cpu", "--model", "qwen3_moe_small", "--layers", "2", "--seq-length", "32"]
    few = ["--warmup", "1", "--steps", "1", "--dtype", "float32", "--out", "found.json"]
    methods = ["--methods", "dp2ep2", "pp2:schedule=interleaved"]
    done = run("moeweave.launch.compare.models", *sizes, *few, *methods, cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert "found.partial" not in [path.name for path in tmp_path.iterdir()]
    rival, ours, failed, again = found["methods"]
    names = ["hf:dp2ep2", "dp2ep2", "pp2:schedule=interleaved", f"hf:dp2ep2{figures.AGAIN}"]
    assert [row["name"] for row in found["methods"]] == names
    assert "stages" in failed["reason"] and "seconds" not in failed
    for row in (rival, ours, again):
        assert "reason" not in row and row["tokens_per_second"] > 0 and len(row["seconds"]) == 1, row
    assert max(ours["loss_off"], ours["norm_off"]) <= 1e-5 and ours["norm"] > 0
    assert ours["over_rival"]["ratio"] > 0 and again["over_first"]["ratio"] > 0 and ours["balance"] >= 1
    assert found["versions"]["torch"] and found["git"] and "--layers 2" in found["command"]
    assert "| pp2, schedule=interleaved | " in done.out and "2/4 dp2ep2: " in done.out


def prefill(words: list[str]) -> list[dict[str, Any]]:
    job = Job("prefill", "qwen3_moe", SMALL, "float32", "cpu", sequences=2, seq_length=24, warmup=1, steps=1)
    return [measure(parse(word), job) for word in words]


@pytest.mark.transformers("5.23", "transformers' own all-to-all expert parallelism")
def test_prefill_gives_the_same_logits_however_it_is_spread() -> None:
    words = ["hf:dp2ep2", "dp2ep2:overlap=microbatch,overlap_min_tokens=0", "tp2ep2", "sp2"]
    for found in run_ranks(2, prefill, words):
        for row in found[1:]:
            assert row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
            assert row["norm"] == pytest.approx(found[0]["norm"], rel=1e-5)
            assert row["seconds"][0] > 0


def first_steps(words: list[str], seed: int) -> list[dict[str, Any]]:
    job = Job("train", "qwen3_moe", SMALL, "float32", "cpu", sequences=1, seq_length=8, warmup=1, steps=1, seed=seed)
    return [measure(parse(word), job) for word in words]


def test_a_step_is_the_same_on_every_mesh_and_another_with_other_weights() -> None:
    for found in run_ranks(2, first_steps, ["dp2ep2", "pp2", "tp2ep2"], 0):
        for row in found[1:]:
            assert (row["loss"], row["norm"]) == pytest.approx((found[0]["loss"], found[0]["norm"]), rel=1e-5)
    (other,) = run_ranks(2, first_steps, ["dp2ep2"], 1)[0]
    assert abs(other["norm"] / found[0]["norm"] - 1) > 1e-3
