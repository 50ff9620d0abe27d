"""Dispatch and combine through a codec, on 1, 2 and 4 ranks: rows bit for bit what a local encode and decode gives,
numbers and gradients against a loop over routes, and what a format leaves untouched.

Legend: T tokens of a rank, K routes a token, D width, R rows that arrive, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec, decode_rows, encode_rows
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.kernels_ext.grouped_mm import grouped_mm
from moeweave.kernels_ext.scaled_grouped_mm import quantize_weight, scaled_grouped_mm
from moeweave.kernels_ext.tolerance import assert_close, relative_error
from nan_empty import nan_empty
from plain_moe import Case, experts_of, ids_of, probe_of, routes_by_row, tokens_of, two_nodes, weights_of
from run_ranks import run_ranks

WAYS = [
    ("alltoall", "exact"),
    ("allgather", "exact"),
    ("allgather", "prereduced"),
    ("onesided", "exact"),
    ("onesided", "prereduced"),
    ("hierarchical", "prereduced"),
]
BF16 = torch.bfloat16
MIXED = Codec(dispatch="fp8", combine="int8", dispatch_backward="fp8_e5m2", combine_backward="fp8")
GROUPED = Codec(
    dispatch="fp8", combine="fp8_e5m2", dispatch_backward="fp8", combine_backward="fp8_e5m2", scale="group128"
)
# A width that is no multiple of 16 unless groups need one of 128; zero tokens on a rank, on all; one hot expert.
SETTINGS = [
    (Case((5, 17, 0, 9), dim=20, routing="holes"), Codec(dispatch="fp8")),
    (Case((5, 17, 0, 9), dim=20, routing="holes", top_k=3), MIXED),
    (Case((5, 17), dim=33, routing="hot", dtype=BF16), Codec(dispatch="int8")),
    (Case((5, 17), dim=20, routing="beyond", dtype=BF16), MIXED),
    (Case((3, 63), dim=256), GROUPED),
    (Case((0, 0), dim=20), MIXED),
    (Case((4, 2), dim=20, routing="none"), MIXED),
    (Case((6,), dim=20, routing="holes", top_k=8), MIXED),
]
IDS = [f"{len(case.tokens)}ranks-{case.name}-{codec}".replace(" ", "-") for case, codec in SETTINGS]


def factor_of(expert: int) -> float:
    """What an expert of these tests multiplies its rows by: a power of two, so that nothing is rounded."""
    return 2.0 ** (expert % 5 - 2)


def tokens(case: Case, rank: int) -> Tensor:
    """x_TD of a rank; every fourth row is zeros."""
    x_TD = tokens_of(case, rank)
    x_TD[3::4] = 0
    return x_TD


def one_step(case: Case, way: tuple[str, str], codec: Codec, posted: bool) -> dict[str, Tensor]:
    """Dispatch, experts, combine, backward on this rank; `grad_rows` is what reached the experts' output."""
    rank, world = dist.get_rank(), case.world
    name, combine = way
    group = dist.group.WORLD if world > 1 else None
    dispatcher = make_dispatcher(
        name, group, case.num_experts, top_k=case.top_k, combine=combine, codec=codec, nodes=two_nodes(world)
    )
    x_TD, weights_TK = tokens(case, rank).requires_grad_(), weights_of(case, rank).requires_grad_()
    ids_TK = ids_of(case, rank)
    with nan_empty():
        if posted:
            dispatched = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK).wait()
        else:
            dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        factors = torch.tensor([factor_of(route[0]) for route in routes_by_row(case, rank, world)]).view(-1, 1)
        out_RD = dispatched.rows_RD * factors.to(case.dtype)
        out_RD.retain_grad()
        # Two rows more than arrived, and NaN: what lies past the last offset must reach nothing.
        longer_RD = torch.cat([out_RD, torch.full((2, case.dim), float("nan"), dtype=case.dtype)])
        if posted:
            y_TD = dispatcher.combine_async(longer_RD, weights_TK, dispatched).wait()
        else:
            y_TD = dispatcher.combine(longer_RD, weights_TK, dispatched)
        y_TD.backward(probe_of(case, rank))
    found = dict(rows_RD=dispatched.rows_RD, y_TD=y_TD, grad_rows=out_RD.grad)
    found.update(grad_x_TD=x_TD.grad, grad_weights_TK=weights_TK.grad)
    assert dispatched.scales_R is None
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def every_way(case: Case, codecs: list[Codec]) -> list[dict[str, dict[str, Tensor]]]:
    return [
        {
            "/".join(way) + "/posted" * posted: one_step(case, way, codec, posted)
            for way in WAYS
            for posted in (False, True)
        }
        for codec in codecs
    ]


@cache
def ran(case: Case, codec: Codec) -> list[dict[str, dict[str, Tensor]]]:
    return [found for (found,) in run_ranks(case.world, every_way, case, [codec])]


def coded(rows: Tensor, form: str, scale: str) -> Tensor:
    """What of rows [..., D] arrives."""
    flat = rows.reshape(-1, rows.shape[-1])
    return decode_rows(encode_rows(flat, form, scale), form, scale, rows.shape[-1], rows.dtype).view(rows.shape)


@dataclass(frozen=True)
class Wanted:
    """Of one rank: the results, and the routes' gradients [T, K, D] as they reach the experts."""

    y_TD: Tensor
    grad_x_TD: Tensor
    grad_weights_TK: Tensor
    grad_rows_TKD: Tensor


def wanted(
    case: Case,
    rank: int,
    codec: Codec,
    prereduced: bool,
    weighted_there: bool,
    summed_there: bool,
    fused: bool,
    nodes: bool = False,
) -> Wanted:
    """The layer of `one_step` one exchange after the other, in float64 between them.

    weighted_there: the output's gradient is weighted after it came to the expert's rank, once for all its routes there.
    summed_there: the rows' gradients are summed before they leave it.
    fused: products are added without being rounded first, as processors with such an instruction may do.
    nodes: what is summed on the experts' ranks is summed over each of two nodes, and only then coded.
    """
    x_TD, ids_TK, weights_TK = tokens(case, rank), ids_of(case, rank), weights_of(case, rank)
    routed_TK1 = ((ids_TK >= 0) & (ids_TK < case.num_experts)).unsqueeze(2)
    factors_TK1 = torch.exp2((ids_TK % 5).double() - 2).unsqueeze(2)
    weights_TK1 = weights_TK.double().unsqueeze(2)
    probe_TD = probe_of(case, rank)

    def routes(rows_TKD: Tensor) -> Tensor:
        return torch.where(routed_TK1, rows_TKD.double(), 0.0)

    out_TKD = routes(coded(x_TD, codec.dispatch, codec.scale).double().unsqueeze(1) * factors_TK1)

    def sums(rows_TKD: Tensor, scales_TK1: Tensor, form: str) -> Tensor:
        """Summed on each rank and then over ranks, coded in between."""
        terms_TKD = rows_TKD.double() * scales_TK1.double() if fused else rows_TKD.float() * scales_TK1.float()
        owner_TK = torch.where(routed_TK1[..., 0], ids_TK // (case.num_experts // case.world), -1)
        # In float32, and in the order of the sum: one unit in the last place is a whole step of a code.
        parts = [torch.zeros(x_TD.shape) for _ in range(case.world)]
        for owner, part in enumerate(parts):
            for k, term_TD in enumerate(terms_TKD.unbind(1)):
                part.copy_(torch.where((owner_TK[:, k] == owner)[:, None], part + term_TD, part))
        if nodes:
            half = max(1, case.world // 2)
            parts = [sum(parts[first : first + half][1:], parts[first]) for first in range(0, case.world, half)]
        return sum((coded(part, form, codec.scale).double() for part in parts), torch.zeros(x_TD.shape).double())

    if prereduced:
        y_TD = sums(out_TKD.to(case.dtype), weights_TK1, codec.combine)
        grad_TKD = coded(probe_TD, codec.combine_backward, codec.scale).double().unsqueeze(1).expand_as(out_TKD)
        grad_weights_TK = (routes(grad_TKD) * out_TKD).sum(2)
    else:
        back_TKD = routes(coded(out_TKD.to(case.dtype), codec.combine, codec.scale))
        y_TD = (back_TKD * weights_TK1).sum(1)
        grad_weights_TK = (probe_TD.double().unsqueeze(1) * back_TKD).sum(2)
    if weighted_there:
        there_TKD = coded(probe_TD, codec.combine_backward, codec.scale).unsqueeze(1)
        grad_rows = routes((there_TKD.float() * weights_TK1.float()).to(case.dtype))
    else:
        sent_TKD = (probe_TD.unsqueeze(1).float() * weights_TK1.float()).to(case.dtype)
        grad_rows = routes(coded(sent_TKD, codec.combine_backward, codec.scale))
    home_TKD = (grad_rows * factors_TK1).to(case.dtype)
    if summed_there:
        grad_x_TD = sums(home_TKD, torch.ones(1), codec.dispatch_backward)
    else:
        grad_x_TD = routes(coded(home_TKD, codec.dispatch_backward, codec.scale)).sum(1)
    return Wanted(y_TD, grad_x_TD, grad_weights_TK, grad_rows)


@pytest.mark.parametrize("case, codec", SETTINGS, ids=IDS)
def test_equals_a_loop_over_routes(case: Case, codec: Codec) -> None:
    kinds = [kind for kind in product((False, True), repeat=5) if kind[:3] == (True,) * 3 or not kind[4]]
    want = {kind: [wanted(case, rank, codec, *kind) for rank in range(case.world)] for kind in kinds}
    arrives = [coded(tokens(case, source), codec.dispatch, codec.scale) for source in range(case.world)]
    for rank, ways in enumerate(ran(case, codec)):
        here = routes_by_row(case, rank, case.world)
        rows = [arrives[source][token] for _, source, token, _ in here]
        want_RD = torch.stack(rows) if rows else torch.empty(0, case.dim, dtype=case.dtype)
        for way, found in ways.items():
            prereduced, nodes = "prereduced" in way, "hierarchical" in way
            one_sided = nodes or "onesided" in way
            kind = (prereduced, prereduced or one_sided, prereduced and one_sided)
            either = [want[(*kind, fused, nodes)] for fused in ((False, True) if all(kind) else (False,))]
            expected = min(either, key=lambda each: relative_error(found["y_TD"], each[rank].y_TD))
            grads = [expected[source].grad_rows_TKD[token, k] for _, source, token, k in here]
            where = f"rank {rank} {way}"
            assert torch.equal(found["rows_RD"], want_RD), f"{where}: rows survive as they do at home"
            want_grads = torch.stack(grads).to(case.dtype) if grads else torch.empty(0, case.dim, dtype=case.dtype)
            assert torch.equal(found["grad_rows"], want_grads), f"{where}: gradients of rows"
            for name in ("y_TD", "grad_x_TD", "grad_weights_TK"):
                assert_close(f"{where} {name}", found[name], getattr(expected[rank], name), case.dtype)


@pytest.mark.parametrize("case, codec", SETTINGS, ids=IDS)
def test_exact_results_are_the_same_bits_every_way(case: Case, codec: Codec) -> None:
    for ways in ran(case, codec):
        for way, found in ways.items():
            own_sums = "prereduced" in way or ("onesided" in way and codec.combine_backward != "none")
            first = ways[way.removesuffix("/posted") if own_sums else "alltoall/exact"]
            for name, tensor in found.items():
                assert torch.equal(tensor, first[name]), f"{way}: {name}"


# What each exchange's format may change, the experts being linear; the rest keeps every bit of the uncoded run. Where
# the token's rank reduces, the weights' gradient is made of rows that came back; where the expert's does, of gradients
# of the output that came there.
CHANGES = {
    "dispatch": {"rows_RD", "y_TD", "grad_weights_TK"},
    "combine": {"y_TD", "grad_weights_TK"},
    "dispatch_backward": {"grad_x_TD"},
    "combine_backward": {"grad_x_TD", "grad_rows"},
}
PREREDUCED_CHANGES = CHANGES | {
    "combine": {"y_TD"},
    "combine_backward": {"grad_x_TD", "grad_rows", "grad_weights_TK"},
}


@cache
def alone() -> list[list[dict[str, dict[str, Tensor]]]]:
    codecs = [Codec(), *(Codec(**{exchange: "fp8"}) for exchange in CHANGES)]
    return run_ranks(2, every_way, Case((5, 17), dim=24, routing="holes"), codecs)


@pytest.mark.parametrize("exchange", CHANGES)
def test_a_format_changes_only_what_it_carries(exchange: str) -> None:
    for uncoded, *each in alone():
        found = each[list(CHANGES).index(exchange)]
        for way, results in found.items():
            changes = (PREREDUCED_CHANGES if "prereduced" in way else CHANGES)[exchange]
            same = {name for name, tensor in results.items() if torch.equal(tensor, uncoded[way][name])}
            assert same == set(results) - changes, way


def with_a_nan(way: tuple[str, str]) -> list[Tensor]:
    """Tokens of which rank 1 spoils one, coded there and back: where NaN is, and the same without it."""
    case = Case((5, 9), routing="spread")
    rank, found = dist.get_rank(), []
    for spoil in (False, True):
        codec = Codec(dispatch="fp8", combine="fp8")
        dispatcher = make_dispatcher(
            way[0], dist.group.WORLD, case.num_experts, combine=way[1], codec=codec, nodes=two_nodes(2)
        )
        x_TD = tokens_of(case, rank)
        if spoil and rank == 1:
            x_TD[4, 7] = float("inf")
        dispatched = dispatcher.dispatch(x_TD, ids_of(case, rank), weights_of(case, rank))
        found.append(dispatcher.combine(dispatched.rows_RD, weights_of(case, rank), dispatched))
    return found


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_a_token_that_is_not_finite_comes_back_as_nan_and_spoils_no_other(way: tuple[str, str]) -> None:
    (clean_0, spoilt_0), (clean_1, spoilt_1) = run_ranks(2, with_a_nan, way)
    assert torch.equal(clean_0, spoilt_0)
    assert bool(spoilt_1[4].isnan().all())
    kept = torch.arange(9) != 4
    assert torch.equal(clean_1[kept], spoilt_1[kept])


def as_codes(way: tuple[str, str], codec: Codec, case: Case) -> dict[str, Any]:
    """Codes and scales that arrive, at once and posted; the decoded rows; a combine after them; two refusals."""
    rank = dist.get_rank()
    group = dist.group.WORLD
    x_TD, ids_TK, weights_TK = tokens(case, rank), ids_of(case, rank), weights_of(case, rank)
    coded_rows, decoded = (
        make_dispatcher(
            way[0], group, case.num_experts, combine=way[1], codec=codec, coded_rows=each, nodes=two_nodes(2)
        )
        for each in (True, False)
    )
    want = decoded.dispatch(x_TD, ids_TK, weights_TK)
    found: dict[str, Any] = {"want_RD": want.rows_RD, "want_TD": decoded.combine(want.rows_RD, weights_TK, want)}
    for name, got in (
        ("once", coded_rows.dispatch(x_TD, ids_TK, weights_TK)),
        ("posted", coded_rows.dispatch_async(x_TD, ids_TK, weights_TK).wait()),
        ("handle", coded_rows.dispatch(x_TD, ids_TK, weights_TK, handle=want.handle)),
    ):
        y_TD = coded_rows.combine(want.rows_RD, weights_TK, got)
        # As float32: torch does not pickle fp8.
        found[name] = (str(got.rows_RD.dtype), got.rows_RD.float(), got.scales_R, y_TD)
    try:
        coded_rows.dispatch(x_TD.requires_grad_(), ids_TK, weights_TK)
    except RuntimeError as error:
        found["refused"] = str(error)
    with torch.no_grad():
        coded_rows.dispatch(x_TD, ids_TK, weights_TK)
    return found


@pytest.mark.parametrize(
    "codec, dim",
    [(Codec(dispatch="fp8"), 20), (Codec(dispatch="int8"), 20), (Codec(dispatch="fp8", scale="group128"), 256)],
)
@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_coded_rows_are_the_codes_and_scales_of_the_decoded(way: tuple[str, str], codec: Codec, dim: int) -> None:
    case = Case((5, 9), dim=dim, routing="holes", dtype=BF16)
    for found in run_ranks(2, as_codes, way, codec, case):
        assert "x.requires_grad (True) must be False with coded_rows=True" in found["refused"]
        for name in ("once", "posted", "handle"):
            dtype, codes_RD, scales, y_TD = found[name]
            assert dtype == ("torch.int8" if codec.dispatch == "int8" else "torch.float8_e4m3fn")
            assert scales.shape == ((len(codes_RD),) if codec.scale == "token" else (len(codes_RD), dim // 128))
            grouped = codes_RD.view(len(codes_RD), -1, dim if codec.scale == "token" else 128)
            rows_RD = (grouped * scales.reshape(len(codes_RD), -1, 1)).view(codes_RD.shape).to(BF16)
            assert torch.equal(rows_RD, found["want_RD"])
            assert torch.equal(y_TD, found["want_TD"])


def low_precision(way: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Coded rows through the scaled grouped product, and decoded rows through the plain one, both combined."""
    case, rank = Case((7, 4), dim=32, top_k=3, routing="holes"), dist.get_rank()
    given = (tokens(case, rank), ids_of(case, rank), weights_of(case, rank))
    weight, scales_EF = quantize_weight(experts_of(case)[rank * 4 : rank * 4 + 4])
    found = []
    for coded_rows in (True, False):
        codec = Codec.parse("fp8")
        dispatcher = make_dispatcher(
            way[0], dist.group.WORLD, 8, combine=way[1], codec=codec, coded_rows=coded_rows, nodes=two_nodes(2)
        )
        at = dispatcher.dispatch(*given)
        if at.scales_R is not None:
            out_RF = scaled_grouped_mm(at.rows_RD, at.scales_R, weight, scales_EF, at.offsets_e, torch.float32)
        else:
            out_RF = grouped_mm(at.rows_RD, weight.float() * scales_EF.unsqueeze(1), at.offsets_e)
        found.append(dispatcher.combine(out_RF, given[2], at))
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_coded_rows_feed_a_low_precision_product(way: tuple[str, str]) -> None:
    for got, want in run_ranks(2, low_precision, way):
        assert_close("y_TD", got, want)
        assert want.any()


@pytest.mark.parametrize("name", ["alltoall", "allgather", "auto"])
def test_coded_rows_need_a_coded_dispatch(name: str) -> None:
    for codec in (None, Codec(combine="fp8")):
        with pytest.raises(ValueError, match=r"coded_rows \(True\) must go with a coded dispatch, .* Set codec='fp8'"):
            make_dispatcher(name, None, 8, codec=codec, coded_rows=True)


def reuse(way: tuple[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Other rows along the layout of an earlier dispatch, beside the same without it."""
    case, rank = Case((5, 9), routing="holes"), dist.get_rank()
    dispatcher = make_dispatcher(
        way[0], dist.group.WORLD, case.num_experts, combine=way[1], codec=MIXED, nodes=two_nodes(2)
    )
    x_TD, ids_TK, weights_TK = tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)
    handle = dispatcher.dispatch(x_TD, ids_TK, weights_TK).handle
    results = []
    for given in (handle, None):
        x, weights = (x_TD * 3).requires_grad_(), (weights_TK + 1).requires_grad_()
        dispatched = dispatcher.dispatch(x, ids_TK, weights, handle=given)
        y_TD = dispatcher.combine(dispatched.rows_RD.square(), weights, dispatched)
        y_TD.backward(probe_of(case, rank))
        results.append(torch.cat([y_TD.flatten(), x.grad.flatten(), weights.grad.flatten()]).detach())
    return results


@pytest.mark.parametrize("way", WAYS, ids="/".join)
def test_a_handle_carries_other_coded_rows(way: tuple[str, str]) -> None:
    for reused, anew in run_ranks(2, reuse, way):
        assert torch.equal(reused, anew)
        assert anew.any()


def too_narrow() -> str:
    codec = Codec(dispatch="fp8", scale="group128")
    dispatcher = make_dispatcher("alltoall", dist.group.WORLD, 8, codec=codec)
    try:
        dispatcher.dispatch(torch.ones(3, 100), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    except ValueError as error:
        return str(error)
    return ""


def test_a_width_that_groups_do_not_fit_is_an_error_on_every_rank() -> None:
    for text in run_ranks(2, too_narrow):
        assert "width (100) must be a multiple of 128 with scale='group128'. Set scale='token'" in text
