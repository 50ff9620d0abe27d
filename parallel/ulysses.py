"""Ulysses (arXiv 2309.14509): attention over a sequence that ranks share, by two all-to-alls.

Before attention every rank gives away all heads but its own, and gets all positions of those; afterwards back:

    q, k, v  [B, H, s, d]  ->  [B, H / W, S, d]  ->  attention as it is  ->  out [B, S, H / W, d]  ->  [B, s, H, d]

Any attention that treats heads apart runs unchanged, masks included. Key heads that do not divide over the ranks are
repeated first, lcm(Hk, W) / Hk times: with 2 key heads on 4 ranks each goes to two of them.

Legend: B rows, H query heads, Hk key heads, h heads of one rank, S positions of the whole sequence, s of this rank, c
of the longest shard, d head width, W ranks.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from moeweave.comm.communicator import Communicator
from moeweave.parallel.shards import Shards, pad


def check_heads(num_heads: int, where: str, sp: int, tp: int = 1) -> None:
    """Raise ValueError unless `num_heads` query heads, split by tp first, divide over sp ranks."""
    if num_heads % (sp * tp):
        here = num_heads // tp
        legal = ", ".join(str(n) for n in range(1, here + 1) if here % n == 0)
        behind = f" behind tp ({tp})" if tp > 1 else ""
        raise ValueError(
            f"sp ({sp}) must divide the {here} heads of {where}{behind} under Plan(sequence='ulysses'). sp can be "
            f"{legal}; Plan(sequence='ring') takes any."
        )


def repeat_keys(x: Tensor, num_ranks: int) -> Tensor:
    """[B, Hk, s, d] -> [B, lcm(Hk, W), s, d]: as many heads as divide over the ranks."""
    times = math.lcm(x.shape[1], num_ranks) // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def to_heads(tensors: list[Tensor], shards: Shards) -> list[Tensor]:
    """Each [B, H, s, d] of this rank's positions -> [B, H / W, S, d] of this rank's heads, in one exchange."""
    # [W, B, h, c, d]: block w goes to rank w. Back come this rank's heads, block w with the positions of rank w.
    sent = [pad(x, 2, shards.step).unflatten(1, (shards.comm.size, -1)).movedim(1, 0) for x in tensors]
    return [shards.merge(x, 2) for x in _exchange(sent, shards.comm)]


def to_positions(out: Tensor, shards: Shards) -> Tensor:
    """[B, S, h, d] of this rank's heads -> [B, s, W * h, d] of this rank's positions."""
    (received,) = _exchange([shards.split(out, 1)], shards.comm)
    return received.movedim(0, 2).flatten(2, 3)[:, : shards.held]


def heads_of(x: Tensor, dim: int, comm: Communicator) -> Tensor:
    """This rank's block of what there is one of for every query head."""
    return x.chunk(comm.size, dim)[comm.rank]


def _exchange(tensors: list[Tensor], comm: Communicator) -> list[Tensor]:
    """Block w of dim 0 of each tensor goes to rank w; block w of the results came from rank w."""
    assert comm.group is not None
    flat = torch.cat([x.flatten(1) for x in tensors], dim=1)
    received = all_to_all_single_autograd(flat.contiguous(), None, None, comm.group)
    ends = accumulate((x[0].numel() for x in tensors), initial=0)
    return [received[:, start:stop].view(x.shape) for x, (start, stop) in zip(tensors, pairwise(ends), strict=True)]
