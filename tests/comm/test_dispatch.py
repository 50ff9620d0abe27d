"""Every dispatcher against a plain loop over tokens: rows moved bit for bit, numbers and all gradients computed within
the table, on 1, 2 and 4 ranks, with uninitialised memory NaN.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, e experts of this rank.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.layout import Layout
from moeweave.kernels_ext.tolerance import assert_close
from nan_empty import nan_empty
from plain_moe import Case, experts_of, ids_of, plain, probe_of, routes_by_row, tokens_of, two_nodes, weights_of
from run_ranks import run_ranks

WAYS = [
    ("alltoall", "exact"),
    ("allgather", "exact"),
    ("allgather", "prereduced"),
    ("onesided", "exact"),
    ("onesided", "prereduced"),
    ("hierarchical", "prereduced"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def cases_on(world: int) -> list[Case]:
    uneven = (5, 17, 1, 9)[:world]
    cases = [Case(uneven, routing=routing) for routing in ("spread", "holes", "none", "hot", "beyond")]
    cases += [Case(uneven, routing="holes", dtype=dtype) for dtype in DTYPES[1:]]
    cases += [Case(uneven, routing="holes", top_k=k) for k in (1, 3, 4, 8)]
    cases += [
        Case((1,) * world),
        Case((63,) * world, dim=20, top_k=3, num_experts=12),
        Case((0,) * world),
        Case((0,) * world, dtype=torch.bfloat16),
        Case((0, *uneven[1:])),
        Case((*uneven[:-1], 0), routing="holes", dtype=torch.bfloat16),
        Case(uneven, num_experts=world, top_k=1),
        Case(uneven, num_experts=16, top_k=16, routing="holes"),
        Case(uneven, dim=1),
        Case(uneven, dtype=torch.bfloat16, weights_dtype=torch.bfloat16),
    ]
    return list(dict.fromkeys(cases))


CASES = [pytest.param(world, case, id=f"{world}ranks-{case.name}") for world in (1, 2, 4) for case in cases_on(world)]
CASES += [
    pytest.param(8, Case((5, 0, 1, 9, 17, 2, 3, 8), **kind), id=f"8ranks-{number}", marks=pytest.mark.slow)
    for number, kind in enumerate((dict(routing="holes", top_k=3), dict(num_experts=16, top_k=16), dict(routing="hot")))
]


def group_of(world: int) -> dist.ProcessGroup | None:
    return dist.group.WORLD if world > 1 else None


def dispatcher_for(case: Case, way: tuple[str, str]) -> TokenDispatcher:
    name, combine = way
    nodes = two_nodes(case.world)
    return make_dispatcher(name, group_of(case.world), case.num_experts, top_k=case.top_k, combine=combine, nodes=nodes)


def one_step(
    case: Case, dispatcher: TokenDispatcher, posted: bool = False, handle: Layout | None = None
) -> dict[str, Tensor]:
    """Dispatch, a matrix an expert, combine, backward: everything that came out on this rank."""
    rank = dist.get_rank()
    per_rank = case.num_experts // case.world
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    mine = experts_of(case)[rank * per_rank : (rank + 1) * per_rank].clone()
    for leaf in (x_TD, weights_TK, mine):
        leaf.requires_grad_()
    if posted:
        dispatched = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK, handle=handle).wait()
    else:
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK, handle=handle)
    starts = [0, *dispatched.offsets_e.tolist()]
    pieces = [dispatched.rows_RD[a:b] @ mine[e] for e, (a, b) in enumerate(pairwise(starts))]
    # Two rows more than arrived, and NaN: what lies past the last offset must reach nothing.
    rows_RD = torch.cat([*pieces, torch.full((2, case.dim), float("nan"), dtype=case.dtype)])
    if posted:
        y_TD = dispatcher.combine_async(rows_RD, weights_TK, dispatched).wait()
    else:
        y_TD = dispatcher.combine(rows_RD, weights_TK, dispatched)
    y_TD += torch.zeros_like(y_TD)  # as models add a shared expert
    y_TD.backward(probe_of(case, rank))
    found = dict(rows_RD=dispatched.rows_RD, y_TD=y_TD, grad_x_TD=x_TD.grad, grad_weights_TK=weights_TK.grad)
    found.update(grad_experts=mine.grad, offsets_e=dispatched.offsets_e)
    if dispatched.weights_R is not None:
        found["weights_R"] = dispatched.weights_R
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def every_way(case: Case) -> dict[str, dict[str, Tensor]]:
    with nan_empty():
        found = {}
        for way in WAYS:
            dispatcher = dispatcher_for(case, way)
            found["/".join(way)] = one_step(case, dispatcher)
            found["/".join((*way, "again"))] = one_step(case, dispatcher)
            found["/".join((*way, "posted"))] = one_step(case, dispatcher, posted=True)
        return found


@cache
def ran(case: Case) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(case.world, every_way, case)


@pytest.mark.parametrize("world, case", CASES)
def test_equals_a_loop_over_tokens(world: int, case: Case) -> None:
    answers = plain(case)
    per_rank = case.num_experts // world
    for rank, ways in enumerate(ran(case)):
        routes = routes_by_row(case, rank, world)
        sources = [tokens_of(case, source) for source in range(world)]
        want_rows = [sources[source][token] for _, source, token, _ in routes]
        want_RD = torch.stack(want_rows) if routes else torch.empty(0, case.dim, dtype=case.dtype)
        counts_e = [sum(expert == rank * per_rank + e for expert, *_ in routes) for e in range(per_rank)]
        want = answers[rank]
        for way, found in ways.items():
            assert torch.equal(found["rows_RD"], want_RD), f"rank {rank} {way}: rows by expert, then source, then route"
            assert found["offsets_e"].dtype == torch.int32
            assert found["offsets_e"].tolist() == torch.tensor(counts_e).cumsum(0).tolist()
            assert found["y_TD"].dtype == found["grad_x_TD"].dtype == case.dtype
            mine = want.grad_experts[rank * per_rank : (rank + 1) * per_rank]
            if "weights_R" in found:
                weights = [weights_of(case, source)[token, k] for _, source, token, k in routes]
                assert found["weights_R"].tolist() == [float(weight) for weight in weights]
            for name, tensor in (
                ("y_TD", want.y_TD),
                ("grad_x_TD", want.grad_x_TD),
                ("grad_weights_TK", want.grad_weights_TK),
                ("grad_experts", mine),
            ):
                assert_close(f"rank {rank} {way} {name}", found[name], tensor, case.dtype)


@pytest.mark.parametrize("world, case", CASES)
def test_exact_results_are_the_same_bits_every_way(world: int, case: Case) -> None:
    for rank, ways in enumerate(ran(case)):
        first = ways["alltoall/exact"]
        for way, found in ways.items():
            # Prereduced sums round once more, each dispatcher in its own way; they repeat.
            want = ways["/".join(way.split("/")[:2])] if "prereduced" in way else first
            for name in want:
                assert torch.equal(found[name], want[name]), f"rank {rank}: {way} differs in {name}"


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_prereduced_is_rounded_at_most_once_more(way: tuple[str, str]) -> None:
    """In fp32 the sums differ only by their order, so a token with one route has the same bits either way."""
    case = Case((5, 17), top_k=1)
    for ways in ran(case):
        assert torch.equal(ways["/".join(way)]["y_TD"], ways["alltoall/exact"]["y_TD"])


def reuse(case: Case, way: tuple[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Dispatches of other rows and weights with the layout of the first, beside the same without it."""
    dispatcher, rank = dispatcher_for(case, way), dist.get_rank()
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    handle = dispatcher.dispatch(x_TD, ids_TK, weights_TK).handle
    pairs = []
    for scale in (2.0, -0.5):
        results = []
        for given in (handle, None):
            x, weights = (x_TD * scale).requires_grad_(), (weights_TK + scale).requires_grad_()
            dispatched = dispatcher.dispatch(x, ids_TK, weights, handle=given)
            y_TD = dispatcher.combine(dispatched.rows_RD.square(), weights, dispatched)
            y_TD.backward(probe_of(case, rank))
            results.append(torch.cat([y_TD.flatten(), x.grad.flatten(), weights.grad.flatten()]).detach())
        pairs.append((results[0], results[1]))
    return pairs


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_a_handle_carries_other_rows_and_weights(way: tuple[str, str]) -> None:
    for pairs in run_ranks(2, reuse, Case((5, 9), routing="holes"), way):
        for reused, anew in pairs:
            assert torch.equal(reused, anew)
            assert anew.any()


def layers_in_flight(case: Case, way: tuple[str, str], num_layers: int) -> list[Tensor]:
    """Many layers on one dispatcher, all dispatched before any is combined, gradients through all; and one by one."""
    dispatcher, rank = dispatcher_for(case, way), dist.get_rank()
    ids_TK = ids_of(case, rank)
    results: list[Tensor] = []
    for together in (True, False):
        x_TD, weights_TK = tokens_of(case, rank).requires_grad_(), weights_of(case, rank).requires_grad_()
        total, flying = torch.zeros_like(x_TD), []
        for layer in range(num_layers):
            ids = torch.where(ids_TK >= 0, (ids_TK + layer) % case.num_experts, ids_TK)
            dispatched = dispatcher.dispatch(x_TD * (layer + 1), ids, weights_TK)
            flying.append(dispatched)
            if not together:
                total = total + dispatcher.combine(dispatched.rows_RD.tanh(), weights_TK, dispatched)
        if together:
            for dispatched in flying:
                total = total + dispatcher.combine(dispatched.rows_RD.tanh(), weights_TK, dispatched)
        total.backward(probe_of(case, rank))
        results += [total.detach(), x_TD.grad, weights_TK.grad]
    return results


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_dispatchers_keep_nothing_between_calls(way: tuple[str, str]) -> None:
    case = Case((5, 0, 9, 2), routing="holes", dtype=torch.float64)
    for together_y, together_x, together_w, *single in run_ranks(4, layers_in_flight, case, way, 6):
        for got, want in zip((together_y, together_x, together_w), single, strict=True):
            assert_close("in flight", got, want)


def no_gradient(case: Case, way: tuple[str, str]) -> list[bool]:
    dispatcher, rank = dispatcher_for(case, way), dist.get_rank()
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    states = []
    for wants_x, wants_weights in ((False, False), (True, False), (False, True)):
        x, weights = x_TD.clone().requires_grad_(wants_x), weights_TK.clone().requires_grad_(wants_weights)
        dispatched = dispatcher.dispatch(x, ids_TK, weights)
        y_TD = dispatcher.combine(dispatched.rows_RD, weights, dispatched)
        if wants_x or wants_weights:
            y_TD.sum().backward()
        states += [dispatched.rows_RD.requires_grad == wants_x, y_TD.requires_grad == (wants_x or wants_weights)]
        states += [(x.grad is not None) == wants_x, (weights.grad is not None) == wants_weights]
        states += [dispatched.weights_R is None or not dispatched.weights_R.requires_grad]
    return states


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_gradients_only_where_they_are_wanted(way: tuple[str, str]) -> None:
    for states in run_ranks(2, no_gradient, Case((5, 9)), way):
        assert all(states)


def transposed(x: Tensor) -> Tensor:
    """The same values, laid out by column."""
    return x.t().contiguous().t()


def odd_inputs(way: tuple[str, str]) -> list[bool]:
    """Non-contiguous tokens, weights and rows; an expanded gradient; the answers of contiguous ones."""
    case = Case((6, 4), routing="holes")
    dispatcher, rank = dispatcher_for(case, way), dist.get_rank()
    ids_TK = ids_of(case, rank)
    results = []
    for odd in (False, True):
        x_TD, weights_TK = tokens_of(case, rank), weights_of(case, rank)
        if odd:
            x_TD, weights_TK, ids_TK = transposed(x_TD), transposed(weights_TK), transposed(ids_TK)
        x_TD, weights_TK = x_TD.requires_grad_(), weights_TK.requires_grad_()
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        rows_RD = dispatched.rows_RD * 3
        rows_RD = transposed(rows_RD) if odd else rows_RD
        y_TD = dispatcher.combine(rows_RD, weights_TK, dispatched)
        loss = y_TD.sum() if odd else (y_TD * torch.ones_like(y_TD)).sum()
        loss.backward()
        results.append((y_TD.detach(), x_TD.grad, weights_TK.grad))
    return [torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_strides_do_not_matter(way: tuple[str, str]) -> None:
    for equal in run_ranks(2, odd_inputs, way):
        assert all(equal)


def in_a_subgroup(way: tuple[str, str]) -> list[Any]:
    """Two groups of two at once, as with copies of the experts: each is a world of its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    case = Case((3, 7), routing="holes")
    name, combine = way
    dispatcher = make_dispatcher(name, groups[rank % 2], case.num_experts, combine=combine, nodes=two_nodes(2))
    place = rank // 2
    x_TD, ids_TK, weights_TK = tokens_of(case, place) + rank % 2, ids_of(case, place), weights_of(case, place)
    dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    routes = routes_by_row(case, place, 2)
    want_RD = torch.stack([tokens_of(case, source)[token] + rank % 2 for _, source, token, _ in routes])
    y_TD = dispatcher.combine(dispatched.rows_RD, weights_TK, dispatched)
    want_TD = x_TD * (weights_TK * (ids_TK >= 0)).sum(1, keepdim=True)
    return [torch.equal(dispatched.rows_RD, want_RD), torch.allclose(y_TD, want_TD, rtol=1e-5, atol=1e-6)]


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_subgroups_do_not_mix(way: tuple[str, str]) -> None:
    for equal in run_ranks(4, in_a_subgroup, way):
        assert all(equal)
