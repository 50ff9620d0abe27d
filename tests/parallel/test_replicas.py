"""Experts in several slots that train: what one process computes, with an expert's slots the same to the last bit.

Legend: S slots, n slots of a rank, F numbers of an expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
import plain_models
from moeweave.comm.communicator import Communicator
from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel.adapter import find_moe_blocks
from moeweave.parallel.data_deepspeed_config import check_zero
from moeweave.parallel.hf.boxes import whole_tensor
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.names import named_params
from moeweave.parallel.placed import SlotTable, place_blocks, slots_of_params
from moeweave.parallel.replicas import ReplicaSum, check_replicas
from moeweave.parallel.verify import concatenate, gradient_parity
from run_ranks import run_ranks
from test_placed import turned
from train_steps import Steps, batch_of, builder, check, train

GRADIENT, NORM = 1e-5, 1e-6


# ---- the sum itself


def summed(slots: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradients of this rank's slots before, and after), in numbers that a sum rounds."""
    comm = Communicator(dist.group.WORLD)
    generator = torch.Generator().manual_seed(comm.rank)
    before_nF = torch.randn(len(slots) // comm.size, width, generator=generator).to(dtype)
    after_nF = before_nF.clone()
    sent = ReplicaSum(slots, comm).sum_(after_nF)
    assert (sent > 0) == (width > 0)
    return before_nF, after_nF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 2, 0])
def test_slots_of_an_expert_get_their_sum_and_other_slots_stay(width: int, dtype: torch.dtype) -> None:
    # Expert 0 on three ranks, on one of them twice; 3 on two; 4 twice on one rank and nowhere else; others once.
    slots = (0, 1, 3, 0, 2, 0, 4, 4, 3, 0, 5, 6)
    ranks = run_ranks(4, summed, slots, width, dtype)
    before_SF, after_SF = (torch.cat([rank[at] for rank in ranks]) for at in range(2))
    for expert in set(slots):
        own = [at for at, each in enumerate(slots) if each == expert]
        want_F = before_SF[own].double().sum(0)
        for at in own:
            assert torch.equal(after_SF[at], after_SF[own[0]])
            assert relative_error(after_SF[at], want_F) <= TOLERANCE[dtype]
        if len(own) == 1:
            assert torch.equal(after_SF[own[0]], before_SF[own[0]])


def test_replicas_share_out_the_routes_of_every_rank() -> None:
    slots, num_ranks, num_tokens = (0, 1, 0, 2, 3, 0), 3, 41
    counts_S = torch.zeros(len(slots), dtype=torch.int64)
    ids_TK = torch.tensor([[0, 1 + token % 3] for token in range(num_tokens)])
    for rank in range(num_ranks):
        table = SlotTable(slots, 4, rank, torch.device("cpu"))
        slots_TK = table(ids_TK)
        assert torch.equal(slots_TK, table(ids_TK))
        assert torch.equal(torch.tensor(slots)[slots_TK], ids_TK)
        own_S = torch.bincount(slots_TK.flatten(), minlength=len(slots))
        assert int(own_S[[0, 2, 5]].max() - own_S[[0, 2, 5]].min()) <= 1
        counts_S += own_S
    assert counts_S[[0, 2, 5]].tolist() == [num_tokens] * 3


# ---- against one process


def slot_rows(tensor: Tensor) -> Tensor:
    """A row a slot, of all ranks."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_replicas_equal(name: str, tensor: Tensor, slots: tuple[int, ...]) -> None:
    rows = slot_rows(tensor)
    assert rows.shape[0] == len(slots) > len(set(slots))
    for at, expert in enumerate(slots):
        assert torch.equal(rows[at], rows[slots.index(expert)]), (name, at)


def compared(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> dict[str, float]:
    """Errors of loss, gradients, norm, and one clipped step of SGD; replicas are compared bit by bit."""
    mesh, models = mw.Mesh(**sizes), []
    batch = partial(hf_zoo.make_batch, name, rows=4, length=15)
    chosen = mw.Plan(**plan, placement=turned(name, 12))
    report = gradient_parity(hf_zoo.ZOO[name], batch, mesh, chosen, prepare=models.append)
    reference, wrapped = models
    placed, params = slots_of_params(wrapped), named_params(wrapped)
    assert placed
    for path, slots in placed.items():
        assert_replicas_equal(path, params[path].grad, slots)
    start = {path: param.detach().clone() for path, param in reference.named_parameters()}
    torch.nn.utils.clip_grad_norm_(reference.parameters(), report.reference_norm / 2)
    mw.clip_grad_norm_(wrapped, report.reference_norm / 2)
    for groups in (reference.parameters(), mw.param_groups(wrapped)):
        torch.optim.SGD(groups, lr=1000.0).step()  # storing the parameter rounds nothing of the update away
    update = 0.0
    for path, param in params.items():
        if path in placed:
            assert_replicas_equal(path, param, placed[path])
        want = reference.get_parameter(path).detach()
        moved = want - start[path]
        if moved.any():
            update = max(update, float((whole_tensor(param, placed.get(path)) - want).norm() / moved.norm()))
    return dict(loss=report.loss_error, gradient=report.worst, norm=report.norm_error, update=update)


CASES: list[Any] = [
    ("qwen3_moe", dict(dp=2, ep=2), {}),
    ("qwen3_moe", dict(dp=4, ep=4), {}),
    ("gpt_oss", dict(dp=4, ep=2), {}),
    ("mixtral", dict(dp=2, tp=2, ep=4), dict(recompute=True)),
]
SLOW_CASES: list[Any] = [
    ("mixtral", dict(dp=4, ep=2), dict(data="ddp")),
    ("qwen3_moe", dict(dp=4, ep=4), dict(data="ddp")),
    ("deepseek_v3", dict(dp_replicate=2, dp=2, ep=2), {}),
    ("deepseek_v3", dict(dp=2, sp=2, ep=2), dict(recompute=True)),
    ("mixtral", dict(tp=2, ep=2), {}),
    ("gpt_oss", dict(dp=2, tp=2, ep=2, etp=2), {}),
    ("mixtral", dict(dp=4, tp=2, ep=2, etp=2), {}),
    ("mixtral", dict(dp=2, tp=2, ep=2), dict(tp_sequence=True)),
    ("gpt_oss", dict(pp=2, dp=2, ep=2), {}),
    ("step3p7", dict(dp=4, ep=2), {}),
    ("qwen3_moe", dict(dp=4, ep=4), dict(overlap="three_stream")),
    ("qwen3_moe", dict(dp=4, ep=4), dict(dispatcher="allgather")),
    ("qwen3_moe", dict(dp=8, ep=4), {}),
]


@pytest.mark.parametrize(
    ("name", "sizes", "plan"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_loss_gradients_norm_and_update_are_those_of_one_process(name: str, sizes: Any, plan: Any) -> None:
    hf_zoo.needs(name)
    world = MeshSizes(**sizes).world
    for errors in run_ranks(world, compared, name, sizes, plan):
        assert max(errors["loss"], errors["gradient"], errors["update"]) <= GRADIENT, errors
        assert errors["norm"] <= NORM, errors


# ---- odd batches, no tokens, one hot expert


def plain_slots(*slots: int) -> dict[str, list[int]]:
    """The same slots in both layers of a plain model."""
    return {f"layers.{layer}.moe.experts": list(slots) for layer in range(2)}


# Expert 0 on every rank, 1 on two; with `one_rank_has_all_experts_chosen` no other expert gets a token.
HOT = plain_slots(0, 1, 2, 3, 0, 4, 5, 6, 1, 7, 0, 0)
# Replicas on one rank only, which the other three have nothing of.
ASIDE = plain_slots(0, 0, 0, 2, 1, 3, 4, 5, 6, 7, 7, 7)
CHOSEN = "one_rank_has_all_experts_chosen"
ODD = [
    Steps("packed", dict(dp=2, ep=2), dict(placement=HOT), rows=(3, 0)),
    Steps("stacked", dict(dp=4, ep=2), dict(placement=HOT), rows=(1, 4, 2, 3), ignored=(2,), tweak=CHOSEN),
    Steps("packed", dict(dp=4, ep=4), dict(placement=HOT), rows=(1, 0, 2), tweak=CHOSEN),
]
ODD_AND_SLOW = [
    Steps("packed", dict(dp=2, ep=2), dict(placement=HOT, data="ddp"), rows=(3, 0)),
    Steps("stacked", dict(dp=4, ep=4), dict(placement=ASIDE), tweak=CHOSEN),
    Steps("packed", dict(dp=4, ep=4), dict(placement=ASIDE, data="ddp"), rows=(1, 2), norm_type=float("inf")),
    Steps("packed", dict(dp=4, ep=2), dict(placement=HOT), norm_type=1.0),
    Steps("stacked", dict(dp_replicate=2, dp=2, ep=2), dict(placement=HOT, recompute=True), rows=(2, 1)),
    Steps("packed", dict(dp=4, ep=2), dict(placement=HOT, overlap="microbatch", overlap_min_tokens=0), rows=(2, 5)),
    Steps("packed", dict(dp=4, ep=4), dict(placement=HOT, overlap="microbatch", overlap_min_tokens=0), rows=(3, 2)),
]


@pytest.mark.parametrize(
    "steps",
    [*ODD, *(pytest.param(steps, marks=pytest.mark.slow) for steps in ODD_AND_SLOW)],
    ids=lambda steps: steps.name,
)
def test_odd_batches_no_tokens_and_one_hot_expert(steps: Steps) -> None:
    for found in run_ranks(steps.world, train, steps):
        check(found, TOLERANCE[torch.float64])


# ---- many steps


def trained(steps: Steps, placement: dict[str, list[int]] | None) -> dict[str, Any]:
    """Losses, loads and biases of AdamW steps; slots are compared after each, states after every fifth."""
    mesh = mw.Mesh(**steps.sizes)
    model = mw.parallelize(builder(steps)(), mesh, mw.Plan(**steps.plan, placement=placement))
    adamw = torch.optim.AdamW(mw.param_groups(model), lr=0.01, weight_decay=0.1)
    optimizer = mw.prepare_optimizer(model, adamw)
    placed, params = slots_of_params(model), named_params(model)
    losses = []
    for step in range(steps.num_steps):
        losses.append(float(mw.forward_backward(model, batch_of(steps, mesh.data_rank, step), microbatches=2)))
        mw.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if steps.model == "deepseek_v3":
            mw.update_router_bias(model)
        for path, slots in placed.items():
            assert_replicas_equal(path, params[path], slots)
            for key in ("exp_avg", "exp_avg_sq") if step % 5 == 4 else ():
                assert_replicas_equal(f"{path} {key}", optimizer.state[params[path]][key], slots)
    load = {path: counts.tolist() for path, counts in mw.expert_load(model).items()}
    biases = {path: bias.clone() for path, bias in model.named_buffers() if path.endswith("correction_bias")}
    return dict(losses=losses, load=load, biases=biases, placed=sorted(placed))


def with_and_without(steps: Steps) -> list[dict[str, Any]]:
    slots = HOT if steps.model in plain_models.BLOCKS else turned(steps.model, 12)
    return [trained(steps, placement) for placement in (None, slots)]


@pytest.mark.parametrize(
    "steps",
    [
        Steps("packed", dict(dp=4, ep=2), options=dict(dtype=torch.float32), num_steps=20),
        Steps("deepseek_v3", dict(dp=2, ep=2), dict(grad_sync="each"), num_steps=2),
        *(
            pytest.param(Steps(*case, num_steps=20), marks=pytest.mark.slow)
            for case in (
                ("stacked", dict(dp=4, ep=4)),
                ("deepseek_v3", dict(dp=4, ep=2)),
                ("gpt_oss", dict(dp=4, ep=2), dict(data="ddp")),
                ("gpt_oss", dict(dp=4, ep=4), dict(grad_sync="each")),
                ("qwen3_moe", dict(dp_replicate=2, dp=2, ep=2), dict(grad_sync="each")),
                ("mixtral", dict(dp=2, tp=2, ep=4)),
                ("qwen3_moe", dict(dp=8, ep=2)),
            )
        ),
    ],
    ids=lambda steps: steps.name,
)
def test_replicas_stay_equal_to_the_bit(steps: Steps) -> None:
    for plain, placed in run_ranks(MeshSizes(**steps.sizes).world, with_and_without, steps):
        assert placed["placed"] and not plain["placed"]
        assert placed["losses"] == pytest.approx(plain["losses"], rel=TOLERANCE[torch.float32])
        assert placed["load"] == plain["load"]
        assert bool(plain["biases"]) == (steps.model == "deepseek_v3")
        for path, bias in plain["biases"].items():
            assert torch.equal(placed["biases"][path], bias) and bias.any()


def added_up(sizes: dict[str, int], frozen: str) -> float:
    """Worst error of a gradient that two backward passes added up, one parameter of the experts frozen."""
    mesh = mw.Mesh(**sizes)
    model = plain_models.build("packed", dtype=torch.float64)
    reference = plain_models.build("packed", dtype=torch.float64)
    for each in (model, reference):
        for path, param in each.named_parameters():
            param.requires_grad_(frozen not in path)
    mw.parallelize(model, mesh, mw.Plan(placement=HOT))
    for step in range(2):
        batches = [plain_models.make_batch(rank + 10 * step) for rank in range(mesh.data_size)]
        reference(**concatenate(batches, mesh.device)).backward()
        model(**batches[mesh.data_rank]).backward()
    errors, placed = [], slots_of_params(model)
    for path, param in named_params(model).items():
        want = reference.get_parameter(path).grad
        assert (param.grad is None) == (want is None) == (frozen in path)
        if want is not None:
            errors.append(relative_error(whole_tensor(param.grad, placed.get(path)), want))
    return max(errors)


@pytest.mark.parametrize(("sizes", "frozen"), [(dict(dp=4, ep=2), "down_proj"), (dict(dp=2, ep=2), "gate_up_proj")])
def test_backward_passes_add_up_beside_frozen_weights(sizes: Any, frozen: str) -> None:
    assert max(run_ranks(sizes["dp"], added_up, sizes, frozen)) <= TOLERANCE[torch.float64]


# ---- refusals


def fused() -> str:
    model = mw.parallelize(plain_models.build("packed"), mw.Mesh(dp=2, ep=2), mw.Plan(placement=HOT))
    try:
        mw.prepare_optimizer(model, torch.optim.AdamW(mw.param_groups(model), fused=True))
    except ValueError as error:
        return str(error)
    return ""


def test_a_step_that_rounds_by_place_is_refused() -> None:
    for said in run_ranks(2, fused):
        assert said.startswith("AdamW(fused=True) rounds by a number's place in its tensor on a CPU, so replicas")
        assert said.endswith("Leave fused out.")


def test_what_cannot_train_replicas_is_refused_in_one_line() -> None:
    model, three = plain_models.build("packed"), MeshSizes(dp=6, ep=2)
    with pytest.raises(
        ValueError, match=r"Plan.placement must be None with Plan\(data='zero1'\), or use data='fsdp2'."
    ):
        check_zero(model, mw.Plan(data="zero1", placement=HOT), MeshSizes(dp=2, ep=2))
    block, _ = place_blocks(find_moe_blocks(model), HOT, three)
    said = (
        r"Plan.placement has replicas at layers.0.moe.experts, whose copies, edp \(3\), must divide a width of "
        r"down_proj_bias \(16,\). Choose dp or ep such that they do, or use Plan\(data='ddp'\)."
    )
    with pytest.raises(ValueError, match=said):
        check_replicas(block, three, mw.Plan(placement=HOT))
    check_replicas(block, three, mw.Plan(placement=HOT, data="ddp"))
    check_replicas(block, MeshSizes(dp=4, ep=2), mw.Plan(placement=HOT))
