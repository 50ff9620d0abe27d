"""Groups of each plane, and their options, without torch-npu."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moeweave.comm import planes
from moeweave.comm.planes import hccl_config, new_plane_group, open_planes, refuse_training
from run_ranks import run_ranks


def test_push_is_aiv_and_dma_the_default() -> None:
    assert hccl_config("push") == {"hccl_op_expansion_mode": 3}
    assert hccl_config("push", "A2", nodes=[0, 0], planes_open=["dma"]) == {"hccl_op_expansion_mode": 3}
    assert hccl_config("push", "A3", nodes=[0, 0, 1, 1]) == {"hccl_op_expansion_mode": 3}
    assert hccl_config("dma", "A2", nodes=[0, 1, 1], planes_open=["push", "dma"]) == {}


@pytest.mark.parametrize(
    "given, text",
    [
        (dict(plane="aiv"), r"plane \('aiv'\) must be one of push, dma"),
        (dict(plane="push", series="A5"), r"series \('A5'\) must be A2 or A3"),
        (dict(plane="push", planes_open=["push"]), r"plane \('push'\) must be open once"),
        (dict(plane="push", series="A2", nodes=[0, 1]), r"servers \(2\) must be 1 for plane='push' on A2"),
        (dict(plane="push", nodes=[0, 0, 1]), r"ranks of each server \(2, 1\) must be as many for plane='push'"),
    ],
)
def test_what_hccl_does_not_document_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hccl_config(**given)


def groups_on_npus(name: str, devices: int) -> list[Any]:
    """What this rank asks HCCL for, gloo in its place: configs of both planes, ranks, planes open, a second push."""
    asked: list[dict[str, Any]] = []
    new_group = dist.new_group

    def gloo(ranks: list[int], *, backend: str, pg_options: Any, **given: Any) -> Any:
        asked.append(dict(backend=backend, config=getattr(pg_options, "hccl_config", None), **given))
        return new_group(ranks, backend="gloo", **given)

    npu = SimpleNamespace(device_count=lambda: devices, get_device_name=lambda: name)
    mine = [0, 1] if dist.get_rank() < 2 else [2, 3]
    with (
        patch.object(dist, "new_group", gloo),
        patch.object(torch, "get_device_module", lambda device: npu),
        patch.object(planes, "_hccl_options", SimpleNamespace),
    ):
        push, dma = (new_plane_group(plane, mine, "npu") for plane in ("push", "dma"))
        found = [asked, dist.get_process_group_ranks(push), dist.get_process_group_ranks(dma), sorted(open_planes())]
        try:
            new_plane_group("push", mine, "npu")
        except ValueError as error:
            found.append(str(error))
    for group in (push, dma):
        dist.destroy_process_group(group)
    return [*found, open_planes()]


def test_each_plane_is_an_hccl_group_of_its_own() -> None:
    for rank, (asked, push, dma, opened, second, after) in enumerate(run_ranks(4, groups_on_npus, "Ascend910B2", 2)):
        assert asked == [
            dict(backend="hccl", config=config, use_local_synchronization=True, group_desc=plane)
            for plane, config in (("push", {"hccl_op_expansion_mode": 3}), ("dma", None))
        ]
        assert push == dma == ([0, 1] if rank < 2 else [2, 3])
        assert opened == ["dma", "push"] and not after
        assert "must be open once" in second


def test_push_is_refused_where_the_machine_has_no_such_plane() -> None:
    for name, devices, text in (
        ("Ascend910B2", 1, r"servers \(2\) must be 1"),
        ("Ascend310", 8, "must be an Ascend910B"),
    ):
        npu = SimpleNamespace(device_count=lambda devices=devices: devices, get_device_name=lambda name=name: name)
        with patch.object(torch, "get_device_module", lambda device: npu), pytest.raises(ValueError, match=text):  # noqa: B023
            new_plane_group("push", [0, 1], "npu")


def test_training_on_an_npus_push_plane_is_refused() -> None:
    wants = torch.zeros(2, requires_grad=True)
    refuse_training("cpu", wants)
    refuse_training("npu", wants.detach())
    with torch.no_grad():
        refuse_training("npu", wants)
    with pytest.raises(RuntimeError, match="HCCL documents AIV for inference"):
        refuse_training("npu", wants)
