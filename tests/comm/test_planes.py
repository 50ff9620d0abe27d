"""Options of the groups of each plane, without torch-npu."""

from __future__ import annotations

from typing import Any

import pytest

from moeweave.comm.planes import hccl_config


def test_push_is_aiv_and_dma_the_default() -> None:
    assert hccl_config("push") == {"hccl_op_expansion_mode": 3}
    assert hccl_config("push", "A2", num_nodes=1, planes_open=["dma"]) == {"hccl_op_expansion_mode": 3}
    assert hccl_config("push", "A3", num_nodes=4) == {"hccl_op_expansion_mode": 3}
    assert hccl_config("dma", "A2", num_nodes=4, planes_open=["push", "dma"]) == {}


@pytest.mark.parametrize(
    "given, text",
    [
        (dict(plane="aiv"), r"plane \('aiv'\) must be one of push, dma"),
        (dict(plane="push", series="A5"), r"series \('A5'\) must be A2 or A3"),
        (dict(plane="push", planes_open=["push"]), r"plane \('push'\) must be open once"),
        (dict(plane="push", series="A2", num_nodes=2), r"num_nodes \(2\) must be 1 for plane='push' on A2"),
    ],
)
def test_what_hccl_does_not_document_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hccl_config(**given)
