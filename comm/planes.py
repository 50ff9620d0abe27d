"""Groups for the two planes of communication; HCCL's options can be read without torch-npu.

On Ascend, `push`: vector cores of the device write to peers (AIV expansion): low latency, costs cores. `dma`: HCCL's
default, copy engines move bulk. A mode belongs to a communicator, so each plane has a group of its own. HCCL documents
for A2 and A3: one AIV communicator in a process, inference, symmetric networks, and on A2 AlltoAllV within one server.
The first three of these depend on more than one call: the caller vouches for the network and for inference.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.distributed as dist

PLANES = ("push", "dma")
AIV = 3  # hccl_op_expansion_mode


def hccl_config(
    plane: str, series: str = "A3", num_nodes: int = 1, planes_open: Collection[str] = ()
) -> dict[str, int]:
    """What a group of `plane` sets in `hccl_config`; empty means HCCL's default.

    Args:
        plane: "push" or "dma".
        series: "A2" or "A3".
        num_nodes: servers that the group spans.
        planes_open: planes of the groups that the process already has.

    Raises:
        ValueError: an unknown plane; what HCCL does not document for AIV.
    """
    if plane not in PLANES:
        raise ValueError(f"plane ({plane!r}) must be one of {', '.join(PLANES)}.")
    if plane == "dma":
        return {}
    if series not in ("A2", "A3"):
        raise ValueError(f"series ({series!r}) must be A2 or A3 for plane='push'. Use plane='dma'.")
    if "push" in planes_open:
        raise ValueError("plane ('push') must be open once: HCCL has one AIV communicator a process. Use plane='dma'.")
    if series == "A2" and num_nodes > 1:
        raise ValueError(
            f"num_nodes ({num_nodes}) must be 1 for plane='push' on A2, whose AlltoAllV by AIV stays in a server. "
            "Use plane='dma'."
        )
    return {"hccl_op_expansion_mode": AIV}


def new_plane_group(plane: str, ranks: list[int], device: str) -> dist.ProcessGroup | None:
    """A group of `ranks` for one plane, None for one rank; collective over these ranks.

    NVIDIA: the dma plane asks NCCL for no cores (CTA policy zero), which it grants on buffers that are registered as
    symmetric memory and else ignores; the push plane's stream has high priority. CPU: two plain groups.
    """
    if len(ranks) == 1:
        return None
    if device == "npu":
        return new_hccl_group(ranks, hccl_config(plane))
    options: Any = None
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = plane == "push"
        zero = getattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO", None)
        if plane == "dma" and zero is not None:
            options.config.cta_policy = zero
    group = dist.new_group(ranks, pg_options=options, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def new_hccl_group(ranks: list[int], config: dict[str, int]) -> dist.ProcessGroup:
    """An hccl group of `ranks` with `hccl_config` of a plane; a collective over all ranks, on NPUs only."""
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options: Any = ProcessGroupHCCL.Options()
    if config:
        options.hccl_config = config
    group = dist.new_group(ranks, backend="hccl", pg_options=options)
    assert isinstance(group, dist.ProcessGroup)
    return group
