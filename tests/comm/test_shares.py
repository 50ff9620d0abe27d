"""What the three-stream schedule chooses from a topology file: the split over planes, the form; alike on all ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from moeweave.comm.shares import DEFAULT_SHARE, form_over_windows, push_share, rates_of_planes, share_of
from moeweave.comm.topology import Topology
from moeweave.parallel.plan import Plan
from moeweave.parallel.three_stream import options_of
from run_ranks import RankError, run_ranks
from test_topology import TWO

RATES = replace(TWO, push_gbps=1.0, dma_gbps=3.0)
GPUS = replace(RATES, push_gbps=100.0, dma_gbps=300.0, push_sms=132)


def test_both_planes_end_together() -> None:
    assert push_share(100, 300) == 0.25
    for push, dma in ((1.0, 7.0), (250.0, 330.0)):
        share = push_share(push, dma)
        assert share / push == pytest.approx((1 - share) / dma, rel=5e-3)


@pytest.mark.parametrize("num_sms, share", [(0, 0.25), (33, 0.077), (66, 0.143), (132, 0.25), (200, 0.25)])
def test_the_budget_of_multiprocessors_caps_the_share(num_sms: int, share: float) -> None:
    found, reason = share_of(GPUS, 2, num_sms)
    assert found == share
    assert "push 100, dma 300 GB/s measured" in reason and (f"{num_sms} of 132" in reason) == (num_sms > 0)
    assert share_of(RATES, 2, num_sms)[0] == 0.25, "where push takes no multiprocessors the budget says nothing"


@pytest.mark.parametrize("topology, size", [(None, 2), (TWO, 2), (RATES, 4), (replace(RATES, dma_gbps=0.0), 2)])
def test_without_rates_of_as_many_ranks_the_share_is_the_default(topology: Topology | None, size: int) -> None:
    assert rates_of_planes(topology, size) is None
    assert share_of(topology, size) == (DEFAULT_SHARE, f"no rates of both planes are known for {size} ranks")


@pytest.mark.parametrize(
    "size, top_k, rates, all_to_all, form",
    [
        (2, 1, (1.0, 3.0), 1.5, "gathered"),  # half the bytes at 1.5 against 4
        (2, 1, (1.0, 1.0), 1.5, "routed"),
        (8, 8, (1.0, 1.0), 1.5, "gathered"),  # as many bytes
        (8, 2, (1.0, 1.0), 1.5, "routed"),
        (8, 2, (4.0, 4.0), 1.5, "gathered"),
    ],
)
def test_bytes_over_rates_choose_the_form(
    size: int, top_k: int, rates: tuple[float, float], all_to_all: float, form: str
) -> None:
    found, reason = form_over_windows(size, top_k, rates, all_to_all)
    assert found == form
    assert f"top_k {top_k}, ep {size}" in reason and f"all-to-all {all_to_all:.3g}" in reason


def chosen(path: str, top_k: int, values: dict[str, object], differ: bool = False) -> tuple[str, float, str]:
    topology = Topology.shared(path, dist.group.WORLD)
    if differ and dist.get_rank() == 1:
        topology = replace(topology, push_gbps=9.0)
    options = options_of(Plan(overlap="three_stream", **values), top_k, dist.group.WORLD, topology)
    return options.form, options.push_share, options.planes


def test_a_plan_takes_what_the_file_says(tmp_path: Path) -> None:
    path = str(tmp_path / "topology.json")
    RATES.save(path)
    assert run_ranks(2, chosen, path, 1, {}) == [("gathered", 0.25, "auto")] * 2
    replace(RATES, push_gbps=0.6, dma_gbps=0.4).save(path)
    assert run_ranks(2, chosen, path, 1, {}) == [("routed", 0.6, "auto")] * 2
    asked = dict(three_stream_form="gathered", push_share=0.5, planes="collectives")
    assert run_ranks(2, chosen, path, 1, asked) == [("gathered", 0.5, "collectives")] * 2
    with pytest.raises(RankError, match=r"must be the same on all ranks.*routed and push_share 0\.6"):
        run_ranks(2, chosen, path, 1, dict(three_stream_form="routed"), True)


def test_a_file_from_before_planes_were_measured_is_read(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    TWO.save(path)
    values = {name: value for name, value in json.loads(path.read_text()).items() if "push" not in name}
    path.write_text(json.dumps({name: value for name, value in values.items() if "dma" not in name}))
    assert Topology.load(path) == TWO
