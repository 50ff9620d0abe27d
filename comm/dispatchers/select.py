"""Which dispatcher moves the tokens: by name, or `auto` from what every rank knows alike."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.dispatchers.allgather import AllGatherDispatcher
from moeweave.comm.dispatchers.alltoall import AllToAllDispatcher
from moeweave.comm.dispatchers.ascend import make_ascend
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.comm.dispatchers.hierarchical import HierarchicalDispatcher
from moeweave.comm.dispatchers.onesided import OneSidedDispatcher
from moeweave.comm.dispatchers.onesided_cuda import CudaOptions, OneSidedCudaDispatcher
from moeweave.comm.engines import nodes_of, shares_memory
from moeweave.comm.engines_cuda import gpus_apart
from moeweave.comm.nodes import Nodes
from moeweave.comm.topology import Topology
from moeweave.comm.windows_cuda import WindowMap

logger = logging.getLogger("moeweave")

# What each dispatcher can return: a row a route, or one row a token and rank. The first is its default.
COMBINES: dict[str, tuple[str, ...]] = {
    "alltoall": ("exact",),
    "allgather": ("exact", "prereduced"),
    "onesided": ("prereduced", "exact"),
    "hierarchical": ("prereduced",),
    "ascend": ("exact",),
}
DISPATCHERS = (*COMBINES, "auto")


def validate_choice(name: str, combine: str | None) -> None:
    """Raise ValueError unless `name` is a dispatcher and `combine` (None: its default) one of its ways back."""
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher ({name!r}) must be one of {', '.join(DISPATCHERS)}.")
    ways = sorted({way for each in COMBINES.values() for way in each}) if name == "auto" else COMBINES[name]
    if combine is not None and combine not in ways:
        raise ValueError(
            f"combine ({combine!r}) must be one of {', '.join(ways)} with dispatcher={name!r}. "
            "Leave it unset for the dispatcher's default."
        )


def choose(
    ep_size: int,
    top_k: int,
    combine: str | None,
    topology: Topology | None = None,
    *,
    shared: bool = False,
    nodes: Nodes | None = None,
) -> tuple[str, str]:
    """-> dispatcher name and the reason. Depends only on arguments that are equal on every rank.

    shared: the ranks can write into each other's memory. One-sided writes then beat both collectives (T 1024, D 1024,
    top-8, ep 4 on two CPU cores, fp32: dispatch 3.3 times, combine 5.0 times as fast as the all-to-all,
    `tests/results/onesided_cpu.json`), except for a few tokens, where all three are alike.

    nodes: how the ranks lie on several hosts, where the ranks of each share memory. What crosses the network once a
    token and node is then less than any collective sends, whatever its speed.

    Else bytes decide, over the bandwidths of both collectives where `topology` has them for as many ranks. An
    all-gather sends each token to ep_size - 1 ranks, an all-to-all a row for each remote route, top_k * (ep_size - 1) /
    ep_size of them on average; a codec shrinks both alike. Where both send as much, the all-to-all has one collective
    less (T 1024, D 256, ep 2 on two CPU cores: 29 against 31 ms a layer, forward and backward).
    """
    if shared and ep_size > 1:
        return "onesided", "all ranks share memory: a token goes once to each rank, without an exchange of counts"
    if nodes is not None and nodes.num_nodes > 1 < nodes.ranks_per_node and combine != "exact":
        where = f"{nodes.num_nodes} nodes of {nodes.ranks_per_node} ranks"
        return "hierarchical", f"{where}: a token crosses the network once to each node that needs it"
    if combine == "prereduced":
        return "allgather", "combine='prereduced' is what it offers"
    if ep_size == 1:
        return "alltoall", "one rank: a local permute"
    if topology is not None and topology.num_ranks == ep_size:
        return _choose_measured(ep_size, top_k, topology)
    if top_k > ep_size:
        return "allgather", f"top_k {top_k} > ep {ep_size}: gathered rows are fewer than routed ones"
    return "alltoall", f"top_k {top_k} <= ep {ep_size}: routed rows are no more than gathered ones"


def choose_over(
    group: ProcessGroup | None, top_k: int, combine: str | None, topology: Topology | None, *, shared: bool = False
) -> tuple[str, str]:
    """`choose` for the ranks of `group`, by the nodes that `topology` tells, else by their hosts. A collective.

    shared: as for `choose`, wherever `topology` does not tell of several nodes.

    Raises:
        ValueError: a node of `topology` whose ranks are on several hosts. RuntimeError: ranks chose differently.
    """
    nodes = nodes_of(group, topology)
    shared = shared and (nodes is None or nodes.num_nodes == 1)
    chosen = choose(1 if group is None else group.size(), top_k, combine, topology, shared=shared, nodes=nodes)
    check_alike(f"{chosen[0]} ({chosen[1]}), {nodes}", group)
    return chosen


def check_alike(choice: str, group: ProcessGroup | None) -> None:
    """Raise RuntimeError on every rank unless all ranks of `group` pass the same text. A collective."""
    if group is None:
        return
    choices: list[str] = [""] * group.size()
    dist.all_gather_object(choices, choice, group=group)
    other = next((rank for rank, each in enumerate(choices) if each != choices[0]), None)
    if other is not None:
        raise RuntimeError(
            f"dispatcher must be the same on all ranks of the expert group: rank 0 has {choices[0]}, rank {other} "
            f"{choices[other]}. Pass the same plan, model and topology file on every rank."
        )


def _choose_measured(ep_size: int, top_k: int, topology: Topology) -> tuple[str, str]:
    """By the time that a token's rows take: top_k / ep_size of a gathered row's bytes, each at its measured speed."""
    routed, gathered = top_k / ep_size / topology.all_to_all_gbps, 1 / topology.all_gather_gbps
    speeds = f"all-to-all {topology.all_to_all_gbps:.3g}, all-gather {topology.all_gather_gbps:.3g} GB/s measured"
    reason = f"top_k {top_k}, ep {ep_size}, {speeds}: routed rows take {routed / gathered:.2f} of gathered rows' time"
    return ("allgather" if routed > gathered else "alltoall"), reason


def make_dispatcher(
    name: str,
    group: ProcessGroup | None,
    num_experts: int,
    *,
    top_k: int = 1,
    topology: str | Topology | None = None,
    combine: str | None = None,
    return_group: ProcessGroup | None = None,
    codec: Codec | None = None,
    coded_rows: bool = False,
    max_tokens: int | None = None,
    ascend: AscendOptions | None = None,
    cuda: CudaOptions | None = None,
    nodes: Sequence[Hashable] | None = None,
) -> TokenDispatcher:
    """A dispatcher over `group` (None: this rank alone).

    Args:
        name: "alltoall", "allgather", "onesided" (CPU ranks of one host, NVIDIA GPUs that reach each other),
            "hierarchical" (CPU ranks of several hosts), "ascend" (inference on NPUs), or "auto", which picks one of the
            first four (on GPUs "onesided" only with `max_tokens`). Making "onesided", "hierarchical" or "auto" is a
            collective over the group.
        num_experts: experts over the whole group, a multiple of its size.
        top_k: routes a token, for `auto`.
        topology: measurements, or their file, read by the group's first rank for all: bandwidths for "auto", and for
            "auto" and "hierarchical" the nodes, where the job has as many ranks as were measured.
        combine: "exact", "prereduced", or None for the dispatcher's default.
        return_group: a group of the same ranks for asynchronous combines, so that they never wait behind a dispatch.
        codec: formats of the rows on the link, None for the rows as they are. Every dispatcher takes every codec but
            "ascend", whose operators know int8.
        coded_rows: dispatch hands over codes and scales as they came, for a low-precision grouped product; inference.
        max_tokens: of any rank, for "onesided": its windows are sized once. None: they grow with the tokens.
        ascend: options of the dispatcher of that name, None for its defaults.
        cuda: options of "onesided" between NVIDIA GPUs, None for its defaults.
        nodes: the node of each rank, for "hierarchical"; None takes them from `topology`, else finds the hosts.

    Raises:
        ValueError: unknown name or combine; experts that do not divide over the group; "ascend" off an NPU, or with a
            codec that it does not have; coded rows of a dispatch that codes nothing; a topology file that holds none,
            or whose nodes span hosts.
        RuntimeError: ranks of the group chose differently.
    """
    validate_choice(name, combine)
    size = 1 if group is None else group.size()
    if num_experts % size:
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by the expert group's size ({size}). "
            f"Legal sizes: {', '.join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)}."
        )
    measured = None
    if name in ("auto", "hierarchical"):
        measured = Topology.shared(topology, group) if isinstance(topology, str) else topology
    if name == "auto":
        shared = shares_memory(group) or _gpus_share_memory(group, num_experts, top_k, max_tokens, measured)
        name, reason = choose_over(group, top_k, combine, measured, shared=shared)
        _log_once(f"dispatcher auto -> {name}: {reason}")
    if name == "allgather":
        return AllGatherDispatcher(
            group, num_experts, combine or "exact", return_group=return_group, codec=codec, coded_rows=coded_rows
        )
    if name == "onesided":
        combine = combine or COMBINES[name][0]
        if group is not None and "nccl" in dist.get_backend_config(group):
            return OneSidedCudaDispatcher(
                group, num_experts, combine, codec=codec, coded_rows=coded_rows, max_tokens=max_tokens, options=cuda
            )
        return OneSidedDispatcher(
            group, num_experts, combine, codec=codec, coded_rows=coded_rows, max_tokens=max_tokens
        )
    if name == "hierarchical":
        lie = Nodes.found(group, measured) if nodes is None else Nodes.of(nodes)
        check_alike(str(lie), group)
        return HierarchicalDispatcher(
            group, num_experts, codec=codec, coded_rows=coded_rows, max_tokens=max_tokens, nodes=lie
        )
    if name == "ascend":
        return make_ascend(group, num_experts, ascend or AscendOptions(), codec=codec, coded_rows=coded_rows)
    return AllToAllDispatcher(group, num_experts, return_group=return_group, codec=codec, coded_rows=coded_rows)


def _gpus_share_memory(
    group: ProcessGroup | None, num_experts: int, top_k: int, max_tokens: int | None, topology: Topology | None
) -> bool:
    """Whether `auto` may take one-sided writes between GPUs: they reach each other, and the sizes fit. A collective.

    Only where `max_tokens` was given, as for inference in fixed sizes. Its kernels wait for peers on all
    multiprocessors: beside collectives on other streams, as data parallelism has in training, each could wait for the
    other's room.
    """
    if group is None or max_tokens is None or "nccl" not in dist.get_backend_config(group):
        return False
    try:
        WindowMap(
            size=group.size(), num_experts=num_experts, top_k=top_k, max_tokens=max_tokens, row_bytes=16, back_bytes=16
        )
    except ValueError as error:
        reason: str | None = str(error)
    else:
        reason = gpus_apart(group)
    if topology is not None and topology.num_ranks == group.size() and reason is None and not topology.is_one_memory:
        reason = "the topology file has ranks that cannot write into each other's memory"
    if reason is not None:
        _log_once(f"dispatcher auto: not onesided, {reason}")
    return reason is None


@functools.lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)
