"""LoRA by peft on wrapped experts, attention and router: gradients of the adapters against the unwrapped model."""

import functools

import pytest
import torch

import moeweave as mw
from hf_zoo import ZOO, make_batch
from run_ranks import run_ranks

TARGETS = {
    "mixtral": (["q_proj", "v_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "gpt_oss": (["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "qwen2_moe": (["q_proj", "o_proj"], ["mlp.experts.down_proj"]),
}


def build(name: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    modules, params = TARGETS[name]
    torch.manual_seed(7)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=modules, target_parameters=params, init_lora_weights=False)
    return get_peft_model(ZOO[name](), config)


def parity(name: str, sizes: dict, plan: dict) -> tuple[mw.ParityReport, int]:
    report = mw.gradient_parity(
        functools.partial(build, name), functools.partial(make_batch, name), mw.Mesh(**sizes), mw.Plan(**plan)
    )
    return report, sum("lora" in param for param in report.errors)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("ranks", "sizes", "plan"),
    [
        pytest.param(2, {"dp": 2, "ep": 2}, {}, id="ep2"),
        pytest.param(2, {"dp": 2}, {}, id="ep1"),
        pytest.param(4, {"dp": 4, "ep": 2}, {}, id="ep2-edp2"),
        pytest.param(2, {"sp": 2, "ep": 2}, {"recompute": True}, id="sp2-recompute"),
        pytest.param(2, {"dp": 2, "ep": 2}, {"data": "ddp", "recompute": True}, id="ddp-recompute"),
    ],
)
def test_adapters_get_the_gradients_of_the_unwrapped_model(name, ranks, sizes, plan):
    for report, num_adapters in run_ranks(ranks, parity, name, sizes, plan):
        # Two factors for each targeted projection of each of the layers, and nothing but adapters.
        assert num_adapters == len(report.errors) >= 4 * len(TARGETS[name][1])
        assert report.ok, (report.worst_name, report.worst, report.loss_error)


def losses_with_and_without_adapter() -> tuple[float, float, float]:
    mesh = mw.Mesh(dp=2, ep=2)
    model = mw.parallelize(build("mixtral"), mesh)
    plain = mw.parallelize(ZOO["mixtral"](), mesh)
    batch = make_batch("mixtral", mesh.data_rank)
    with torch.no_grad():
        adapted = model(**batch).loss.item()
        with model.disable_adapter():
            without = model(**batch).loss.item()
        return adapted, without, plain(**batch).loss.item()


def test_disabled_adapter_is_the_plain_model():
    for adapted, without, plain in run_ranks(2, losses_with_and_without_adapter):
        assert without == plain
        assert adapted != plain
