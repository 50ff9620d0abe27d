"""Over ranks with different batches, every architecture takes the step that one process would take on all of them."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_zoo import AUX_COEF, CORE, LAYOUTS, NOT_WRAPPABLE, NUM_EXPERTS, ZOO, make_batch
from moeweave.kernels_ext.tolerance import relative_error
from parity_table import MESHES, parity
from run_ranks import run_ranks

pytest.importorskip("transformers")

TOLERANCE = 1e-5
CASES = [
    pytest.param(name, ranks, ep, marks=() if name in CORE or (name in LAYOUTS and ranks == 2) else pytest.mark.slow)
    for name in ZOO
    if name not in NOT_WRAPPABLE
    for ranks, ep in MESHES
]


@pytest.mark.parametrize("name, ranks, ep", CASES)
def test_step_over_ranks_is_the_step_of_one_process(name: str, ranks: int, ep: int) -> None:
    row, *others = run_ranks(ranks, parity, name, ep)
    assert all(other == row for other in others)
    assert row["blocks"] >= 2
    assert row["experts_per_rank"] == [NUM_EXPERTS // ep]
    assert row["share_held"] == [1 / ranks]
    assert row["worst"] <= TOLERANCE, row["worst_name"]
    assert row["loss_error"] <= TOLERANCE
    assert row["norm_error"] <= TOLERANCE
    assert row["ok"]


def split_step(name: str, microbatches: int) -> tuple[float, float]:
    """Relative errors of loss and worst gradient of a step in micro-batches, one row of each rank in each."""
    import moeweave as mw

    mesh = mw.Mesh(dp=dist.get_world_size(), ep=dist.get_world_size())
    wrapped = mw.parallelize(ZOO[name](), mesh)
    loss = mw.forward_backward(wrapped, make_batch(name, mesh.data_rank, rows=microbatches), microbatches)

    reference = ZOO[name]()
    batches = [make_batch(name, rank, rows=microbatches) for rank in range(mesh.data_size)]
    labels = torch.cat([batch["labels"][:, 1:] for batch in batches])
    wanted = torch.zeros(())
    for row in range(microbatches):
        part = {key: torch.cat([batch[key][row : row + 1] for batch in batches]) for key in batches[0]}
        output = reference(**part)
        aux = AUX_COEF * (getattr(output, "aux_loss", None) or 0.0)
        share = (part["labels"][:, 1:] != -100).sum() / (labels != -100).sum()
        wanted = wanted + (output.loss - aux) * share + aux / microbatches
    wanted.backward()
    errors = [
        relative_error(param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad, want.grad)
        for (_, param), (_, want) in zip(wrapped.named_parameters(), reference.named_parameters(), strict=True)
        if want.grad is not None
    ]
    return abs(float(loss) / float(wanted.detach()) - 1), max(errors)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_micro_batches_add_up(name: str, ranks: int) -> None:
    for errors in run_ranks(ranks, split_step, name, 3):
        assert max(errors) <= TOLERANCE


def plain_parity(name: str) -> float:
    """Worst gradient error of a step that balances experts over each rank's own tokens."""
    import moeweave as mw
    from moeweave.parallel.verify import gradient_parity

    mesh = mw.Mesh(dp=2, ep=2)
    return gradient_parity(ZOO[name], partial(make_batch, name), mesh, mw.Plan(aux="rank")).worst


def test_the_proof_sees_a_balance_loss_per_rank() -> None:
    assert min(run_ranks(2, plain_parity, "mixtral")) > 100 * TOLERANCE


class Wide(torch.nn.Module):
    """One weight of ten million elements: float32 sums of so many squares are off by 1e-4 on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = torch.nn.Linear(5000, 2000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).square().mean()


def wide_batch(rank: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 5000, generator=torch.Generator().manual_seed(rank))}


def wide_parity() -> float:
    import moeweave as mw
    from moeweave.parallel.verify import gradient_parity

    return gradient_parity(Wide, wide_batch, mw.Mesh(dp=2)).norm_error


def test_norm_of_a_large_weight() -> None:
    assert max(run_ranks(2, wide_parity)) <= 1e-6
