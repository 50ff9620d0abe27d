"""Hugging Face folders in and out of wrapped models: bitwise the same weights, each rank its own share."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import moeweave as mw
from hf_zoo import CORE, ZOO, make_batch
from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.hf.boxes import box_slices, local_pieces
from run_ranks import run_ranks

pytestmark = pytest.mark.ranks(2)

EP2 = dict(dp=2, ep=2)
# Experts over 2 ranks and their copies over 2 more; the same with every copy whole; dense parameters over 4 ranks.
FOUR = {"ep2edp2": dict(dp=4, ep=2), "hsdp": dict(dp=2, dp_replicate=2, ep=2), "ep4": dict(dp=4, ep=4)}


def write_reference(name: str, folder: Path, **changes: Any) -> Any:
    """The zoo's model, saved by transformers itself in several files."""
    model = ZOO[name](**changes).eval()
    model.save_pretrained(folder, max_shard_size="30KB")
    return model


def wrap(name: str, mesh: dict[str, int], plan: dict[str, Any]) -> Any:
    return mw.parallelize(ZOO[name](), mw.Mesh(**mesh, device="cpu"), mw.Plan(**plan))


def assert_holds(model: Any, reference: Any) -> None:
    """Every parameter and buffer of `model`, computed ones included, is this rank's part of the reference's."""
    wanted = {**dict(reference.named_parameters(remove_duplicate=False)), **dict(reference.named_buffers())}
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        for box, view in local_pieces(tensor):
            assert torch.equal(view, wanted[name].detach()[box_slices(box)]), name


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_weights(folder: Path, reference: Path) -> None:
    found, wanted = read_folder(folder), read_folder(reference)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


# ---- export


def export(name: str, mesh: dict[str, int], plan: dict[str, Any], folder: str, size: str) -> list[str]:
    mw.save_pretrained(wrap(name, mesh, plan), folder, max_shard_size=size)
    return sorted(path.name for path in Path(folder).iterdir())


def assert_loads_in_transformers(folder: Path, reference: Any) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(8, 24).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("name", CORE)
def test_export_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    reference = write_reference(name, tmp_path / "reference")
    listings = run_ranks(2, export, name, EP2, {}, str(tmp_path / "out"), "20KB")
    assert len({tuple(names) for names in listings}) == 1
    assert_same_weights(tmp_path / "out", tmp_path / "reference")
    assert_loads_in_transformers(tmp_path / "out", reference)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "reference" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == theirs["metadata"]
    config, their_config = (
        json.loads((tmp_path / which / "config.json").read_text()) for which in ("out", "reference")
    )
    assert config == their_config


@pytest.mark.parametrize("plan", [{}, {"data": "ddp"}], ids=["fsdp2", "ddp"])
@pytest.mark.parametrize("mesh", FOUR.values(), ids=FOUR)
def test_export_from_four_ranks(mesh: dict[str, int], plan: dict[str, Any], tmp_path: Path) -> None:
    for name in ("qwen2_moe", "gpt_oss"):
        reference = write_reference(name, tmp_path / name / "reference")
        run_ranks(4, export, name, mesh, plan, str(tmp_path / name / "out"), "1GB")
        assert_same_weights(tmp_path / name / "out", tmp_path / name / "reference")
        assert_loads_in_transformers(tmp_path / name / "out", reference)


def test_ranks_write_their_own_experts(tmp_path: Path) -> None:
    run_ranks(2, export, "qwen3_moe", EP2, {}, str(tmp_path / "out"), "1GB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 2
    experts = [
        {int(key.split("experts.")[1].split(".")[0]) for key in load_file(f) if ".experts." in key} for f in files
    ]
    assert experts == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.1 * min(sizes)


# ---- import


def load(name: str, mesh: dict[str, int], plan: dict[str, Any], folder: str, changes: dict[str, Any]) -> None:
    mw_mesh = mw.Mesh(**mesh, device="cpu")
    model = mw.from_pretrained(folder, mw_mesh, mw.Plan(**plan), attn_implementation="eager")
    assert not model.training
    assert_holds(model, ZOO[name](**changes))
    wrapped = mw.parallelize(ZOO[name](**changes).eval(), mw_mesh, mw.Plan(**plan))
    batch = make_batch(name, mw_mesh.data_rank)
    assert torch.equal(mw.forward_backward(model, batch), mw.forward_backward(wrapped, batch))
    for (key, param), other in zip(model.named_parameters(), wrapped.parameters(), strict=True):
        if other.grad is not None:  # hooks and engines are in place, too
            for (box, mine), (same_box, theirs) in zip(local_pieces(param.grad), local_pieces(other.grad), strict=True):
                assert box == same_box
                assert torch.equal(mine, theirs), key


@pytest.mark.parametrize("name", CORE)
def test_from_pretrained_fills_every_shard(name: str, tmp_path: Path) -> None:
    write_reference(name, tmp_path)
    run_ranks(2, load, name, EP2, {}, str(tmp_path), {})


@pytest.mark.parametrize("plan", [{}, {"data": "ddp"}], ids=["fsdp2", "ddp"])
@pytest.mark.parametrize("mesh", FOUR.values(), ids=FOUR)
def test_from_pretrained_on_four_ranks(mesh: dict[str, int], plan: dict[str, Any], tmp_path: Path) -> None:
    write_reference("glm4_moe", tmp_path)
    run_ranks(4, load, "glm4_moe", mesh, plan, str(tmp_path), {})


@pytest.mark.parametrize("plan", [{}, {"data": "ddp"}], ids=["fsdp2", "ddp"])
def test_tied_embeddings_stay_tied(plan: dict[str, Any], tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True}
    write_reference("qwen3_moe", tmp_path / "in", **changes)
    assert "lm_head.weight" not in read_folder(tmp_path / "in")
    run_ranks(2, through_tied, str(tmp_path / "in"), str(tmp_path / "out"), plan, changes)
    assert_same_weights(tmp_path / "out", tmp_path / "in")


def through_tied(source: str, target: str, plan: dict[str, Any], changes: dict[str, Any]) -> None:
    load("qwen3_moe", EP2, plan, source, changes)
    model = mw.from_pretrained(source, mw.Mesh(**EP2, device="cpu"), mw.Plan(**plan))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mw.save_pretrained(model, target)


class Counted:
    """Stands in for `safetensors.safe_open`: notes which keys are read through it, and how many bytes."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.bytes = 0
        self.real = safetensors.safe_open

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        opened = self.real(*args, **kwargs)

        def get_slice(key: str) -> CountedSlice:
            return CountedSlice(self, key, opened.get_slice(key))

        handle = SimpleNamespace(keys=opened.keys, get_slice=get_slice)
        return nullcontext(handle)


class CountedSlice:
    def __init__(self, counted: Counted, key: str, real: Any):
        self.counted, self.key = counted, key
        self.real, self.get_shape, self.get_dtype = real, real.get_shape, real.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        value = self.real[index]
        self.counted.keys.add(self.key)
        self.counted.bytes += value.numel() * value.element_size()
        return value


def count_reads(mesh: dict[str, int], folder: str) -> tuple[set[str], int, int]:
    safetensors.safe_open = counted = Counted()  # type: ignore[misc, assignment]
    try:
        model = mw.from_pretrained(folder, mw.Mesh(**mesh, device="cpu"))
    finally:
        safetensors.safe_open = counted.real  # type: ignore[misc]
    held = sum(view.numel() * view.element_size() for p in model.parameters() for _, view in local_pieces(p))
    buffers = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict())
    return counted.keys, counted.bytes, held + buffers


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("ranks, mesh", [(2, EP2), (4, FOUR["ep2edp2"])], ids=["ep2", "ep2edp2"])
def test_a_rank_reads_what_it_holds_and_no_more(name: str, ranks: int, mesh: dict[str, int], tmp_path: Path) -> None:
    write_reference(name, tmp_path)
    for rank, (keys, read, held) in enumerate(run_ranks(ranks, count_reads, mesh, str(tmp_path))):
        assert read == held
        experts = {
            int(key.split(".experts.")[1].split(".")[0]) for key in keys if ".experts." in key and name != "gpt_oss"
        }
        first = 4 * (rank % 2)
        assert experts <= set(range(first, first + 4))


def out_and_in(name: str, folder: str) -> None:
    mw.save_pretrained(wrap(name, EP2, {}), folder, max_shard_size="30KB")
    model = mw.from_pretrained(folder, mw.Mesh(**EP2, device="cpu"))
    assert_holds(model, ZOO[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"diffusion_gemma"}))  # shares weights between units of sharding
def test_every_architecture_out_and_in(name: str, tmp_path: Path) -> None:
    write_reference(name, tmp_path / "reference")
    run_ranks(2, out_and_in, name, str(tmp_path / "out"))
    assert_same_weights(tmp_path / "out", tmp_path / "reference")


# ---- what transformers keeps in another dtype, and other ways in


def load_bf16(folder: str) -> str:
    model = mw.from_pretrained(folder, mw.Mesh(**EP2, device="cpu"))
    bias = next(b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    mw.save_pretrained(model, f"{folder}-again")
    return f"{next(model.parameters()).dtype} {bias.dtype}"


def test_dtypes_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = ZOO["deepseek_v3"]().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.float()
    model.save_pretrained(tmp_path / "in")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    their_bias = next(b for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias"))
    assert (
        run_ranks(2, load_bf16, str(tmp_path / "in")) == [f"{next(theirs.parameters()).dtype} {their_bias.dtype}"] * 2
    )
    theirs.save_pretrained(tmp_path / "theirs")  # from 5.24 on with routers in float32
    assert_same_weights(tmp_path / "in-again", tmp_path / "theirs")


class PlainExperts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(4))
        self.top_k = 2

    def forward(self, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def plain_round_trip(folder: str) -> list[str]:
    """A model that transformers does not know, one expert per ModuleList entry, each rank with its own names."""
    from moeweave.parallel.hf.reader import load_weights

    rank = dist.get_rank()
    with torch.device("meta"):
        model = PlainExperts()
    for index in range(4):
        if index // 2 != rank:
            model.experts._modules[str(index)] = None
    load_weights(Path(folder), model, "cpu")
    whole = read_folder(Path(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name])
    mw.save_pretrained(model, f"{folder}-again")
    return sorted(model.state_dict())


def test_plain_model_with_names_of_its_own_on_each_rank(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(PlainExperts().state_dict(), tmp_path / "in" / "model.safetensors")
    names = run_ranks(2, plain_round_trip, str(tmp_path / "in"))
    assert names[0] != names[1]
    assert_same_weights(tmp_path / "in-again", tmp_path / "in")


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    return get_peft_model(ZOO["mixtral"](), config)


def export_adapters(folder: str, mesh: dict[str, int], plan: dict[str, Any]) -> str:
    model = mw.parallelize(adapted(), mw.Mesh(**mesh, device="cpu"), mw.Plan(**plan))
    mw.save_pretrained(model, folder)
    with pytest.raises(CheckpointError) as error:
        mw.load(f"{folder}-base", model)
    return str(error.value)


@pytest.mark.transformers("5.1", "peft 0.21 cannot load adapters with 5.0")
@pytest.mark.parametrize("plan", [{}, {"data": "ddp"}], ids=["fsdp2", "ddp"])
def test_adapters_are_written_as_peft_reads_them(plan: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    write_reference("mixtral", tmp_path / "out-base")
    assert all(
        "then add the adapters" in error for error in run_ranks(2, export_adapters, str(tmp_path / "out"), EP2, plan)
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(ZOO["mixtral"](), tmp_path / "out").eval()
    ids = torch.arange(8, 24).reshape(2, 8)
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        assert torch.equal(logits, adapted().eval()(input_ids=ids).logits)
        assert not torch.equal(logits, ZOO["mixtral"]().eval()(input_ids=ids).logits)


# ---- bad folders


def load_badly(folder: str) -> str:
    try:
        mw.from_pretrained(folder, mw.Mesh(**EP2, device="cpu"))
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it loaded")


def errors_of(folder: Path) -> str:
    """The one error that all ranks raise."""
    errors = run_ranks(2, load_badly, str(folder), timeout=60)
    assert len(set(errors)) == 1
    return errors[0]


def rewrite(folder: Path, key: str, value: torch.Tensor | None) -> str:
    """Replaces or removes one tensor of a folder; the name of its file."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / index[key])
    tensors.pop(key)
    if value is not None:
        tensors[key] = value
    save_file(tensors, folder / index[key], metadata={"format": "pt"})
    return str(index[key])


EXPERT = "model.layers.1.mlp.experts.5.gate_proj.weight"


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert victim.name in errors_of(tmp_path)


def test_cut_file_is_named(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    error = errors_of(tmp_path)
    assert str(victim) in error
    assert "not a readable safetensors file" in error


def test_wrong_shape_names_file_key_expected_found(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path)
    file = rewrite(tmp_path, "model.norm.weight", torch.zeros(7))
    error = errors_of(tmp_path)
    for part in (file, "model.norm.weight", "(7,)", "expected (32,)"):
        assert part in error


def test_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path)
    rewrite(tmp_path, EXPERT, None)
    assert EXPERT in errors_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    del listing["weight_map"][EXPERT]
    index.write_text(json.dumps(listing))
    assert EXPERT in errors_of(tmp_path)


def test_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path)
    rewrite(tmp_path, EXPERT, torch.zeros(24, 31))
    error = errors_of(tmp_path)
    for part in (str(tmp_path), EXPERT, "(24, 31)", "(24, 32)"):
        assert part in error


def test_folder_of_another_model_lists_what_is_lacking(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path / "a")
    write_reference("mixtral", tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    error = errors_of(tmp_path / "a")
    assert "lacks" in error
    assert "model.layers.0.mlp.experts.down_proj" in error


def test_other_bad_folders(tmp_path: Path) -> None:
    assert "not a folder" in errors_of(tmp_path / "none")
    write_reference("qwen3_moe", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "quantised" in errors_of(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{")
    assert "not an index" in errors_of(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in errors_of(tmp_path / "a")


# ---- replacing folders


def export_twice(folder: str) -> None:

    model = wrap("qwen3_moe", EP2, {})
    mw.save_pretrained(model, folder, max_shard_size="20KB")
    if dist.get_rank() == 0:
        Path(folder, "tokenizer.json").write_text("{}")
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    mw.save_pretrained(model, folder, max_shard_size="1GB")


def test_export_replaces_weights_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    write_reference("qwen3_moe", tmp_path / "reference")
    run_ranks(2, export_twice, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    doubled = {key: value * 2 for key, value in read_folder(tmp_path / "reference").items()}
    found = read_folder(tmp_path / "out")
    assert found.keys() == doubled.keys()
    assert all(torch.equal(found[key], doubled[key]) for key in doubled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]


def fail_on_one_rank(folder: str) -> str:
    import safetensors.torch

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    model = wrap("qwen3_moe", EP2, {})
    real = safetensors.torch.save_file
    if dist.get_rank() == 1:
        safetensors.torch.save_file = full_disk
    try:
        mw.save_pretrained(model, folder, max_shard_size="20KB")
    except OSError as error:
        return str(error)
    finally:
        safetensors.torch.save_file = real
    raise AssertionError("it saved")


def test_a_rank_that_cannot_write_stops_all_and_leaves_the_old_folder(tmp_path: Path) -> None:
    run_ranks(2, export, "qwen3_moe", EP2, {}, str(tmp_path / "out"), "1GB")
    before = read_folder(tmp_path / "out")
    errors = run_ranks(2, fail_on_one_rank, str(tmp_path / "out"), timeout=60)
    assert all("No space left" in error for error in errors)
    after = read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
