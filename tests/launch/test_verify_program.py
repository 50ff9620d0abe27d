"""moeweave-verify: the proof alone, on any model and plan, and that it notices what is wrong."""

import json

import pytest
import torch

from moeweave.launch.schema import BatchConfig
from moeweave.launch.verify import make_batch
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.hf.build import build_model
from programs import run


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=mixtral", "model.overrides.output_router_logits=true"],
        ["model=gpt_oss", "mesh.dp=4", "mesh.ep=2"],
        ["model=olmoe", "mesh.dp=2", "mesh.dp_replicate=2", "plan.dispatcher=alltoall", "plan.recompute=true"],
        ["model=qwen2_moe", "plan.data=ddp"],
        ["model=mixtral", "mesh.dp=2", "mesh.ep=2", "plan.data=zero3"],
    ],
    ids=str,
)
def test_models_meshes_and_plans_are_proven(tmp_path, arguments):
    done = run("verify", *arguments, "mesh.device=cpu", cwd=tmp_path)
    assert (done.code, done.left) == (0, ()), done.err + done.out
    assert "equal: largest relative error" in done.out
    assert "tolerance 1e-05" in done.out
    assert list(tmp_path.iterdir()) != []  # only what the test itself captured
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_replicas_of_experts_are_proven(tmp_path):
    blocks = find_moe_blocks(build_model("qwen3_moe", device="meta"))
    slots = [0, 1, 2, 3, 0, 4, 5, 6, 7, 0, 4, 4]
    (tmp_path / "placement.json").write_text(json.dumps({block.path: slots for block in blocks}))
    for more in ([], ["plan.data=ddp"]):
        given = ["model=qwen3_moe", "mesh.dp=4", "mesh.ep=2", "mesh.device=cpu", "plan.placement=placement.json", *more]
        done = run("verify", *given, cwd=tmp_path)
        assert (done.code, done.left) == (0, ()), done.err + done.out
        assert "equal: largest relative error" in done.out
    refused = run(
        "verify",
        "model=qwen3_moe",
        "mesh.dp=2",
        "mesh.ep=2",
        "plan.placement=placement.json",
        "plan.data=zero1",
        cwd=tmp_path,
    )
    assert refused.code == 2
    assert "Plan.placement must be None with Plan(data='zero1'), or use data='fsdp2'." in refused.err


def test_a_config_file_is_taken_at_its_own_sizes(tmp_path):
    config = dict(model_type="mixtral", hidden_size=40, intermediate_size=24, num_hidden_layers=1, vocab_size=50)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=6)
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("verify", f"model={tmp_path}", "mesh.ep=2", "mesh.device=cpu", "show=100", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "1 MoE layers of 6 experts" in done.out


def test_a_gradient_that_differs_is_found_and_named(tmp_path):
    done = run(
        "launch_cases", "verify", "scale_one_gradient", "model=qwen3_moe", "mesh.device=cpu", "show=1", cwd=tmp_path
    )
    assert done.code == 1
    assert "NOT equal: largest relative error 1.00e-03, tolerance 1e-05" in done.out
    assert "model.layers.1.self_attn.q_proj" in done.out


def test_the_batch_differs_between_ranks_and_is_unequally_padded():
    batches = [make_batch(BatchConfig(rows=3, length=16), 50, 0, rank) for rank in range(2)]
    counts = [(batch["labels"] != -100).sum().item() for batch in batches]
    assert counts[0] != counts[1]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    for batch in batches:
        assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
