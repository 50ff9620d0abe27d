"""The mesh of a job whose number of ranks has changed: which axes give way, in which order.

Data ranks come and go freely: they hold shards that the next checkpoint is read into, and the batch is shared out anew.
Only where the ranks no longer hold one copy of the model's other axes do these give way, and then the one whose loss
costs least: sp (longer sequences on a rank), pp (more layers on a rank), tp (larger matrices on a rank). Expert axes
follow the ranks that they regroup. An axis that gives way takes a divisor of its configured size, so heads, layers and
experts that it divided before are divided still; no axis but dp and dp_replicate ever grows.

Worked example, `dp=4, ep=4, tp=2` with 8 experts: on 4 ranks dp=2, ep=4, tp=2; on 2 ranks dp=1, ep=2, tp=2; on one rank
tp gives way too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from moeweave.parallel.mesh import MeshSizes


def derive(sizes: MeshSizes, world: int, batch_size: int, microbatches: int) -> MeshSizes:
    """The mesh for exactly `world` ranks, as near to the configured `sizes` as it can be. Pure.

    Raises:
        ValueError: no mesh of that many ranks can share out the batch; the message says why, and what would help.
    """
    if world == sizes.world:
        return sizes
    for pp, sp, tp in _model_axes(sizes):
        data_ranks, left = divmod(world, pp * sp * tp)
        if left or batch_size % (data_ranks * microbatches):
            continue
        dp, dp_replicate = _data_axes(sizes, data_ranks)
        etp = math.gcd(sizes.etp, dp * sp * tp)
        ep = math.gcd(sizes.ep, dp * sp * tp // etp)
        return MeshSizes(dp, tp, pp, sp, ep, etp, dp_replicate)
    raise ValueError(
        f"ranks ({world}): the mesh of {sizes.world} ranks cannot be made one of {world}: batch_size ({batch_size}) "
        f"must be a multiple of its data ranks x microbatches ({microbatches}). Set a batch_size that {world} x "
        f"{microbatches} divides, or another number of hosts."
    )


def _model_axes(sizes: MeshSizes) -> Iterator[tuple[int, int, int]]:
    """Sizes of (pp, sp, tp) from the configured ones down: sp gives way first, then pp, then tp."""
    for tp in _divisors(sizes.tp):
        for pp in _divisors(sizes.pp):
            for sp in _divisors(sizes.sp):
                yield pp, sp, tp


def _data_axes(sizes: MeshSizes, data_ranks: int) -> tuple[int, int]:
    """(dp, dp_replicate): replicas come and go while a shard keeps its size; otherwise every data rank shards."""
    if sizes.dp_replicate > 1 and data_ranks % sizes.dp == 0:
        return sizes.dp, data_ranks // sizes.dp
    return data_ranks, 1


def _divisors(size: int) -> list[int]:
    return [part for part in range(size, 0, -1) if size % part == 0]
