"""The hierarchical dispatcher on other numbers of nodes than two halves: rows bit for bit those that a loop over routes
names, also coded, posted and along a known layout; sums and gradients against the plain loop.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, e experts of this rank.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec, decode_rows, encode_rows
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.kernels_ext.tolerance import assert_close
from nan_empty import nan_empty
from plain_moe import Case, ids_of, leaves_of, plain, probe_of, routes_by_row, run_experts, tokens_of
from run_ranks import run_ranks

THREE, FOUR = (0, 0, 1, 1, 2, 2), (0, 1, 2, 3)
TOKENS = (5, 0, 1, 9, 17, 2)
CODED = Codec(dispatch="fp8", dispatch_backward="fp8_e5m2")
CASES = [
    pytest.param(THREE, Case(TOKENS, num_experts=12, routing="holes", top_k=4), Codec(), id="3x2"),
    pytest.param(FOUR, Case(TOKENS[:4], routing="beyond", top_k=3), CODED, id="4x1-coded"),
    pytest.param((0,) * 4, Case(TOKENS[:4], routing="hot", top_k=2), Codec(), id="1x4-hot"),
]
WIDE = [
    (THREE, Case(TOKENS, num_experts=12, routing=routing, top_k=k))
    for routing, k in (("spread", 12), ("hot", 2), ("none", 2), ("holes", 1))
]
WIDE += [(THREE, Case((0,) * 6, num_experts=12)), (THREE, Case((63,) * 6, num_experts=6, dim=20, top_k=3))]
WIDE += [((0, 0, 0, 0, 1, 1, 1, 1), Case((*TOKENS, 3, 8), num_experts=16, top_k=8, routing="holes"))]
WIDE += [((0, 0, 1, 1, 2, 2, 3, 3), Case((*TOKENS, 3, 8), dtype=torch.bfloat16, top_k=4))]
for nodes, case in WIDE:
    for codec in (Codec(), CODED):
        name = f"{max(nodes) + 1}x{nodes.count(0)}-{case.name}-{codec.dispatch}"
        CASES.append(pytest.param(nodes, case, codec, id=name, marks=pytest.mark.slow))


def three_ways(case: Case, nodes: tuple[int, ...], codec: Codec) -> list[list[Tensor]]:
    """At once, posted, and along the first one's layout: rows, output and gradients."""
    rank, found, handle = dist.get_rank(), [], None
    dispatcher = make_dispatcher("hierarchical", dist.group.WORLD, case.num_experts, codec=codec, nodes=nodes)
    for way in ("at once", "posted", "known"):
        x_TD, weights_TK, mine = leaves_of(case, rank)
        with nan_empty():
            given = (x_TD, ids_of(case, rank), weights_TK)
            if way == "posted":
                arrived = dispatcher.dispatch_async(*given).wait()
            else:
                arrived = dispatcher.dispatch(*given, handle=handle)
            rows_RD = run_experts(mine, arrived.rows_RD, arrived.offsets_e)
            combine = dispatcher.combine if way != "posted" else lambda *a: dispatcher.combine_async(*a).wait()
            y_TD = combine(rows_RD, weights_TK, arrived)
            y_TD.backward(probe_of(case, rank))
        handle = arrived.handle
        results = [arrived.rows_RD, y_TD, x_TD.grad, weights_TK.grad, mine.grad]
        found.append([each.detach().clone() for each in results])
    return found


@pytest.mark.parametrize("nodes, case, codec", CASES)
def test_on_any_even_nodes(nodes: tuple[int, ...], case: Case, codec: Codec) -> None:
    answers, per_rank = plain(case), case.num_experts // case.world
    arrives = [coded(tokens_of(case, rank), codec) for rank in range(case.world)]
    for rank, (found, posted, known) in enumerate(run_ranks(case.world, three_ways, case, nodes, codec)):
        assert all(torch.equal(a, b) for a, b in zip(found, posted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True))
        rows_RD, y_TD, *gradients = found
        want = [arrives[source][token] for _, source, token, _ in routes_by_row(case, rank, case.world)]
        assert torch.equal(rows_RD, torch.stack(want) if want else rows_RD[:0])
        if codec != Codec():
            continue  # what a codec does to sums and gradients is compared in test_dispatch_codec
        mine = answers[rank].grad_experts[rank * per_rank : (rank + 1) * per_rank]
        wanted = (answers[rank].y_TD, answers[rank].grad_x_TD, answers[rank].grad_weights_TK, mine)
        for name, got, each in zip(("y", "x", "weights", "experts"), (y_TD, *gradients), wanted, strict=True):
            assert_close(f"rank {rank} {name}", got, each, case.dtype)


def coded(x_TD: Tensor, codec: Codec) -> Tensor:
    words = encode_rows(x_TD, codec.dispatch, codec.scale)
    return decode_rows(words, codec.dispatch, codec.scale, x_TD.shape[1], x_TD.dtype)
