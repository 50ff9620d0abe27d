"""moeweave-inspect: what it says of a model is what the model is, and what a mesh really does with it."""

import pytest
import torch
from torch.distributed.tensor import DTensor

import moeweave as mw
from moeweave.launch import report
from moeweave.launch.inspect import main
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.hf.build import build_model
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan
from run_ranks import run_ranks


def inspect(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "160")
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_real_sizes_of_a_large_model_are_counted_without_memory(capsys, monkeypatch):
    code, out, _ = inspect(capsys, monkeypatch, "deepseek_v3", "--dp", "64", "--ep", "32", "--dtype", "bfloat16")
    assert code == 0
    assert "671,026,404,352" in out  # all parameters
    assert "37,552,282,624" in out  # those of a token
    for shown in (": 256, 8 to each token", "model.layers.{3-60}.mlp.experts", "DeepseekV3TopkRouter"):
        assert shown in out
    for shown in ("[256, 4096, 7168] bfloat16", "shared_experts (DeepseekV3MLP)", "e_score_correction_bias"):
        assert shown in out
    assert "experts over ep=32, then FSDP2 over edp=2" in out


@pytest.mark.transformers("5.1", "experts do not say in 5.0 whether gate and up are interleaved")
@pytest.mark.parametrize(
    "model_type, shown",
    [
        ("gpt_oss", ["interleaved", "[expert, in, out]", "gate_up_proj_bias", "fast path"]),
        ("qwen2_moe", ["shared_expert (Qwen2MoeMLP)", "as two halves", "[expert, out, in]"]),
        ("llama", ["no mixture-of-experts blocks"]),
    ],
)
def test_layout_bias_and_shared_experts_are_shown(capsys, monkeypatch, model_type, shown):
    code, out, _ = inspect(capsys, monkeypatch, model_type, "--size", "tiny")
    assert code == 0
    for text in shown:
        assert text in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["switch_transformers", "--size", "tiny"], "refused: encoder.block.1.layer.1.mlp.experts (SwitchTransformers"),
        (["mixtrl"], "Nearest: mixtral"),
        (["mixtral", "--dp", "6", "--ep", "4"], "ep can be 1, 2, 3, 6"),
        (["mixtral", "--dp", "16", "--ep", "16"], "ep (16) must divide the number of experts (8)"),
        (["mixtral", "--set", "hiden_size=3"], "Nearest: hidden_size"),
        (["mixtral", "--set", "hidden_size"], "must be FIELD=VALUE"),
    ],
)
def test_a_refusal_gives_the_reason(capsys, monkeypatch, arguments, message):
    code, out, err = inspect(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_meshes_are_suggested(capsys, monkeypatch):
    code, out, _ = inspect(
        capsys, monkeypatch, "mixtral", "--dtype", "bfloat16", "--world", "16", "--tokens", "1048576"
    )
    assert code == 0
    assert "Meshes of 16 ranks, 80 GiB each" in out
    assert "ep=8" in out
    code, _, err = inspect(capsys, monkeypatch, "mixtral", "--world", "2")
    assert code == 2
    assert "the leanest mesh" in err


def test_help_has_worked_command_lines(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "moeweave-inspect deepseek_v3 --dp 64 --ep 32" in capsys.readouterr().out


def held_by_rank(sizes, data):
    """Bytes of this rank's experts and of the rest, once wrapped."""
    model = mw.parallelize(build_model("mixtral"), mw.Mesh(**sizes, device="cpu"), Plan(data=data))
    held = {"experts": 0, "the rest": 0}
    for name, param in model.named_parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        held["experts" if ".experts." in name else "the rest"] += local.numel() * local.element_size()
    return held


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "sizes, data",
    [
        (dict(dp=4, ep=2), "fsdp2"),
        (dict(dp=4, ep=4), "fsdp2"),
        (dict(dp=2, dp_replicate=2, ep=2), "fsdp2"),
        (dict(dp=4, ep=2), "ddp"),
        (dict(dp=4), "fsdp2"),
        (dict(dp=2, tp=2, ep=4), "fsdp2"),
        (dict(dp=2, pp=2, ep=2), "fsdp2"),
    ],
    ids=str,
)
def test_the_memory_it_says_is_the_memory_a_rank_holds(sizes, data):
    held = run_ranks(4, held_by_rank, sizes, data)
    model = build_model("mixtral", device="meta")
    said = report.memory(model, find_moe_blocks(model), MeshSizes(**sizes), Plan(data=data))
    for name, (weights, gradients, adam, total) in said:
        if name != "all":
            # Shards differ by what does not divide evenly.
            assert weights == pytest.approx(max(rank[name] for rank in held), rel=0.02)
        assert (gradients, adam, total) == (weights, 2 * weights, 4 * weights)


@pytest.mark.parametrize(
    "number, text", [(1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_are_said_for_people(number, text):
    assert report.gib(number) == text


def test_paths_that_count_up_are_one():
    assert report.common_path(["m.0.x", "m.1.x", "m.2.x"]) == "m.{0-2}.x"
    assert report.common_path(["m.1.x", "m.3.x"]) == "m.{1,3}.x"
    assert report.common_path(["m.x"]) == "m.x"


def test_meta_models_allocate_nothing():
    assert all(param.device == torch.device("meta") for param in build_model("mixtral", device="meta").parameters())
