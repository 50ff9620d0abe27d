"""Training checkpoints: the same numbers go on, on any mesh, and no interruption or damage goes unnoticed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moeweave as mw
from hf_zoo import ZOO, make_batch
from moeweave.parallel import checkpoint as under_test
from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.checkpoint import latest, load, save
from moeweave.parallel.names import named_params, named_state
from moeweave.parallel.packing import pack, tensor_names, unpack
from run_ranks import RankError, run_ranks

pytestmark = pytest.mark.ranks(2)

FSDP, DDP = {}, {"data": "ddp"}
EP2 = dict(dp=2, ep=2)
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "one": (1, dict(dp=1), FSDP),
    "fsdp2": (2, dict(dp=2), FSDP),
    "ep2": (2, EP2, FSDP),
    "ep2ddp": (2, EP2, DDP),
    "ep4": (4, dict(dp=4, ep=4), FSDP),
    "ep2edp2": (4, dict(dp=4, ep=2), FSDP),
    "ep2edp2ddp": (4, dict(dp=4, ep=2), DDP),
    "hsdp": (4, dict(dp=2, dp_replicate=2, ep=2), FSDP),
}


class ListedExperts(nn.Module):
    """Experts in a ModuleList: under expert parallelism each rank has names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        for at, expert in enumerate(self.experts):
            out_TD = out_TD + (weights_TK * (ids_TK == at)).sum(1, keepdim=True) * expert(hidden_TD)
        return out_TD


class ListedModel(nn.Module):
    """A plain model; its bias of 3 leaves some of four ranks without a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = ListedExperts()
        self.head = nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.gate(x_TD).softmax(-1).topk(2)
        return self.head(self.experts(x_TD, ids_TK, weights_TK)).square().mean()


def build(kind: str, seed: int) -> nn.Module:
    """The zoo's model or the plain one; another seed, other weights."""
    torch.manual_seed(seed)
    if kind == "listed":
        return ListedModel()
    model = ZOO[kind]()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * seed)
    return model


def prepare(kind: str, layout: str, seed: int, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    _, mesh, plan = LAYOUTS[layout]
    model = mw.parallelize(build(kind, seed), mw.Mesh(**mesh, device="cpu"), mw.Plan(**plan))
    options = {"lr": 1e-2, "betas": (0.8, 0.9), **options}
    return model, torch.optim.AdamW(mw.param_groups(model, **options))


def step(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step whose data and dropout come from the random number generators."""
    if kind == "listed":
        loss = model(torch.randn(6, 8))
    else:
        batch = make_batch(kind, dist.get_rank() + random.randrange(1000) + int(np.random.randint(1000)))  # noqa: NPY002
        loss = mw.forward_backward(model, batch)
    if kind == "listed":
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state, whole, by name; of names that this rank has."""
    found = {name: whole(tensor) for name, tensor in named_state(model).items()}
    for name, param in named_params(model).items():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}/{key}"] = whole(value)
    return found


def merge(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ranks hold together; what several have must be the same."""
    merged: dict[str, Tensor] = {}
    for one in results:
        for name, value in one.items():
            assert torch.equal(merged.setdefault(name, value), value), name
    return merged


# ---- going on


def train_and_save(kind: str, layout: str, folder: str) -> list[float]:
    model, optimizer = prepare(kind, layout, seed=0)
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())  # noqa: NPY002
    for _ in range(2):
        step(kind, model, optimizer)
    path = save(folder, model, optimizer, step=2, extra={"rank": dist.get_rank(), "at": (1, torch.tensor([0.1]))})
    assert str(path) == folder
    return [step(kind, model, optimizer) for _ in range(3)]


def load_and_train(kind: str, layout: str, folder: str) -> list[float]:
    model, optimizer = prepare(kind, layout, seed=5, lr=9.0)
    loaded = load(folder, model, optimizer)
    assert loaded.step == 2
    assert loaded.rng_restored
    assert loaded.world_size == dist.get_world_size()
    assert loaded.extra["rank"] == dist.get_rank()
    assert loaded.extra["at"] == (1, torch.tensor([0.1]))
    assert all(group["lr"] == 1e-2 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    return [step(kind, model, optimizer) for _ in range(3)]


@pytest.mark.parametrize("layout", ["ep2", "ep2ddp", "ep2edp2", "hsdp"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "listed"])
def test_going_on_is_bit_identical(kind: str, layout: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout][0]
    unbroken = run_ranks(ranks, train_and_save, kind, layout, str(tmp_path / "a"))
    resumed = run_ranks(ranks, load_and_train, kind, layout, str(tmp_path / "a"))
    assert resumed == unbroken
    assert len({loss for losses in unbroken for loss in losses}) >= 3  # or equal losses would prove nothing


# ---- other meshes


def train_save_and_tell(kind: str, layout: str, folder: str) -> dict[str, Tensor]:
    model, optimizer = prepare(kind, layout, seed=0)
    torch.manual_seed(dist.get_rank())
    step(kind, model, optimizer)
    save(folder, model, optimizer, step=1, extra=dist.get_rank())
    return everything(model, optimizer)


def load_and_tell(kind: str, layout: str, folder: str) -> dict[str, Tensor]:
    model, optimizer = prepare(kind, layout, seed=5)
    before = torch.get_rng_state()
    loaded = load(folder, model, optimizer)
    if not loaded.rng_restored:
        assert torch.equal(before, torch.get_rng_state())
    assert loaded.extra == dist.get_rank() % loaded.world_size
    found = everything(model, optimizer)
    step(kind, model, optimizer)
    return found


CHANGES = {
    "ep4": ["ep2", "one", "ep2edp2ddp"],
    "ep2": ["one", "ep4", "ep2ddp", "fsdp2"],
    "ep2edp2": ["ep4", "hsdp", "ep2", "one"],
    "ep2edp2ddp": ["hsdp", "ep4", "one"],
    "hsdp": ["ep2", "ep2edp2ddp"],
    "one": ["ep4", "ep2edp2"],
}


@pytest.mark.parametrize(
    "kind, source",
    [("qwen3_moe", source) for source in CHANGES if source != "ep2"]
    + [("listed", s) for s in ("ep4", "ep2", "ep2edp2")],
)
def test_loads_on_another_mesh(kind: str, source: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    saved = merge(run_ranks(LAYOUTS[source][0], train_save_and_tell, kind, source, folder))
    assert sum(name.endswith("/exp_avg") for name in saved) > 5
    for target in CHANGES[source]:
        loaded = merge(run_ranks(LAYOUTS[target][0], load_and_tell, kind, target, folder))
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def load_on_meta(layout: str, folder: str) -> dict[str, Tensor]:
    _, mesh, plan = LAYOUTS[layout]
    small = ZOO["qwen3_moe"](tie_word_embeddings=True)
    with torch.device("meta"):
        model = type(small)(small.config)
    model = mw.parallelize(model, mw.Mesh(**mesh, device="cpu"), mw.Plan(**plan))
    optimizer = torch.optim.AdamW(mw.param_groups(model))
    load(folder, model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    computed = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    wanted = dict(ZOO["qwen3_moe"]().named_buffers())
    assert computed
    assert all(torch.equal(buffer, wanted[name]) for name, buffer in computed.items())
    found = {name: whole(tensor) for name, tensor in named_state(model).items()}
    mw.forward_backward(model, make_batch("qwen3_moe", dist.get_rank()))
    usual = mw.parallelize(small, mw.Mesh(**mesh, device="cpu"), mw.Plan(**plan))
    load(folder, usual)
    mw.forward_backward(usual, make_batch("qwen3_moe", dist.get_rank()))
    for param, other in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(whole(param.grad), whole(other.grad))
    optimizer.step()  # it was made before the parameters had memory, and holds them still
    assert not torch.equal(whole(model.lm_head.weight), found["lm_head.weight"])
    return found


def save_tied(folder: str) -> dict[str, Tensor]:
    model = mw.parallelize(ZOO["qwen3_moe"](tie_word_embeddings=True), mw.Mesh(**EP2, device="cpu"))
    save(folder, model)
    if dist.get_rank() == 0:
        ZOO["qwen3_moe"](tie_word_embeddings=True).save_pretrained(f"{folder}-hf")
    return {name: whole(tensor) for name, tensor in named_state(model).items()}


@pytest.mark.transformers("5.1", "5.0 leaves the tied weights of a model on meta untied")
@pytest.mark.parametrize("layout", ["ep2", "ep2ddp", "ep2edp2", "ep2edp2ddp"])
def test_model_built_on_meta(layout: str, tmp_path: Path) -> None:
    saved = merge(run_ranks(2, save_tied, str(tmp_path / "a")))
    for folder in ("a", "a-hf"):  # a checkpoint, and a Hugging Face folder
        loaded = merge(run_ranks(LAYOUTS[layout][0], load_on_meta, layout, str(tmp_path / folder)))
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


# ---- interruptions


def save_once(folder: str, number: int, **options: Any) -> None:
    model, optimizer = prepare("listed", "ep2", seed=number)
    save(Path(folder, f"step-{number}"), model, optimizer, step=number, extra=number, **options)


def die_while_saving(folder: str, number: int, where: str) -> None:
    """Rank 0 is killed when the save gets to `where`."""

    def die(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    real = Path.rename

    def die_between_renames(path: Path, target: Path) -> Path:
        return die() if "moeweave-saving" in path.name else real(path, target)

    if dist.get_rank() == 0:
        if where == "between renames":
            Path.rename = die_between_renames  # type: ignore[method-assign, assignment]
        else:
            setattr(under_test, where, die)
    save_once(folder, number)


def step_of(folder: str) -> int:
    model, optimizer = prepare("listed", "ep2", seed=9)
    return load(latest(folder) or "none", model, optimizer).step


@pytest.mark.parametrize(
    "where", ["checksum", "write_manifest", "publish", "between renames", "mark_complete", "settle"]
)
@pytest.mark.parametrize("again", [False, True], ids=["next", "same"])
def test_killed_save_hides_nothing(where: str, again: bool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(2, save_once, folder, 1)
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(2, die_while_saving, folder, 1 if again else 2, where, timeout=60)
    done = where == "settle" and not again
    assert run_ranks(2, step_of, folder) == [2 if done else 1] * 2
    run_ranks(2, save_once, folder, 3)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []
    assert run_ranks(2, step_of, folder) == [3, 3]


def keep_three(folder: str) -> None:
    for number in (1, 2, 3, 10, 11):
        save_once(folder, number, keep_last=3)


def test_keeps_the_last(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    run_ranks(2, keep_three, str(tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step-10", "step-11", "step-3"]
    assert latest(tmp_path) == tmp_path / "step-11"
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path / "notes") is None


def save_where_it_cannot(folder: str) -> list[str]:
    model, _ = prepare("listed", "ep2", seed=0)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    attempts: list[Callable[[], Any]] = [
        lambda: save(Path(folder, "file", "a"), model),
        lambda: save(Path(folder, "file"), model),
        lambda: save(Path(folder, "b"), model, extra={"data": [1, object() if dist.get_rank() else 2]}),
        lambda: save(Path(folder, "b"), model, stranger),
        lambda: save(Path(folder, "b"), model, keep_last=0),
    ]
    return [error_of(attempt) for attempt in attempts]


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no error")


def test_what_cannot_be_saved_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    errors, others = run_ranks(2, save_where_it_cannot, str(tmp_path), timeout=60)
    assert errors == others
    for error, part in zip(
        errors,
        [
            "cannot be written",
            "is a file",
            "extra'\\]['data'\\][1] is of type object",
            "not the model's",
            "keep_last (0)",
        ],
        strict=True,
    ):
        assert part.replace("\\", "") in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


# ---- damage, and checkpoints of something else


def load_badly(folder: str, kind: str = "listed", optimizer_kind: str = "AdamW") -> str:
    model, optimizer = prepare(kind, "ep2", seed=0)
    if optimizer_kind != "AdamW":
        optimizer = getattr(torch.optim, optimizer_kind)(mw.param_groups(model), lr=0.1)
    before = everything(model, optimizer)
    error = error_of(lambda: load(folder, model, optimizer))
    after = everything(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return error


def the_error(*args: Any) -> str:
    errors = run_ranks(2, load_badly, *args, timeout=60)
    assert len(set(errors)) == 1
    return errors[0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run_ranks(2, save_once, str(tmp_path), 1)
    return tmp_path / "step-1"


def test_damage_is_found_and_named(saved: Path, tmp_path: Path) -> None:
    data = saved / "__1_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    assert f"{data} has {len(content) - 10} bytes, expected {len(content)}" in the_error(str(saved))
    assert latest(tmp_path) is None
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    data.write_bytes(flipped)
    assert f"{data} is damaged: checksum" in the_error(str(saved))
    data.unlink()
    assert f"{data} is missing" in the_error(str(saved))
    data.write_bytes(content)
    manifest = saved / "moeweave.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    assert f"{manifest} is damaged" in the_error(str(saved))
    (saved / "complete").unlink()
    assert "incomplete" in the_error(str(saved))
    manifest.unlink()
    assert "written with torch.distributed.checkpoint" in the_error(str(saved)).replace("wrote", "written")
    shutil.rmtree(saved)
    assert f"no checkpoint at {saved}" in the_error(str(saved))


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_index_runs_no_code(saved: Path, tmp_path: Path) -> None:
    index, manifest = saved / ".metadata", saved / "moeweave.json"
    index.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    listing = json.loads(manifest.read_text())
    listing["files"][".metadata"] = {"bytes": index.stat().st_size, "crc32": under_test.checksum(index)}
    manifest.write_text(json.dumps(listing))
    (saved / "complete").write_text(under_test.checksum(manifest))
    assert "which an index never does" in the_error(str(saved))
    assert not (tmp_path / "touched").exists()


def test_folder_of_checkpoints_says_which(saved: Path, tmp_path: Path) -> None:
    assert f"the newest is {saved}" in the_error(str(tmp_path))
    assert "Beside it there are step-1" in the_error(str(tmp_path / "step-2"))


def test_other_models_and_optimizers(saved: Path, tmp_path: Path) -> None:
    error = the_error(str(saved), "qwen3_moe")
    assert "lacks" in error
    assert "lm_head.weight" in error
    assert "AdamW" in the_error(str(saved), "listed", "SGD")
    ZOO["qwen3_moe"]().save_pretrained(tmp_path / "hf")
    assert "has no optimizer state" in the_error(str(tmp_path / "hf"), "qwen3_moe")


class Wider(ListedModel):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)


class More(ListedModel):
    def __init__(self) -> None:
        super().__init__()
        self.heads = self.head
        del self.head


class Fewer(ListedModel):
    def __init__(self) -> None:
        super().__init__()
        del self.head


def load_into(folder: str, kind: type[nn.Module]) -> str:
    model = mw.parallelize(kind(), mw.Mesh(**EP2, device="cpu"))
    return error_of(lambda: load(folder, model))


@pytest.mark.parametrize(
    "kind, parts",
    [
        (Wider, ["does not fit Wider", "head.weight: (3, 8) there, expected (5, 8)"]),
        (More, ["lacks 2", "heads.weight (nearest: head.weight)"]),
        (Fewer, ["2 of its names are not in the model: head.bias, head.weight"]),
    ],
)
def test_what_does_not_fit_is_listed(kind: type[nn.Module], parts: list[str], saved: Path) -> None:
    errors = run_ranks(2, load_into, str(saved), kind, timeout=60)
    assert len(set(errors)) == 1
    assert all(part in errors[0] for part in parts), errors[0]


# ---- one process, and values


def test_works_without_ranks(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    model = build("listed", 0)
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD(
        [{"params": model.experts.parameters(), "momentum": 0.5}, {"params": model.gate.parameters(), "lr": lr}],
        lr=0.3,
        momentum=0.9,
    )
    model(torch.randn(4, 8)).backward()
    optimizer.step()
    save(tmp_path / "a", model, optimizer, step=7)
    other = build("listed", 1)
    groups = [{"params": other.experts.parameters()}, {"params": other.gate.parameters(), "lr": torch.tensor(0.0)}]
    other_optimizer = torch.optim.SGD(groups, lr=0.0)
    assert load(tmp_path / "a", other, other_optimizer).step == 7
    assert everything(other, other_optimizer).keys() == everything(model, optimizer).keys()
    assert [(g["lr"], g["momentum"]) for g in other_optimizer.param_groups] == [(0.3, 0.5), (lr, 0.9)]
    with pytest.raises(CheckpointError, match="saved with other options"):
        load(tmp_path / "a", other, torch.optim.SGD([*other.experts.parameters(), *other.gate.parameters()], lr=0.1))


def test_nothing_is_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "a", build("listed", 0))
        load(tmp_path / "a", build("listed", 1))


def test_packed_values_come_back() -> None:
    value = {
        "a": [1, 0.1, float("inf"), "x", None, True, (2, (3,))],
        "b": {1: "int key", (2, "t"): torch.arange(3)},
        "$tensor": "a key like ours",
        "c": {"$x": {"d": torch.ones(2, 2, dtype=torch.bfloat16)}},
    }
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, tensors, "p", "value")))
    assert sorted(tensor_names(packed)) == sorted(tensors)
    again = unpack(packed, tensors)
    assert str(again) == str(value)
    assert type(again["a"][6]) is tuple
