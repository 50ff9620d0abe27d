"""Micro-batches that take turns: while the rows of one are on the wire, another computes.

Inside a layer, `run_routed` cuts the tokens into chunks. Across layers, `Lanes` runs a whole model on several
micro-batches at once; the model knows nothing of it, because every exchange is a yield point: `hand_over` passes the
turn to the next lane while the exchange is under way. The same code runs one micro-batch, where nothing is handed over.

Lanes are threads of which one runs at a time, in a fixed order, so that every rank issues its collectives in the same
order. Two lanes of a layer, a and b (attention with the router, d dispatch, e experts, c combine):

    compute   a.att  b.att  a.exp  b.exp  a.att' b.att' ...
    wire             a.d    b.d    a.c    b.c    a.d'

Backward is one pass over one graph. Edges between the lanes' exchanges (`_Leave`, `_Enter`, `_End`) make it take the
same turns in reverse; in front of a lane's first exchange there is nothing to tie an edge to, and autograd's own order,
by number, does it (`_number_from`). So every rank's backward issues its collectives in one order, those of attention
over other groups as well. Gradients of parameters are summed over the lanes before anything reduces them over ranks.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.pending import Pending
from moeweave.comm.timeline import Timeline

T = TypeVar("T")
Experts = Callable[[Tensor, Tensor], Tensor]  # rows_RD, offsets_e -> rows_RD

_current: ContextVar[_Lane | None] = ContextVar("moeweave_lane", default=None)


def run_routed(
    dispatcher: TokenDispatcher,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: Experts,
    num_chunks: int = 1,
    timeline: Timeline | None = None,
) -> Tensor:
    """Dispatch, experts, combine of `num_chunks` chunks of the tokens -> y_TD.

        1. post every chunk's dispatch
        2. for each chunk: join its rows, run the experts, post its combine
        3. join the combines in order

    With n chunks, 1 / n of the dispatch and of the combine stay exposed; in backward likewise, in reverse order. Every
    rank of the dispatcher's group must pass the same number of chunks, whatever its number of tokens.
    """
    x_TD, weights_TK = _Together.apply(x_TD, weights_TK)
    chunks = list(
        zip(*(each.tensor_split(num_chunks) for each in (x_TD, ids_TK, weights_TK)), strict=True)
        if num_chunks > 1
        else [(x_TD, ids_TK, weights_TK)]
    )
    arriving = [dispatcher.dispatch_async(*chunk) for chunk in chunks]
    posted = [timeline.now() if timeline else None for _ in chunks]
    returning = []
    for index, (_, _, weights) in enumerate(chunks):
        hand_over(arriving[index])
        arrived = arriving[index].wait()
        _note(timeline, "push", f"dispatch {index}", posted[index])
        start = timeline.now() if timeline else None
        rows_RD = experts(arrived.rows_RD, arrived.offsets_e)
        _note(timeline, "compute", f"experts {index}", start)
        posted[index] = timeline.now() if timeline else None
        returning.append(dispatcher.combine_async(rows_RD, weights, arrived))
    outputs = []
    for index, pending in enumerate(returning):
        hand_over(pending)
        outputs.append(pending.wait())
        _note(timeline, "push", f"combine {index}", posted[index])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@torch.library.custom_op("moeweave::least_of_ranks", mutates_args=())
def least_of_ranks(values: Tensor, group: str) -> Tensor:
    """The least of each of `values` over the ranks of a group: how ranks with different batches agree on one path."""
    least = values.clone()
    comm = Communicator.named(group)
    if comm.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN, group=comm.group)
    return least


@least_of_ranks.register_fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values)


def _note(timeline: Timeline | None, stream: str, name: str, start: Any) -> None:
    if timeline is not None:
        timeline.add(stream, name, start, timeline.now())


def in_lane() -> bool:
    """True on a lane of several."""
    return _current.get() is not None


def hand_over(pending: Pending[Any]) -> None:
    """The yield point: let the other lanes run while `pending` is under way. Nothing happens outside of lanes."""
    lane = _current.get()
    if lane is None:
        return
    turns, token = lane.turns, pending.token
    linked = token is not None and token.requires_grad and torch.is_grad_enabled()
    if linked:
        pending.token, turns.baton = _Leave.apply(token)
    lane.yield_turn(linked)
    if linked and turns.baton is not None:
        pending.token = _Enter.apply(pending.token, turns.baton)


class _Together(torch.autograd.Function):
    """Tokens and their weights as they are. In backward the tokens' gradient comes before the router's, whatever ran
    while it was under way: sums of gradients keep their order, and so their bits."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return x_TD.view_as(x_TD), weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor, grad_TK: Tensor) -> tuple[Tensor, Tensor]:
        return grad_TD, grad_TK


class _Leave(torch.autograd.Function):
    """In backward: the exchange is not joined before the lane that ran next has posted its own."""

    @staticmethod
    def forward(ctx: Any, token: Tensor) -> tuple[Tensor, Tensor]:
        return token.new_empty(0), token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, baton: Tensor) -> Tensor:
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class _End(torch.autograd.Function):
    """In backward: a lane's last piece waits for that of the lane that ran on after it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> tuple[Tensor, Tensor]:
        return result.view_as(result), result.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad


def _number_from(number: int) -> int:
    """Make autograd number what this thread does next from `number` on; returns where it is.

    Of nodes that are ready, backward runs the highest number first, and every thread counts for itself.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return 0
    one, reached = torch.ones((), requires_grad=True), -1
    while reached < number:
        node = one.view_as(one).grad_fn
        assert node is not None
        reached = node._sequence_nr()
    return reached


class LaneLocal(Protocol):
    """State of somebody else's that must be each lane's own: taken out when a lane stops, put back when it goes on."""

    def save(self) -> Any: ...

    def restore(self, saved: Any) -> None: ...


class LaneStopped(RuntimeError):
    """Raised in a lane when another one failed, to end it."""


def run_lanes(tasks: Sequence[Callable[[], T]], local: Sequence[LaneLocal] = ()) -> list[T]:
    """Run the tasks as lanes and return their results in order. Call it with the same tasks on every rank.

    Each task runs on a thread that ends with it, the first one too: how far the caller's thread has counted autograd's
    nodes is no other rank's business. Grad mode, autocast, device, stream and context variables are the caller's; modes
    of tensor functions are not. The first exception of a lane is raised once all have ended.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    turns = _Turns(len(tasks), list(local))
    lanes = [_Lane(index, task, turns) for index, task in enumerate(tasks)]
    inherit = _thread_state()
    threads = []
    for lane in lanes:
        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(lane.run, inherit), name=f"lane {lane.index}"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error
    return [lane.result for lane in lanes]


class _Turns:
    """Whose turn it is."""

    def __init__(self, num_lanes: int, local: list[LaneLocal]) -> None:
        self.changed = threading.Condition()
        self.turn = 0
        self.running = list(range(num_lanes))
        self.error: BaseException | None = None
        self.baton: Tensor | None = None
        self.number = 0  # where autograd has counted to in lanes that no edge ties yet
        self.local = local
        self.saved = {index: [each.save() for each in local] for index in range(num_lanes)}

    def wait_for(self, index: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == index or self.error is not None)
            if self.error is not None:
                raise LaneStopped(f"lane {index} was stopped: another one failed with {self.error!r}")
        for each, value in zip(self.local, self.saved[index], strict=True):
            each.restore(value)

    def pass_on(self, index: int, *, ended: bool = False) -> None:
        self.saved[index] = [each.save() for each in self.local]
        with self.changed:
            after = [other for other in self.running if other > index] + self.running
            self.turn = after[0]
            if ended:
                self.running.remove(index)
                self.turn = next((other for other in after if other != index), -1)
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


class _Lane:
    def __init__(self, index: int, task: Callable[[], Any], turns: _Turns) -> None:
        self.index, self.task, self.turns = index, task, turns
        self.result: Any = None
        self.linked = False

    def run(self, inherit: Callable[[], Any]) -> None:
        try:
            self.turns.wait_for(self.index)
            _current.set(self)
            with inherit():
                _number_from(self.turns.number)
                self.result = self._end(self.task())
            self.turns.pass_on(self.index, ended=True)
        except LaneStopped:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again by run_lanes, on the caller's thread)
            self.turns.fail(error)

    def yield_turn(self, linked: bool) -> None:
        if not self.linked:
            self.turns.number = _number_from(0)
        self.linked = self.linked or linked
        self.turns.pass_on(self.index)
        self.turns.wait_for(self.index)
        if not self.linked:
            _number_from(self.turns.number)

    def _end(self, result: Any) -> Any:
        if not (isinstance(result, Tensor) and result.requires_grad):
            return result
        result, self.turns.baton = _End.apply(result)
        return result


def _thread_state() -> Callable[[], Any]:
    """A context manager that gives another thread what torch keeps by thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    stream = None if accelerator is None else torch.accelerator.current_stream()

    def inherit() -> ExitStack:
        stack = ExitStack()
        if stream is not None:
            torch.accelerator.set_device_index(stream.device.index)
            torch.accelerator.set_stream(stream)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype))
        return stack

    return inherit
