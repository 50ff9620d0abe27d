"""The three-stream schedule of one layer: its values, its order, and that splitting over planes changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moeweave.comm.codec import Codec
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.nodes import Nodes
from moeweave.comm.pending import Pending
from moeweave.comm.streams import HostStreams, make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.timeline import Span, Timeline
from moeweave.kernels_ext.tolerance import assert_close
from nan_empty import nan_empty
from plain_moe import Case, ids_of, leaves_of, plain, probe_of, run_experts, tokens_of, two_nodes
from run_ranks import run_ranks

CASES = [
    Case((5, 17), top_k=2),
    Case((0, 7), routing="holes"),
    Case((0, 0)),
    Case((9, 4), routing="hot", top_k=3),
    Case((6, 1, 0, 11), routing="holes", top_k=4),
]


class _TimedTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, timeline: Timeline) -> Tensor:
        ctx.timeline, y_TD = timeline, torch.tanh(x_TD)
        ctx.save_for_backward(y_TD)
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        with ctx.timeline.span("compute", "shared expert's gradients"):
            (y_TD,) = ctx.saved_tensors
            return grad_TD * (1 - y_TD * y_TD), None


@dataclass(frozen=True)
class Way:
    """How the layer runs: with this schedule, or (None) through a dispatcher; the shared expert is tanh of the tokens.

    nodes: the node of each rank; () for two halves.
    """

    options: ThreeStreamOptions | None
    dispatcher: dict[str, Any] = field(default_factory=dict)
    overlap: bool = True
    nodes: tuple[int, ...] = ()

    @staticmethod
    def shared(timeline: Timeline | None) -> Callable[[Tensor], Tensor]:
        """tanh, whose backward is a span where there is a timeline."""
        return torch.tanh if timeline is None else lambda x_TD: _TimedTanh.apply(x_TD, timeline)

    def run(self, case: Case, timeline: Timeline | None = None) -> list[Tensor]:
        rank = dist.get_rank()
        x_TD, weights_TK, mine = leaves_of(case, rank)
        experts = lambda rows, offsets: run_experts(mine, rows, offsets)  # noqa: E731
        streams = make_streams("cpu", overlap=self.overlap, timeline=timeline)
        if self.options is None:
            settings = dict(self.dispatcher, nodes=self.nodes or two_nodes(case.world))
            dispatcher = make_dispatcher(group=dist.group.WORLD, num_experts=case.num_experts, **settings)
            arrived = dispatcher.dispatch(x_TD, ids_of(case, rank), weights_TK)
            y_TD = dispatcher.combine(experts(arrived.rows_RD, arrived.offsets_e), weights_TK, arrived)
            y_TD = y_TD + torch.tanh(x_TD)
        else:
            groups = [dist.new_group(list(range(case.world))) for _ in range(2)]
            nodes = Nodes.of(self.nodes or two_nodes(case.world))
            schedule = ThreeStream(*groups, case.num_experts, streams, self.options, case.top_k, nodes)
            y_TD = schedule.layer(x_TD, lambda x: (ids_of(case, rank), weights_TK), experts, self.shared(timeline))
        y_TD.backward(probe_of(case, rank))
        streams.close()
        return [y_TD.detach(), x_TD.grad, weights_TK.grad, mine.grad]


def both(case: Case, way: Way, other: Way) -> tuple[list[Tensor], list[Tensor]]:
    with nan_empty():
        return way.run(case), other.run(case)


WAYS = {
    "gathered": (ThreeStreamOptions("gathered", 0.3), dict(name="allgather")),
    "routed": (ThreeStreamOptions("routed", 0.5), dict(name="alltoall")),
    "one-plane": (ThreeStreamOptions("gathered", 0.0), dict(name="allgather")),
    "int8": (ThreeStreamOptions("gathered", 0.3, codec=Codec(dispatch="int8")), dict(name="allgather")),
    "routed-fp8-both": (
        ThreeStreamOptions("routed", 0.4, codec=Codec(dispatch="fp8", combine="fp8_e5m2")),
        dict(name="alltoall"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_dispatcher(case: Case, way: str) -> None:
    options, dispatcher = WAYS[way]
    plainly = Way(None, {**dispatcher, "codec": options.codec})
    for rank, (found, want) in enumerate(run_ranks(case.world, both, case, Way(options), plainly)):
        for index, (a, b) in enumerate(zip(found, want, strict=True)):
            assert torch.equal(a, b), f"rank {rank}: {index} differs by {(a - b).abs().max()}"


BY_NODE = dict(form="hierarchical", combine="prereduced")
EVERY_CODEC = Codec(dispatch="int8", combine="fp8", dispatch_backward="fp8_e5m2", combine_backward="int8")
BY_NODE_CASES = [
    *(pytest.param(case, (), {}, Codec(), id=case.name) for case in CASES),
    pytest.param(CASES[4], (), dict(num_parts=5), EVERY_CODEC, id="parts-of-no-token-coded"),
    pytest.param(CASES[4], (), dict(num_parts=0), EVERY_CODEC, id="all-at-once-coded"),
    pytest.param(CASES[4], (0, 0, 0, 0), {}, Codec(dispatch="fp8"), id="one-node"),
    pytest.param(CASES[4], (0, 1, 2, 3), dict(max_tokens=16), Codec(), id="nodes-of-one-rank-fixed-windows"),
]
WIDE = [Case((5, 0, 1, 9, 17, 2), num_experts=12, routing=r, top_k=k) for r in ("holes", "hot", "none") for k in (1, 5)]
WIDE += [Case((5, 0, 1, 9, 17, 2, 3, 8), top_k=4, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)]
for case in WIDE:
    lie = (0, 0, 1, 1, 2, 2) if case.world == 6 else (0, 0, 0, 0, 1, 1, 1, 1)
    for parts, codec in ((1, Codec()), (3, Codec()), (2, EVERY_CODEC)):
        name = f"{case.name}-{parts}-{codec.dispatch}"
        marks = pytest.mark.slow
        BY_NODE_CASES.append(pytest.param(case, lie, dict(num_parts=parts), codec, id=name, marks=marks))


@pytest.mark.parametrize("case, nodes, options, codec", BY_NODE_CASES)
def test_by_node_has_the_bits_of_the_hierarchical_dispatcher(
    case: Case, nodes: tuple[int, ...], options: dict[str, Any], codec: Codec
) -> None:
    way = Way(ThreeStreamOptions(**BY_NODE, codec=codec, **options), nodes=nodes)
    plainly = Way(None, dict(name="hierarchical", codec=codec), nodes=nodes)
    for rank, (found, want) in enumerate(run_ranks(case.world, both, case, way, plainly)):
        for index, (a, b) in enumerate(zip(found, want, strict=True)):
            assert torch.equal(a, b), f"rank {rank}: {index} differs by {(a - b).abs().max()}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prereduced(case: Case) -> None:
    """Overlapped and split over planes or not: the same bits; and the plain loop's values."""
    options = ThreeStreamOptions("gathered", 0.3, "prereduced")
    alone = Way(replace(options, push_share=1.0), overlap=False)
    answers = plain(case)
    for rank, (found, want) in enumerate(run_ranks(case.world, both, case, Way(options), alone)):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        tokens = tokens_of(case, rank)
        assert_close("y_TD", found[0] - torch.tanh(tokens), answers[rank].y_TD, case.dtype)
        assert_close("weights", found[2], answers[rank].grad_weights_TK, case.dtype)


def without_gradients(case: Case, options: ThreeStreamOptions) -> Tensor:
    rank = dist.get_rank()
    x_TD, weights_TK, mine = leaves_of(case, rank)
    groups = [dist.new_group(list(range(case.world))) for _ in range(2)]
    streams = make_streams("cpu")
    schedule = ThreeStream(*groups, case.num_experts, streams, options, case.top_k)
    with torch.no_grad(), nan_empty():
        experts = lambda rows, offsets: run_experts(mine, rows[: offsets[-1]], offsets)  # noqa: E731
        tail = lambda rows, offsets: torch.cat(  # noqa: E731
            [experts(rows, offsets), rows.new_full((rows.shape[0] - int(offsets[-1]), case.dim), float("nan"))]
        )
        y_TD = schedule.layer(x_TD, lambda x: (ids_of(case, rank), weights_TK), tail, torch.tanh)
    streams.close()
    return y_TD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fixed_sizes_change_no_bit(case: Case) -> None:
    """Rows past the last offset hold NaN after the experts, and reach nothing."""
    agreed = ThreeStreamOptions("gathered", 0.3, "prereduced", Codec(dispatch="int8"))
    fixed = replace(agreed, max_tokens=max(*case.tokens, 1) + 3)
    found, want = (run_ranks(case.world, without_gradients, case, options) for options in (fixed, agreed))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_fixed_sizes_read_nothing_from_the_device() -> None:
    """Fake tensors have no values: a read would raise."""
    options = ThreeStreamOptions("gathered", 0.3, "prereduced", Codec(dispatch="int8"), max_tokens=8)
    schedule = ThreeStream(None, None, 4, make_streams("cpu", overlap=False), options, 2)
    with FakeTensorMode(), torch.no_grad():
        x_TD, ids_TK, weights_TK = torch.ones(5, 64), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
        y_TD = schedule.layer(x_TD, lambda x: (ids_TK, weights_TK), lambda rows, offsets: rows * 2, torch.tanh)
        assert y_TD.shape == (5, 64)
    too_few = replace(options, max_tokens=4)
    schedule = ThreeStream(None, None, 4, make_streams("cpu", overlap=False), too_few, 2)
    with pytest.raises(ValueError, match=r"max_tokens \(4\).*tokens of a rank \(5\)"), torch.no_grad():
        schedule.leave(torch.ones(5, 64))


def traced(case: Case, way: Way) -> list[Span]:
    timeline = Timeline()
    way.run(case, timeline)
    return timeline.spans()


def named(spans: list[Span], stream: str, name: str) -> Span:
    (found,) = [span for span in spans if (span.stream, span.name) == (stream, name)]
    return found


def test_gathered_rows_leave_before_the_router_has_run() -> None:
    options = ThreeStreamOptions("gathered", 0.3, codec=Codec(dispatch="int8"))
    for spans in run_ranks(2, traced, Case((64, 64), dim=256), Way(options)):
        router, experts = named(spans, "compute", "router"), named(spans, "compute", "experts")
        assert len([span for span in spans if span.name == "quantise"]) == 1, "quantised once"
        for stream in ("push", "dma"):
            assert named(spans, "compute", "quantise").end <= named(spans, stream, "rows").start
        assert named(spans, "push", "rows").start < router.end and named(spans, "push", "scales").start < router.end
        assert router.end <= named(spans, "push", "ids").start < named(spans, "compute", "shared expert").start
        assert max(named(spans, plane, "rows").end for plane in ("push", "dma")) <= experts.start
        results = [named(spans, plane, "results") for plane in ("push", "dma")]
        assert all(experts.end <= span.start for span in results)
        assert named(spans, "compute", "sum").start >= max(span.end for span in results)


def test_routed_rows_wait_for_the_router_and_not_for_the_shared_expert() -> None:
    for spans in run_ranks(2, traced, Case((64, 64), dim=256), Way(ThreeStreamOptions("routed", 0.5))):
        router, shared = named(spans, "compute", "router"), named(spans, "compute", "shared expert")
        assert router.end <= named(spans, "push", "rows").start < shared.start
        assert named(spans, "push", "rows").end >= shared.end, "joined only after the shared expert"


@pytest.mark.parametrize("form, combine", [("gathered", "exact"), ("routed", "exact"), ("gathered", "prereduced")])
def test_gradients_are_overlapped_too(form: str, combine: str) -> None:
    """Both planes carry both gradients; the shared expert's are computed while those of the rows are under way."""
    for spans in run_ranks(2, traced, Case((64, 64), dim=256), Way(ThreeStreamOptions(form, 0.5, combine))):
        shared = named(spans, "compute", "shared expert's gradients")
        for plane in ("push", "dma"):
            results, rows = (named(spans, plane, f"gradients of {name}") for name in ("results", "rows"))
            assert named(spans, plane, "results").end < results.start < results.end < rows.start
        rows = named(spans, "push", "gradients of rows")
        assert rows.start < shared.start < shared.end < rows.end, "posted before, joined after the shared expert's"


def test_by_node_on_one_rank() -> None:
    case = Case((7,), routing="holes", top_k=3)
    x_TD, weights_TK, mine = leaves_of(case, 0)
    options = ThreeStreamOptions(**BY_NODE)
    schedule = ThreeStream(None, None, case.num_experts, make_streams("cpu"), options)
    routes = ids_of(case, 0), weights_TK
    y_TD = schedule.layer(x_TD, lambda x: routes, lambda rows, offsets: run_experts(mine, rows, offsets))
    y_TD.backward(probe_of(case, 0))
    (want,) = plain(case)
    assert_close("y_TD", y_TD.detach(), want.y_TD, case.dtype)
    assert_close("x_TD", x_TD.grad, want.grad_x_TD, case.dtype)
    schedule.streams.close()
    with pytest.raises(RuntimeError, match=r"form \('hierarchical'\) must run outside of compiled code.*Use a"):
        schedule._engine[1].fake_moves(ids_of(case, 0), int)


class Gate:
    """The network between nodes, which carries each part of the rows only once others were seen to end."""

    def __init__(self, comm: Communicator, timeline: Timeline, awaited: list[str]) -> None:
        self.comm, self.timeline, self.awaited = comm, timeline, awaited
        self.rank, self.size = comm.rank, comm.size

    def all_to_all(self, *args: Any, **kwargs: Any) -> Any:
        name, deadline = self.awaited.pop(0), time.monotonic() + 60
        while not any(span.name == name for span in self.timeline.spans()):
            assert time.monotonic() < deadline, f"{name} waits for a part that has not left"
            time.sleep(0.001)
        return self.comm.all_to_all(*args, **kwargs)


def gated(case: Case) -> tuple[list[str], Tensor]:
    """Names of the spans by start, and the output, with a network that waits for what must not wait for it."""
    rank, timeline = dist.get_rank(), Timeline()
    groups, streams = [dist.new_group() for _ in range(2)], make_streams("cpu", timeline=timeline)
    schedule = ThreeStream(*groups, case.num_experts, streams, ThreeStreamOptions(**BY_NODE), nodes=Nodes(2, 2))
    _, engine = schedule._engine
    engine.across = Gate(engine.across, timeline, ["spread 0", "spread 1", "sums 2", "sums 0"])
    x_TD, weights_TK, mine = leaves_of(case, rank)
    with torch.no_grad():
        experts = lambda rows, offsets: run_experts(mine, rows, offsets)  # noqa: E731
        y_TD = schedule.layer(x_TD, lambda x: (ids_of(case, rank), weights_TK), experts, torch.tanh)
    streams.close()
    assert not engine.across.awaited, "every part crossed"
    return [span.name for span in timeline.spans() if span.stream == "push"], y_TD


def test_a_part_spreads_inside_the_node_while_the_next_crosses() -> None:
    case = Case((6, 9, 3, 11), routing="holes", top_k=4)
    answers = plain(case)
    for rank, (names, y_TD) in enumerate(run_ranks(4, gated, case)):
        there, back = ["ids and weights", "spread 0", "spread 1", "spread 2"], ["sums 1", "sums 2", "sums 0"]
        assert names == there + back
        assert_close("y_TD", y_TD - torch.tanh(tokens_of(case, rank)), answers[rank].y_TD, case.dtype)


def test_helper_thread_starts_late_and_ends() -> None:
    before = threading.active_count()
    streams = HostStreams()
    assert threading.active_count() == before
    main = threading.current_thread().name
    assert streams.start("push", "", lambda: Pending.ready(threading.current_thread().name)).wait() == main
    assert streams.start("dma", "", lambda: Pending.ready(threading.current_thread().name)).wait() != main
    streams.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(form="sent"), "form"),
        (dict(push_share=1.5), "push_share"),
        (dict(combine="sum"), "combine"),
        (dict(form="routed", combine="prereduced"), "gathered"),
        (dict(form="hierarchical"), r"combine \('exact'\) has no form='hierarchical'. Set combine='prereduced'"),
        (dict(num_parts=-1), r"num_parts \(-1\) must be at least 0"),
        (dict(max_tokens=16), "prereduced"),
    ],
)
def test_options_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreeStreamOptions(**fields)
