"""Models from their config alone: types, files, folders, tiny sizes, overrides, and what is refused."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING

from moeweave.parallel.hf.build import build_model, load_config


def test_a_bare_model_type_is_tiny_unless_asked():
    assert load_config("mixtral").hidden_size == 64
    assert load_config("mixtral", size="given").hidden_size == 4096
    assert load_config("mixtral", {"hidden_size": 32}).hidden_size == 32


def test_a_file_and_a_folder_keep_their_sizes(tmp_path):
    fields = dict(model_type="qwen3_moe", hidden_size=32, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for source in (tmp_path, tmp_path / "config.json"):
        assert load_config(str(source)).hidden_size == 32
        assert load_config(str(source), size="tiny").hidden_size == 64
    fewer = load_config(str(tmp_path), {"num_hidden_layers": 2})
    assert (fewer.num_hidden_layers, len(fewer.layer_types)) == (2, 2)


def test_a_built_model_trains_and_its_weights_follow_the_seed():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model("olmoe"))
    weights = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert models[0].training
    ids_BS = torch.arange(12).view(2, 6)
    assert models[0](input_ids=ids_BS, labels=ids_BS).loss.item() == pytest.approx(5.5, abs=0.5)


HYBRID_AND_LATENT = ["granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "longcat_flash", "qwen3_next", "zaya"]


@pytest.mark.transformers("5.20", "older releases name layer kinds otherwise, or cannot cache them")
@pytest.mark.parametrize("source", ["deepseek_v3", "dots1", "glm4_moe", *HYBRID_AND_LATENT])
def test_tiny_sizes_train_on_a_padded_batch(source):
    if source not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {source}")
    torch.manual_seed(0)
    model = build_model(source)
    assert sum(param.numel() for param in model.parameters()) < 5e6
    ids_BS = torch.randint(3, 200, (2, 32))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, -9:] = 0
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS).loss.backward()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_a_model_of_several_parts_takes_tiny_sizes_in_its_parts():
    config = load_config("qwen3_vl_moe")
    assert config.text_config.hidden_size == 64
    assert load_config("qwen3_vl_moe", {"text_config": {"hidden_size": 32}}).text_config.hidden_size == 32


@pytest.mark.parametrize(
    "source, overrides, message",
    [
        ("mixtrl", {}, "Nearest: mixtral"),
        ("no/such/folder", {}, "models are not downloaded"),
        ("mixtral", {"hiden_size": 3}, "Nearest: hidden_size"),
        ("qwen3_vl_moe", {"text_config": {"hiden_size": 3}}, "Nearest: hidden_size"),
        pytest.param(
            "mixtral",
            {"num_attention_heads": "four"},
            "refuses its tiny sizes",
            marks=pytest.mark.transformers("5.1", "configs do not check types in 5.0"),
        ),
    ],
)
def test_what_cannot_be_built_is_refused(source, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(source, overrides, device="meta")


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without a config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no field model_type"):
        load_config(str(tmp_path))
    with pytest.raises(ValueError, match="Use one of auto, tiny, given"):
        load_config("mixtral", size="small")
