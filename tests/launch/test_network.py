"""Two nodes as network namespaces: what is chosen between them, and that scheduling it changes no bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from namespaces import over_nodes, shape, two_networks, why_not
from network_ablation import RESULTS, table

HERE = Path(__file__).parent


@pytest.mark.timeout(150)
def test_the_three_stream_schedule_between_nodes_has_the_bits_of_the_unscheduled_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = why_not(("ip", "tc"))
    if reason is not None:
        pytest.skip(reason)
    folders = (HERE.parents[1], HERE.parent, HERE.parent / "comm")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    with two_networks() as names:
        shape(names, "200mbit")
        printed = "".join(over_nodes(names, 2, [str(HERE / "network_case.py")], timeout=120))
    assert [printed.count(f"rank {rank}: 0 of 8 differ") for rank in range(4)] == [1] * 4


def test_the_ablation_in_the_readme_is_the_measured_one() -> None:
    found = json.loads(RESULTS.read_text())
    assert all(line["wrong"] == 0 for line in found["lines"]) and len(found["lines"]) == 12
    assert table(found["lines"]) in (HERE.parents[1] / "README.md").read_text()
