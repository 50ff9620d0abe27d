"""What the person at the terminal sees while steps run: a bar on a terminal, a line now and then elsewhere.

Balance is the load of a layer's busiest expert over the mean of its experts, averaged over layers: 1.0 is perfect, and
with K of E experts to a token E/K the worst.
"""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Shows steps as they end; says other things in between."""

    def step(self, line: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_reporter(kind: str, name: str, first_step: int, num_steps: int, every: int) -> Reporter:
    """The reporter that log.progress asks for: bar, lines, off, or auto (a bar where the output is a terminal)."""
    if kind == "auto":
        kind = "bar" if Console().is_terminal else "lines"
    if kind == "bar":
        return Bar(name, first_step, num_steps)
    return Lines(num_steps, every if kind == "lines" else num_steps + 1)


class Bar:
    """quickstart ━━━━━━╺━━━ 63/100 loss 2.704  3,912 tok/s  balance 1.21  0:00:21"""

    def __init__(self, name: str, first_step: int, num_steps: int):
        numbers = "loss {task.fields[loss]}  {task.fields[speed]} tok/s  balance {task.fields[balance]}"
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(numbers, style="cyan"),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task(
            name, total=num_steps, completed=first_step - 1, loss="-", speed="-", balance="-"
        )
        self._progress.start()

    def step(self, line: dict[str, Any]) -> None:
        self._progress.update(
            self._task,
            completed=line["step"],
            loss=_loss(line),
            speed=f"{line['tokens_per_second']:,.0f}",
            balance=_balance(line),
        )

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """step 63/100  loss 2.704  3,912 tok/s  balance 1.21"""

    def __init__(self, num_steps: int, every: int):
        self._num_steps, self._every = num_steps, every

    def step(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if self._every <= self._num_steps and (step == 1 or step % self._every == 0 or step == self._num_steps):
            speed = f"{line['tokens_per_second']:,.0f} tok/s"
            print(f"step {step}/{self._num_steps}  loss {_loss(line)}  {speed}  balance {_balance(line)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Silent:
    """For every rank but the first."""

    def step(self, line: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _loss(line: dict[str, Any]) -> str:
    return "skipped" if line["loss"] is None else f"{line['loss']:.3f}"


def _balance(line: dict[str, Any]) -> str:
    return f"{line['balance']:.2f}" if line["balance"] is not None else "-"
