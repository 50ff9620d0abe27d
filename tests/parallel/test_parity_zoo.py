"""Over ranks with different batches, every architecture takes the step that one process would take on all of them."""

import pytest

from hf_zoo import CORE, LAYOUTS, NOT_WRAPPABLE, NUM_EXPERTS, ZOO
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
