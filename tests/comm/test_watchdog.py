"""The watchdog raises a reported error in the thread that started it, unless somebody else did."""

from __future__ import annotations

import time

import pytest

from moeweave.comm.watchdog import watch


class Failure(RuntimeError):
    pass


class Reports:
    """Stands for a launcher."""

    def __init__(self) -> None:
        self.told = False
        self.reported: RuntimeError | None = None

    def error(self) -> RuntimeError | None:
        return self.reported


def work(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_it_raises_what_nobody_asked_for() -> None:
    reports = Reports()
    watch(reports, poll=0.01, grace=0.05)
    work(0.1)
    reports.reported = Failure("rows of rank 1")
    with pytest.raises(Failure, match="rows of rank 1"):
        work(20)
    assert reports.told


def test_what_a_call_raised_is_not_raised_again() -> None:
    reports = Reports()
    thread = watch(reports, poll=0.01, grace=0.05)
    reports.told, reports.reported = True, Failure("rows of rank 1")
    thread.join(20)
    assert not thread.is_alive()
    work(0.05)


def test_it_ends_with_what_it_watches() -> None:
    reports = Reports()
    thread = watch(reports, poll=0.01, grace=0.05)
    del reports
    thread.join(20)
    assert not thread.is_alive()
