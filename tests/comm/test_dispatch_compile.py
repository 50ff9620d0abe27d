"""The custom operators: what PyTorch demands of them (opcheck), and dispatch and combine inside one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm import layout, transfer
from moeweave.comm import transfer_gathered as gathered_rows
from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.layout import Layout
from nan_empty import nan_empty
from plain_moe import Case, ids_of, probe_of, tokens_of, two_nodes, weights_of
from run_ranks import run_ranks

CASES = [Case((6,), routing="holes", top_k=3, dim=5), Case((4,), routing="none"), Case((0,), top_k=2)]
WAYS = [
    ("alltoall", "exact"),
    ("allgather", "exact"),
    ("allgather", "prereduced"),
    ("onesided", "exact"),
    ("onesided", "prereduced"),
    ("hierarchical", "prereduced"),
]


def gathered(case: Case) -> Layout:
    return make_dispatcher("allgather", None, case.num_experts).layout(ids_of(case, 0))  # type: ignore[attr-defined]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def samples(case: Case) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """An operator and arguments to call it with, alone in its group."""
    ids_TK, at = ids_of(case, 0), gathered(case)
    x_TD, weights_TK = tokens_of(case, 0), weights_of(case, 0)
    rows_RD = torch.cos(torch.arange(at.perm_R.shape[0] * case.dim)).view(-1, case.dim)
    weights_R = torch.linspace(0.5, 1.0, at.perm_R.shape[0])
    routed = (at.route_R, at.max_tokens)
    return {
        "exchange_layout": (layout.exchange_layout, (ids_TK, case.num_experts, "")),
        "gather_layout": (layout.gather_layout, (ids_TK, case.num_experts, "")),
        "return_routes": (transfer.return_routes, (rows_RD, *at.moves, *ids_TK.shape, "")),
        "return_routes_coded": (transfer.return_routes, (rows_RD, *at.moves, *ids_TK.shape, "", "fp8", "token")),
    } | {
        f"{function._name}{name}": (function, (*arguments, *formats))
        for function, arguments in (
            (transfer.send_routes, (leaf(x_TD), *at.moves, None, case.top_k, "")),
            (transfer.combine_routes, (leaf(rows_RD), leaf(weights_TK), *at.moves, "")),
            (gathered_rows.gather_rows, (leaf(x_TD), *routed, *at.moves, case.top_k, "")),
            (
                gathered_rows.combine_prereduced,
                (leaf(rows_RD), leaf(weights_TK), weights_R, *routed, *at.moves, ""),
            ),
        )
        for name, formats in (("", ()), ("_coded", ("fp8", "int8", "token")))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("op", list(samples(CASES[0])))
def test_opcheck(op: str, case: Case) -> None:
    function, arguments = samples(case)[op]
    torch.library.opcheck(function, arguments)


def moved(dispatcher: Any, backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Dispatch, something an expert might do, combine: as it is, and compiled without a graph break."""

    def move(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(x_TD * 2, ids_TK, weights_TK)
        rows_RD = torch.nn.functional.silu(dispatched.rows_RD) + 0.1
        return dispatcher.combine(rows_RD, weights_TK, dispatched).square()

    return move, torch.compile(move, fullgraph=True, dynamic=True, backend=backend)


def compiled_equals_eager(
    way: tuple[str, str], backend: str, recompiles: int, codec: Codec | None = None
) -> list[bool]:
    """The same function with changing token counts and routing, forward and gradients, and how often it compiled."""
    rank, world = dist.get_rank(), dist.get_world_size()
    name, combine = way
    dispatcher = make_dispatcher(
        name, dist.group.WORLD if world > 1 else None, 8, top_k=3, combine=combine, codec=codec, nodes=two_nodes(world)
    )
    eager, compiled = moved(dispatcher, backend)
    equal = []
    torch._dynamo.utils.counters.clear()
    for routing, tokens in (("spread", (6, 9)), ("holes", (7, 5)), ("hot", (12, 6)), ("beyond", (5, 8))):
        case = Case(tokens[:world], top_k=3, dim=5, routing=routing)
        found = []
        for function in (eager, compiled):
            x_TD, weights_TK = leaf(tokens_of(case, rank)), leaf(weights_of(case, rank))
            with nan_empty():
                y_TD = function(x_TD, ids_of(case, rank), weights_TK)
                y_TD.backward(probe_of(case, rank))
            found.append((y_TD.detach(), x_TD.grad, weights_TK.grad))
        equal += [torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*found, strict=True)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [*equal, graphs <= recompiles, not torch._dynamo.utils.counters["graph_break"]]


@pytest.mark.parametrize("world, way", [(1, WAYS[0]), *((2, way) for way in WAYS)], ids=str)
def test_compiles_to_one_graph_whatever_the_routing(world: int, way: tuple[str, str]) -> None:
    for equal in run_ranks(world, compiled_equals_eager, way, "aot_eager", 1):
        assert all(equal), equal


CODEC = Codec(dispatch="fp8", combine="int8", dispatch_backward="fp8_e5m2", combine_backward="fp8")


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_compiles_with_a_codec(way: tuple[str, str]) -> None:
    for equal in run_ranks(2, compiled_equals_eager, way, "aot_eager", 1, CODEC):
        assert all(equal), equal


def compiled_codes(way: tuple[str, str]) -> list[bool]:
    """Coded rows out of a compiled dispatch, beside those of eager code."""
    dispatcher = make_dispatcher(way[0], dist.group.WORLD, 8, combine=way[1], codec=Codec.parse("fp8"), coded_rows=True)

    def products(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        return dispatched.rows_RD.float() * dispatched.scales_R.unsqueeze(1)

    compiled, equal = torch.compile(products, fullgraph=True, dynamic=True, backend="aot_eager"), []
    for routing, tokens in (("spread", (6, 9)), ("holes", (7, 5))):
        case = Case(tokens, top_k=3, dim=5, routing=routing)
        given = [each(case, dist.get_rank()) for each in (tokens_of, ids_of, weights_of)]
        equal.append(torch.equal(products(*given), compiled(*given)))
    return equal


@pytest.mark.parametrize("way", WAYS[:2], ids="/".join)
def test_coded_rows_compile(way: tuple[str, str]) -> None:
    for equal in run_ranks(2, compiled_codes, way):
        assert all(equal), equal


@pytest.mark.slow
@pytest.mark.parametrize("codec", [None, Codec.parse("fp8")], ids=str)
@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_compiles_with_inductor(way: tuple[str, str], codec: Codec | None) -> None:
    for equal in run_ranks(2, compiled_equals_eager, way, "inductor", 1, codec, timeout=600):
        assert all(equal), equal
