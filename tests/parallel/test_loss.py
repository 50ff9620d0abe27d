"""One loss over ranks: the global label count, the balance loss of the global batch, and gradient accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_zoo
import plain_models
from moeweave.kernels_ext.tolerance import TOLERANCE, relative_error
from moeweave.parallel.data import no_sync
from moeweave.parallel.loss import forward_backward, global_tokens
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.record import record_of
from moeweave.parallel.verify import concatenate
from run_ranks import RankError, run_ranks
from train_steps import whole

FP32, FP64 = TOLERANCE[torch.float32], TOLERANCE[torch.float64]
Batch = dict[str, Tensor]


# ---- the denominator


def counts(labels: list[list[list[int]]]) -> list[float]:
    mine = torch.tensor(labels[dist.get_rank()])
    return [float(global_tokens(mine)), float(global_tokens(mine, shifted=True))]


def test_global_tokens_is_the_mean_count_over_ranks() -> None:
    first, second = [[5, 6, -100, 7], [1, 2, 3, 4]], [[9, -100, -100, -100], [-100, 1, -100, -100]]
    # Of positions 1..3: 2 + 3 on the first rank, 0 + 1 on the second; of all positions 3 + 4 and 1 + 1.
    assert run_ranks(2, counts, [first, second]) == [[3.0, 4.5]] * 2


def test_global_tokens_is_never_zero() -> None:
    nothing = [[-100, -100]]
    assert run_ranks(2, counts, [nothing, nothing]) == [[0.5, 0.5]] * 2
    assert float(global_tokens(torch.tensor(nothing))) == 1.0
    assert float(global_tokens(torch.tensor([[1, 2, 3]]))) == 2.0


# ---- balance loss


def one_forward(aux: str) -> dict[str, float]:
    mesh = Mesh(dp=2, ep=2)
    batches = [hf_zoo.make_batch("mixtral", rank) for rank in range(2)]
    alone = hf_zoo.build("mixtral")
    coef = alone.router_aux_loss_coef
    local = alone(**batches[mesh.rank])
    together = alone(**concatenate(batches, mesh.device))
    model = parallelize(hf_zoo.build("mixtral"), mesh, Plan(aux=aux))
    mine = model(**batches[mesh.rank])
    return {
        "loss": float(mine.loss),
        "aux": float(mine.aux_loss),
        "local_aux": float(local.aux_loss),
        "whole_aux": float(together.aux_loss),
        "whole_labels": float(together.loss) - coef * float(together.aux_loss),
        "coef": coef,
    }


@pytest.mark.parametrize("aux", ["global", "rank"])
def test_whose_tokens_the_balance_loss_sees(aux: str) -> None:
    found = run_ranks(2, one_forward, aux)
    for each in found:
        assert each["aux"] == pytest.approx(each["whole_aux" if aux == "global" else "local_aux"], rel=1e-5)
        assert each["local_aux"] != pytest.approx(each["whole_aux"], rel=1e-3)
    loss = sum(each["loss"] for each in found) / 2
    aux_mean = sum(each["aux"] for each in found) / 2
    assert loss == pytest.approx(found[0]["whole_labels"] + found[0]["coef"] * aux_mean, rel=1e-5)


def another_aux_loss() -> None:
    model = hf_zoo.build("mixtral")
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.aux_loss = 2 * output.aux_loss
        return output

    model.forward = doubled
    model = parallelize(model, Mesh(dp=2, ep=2))
    model(**hf_zoo.make_batch("mixtral", dist.get_rank()))


def test_a_balance_loss_of_another_formula_is_refused_on_every_rank() -> None:
    with pytest.raises(RankError, match=r"this model reports .* Use Plan\(aux='rank'\)") as refusal:
        run_ranks(2, another_aux_loss)
    assert len(refusal.value.reports) == 2


# ---- micro-batches


def parts_of(batches: list[Batch], microbatches: int, part: int) -> Batch:
    """Part `part` of every rank's batch, as one batch."""
    return concatenate(
        [{name: x.tensor_split(microbatches)[part] for name, x in batch.items()} for batch in batches],
        torch.device("cpu"),
    )


def reference_in_parts(model: nn.Module, batches: list[Batch], microbatches: int, aux: bool) -> Tensor:
    """Labels divided by the whole batch's count, the balance loss as the mean over the micro-batches."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for part in range(microbatches):
        output = model(**parts_of(batches, microbatches, part), num_items_in_batch=torch.tensor(float(count)))
        own_aux = model.router_aux_loss_coef * output.aux_loss if aux else 0.0
        total = total + output.loss - own_aux + own_aux / microbatches
    total.backward()
    return total.detach()


def accumulated(sizes: dict[str, int], data: str, aux: bool, microbatches: int, given: bool = False) -> list[Any]:
    """[loss, reference loss, worst gradient error] of micro-batches against the definition in one process."""
    mesh = Mesh(**sizes)
    batches = [hf_zoo.make_batch("mixtral", rank, rows=4 if rank else 3) for rank in range(mesh.data_size)]
    options = dict(output_router_logits=aux)
    reference = hf_zoo.build("mixtral", **options)
    want = reference_in_parts(reference, batches, microbatches, aux)
    model = parallelize(hf_zoo.build("mixtral", **options), mesh, Plan(data=data))
    mine: dict[str, Any] = dict(batches[mesh.data_rank])
    if given:
        mine["num_items_in_batch"] = global_tokens(mine["labels"])
    loss = forward_backward(model, mine, microbatches)
    errors = [
        relative_error(whole(param.grad), reference.get_parameter(name).grad)
        for name, param in model.named_parameters()
    ]
    return [float(loss), float(want), max(errors), record_of(model).aux_share]


@pytest.mark.parametrize("aux", [False, True], ids=["labels", "balance"])
@pytest.mark.parametrize(
    "sizes, data",
    [({}, "fsdp2"), (dict(dp=2, ep=2), "fsdp2"), (dict(dp=2, ep=2), "ddp"), (dict(dp=4, ep=2), "fsdp2")],
    ids=["one", "dp2-ep2-fsdp2", "dp2-ep2-ddp", "dp4-ep2-fsdp2"],
)
def test_microbatches_make_one_batch(sizes: dict[str, int], data: str, aux: bool) -> None:
    for loss, want, worst, share in run_ranks(sizes.get("dp", 1), accumulated, sizes, data, aux, 3):
        assert loss == pytest.approx(want, rel=FP32)
        assert worst <= FP32
        assert share == 1.0


def test_a_denominator_that_was_given_is_of_the_whole_batch() -> None:
    for loss, want, worst, _ in run_ranks(2, accumulated, dict(dp=2, ep=2), "fsdp2", True, 3, True):
        assert loss == pytest.approx(want, rel=FP32)
        assert worst <= FP32


def plain_parts(microbatches: int) -> list[float]:
    """A model with a denominator of its own: the mean over micro-batches."""
    mesh = Mesh(dp=2, ep=2)
    batches = [plain_models.make_batch(rank, rows=4) for rank in range(2)]
    reference = plain_models.build("stacked", dtype=torch.float64)
    losses = [reference(**parts_of(batches, microbatches, part)) for part in range(microbatches)]
    want = sum(losses[1:], losses[0]) / microbatches
    want.backward()
    model = parallelize(plain_models.build("stacked", dtype=torch.float64), mesh)
    loss = forward_backward(model, batches[mesh.rank], microbatches)
    errors = [relative_error(whole(p.grad), reference.get_parameter(name).grad) for name, p in model.named_parameters()]
    return [float(loss), float(want), max(errors)]


def test_a_model_with_a_denominator_of_its_own_is_averaged() -> None:
    for loss, want, worst in run_ranks(2, plain_parts, 2):
        assert loss == pytest.approx(want, rel=FP64)
        assert worst <= FP64


def calls_in_a_row(sizes: dict[str, int], data: str) -> list[float]:
    """Gradients of three backward passes: all reduced, with two of them under no_sync, and by two forward_backwards."""
    mesh = Mesh(**sizes)
    batches = [plain_models.make_batch(mesh.data_rank + 10 * step) for step in range(3)]

    def gradients(how: str) -> dict[str, Tensor]:
        model = parallelize(plain_models.build("packed", dtype=torch.float64), mesh, Plan(data=data))
        for step, batch in enumerate(batches):
            if how == "calls":
                forward_backward(model, batch)
            elif how == "no_sync" and step < 2:
                with no_sync(model):
                    model(**batch).backward()
            else:
                model(**batch).backward()
        return {name: whole(param.grad) for name, param in model.named_parameters()}

    want = gradients("synced")
    assert all(grad.any() for grad in want.values())
    return [
        max(relative_error(grad, want[name]) for name, grad in gradients(how).items()) for how in ("no_sync", "calls")
    ]


@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
@pytest.mark.parametrize("sizes", [dict(dp=2, ep=2), dict(dp=4, ep=2), dict(dp_replicate=2, dp=2, ep=2)], ids="-".join)
def test_gradients_accumulate_over_calls_and_without_reduction(sizes: dict[str, int], data: str) -> None:
    for errors in run_ranks(sizes["dp"] * sizes.get("dp_replicate", 1), calls_in_a_row, sizes, data):
        assert max(errors) <= FP64


def one_microbatch_failing() -> list[float]:
    model = parallelize(hf_zoo.build("mixtral"), Mesh())
    batch = hf_zoo.make_batch("mixtral", 0, rows=2)
    batch["input_ids"][1, 0] = 10**6
    with pytest.raises(IndexError):
        forward_backward(model, batch, 2)
    return [record_of(model).aux_share, float(forward_backward(model, hf_zoo.make_batch("mixtral", 0)))]


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    ((share, loss),) = run_ranks(1, one_microbatch_failing)
    assert share == 1.0
    assert loss > 0


# ---- errors


class ReturnsLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def refuse(what: str) -> str:
    model = parallelize(ReturnsLogits(), Mesh(dp=2))
    try:
        if what == "logits":
            forward_backward(model, {"x": torch.zeros(3, 2)})
        elif what == "unwrapped":
            forward_backward(ReturnsLogits(), {"x": torch.zeros(3, 2)})
        else:
            forward_backward(model, {"x": torch.zeros(3, 2)}, microbatches=int(what))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


@pytest.mark.parametrize(
    "what, text",
    [
        (
            "logits",
            "TypeError: The model returned Tensor without a scalar loss. Pass labels in the batch, or let forward",
        ),
        ("unwrapped", "ValueError: ReturnsLogits is not wrapped yet: call moeweave.parallelize(model, mesh) first."),
        ("4", "ValueError: microbatches (4) must be between 1 and the rows of the batch (3)."),
        ("0", "ValueError: microbatches (0) must be between 1 and the rows of the batch (3)."),
    ],
)
def test_what_makes_no_step_is_refused(what: str, text: str) -> None:
    for message in run_ranks(2, refuse, what):
        assert message.startswith(text)
