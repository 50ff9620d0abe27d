"""What ranks of two nodes run over a network: a layer by the three-stream schedule and without it, compared.

Started by torchrun on each node; prints a line a rank and exits with 1 where a bit differs.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.hierarchical import HierarchicalDispatcher
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.nodes import Nodes
from moeweave.comm.streams import make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_options import ThreeStreamOptions
from plain_moe import Case, ids_of, leaves_of, probe_of, run_experts


def scheduled(case: Case, codec: Codec) -> list[torch.Tensor]:
    """Output and gradients of the schedule in the form that it picks for these hosts."""
    x_TD, weights_TK, mine = leaves_of(case, dist.get_rank())
    options = ThreeStreamOptions(combine="prereduced", codec=codec)
    groups, streams = [dist.new_group() for _ in range(2)], make_streams("cpu")
    schedule = ThreeStream(*groups, case.num_experts, streams, options, case.top_k, Nodes.found(groups[0]))
    assert schedule.by_node is not None, "auto picks the hierarchical form between hosts"
    routes = ids_of(case, dist.get_rank()), weights_TK
    y_TD = schedule.layer(x_TD, lambda x: routes, lambda rows, ends: run_experts(mine, rows, ends), torch.tanh)
    y_TD.backward(probe_of(case, dist.get_rank()))
    streams.close()
    return [y_TD.detach(), x_TD.grad, weights_TK.grad, mine.grad]


def unscheduled(case: Case, codec: Codec) -> list[torch.Tensor]:
    """The same through the dispatcher that `auto` picks."""
    x_TD, weights_TK, mine = leaves_of(case, dist.get_rank())
    dispatcher = make_dispatcher("auto", dist.new_group(), case.num_experts, top_k=case.top_k, codec=codec)
    assert isinstance(dispatcher, HierarchicalDispatcher) and dispatcher.nodes == Nodes(2, 2)
    arrived = dispatcher.dispatch(x_TD, ids_of(case, dist.get_rank()), weights_TK)
    rows_RD = run_experts(mine, arrived.rows_RD, arrived.offsets_e)
    y_TD = dispatcher.combine(rows_RD, weights_TK, arrived) + torch.tanh(x_TD)
    y_TD.backward(probe_of(case, dist.get_rank()))
    return [y_TD.detach(), x_TD.grad, weights_TK.grad, mine.grad]


def main() -> int:
    dist.init_process_group("gloo")
    case = Case((40, 0, 17, 63), routing="holes", top_k=4, dim=64)
    wrong = 0
    for codec in (Codec(), Codec(dispatch="fp8", combine="int8", combine_backward="fp8_e5m2")):
        pairs = zip(scheduled(case, codec), unscheduled(case, codec), strict=True)
        wrong += sum(not torch.equal(a, b) for a, b in pairs)
    print(f"rank {dist.get_rank()}: {wrong} of 8 differ", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
