"""Communication, communication, computation: an MoE layer on three streams.

Each rank holds its own tokens. Router and shared expert run on these alone, and not on gathered ones, so their work is
1 / W of what it would be. Two planes carry the exchange at the same time, beside the computation:

    dma       rows, quantised once                     ...            results
    push      part of the rows, scales, ids, weights   ...            part of the results
    compute   router, shared expert                    experts        sum

    gathered  rows go to every rank and leave before the router has run: the router hides them too. Wins where a token
              needs most ranks (top-k above the number of ranks).
    routed    rows go to the ranks that need them, so they wait for the router: only the shared expert, and whatever
              other chunk is under way, hides them.
    hierarchical
              rows cross the network once to each node that needs them, on dma and in parts; push spreads inside the
              node what has arrived, while the next part crosses (`onesided_parts`). Wins between nodes.

`push_share` is the part of rows and results that takes the push plane, where both planes reach every rank. Splitting
changes no bit. Planes are collectives (`two_planes`), or of gathered rows writes into windows (`window_planes`).
Gradients go back over both planes as well, straight through and a row a route (of the hierarchical form in parts, as
the rows went):

    dma, push   results' gradients                               rows' gradients
    compute     weights' gradients           experts' backward   shared expert's backward      sum, router's backward

Legend: T tokens here, K routes a token, D width, R rows here, W ranks, M = T_max of the group, N = M * K, G scales.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatchers.onesided import OneSidedDispatcher
from moeweave.comm.engines import part_engine_of
from moeweave.comm.joins import JoinArrived, Post
from moeweave.comm.layout import Layout, arrange_fixed, arrange_gathered, exchange_layout
from moeweave.comm.nodes import Nodes
from moeweave.comm.pending import Pending
from moeweave.comm.plane_links import link_of
from moeweave.comm.planes import refuse_training
from moeweave.comm.streams import Streams
from moeweave.comm.three_stream_back import WayBack
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.transfer_gathered import partial_sums
from moeweave.comm.two_planes import Planes, TwoPlanes
from moeweave.comm.window_planes import WindowPlanes
from moeweave.kernels_ext import quantize_rows

Experts = Callable[[Tensor, Tensor], Tensor]  # rows_RD, offsets_e -> rows_RD


@dataclass(frozen=True)
class Gathering:
    """Rows of `x_TD` on their way to every rank.

    Attributes:
        codes, scales: pending, [W * M, D] and [W * M, G] (None where rows are not quantised).
        max_tokens: M.
        fixed: M was known, and sizes are fixed.
    """

    x_TD: Tensor
    codes: Pending[Tensor]
    scales: Pending[Tensor] | None
    max_tokens: int
    fixed: bool = False


class ThreeStream:
    """The schedule of one layer's exchange. Every rank of the groups calls in the same order.

    Args:
        push_group, dma_group: the same ranks twice, None for this rank alone.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        streams: where exchanges run. top_k: routes a token, for form="auto".
        nodes: how the ranks lie, for forms "hierarchical" (None finds the hosts) and "auto" (None: it is not chosen).
    """

    def __init__(
        self,
        push_group: ProcessGroup | None,
        dma_group: ProcessGroup | None,
        num_experts: int,
        streams: Streams,
        options: ThreeStreamOptions,
        top_k: int = 1,
        nodes: Nodes | None = None,
    ) -> None:
        self.push = Communicator(push_group)
        self.num_experts, self.streams, self.options = num_experts, streams, options
        form = options.form_for(top_k, self.push.size, nodes)
        self.gathered = form == "gathered"
        self.prereduced = self.gathered and options.combine == "prereduced"
        self.collectives = TwoPlanes(self.push, Communicator(dma_group), streams, options.push_share)
        link = link_of(push_group, options) if self.gathered else None
        # Of passes without windows, of those in fixed sizes, and of those whose sizes are agreed on as they run.
        self.collectives_back = self._way_back(self.collectives)
        self.fixed_back = self.back = self.collectives_back
        if link is not None:
            self.fixed_back = self._way_back(WindowPlanes(link, streams, options.push_share))
            self.back = self.fixed_back if link.any_size else self.collectives_back
        self.by_node: OneSidedDispatcher | None = None
        if form == "hierarchical":
            nodes = nodes or Nodes.found(push_group)
            # Kept, as operators know it by its name alone.
            self._engine = part_engine_of(push_group, dma_group, nodes, streams, options.num_parts)
            settings: Any = dict(codec=options.codec, max_tokens=options.max_tokens, engine=self._engine)
            self.by_node = OneSidedDispatcher(push_group, num_experts, **settings)

    def layer(
        self,
        x_TD: Tensor,
        router: Callable[[Tensor], tuple[Tensor, Tensor]],
        experts: Experts,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """A whole layer: x_TD -> y_TD.

            1. quantise the rows and let them leave on both planes           (gathered form)
            2. router, on this rank's tokens
            3. ids and weights leave on push                                 (other forms: and the rows, on both planes)
            4. shared expert, on this rank's tokens
            5. join; experts
            6. results leave on both planes
            7. join; sum

        router: x_TD -> ids_TK, weights_TK.
        """
        leaving = self.leave(x_TD) if self.gathered else None
        with self.computing("router"):
            ids_TK, weights_TK = router(x_TD)
        shared_TD: list[Tensor] = []

        def beside() -> None:
            if shared is not None:
                with self.computing("shared expert"):
                    shared_TD.append(shared(x_TD))

        y_TD = self.routed(leaving, x_TD, ids_TK, weights_TK, experts, beside)
        return y_TD + shared_TD[0] if shared_TD else y_TD

    def leave(self, x_TD: Tensor) -> Gathering:
        """Step 1: this rank's rows, quantised once, to every rank."""
        fixed = self.options.max_tokens is not None and not torch.is_grad_enabled()
        max_tokens = self._fixed_tokens(x_TD) if fixed else self._agreed_tokens(x_TD)
        codes_TD, scales_TG = self._encode(x_TD.detach())
        planes = (self.fixed_back if fixed else self.back).planes
        codes = planes.all_gather("rows", _padded(codes_TD, max_tokens))
        scales = None
        if scales_TG is not None:
            scales = planes.gather_on_push("scales", _padded(scales_TG, max_tokens))
        return Gathering(x_TD, codes, scales, max_tokens, fixed)

    def _agreed_tokens(self, x_TD: Tensor) -> int:
        tokens_W = self.push.all_gather(torch.tensor([x_TD.shape[0]], device=x_TD.device)).view(-1)
        return int(tokens_W.max())

    def _fixed_tokens(self, x_TD: Tensor) -> int:
        most = self.options.max_tokens
        assert most is not None
        if x_TD.shape[0] > most:
            raise ValueError(f"max_tokens ({most}) must be at least the tokens of a rank ({x_TD.shape[0]}). Raise it.")
        return most

    def routed(
        self,
        leaving: Gathering | None,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        beside: Callable[[], None],
    ) -> Tensor:
        """Steps 3 to 7 without adding the shared expert's output, which `beside` computes while rows are under way."""
        refuse_training(x_TD.device.type, x_TD, weights_TK)
        if self.by_node is not None:
            return self._by_node_pass(self.by_node, x_TD, ids_TK, weights_TK, experts, beside)
        if leaving is not None and leaving.fixed:
            return self._fixed_pass(leaving, ids_TK, weights_TK, experts, beside)
        if leaving is None:
            rows_RD, weights_R, layout = self._routed_rows(x_TD, ids_TK, weights_TK, beside)
        else:
            rows_RD, weights_R, layout = self._gathered_rows(leaving, x_TD, ids_TK, weights_TK, beside)
        with self.computing("experts"):
            rows_RD = experts(rows_RD, layout.offsets_e)
        back = self.collectives_back if leaving is None else self.back
        if self.prereduced:
            assert weights_R is not None
            return back.prereduced(rows_RD, weights_TK, weights_R, layout)
        return back.exact(rows_RD, weights_TK, layout)

    def _by_node_pass(
        self,
        dispatcher: OneSidedDispatcher,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        beside: Callable[[], None],
    ) -> Tensor:
        """Steps 3 to 7 between nodes; the engine shares out the exchanges over the planes."""
        arriving = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK)
        beside()
        arrived = arriving.wait()
        with self.computing("experts"):
            rows_RD = experts(arrived.rows_RD, arrived.offsets_e)
        return dispatcher.combine_async(rows_RD, weights_TK, arrived).wait()

    def _gathered_rows(
        self,
        leaving: Gathering,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        beside: Callable[[], None],
    ) -> tuple[Tensor, Tensor | None, Layout]:
        planes, most = self.back.planes, leaving.max_tokens
        way = self.back.gradient_way("rows", "dispatch", most * ids_TK.shape[1])
        token = Post.apply(x_TD, way)
        ids = planes.gather_on_push("ids", _padded(ids_TK, most, -1))
        weights = planes.gather_on_push("weights", _padded(weights_TK.detach(), most)) if self.prereduced else None
        beside()
        order_N, sends, receives, perm_R, offsets_e, route_R = arrange_gathered(
            ids_TK, ids.wait().view(self.push.size, -1), self.num_experts, self.push.rank
        )
        num_tokens, top_k = ids_TK.shape
        sizes = (num_tokens, top_k, self.push.name)
        layout = Layout(order_N, sends, receives, perm_R, offsets_e, *sizes, route_R, torch.tensor([most]))
        source_R = route_R // top_k
        scales = None if leaving.scales is None else leaving.scales.wait().index_select(0, source_R)
        rows_RD = self._decode(leaving.codes.wait().index_select(0, source_R), scales, x_TD.dtype)
        weights_R = None if weights is None else weights.wait().reshape(-1).index_select(0, route_R)
        return JoinArrived.apply(token, rows_RD, layout, way), weights_R, layout

    def _fixed_pass(
        self,
        leaving: Gathering,
        ids_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        beside: Callable[[], None],
    ) -> Tensor:
        """Steps 3 to 7 in fixed sizes, without a gradient and without reading the device."""
        (num_tokens, top_k), most, size = ids_TK.shape, leaving.max_tokens, self.push.size
        planes = self.fixed_back.planes
        ids = planes.gather_on_push("ids", _padded(ids_TK, most, -1))
        weights = planes.gather_on_push("weights", _padded(weights_TK, most))
        beside()
        offsets_e, route_R = arrange_fixed(ids.wait().view(size, -1), self.num_experts, self.push.rank, top_k)
        source_R = route_R // top_k
        scales = None if leaving.scales is None else leaving.scales.wait().index_select(0, source_R)
        rows_RD = self._decode(leaving.codes.wait().index_select(0, source_R), scales, leaving.x_TD.dtype)
        weights_R = weights.wait().reshape(-1).index_select(0, route_R)
        with self.computing("experts"):
            rows_RD = experts(rows_RD, offsets_e)
        partial = partial_sums(rows_RD, weights_R, route_R, size * most, top_k, offsets_e[-1])
        return self.fixed_back.sum_of_ranks(partial, most, num_tokens, rows_RD.dtype)

    def _routed_rows(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        beside: Callable[[], None],
    ) -> tuple[Tensor, Tensor | None, Layout]:
        order_N, to_W, from_W, perm_R, offsets_e = exchange_layout(ids_TK, self.num_experts, self.push.name)
        num_tokens, top_k = ids_TK.shape
        layout = Layout(order_N, to_W, from_W, perm_R, offsets_e, num_tokens, top_k, self.push.name)
        sends, receives = layout.send_splits.tolist(), layout.recv_splits.tolist()
        source_N = layout.order_N[: sum(sends)] // layout.top_k
        way = self.collectives_back.gradient_way("rows", "dispatch")
        token = Post.apply(x_TD, way)
        codes_TD, scales_TG = self._encode(x_TD.detach())
        codes = self.collectives.all_to_all("rows", codes_TD.index_select(0, source_N), sends, receives)
        scales = None
        if scales_TG is not None:
            leaving_scales = scales_TG.index_select(0, source_N)
            scales = self.collectives.all_to_all_on_push("scales", leaving_scales, sends, receives)
        beside()
        arrived = None if scales is None else scales.wait().index_select(0, layout.perm_R)
        rows_RD = self._decode(codes.wait().index_select(0, layout.perm_R), arrived, x_TD.dtype)
        return JoinArrived.apply(token, rows_RD, layout, way), None, layout

    def rows_of(self, leaving: Gathering) -> Tensor:
        """All ranks' rows, decoded: [W * M, D]. Waits for them.

        `routed` may read them once more: peers write them again only after they have this rank's results.
        """
        scales = None if leaving.scales is None else leaving.scales.wait()
        return self._decode(leaving.codes.wait(), scales, leaving.x_TD.dtype)

    def _way_back(self, planes: Planes) -> WayBack:
        return WayBack(planes, self.push.size, self.options.codec, self.computing)

    def _encode(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows as they travel, bytes where quantised, and their scales."""
        codec = self.options.codec
        if codec.dispatch == "none":
            return x_TD, None
        kind = f"{codec.dispatch}_group128" if codec.scale == "group128" else codec.dispatch
        with self.computing("quantise"):
            codes_TD, scales_TG = quantize_rows.encode(x_TD, kind)
        return codes_TD.view(torch.uint8), scales_TG

    def _decode(self, codes_RD: Tensor, scales_RG: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scales_RG is None:
            return codes_RD
        return quantize_rows.decode(codes_RD.view(quantize_rows.CODES[self.options.codec.dispatch]), scales_RG, dtype)

    def computing(self, name: str) -> AbstractContextManager[None]:
        """A span of computation on the timeline, where there is one."""
        timeline = self.streams.timeline
        return nullcontext() if timeline is None else timeline.span("compute", name)


def _padded(x: Tensor, num_tokens: int, value: float = 0) -> Tensor:
    missing = num_tokens - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=value) if missing else x
