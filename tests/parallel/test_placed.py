"""Experts placed by load: the same numbers read into other places, which compute the same; replicas serve in turns."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import hf_zoo
import moeweave as mw
from moeweave.kernels_ext.tolerance import assert_close
from moeweave.parallel.hf.boxes import whole_tensor
from moeweave.parallel.names import named_params
from moeweave.parallel.placed import parse_placement, slots_of_params
from moeweave.parallel.record import record_of
from moeweave.parallel.verify import gradient_parity
from run_ranks import run_ranks

NUM_EXPERTS = 8


def wrap(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer, mw.Mesh]:
    mesh = mw.Mesh(**sizes)
    model = mw.parallelize(hf_zoo.ZOO[name](), mesh, mw.Plan(**plan))
    return model, torch.optim.AdamW(mw.param_groups(model), lr=0.01), mesh


def steps(name: str, model: Any, optimizer: torch.optim.Optimizer, mesh: mw.Mesh, first: int) -> list[float]:
    """Losses of two steps."""
    losses = []
    for step in range(first, first + 2):
        batch = hf_zoo.make_batch(name, mesh.data_rank + 10 * step, rows=2 * mesh.sizes.pp)
        losses.append(float(mw.forward_backward(model, batch, microbatches=max(1, 2 * (mesh.sizes.pp - 1)))))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def load_of_all(model: Any) -> dict[str, list[int]]:
    """Routes of the global batch, of all stages."""
    record, found = record_of(model), {}
    for path, load_E in mw.expert_load(model).items():
        dist.all_reduce(load_E, group=record.routing_group)
        found[path] = load_E.tolist()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    return {path: counts for each in everyones for path, counts in each.items()}


def told(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and first moments, whole, by name."""
    placed, found = slots_of_params(model), {}
    for name, param in named_params(model).items():
        found[name] = whole_tensor(param, placed.get(name)).clone()
        if param in optimizer.state:
            found[f"{name}, exp_avg"] = whole_tensor(optimizer.state[param]["exp_avg"], placed.get(name)).clone()
    return found


def replaced(name: str, folder: str, before: dict[str, Any], after: dict[str, Any], num_slots: int) -> dict[str, Any]:
    """Trains, saves, places by the load that was measured, reads into another mesh, writes and goes on; beside it, the
    same without a placement."""
    model, optimizer, mesh = wrap(name, *before["run"])
    steps(name, model, optimizer, mesh, 0)
    load = load_of_all(model)
    mw.save(f"{folder}/saved", model, optimizer, step=2)
    sizes, plan = after["run"]
    found: dict[str, Any] = {"load": load}
    for kind in ("plain", "placed"):
        chosen = {"placement": mw.place_by_load(load, sizes["ep"], num_slots)} if kind == "placed" else {}
        model, optimizer, mesh = wrap(name, sizes, {**plan, **chosen})
        mw.load(f"{folder}/saved", model, optimizer)
        found[f"{kind} read"] = told(model, optimizer)
        mw.save_pretrained(model, f"{folder}/{kind}-hf", max_shard_size="20KB")
        mw.save(f"{folder}/{kind}", model, optimizer)
        found[f"{kind} losses"] = steps(name, model, optimizer, mesh, 2)
        found[f"{kind} end"] = told(model, optimizer)
        found[f"{kind} names"] = sorted(slots_of_params(model))
    # What was saved with a placement is read without one.
    model, optimizer, _ = wrap(name, *before["run"])
    mw.load(f"{folder}/placed", model, optimizer)
    found["read again"] = told(model, optimizer)
    return found


def assert_same_weights(*folders: Path) -> None:
    """Of two Hugging Face folders: the same names, and under each the same numbers."""
    one, other = ({k: v for f in each.glob("*.safetensors") for k, v in load_file(f).items()} for each in folders)
    assert len(one) > 20 and sorted(one) == sorted(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


PP2 = dict(pp=2, dp=2, ep=2)
ROUTES: list[Any] = [
    ("qwen3_moe", (dict(dp=4, ep=2), {}), (dict(dp=4, ep=4), {}), 8),
    ("gpt_oss", (dict(dp=4, ep=4), {}), (dict(dp=4, ep=2), {}), 10),
    pytest.param("gpt_oss", (dict(dp=4, ep=4), {}), (dict(dp=4, ep=2), dict(data="ddp")), 8, marks=pytest.mark.slow),
    pytest.param("mixtral", (dict(dp=4, ep=2), {}), (dict(dp=4, ep=2, etp=2), {}), 8, marks=pytest.mark.slow),
    pytest.param("mixtral", (dict(dp=4, ep=2), {}), (dict(dp=4, ep=2, etp=2), {}), 14, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", (dict(dp=2, tp=2, ep=4), {}), (PP2, {}), 8, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", (dict(dp=2, tp=2, ep=4), {}), (PP2, {}), 12, marks=pytest.mark.slow),
    pytest.param("step3p7", (dict(dp=4, ep=2), {}), (dict(dp=4, ep=4), dict(data="ddp")), 12, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "before", "after", "num_slots"), ROUTES)
def test_a_checkpoint_is_where_the_placement_changes(
    name: str, before: Any, after: Any, num_slots: int, tmp_path: Path
) -> None:
    hf_zoo.needs(name)
    ranks = run_ranks(4, replaced, name, str(tmp_path), {"run": before}, {"run": after}, num_slots)
    for found in ranks:
        assert found["placed names"] and not found["plain names"]
        want = found["plain read"]
        for kind in ("placed read", "read again"):
            assert any("exp_avg" in key for key in want)
            assert set(found[kind]) >= set(want)  # of this rank's stage, where stages are only in the second mesh
            assert all(torch.equal(found[kind][key], want[key]) for key in want), kind
        assert found["placed losses"] == pytest.approx(found["plain losses"], rel=1e-6)
        for key, end in found["plain end"].items():
            assert_close(key, found["placed end"][key], end)
    load, ep = ranks[0]["load"], after[0]["ep"]
    assert any(slots != list(range(NUM_EXPERTS)) for slots in mw.place_by_load(load, ep, num_slots).values())
    assert_same_weights(tmp_path / "plain-hf", tmp_path / "placed-hf")


def turned(name: str, num_slots: int = NUM_EXPERTS) -> dict[str, list[int]]:
    """Slots in an order that leaves hardly any expert on its rank; further ones for the first experts, twice."""
    extra = num_slots - NUM_EXPERTS
    slots = [*(5 * slot % NUM_EXPERTS for slot in range(NUM_EXPERTS)), *(slot // 2 for slot in range(extra))]
    from moeweave.parallel.adapter import find_moe_blocks

    return {block.path: slots for block in find_moe_blocks(hf_zoo.ZOO[name]())}


def parity(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> Any:
    batch = partial(hf_zoo.make_batch, name, rows=4, length=15)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes), mw.Plan(**plan, placement=turned(name)))


@pytest.mark.parametrize(
    ("name", "sizes", "plan"),
    [
        ("mixtral", dict(dp=2, tp=2, ep=4), {}),
        ("deepseek_v3", dict(dp=2, sp=2, ep=2, etp=2), dict(recompute=True)),
        pytest.param("gpt_oss", dict(pp=2, dp=2, ep=2), {}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", dict(dp=4, ep=4), dict(overlap="three_stream"), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", dict(dp=4, ep=2), dict(dispatcher="allgather"), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> None:
    for report in run_ranks(4, parity, name, sizes, plan):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert max(report.loss_error, report.norm_error) <= 1e-6


def served(name: str, folder: str) -> dict[str, Any]:
    """Greedy tokens of a model with replicas, read from a Hugging Face folder and from a checkpoint."""
    solo, mesh = hf_zoo.ZOO[name]().eval(), mw.Mesh(dp=4, ep=4)
    if mesh.rank == 0:
        solo.save_pretrained(f"{folder}/hf")
    dist.barrier()
    slots = turned(name, 12)
    read = mw.from_pretrained(f"{folder}/hf", mesh, mw.Plan(placement=slots))
    mw.save(f"{folder}/own", read)
    mw.save_pretrained(read, f"{folder}/again")
    other = mw.parallelize(hf_zoo.ZOO[name]().eval(), mesh, mw.Plan(placement=slots))
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    mw.load(f"{folder}/own", other)
    prompt = hf_zoo.make_batch(name, mesh.rank)["input_ids"][:, : 4 + mesh.rank]
    options = dict(max_new_tokens=4 + mesh.rank, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = [each.generate(prompt, **options) for each in (solo, read, other)]
    call = record_of(other).calls[0]
    ids_TK = torch.zeros(6, 1, dtype=torch.int64)
    return dict(tokens=tokens, slots=call.table(ids_TK).flatten().tolist(), held=call.num_local)


def test_replicas_serve_in_turns(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(4, served, "qwen3_moe", str(tmp_path))):
        want, *others = found["tokens"]
        assert all(torch.equal(got, want) for got in others)
        assert found["held"] == 3
        # Expert 0 is in slots 0, 8 and 9, and another replica has the first turn on every rank.
        assert found["slots"] == [[0, 8, 9][(rank + turn) % 3] for turn in range(6)]
    assert_same_weights(tmp_path / "hf", tmp_path / "again")


def refusal(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> str:
    try:
        mw.parallelize(hf_zoo.ZOO[name](), mw.Mesh(**sizes), mw.Plan(**plan))
    except ValueError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    slots = turned("qwen3_moe")
    first = next(iter(slots))
    cases = [
        (dict(dp=2), slots, "needs ep > 1"),
        (dict(dp=2, ep=2), {}, f"no slots for {first}"),
        (dict(dp=2, ep=2), {**slots, first: [0] * 8}, "each of its 8 experts a slot, and no other; see 1, 2"),
        (dict(dp=2, ep=2), {**slots, first: [*range(8), 0]}, r"ep (2) must divide the slots of Plan.placement at"),
    ]
    for sizes, given, text in cases:
        for said in run_ranks(2, refusal, "qwen3_moe", sizes, {"placement": given}):
            assert text in said
    for given in (tmp_path / "none.json", {"a": [0.5]}, {"a": 3}):
        with pytest.raises(ValueError, match=r"Plan.placement.* must map paths of experts"):
            parse_placement(given)
    with pytest.raises(ValueError, match="layer: num_slots"):
        mw.place_by_load({"layer": [1.0] * 8}, 3)
