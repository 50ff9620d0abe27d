"""What carries gathered rows for a group: windows of its memory, or nothing, and then collectives do.

A link is made by all ranks of the group together, shared by the schedules over it, and gone with the group.
"""

from __future__ import annotations

import weakref

import torch.distributed as dist

from moeweave.comm.blocks_cpu import HostBlocks
from moeweave.comm.blocks_cuda import CudaBlocks, open_blocks
from moeweave.comm.engines import shares_memory
from moeweave.comm.engines_cuda import gpus_apart
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.window_planes import BlockLink

_OF_GROUP: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, BlockLink]] = weakref.WeakKeyDictionary()


def can_share(group: dist.ProcessGroup | None) -> bool:
    """Whether windows can be had for `group`, named or not. A collective."""
    if group is None or dist.get_world_size(group) == 1:
        return False
    if "nccl" in dist.get_backend_config(group):
        return gpus_apart(group) is None
    return dist.get_backend(group) == "gloo" and shares_memory(group)


def over_windows(group: dist.ProcessGroup | None, planes: str) -> bool:
    """Whether `ThreeStreamOptions.planes` means windows for `group`. A collective the first time.

    Raises:
        ValueError: windows were asked for by name, and the ranks share no memory.
    """
    if group is None or planes == "collectives" or dist.get_world_size(group) == 1:
        return False
    backend = dist.get_backend_config(group)
    if "nccl" in backend:
        return planes == "windows"  # asked for: no GPU has run them
    if can_share(group):
        return True
    if planes == "windows":
        raise ValueError(
            "planes ('windows') needs CPU ranks of one host, or NVIDIA GPUs that reach each other; this group "
            f"({backend}) has neither. Leave out planes, or set planes='collectives'."
        )
    return False


def link_of(group: dist.ProcessGroup | None, options: ThreeStreamOptions) -> BlockLink | None:
    """The link that `options.planes` wants for `group`, None for collectives. A collective the first time.

    Raises:
        ValueError: as `over_windows`; GPUs that do not reach each other, or without `max_tokens`.
    """
    if group is None or not over_windows(group, options.planes):
        return None
    if "nccl" in dist.get_backend_config(group):
        return _cuda_link(group, options)
    links = _OF_GROUP.setdefault(group, {})
    if not links:
        links[0] = HostBlocks(group)
    return links[0]


def _cuda_link(group: dist.ProcessGroup, options: ThreeStreamOptions) -> CudaBlocks:
    if options.max_tokens is None:
        raise ValueError(
            "planes ('windows') between GPUs needs max_tokens, for windows of fixed sizes. Set max_tokens and "
            "combine='prereduced', or planes='collectives'."
        )
    links = _OF_GROUP.setdefault(group, {})
    link = links.get(options.num_sms)
    if link is None:
        reason = gpus_apart(group)
        if reason is not None:
            raise ValueError(f"planes ('windows') must be 'collectives' here: {reason}.")
        link = links[options.num_sms] = open_blocks(group, options.num_sms)
    assert isinstance(link, CudaBlocks)
    return link
