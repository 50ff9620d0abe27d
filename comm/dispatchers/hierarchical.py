"""Dispatch over several nodes: each token once across the network to each node that needs it, spread there by one-sided
writes.

Wins where ranks of several hosts share the experts and the network is slower than memory: at 256 experts, top-8 and 2
nodes of 4 ranks a token crosses 1.00 times in place of 4.0 (alltoall), at 8 nodes of 8 ranks 4.6 times in place of 7.0.
Rows are coded once, before they cross. On the way back a node sums a token's rows in float32 and one row a token and
node crosses ("prereduced", bitwise repeatable). There is no "exact": a row a route would cross, which the all-to-all
does without a second step.

CPU ranks, as inside a node they write into shared memory. All asynchronous calls must be waited for in one order on all
ranks: those inside the node are posted at `wait`.

Legend: T tokens here, K routes a token, D width, R rows here.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.dispatch import Dispatched
from moeweave.comm.dispatchers.onesided import OneSidedDispatcher
from moeweave.comm.engines import node_engine_of
from moeweave.comm.layout import Layout
from moeweave.comm.nodes import Nodes
from moeweave.comm.pending import Pending


class HierarchicalDispatcher:
    """TokenDispatcher over windows inside nodes and collectives between them: the one-sided one over a `NodeEngine`.

    Args:
        group: ranks that share the experts, None for this rank alone. Making a dispatcher is a collective over it.
        num_experts: experts over the whole group, a multiple of its size; rank r holds the r-th contiguous block.
        codec: formats of the rows on the network; inside a node they are as they are.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; no gradient.
        max_tokens: tokens that a rank may have at most; windows are sized for them once. None: windows grow.
        nodes: how the ranks of the group lie; None finds the hosts.

    Raises:
        ValueError: no CPU group; nodes of unequal size, or whose ranks are not neighbours in the group.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        num_experts: int,
        *,
        codec: Codec | None = None,
        coded_rows: bool = False,
        max_tokens: int | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        found = nodes or Nodes.found(group)
        self.nodes, self.codec, self.coded_rows = found, codec or Codec(), coded_rows
        self._over = OneSidedDispatcher(
            group,
            num_experts,
            codec=codec,
            coded_rows=coded_rows,
            max_tokens=max_tokens,
            engine=node_engine_of(group, found),
        )

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None) -> Dispatched:
        return self._over.dispatch(x_TD, ids_TK, weights_TK, handle=handle)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        return self._over.combine(rows_RD, weights_TK, dispatched)

    def dispatch_async(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, handle: Layout | None = None
    ) -> Pending[Dispatched]:
        return self._over.dispatch_async(x_TD, ids_TK, weights_TK, handle=handle)

    def combine_async(self, rows_RD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        return self._over.combine_async(rows_RD, weights_TK, dispatched)

    def close(self) -> None:
        """Leave the nodes' windows: no dispatcher over the group can be used afterwards. Its end does the same."""
        self._over.close()
