"""Groups for the two planes of communication; HCCL's options can be read without torch-npu.

On Ascend, `push`: vector cores of the device write to peers (AIV expansion): low latency, costs cores. `dma`: HCCL's
default, copy engines move bulk. A mode belongs to a communicator, so each plane has a group of its own. HCCL documents
for A2 and A3: one AIV communicator in a process, inference, symmetric networks, and on A2 AlltoAllV within one server;
anything else is refused here. Ranks are taken to be numbered node by node, one a device, as torchrun numbers them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moeweave.comm.dispatchers.ascend_limits import series_of

PLANES = ("push", "dma")
AIV = 3  # hccl_op_expansion_mode


def hccl_config(
    plane: str, series: str = "A3", nodes: Sequence[int] = (0,), planes_open: Collection[str] = ()
) -> dict[str, int]:
    """What a group of `plane` sets in `hccl_config`; empty means HCCL's default.

    Args:
        plane: "push" or "dma".
        series: "A2" or "A3".
        nodes: server of each rank of the group.
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
    ranks_of = Counter(nodes)
    if len(set(ranks_of.values())) > 1:
        raise ValueError(
            f"ranks of each server ({', '.join(map(str, ranks_of.values()))}) must be as many for plane='push': HCCL "
            "documents AIV for symmetric networks. Use a mesh whose ep covers whole servers, or plane='dma'."
        )
    if series == "A2" and len(ranks_of) > 1:
        raise ValueError(
            f"servers ({len(ranks_of)}) must be 1 for plane='push' on A2, whose AlltoAllV by AIV stays in a server. "
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
        return _new_hccl_group(plane, ranks)
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


def open_planes() -> set[str]:
    """Planes of the groups that this process has: what their descriptions say."""
    return {group.group_desc for group in distributed_c10d._world.pg_map} & set(PLANES)


def refuse_training(device: str, *tensors: Tensor) -> None:
    """Raise RuntimeError for tensors that want a gradient on NPUs, whose push plane is for inference."""
    if device == "npu" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "requires_grad (True) must be False for overlap='three_stream' on NPUs: HCCL documents AIV for inference. "
            "Train without it, or run under torch.no_grad()."
        )


def _new_hccl_group(plane: str, ranks: list[int]) -> dist.ProcessGroup:
    module = torch.get_device_module("npu")
    nodes = [rank // module.device_count() for rank in ranks]
    config = hccl_config(plane, series_of(module.get_device_name()), nodes, open_planes())
    options = _hccl_options()
    if config:
        options.hccl_config = config
    group = dist.new_group(ranks, backend="hccl", pg_options=options, use_local_synchronization=True, group_desc=plane)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _hccl_options() -> Any:
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    return ProcessGroupHCCL.Options()
