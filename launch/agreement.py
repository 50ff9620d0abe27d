"""What all ranks must see alike: what rank 0 decides, and whether something is so on any of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import moeweave as mw


def any_rank(mesh: mw.Mesh, here: bool) -> bool:
    """Whether it is so on any rank; the answer is the same on all."""
    found = torch.tensor(float(here), device=mesh.device)
    if mesh.world > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def from_rank_0(decide: Any) -> Any:
    """What `decide()` gives on rank 0, on every rank. What it raises is raised on every rank."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [decide(), None]
        except (ValueError, RuntimeError, OSError) as error:
            answer = [None, error]
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def from_rank_0_only(make: Any) -> Any:
    """`make()` on rank 0, None elsewhere; what it raises is raised on every rank."""
    made: list[Any] = []
    from_rank_0(lambda: made.append(make()))
    return made[0] if made else None
