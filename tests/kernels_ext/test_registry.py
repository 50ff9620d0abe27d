"""Choosing an implementation: order, reasons, one line of log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moeweave.kernels_ext.registry import Op, select


@dataclass(frozen=True)
class Fake:
    name: str
    reason: str | None = None

    def supports(self, *tensors: Tensor) -> str | None:
        return self.reason


def test_auto_takes_the_first_that_can_run() -> None:
    op = Op("fake", (Fake("fast"), Fake("slow")))
    assert select(op, torch.ones(1)).name == "fast"
    assert select(op, torch.ones(1), impl="slow").name == "slow"


def test_auto_logs_once_what_it_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    op = Op("fake_logged", (Fake("fast", "no such device"), Fake("slow")))
    with caplog.at_level(logging.INFO, logger="moeweave"):
        assert select(op).name == "slow"
        assert select(op).name == "slow"
    assert [record.getMessage() for record in caplog.records] == [
        "fake_logged runs on 'slow' (not fast: no such device)"
    ]


def test_a_named_one_that_cannot_run_raises_with_the_reason_and_the_list() -> None:
    op = Op("fake", (Fake("fast", "no such device"), Fake("slow")))
    with pytest.raises(ValueError, match=r"impl='fast' cannot run fake.*no such device.*auto, fast, slow"):
        select(op, impl="fast")
    with pytest.raises(ValueError, match=r"impl='quick' is no implementation of fake.*auto, fast, slow"):
        select(op, impl="quick")


def test_auto_raises_when_none_can_run() -> None:
    with pytest.raises(ValueError, match="fast: no such device; slow: too slow"):
        select(Op("fake", (Fake("fast", "no such device"), Fake("slow", "too slow"))))
