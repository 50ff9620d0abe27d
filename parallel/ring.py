"""Ring attention (arXiv 2310.01889): keys and values go round, queries stay, blocks are merged by their log-sum-exp.

For sequences with more ranks than heads. Positions are shared out zigzag, so that causal work is even: of the blocks
(queries of a rank, keys of another) those that a mask leaves empty are skipped. torch's own ring attention
(torch.distributed.tensor.experimental) takes neither masks nor CPU tensors, hence this one. Blocks are computed in
float32 with plain matrix products, at most `TILE` queries at a time; no dropout.

Worked example of a merge, one query: block 1 gives value 2 with log-sum-exp 0, block 2 gives 5 with ln 2; together
(1 * 2 + 2 * 5) / 3 = 4 with ln 3.

Legend: B rows, H query heads, K key heads, G = H / K, S positions of the whole sequence, s of this rank, n queries and
m keys of a block, d and e widths of keys and values, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.communicator import Communicator
from moeweave.parallel.shards import Shards, pad

TILE = 2048
# What `BlockMask.block` says of a block of which no key is seen.
EMPTY = "empty"
Interval = tuple[int, int]


class BlockMask(Protocol):
    """Which keys a query sees, asked for block by block."""

    def block(self, queries: Interval, keys: Interval) -> Tensor | str | None:
        """Of positions in half-open intervals: bool or additive, broadcasting to [B, H, n, m]; None if every key is
        seen, `EMPTY` if none is."""


class CausalMask:
    """A query sees the keys up to its own position."""

    def block(self, queries: Interval, keys: Interval) -> Tensor | str | None:
        if keys[0] > queries[1] - 1:
            return EMPTY
        if keys[1] - 1 <= queries[0]:
            return None
        return torch.arange(*queries).unsqueeze(1) >= torch.arange(*keys)


class FullMask:
    """A query sees every key."""

    def block(self, queries: Interval, keys: Interval) -> Tensor | str | None:
        return None


class DenseMask:
    """Blocks of a whole mask, bool or additive, [..., S, S]."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def block(self, queries: Interval, keys: Interval) -> Tensor | str | None:
        return classified(self.mask[..., slice(*queries), slice(*keys)])


def classified(block: Tensor) -> Tensor | str | None:
    """A block of a mask, or what it amounts to. Reads the device."""
    if block.dtype != torch.bool:
        return block
    if not block.any():
        return EMPTY
    return None if block.all() else block


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None, shards: Shards) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks.

    q: [B, H, s, d]. k: [B, K, s, d]. v: [B, K, s, e]; H a multiple of K. scale: of the products, by default d ** -0.5.
    Returns [B, H, s, e] in q's dtype; queries that see no key get zeros.
    """
    return _RingAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, shards)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, shards: Shards) -> Tensor:
        work = _Work(mask, scale, shards, num_keys=k.shape[1])
        queries = work.grouped(q)
        out = queries.new_zeros((*queries.shape[:-1], v.shape[-1]))
        lse = out.new_full(out.shape[:-1], float("-inf"))
        for rank, (keys, values) in _rounds([k, v], shards):
            for n, m, block in work.blocks(rank):
                scores = work.scores(queries[..., n, :], keys[:, :, m], block)
                _merge(out[..., n, :], lse[..., n], scores, values[:, :, m])
        ctx.work = work
        ctx.save_for_backward(q, k, v, out, lse)
        return out.flatten(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        q, k, v, out, lse = ctx.saved_tensors
        queries, grad_out = work.grouped(q), work.grouped(grad)
        # A query that sees no key has probabilities exp(-inf) = 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        mean = (grad_out * out).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(queries)
        sums = [torch.zeros_like(pad(x, 2, work.shards.step), dtype=out.dtype) for x in (k, v)]
        for rank, (keys, values) in _rounds([k, v], work.shards):
            for n, m, block in work.blocks(rank):
                keys_m, values_m = keys[:, :, m].to(out.dtype), values[:, :, m].to(out.dtype)
                queries_n, grad_n = queries[..., n, :], grad_out[..., n, :]
                probs = torch.exp(work.scores(queries_n, keys_m, block) - lse[..., n, None])
                grad_probs = torch.einsum("bkgne,bkme->bkgnm", grad_n, values_m)
                grad_scores = probs * (grad_probs - mean[..., n, :]) * work.scale
                grad_q[..., n, :] += torch.einsum("bkgnm,bkmd->bkgnd", grad_scores, keys_m)
                sums[0][:, :, m] += torch.einsum("bkgnm,bkgnd->bkmd", grad_scores, queries_n)
                sums[1][:, :, m] += torch.einsum("bkgnm,bkgne->bkme", probs, grad_n)
            # The sums travel with their keys, and after the last round are home.
            sums = _pass_on(sums, work.shards.comm)()
        held = work.shards.held
        grad_k, grad_v = (total[:, :, :held].to(x.dtype) for total, x in zip(sums, (k, v), strict=True))
        return grad_q.flatten(1, 2).to(q.dtype), grad_k, grad_v, None, None, None


@dataclass(frozen=True)
class _Work:
    """What forward and backward compute alike."""

    mask: BlockMask
    scale: float
    shards: Shards
    num_keys: int

    def grouped(self, x: Tensor) -> Tensor:
        """[B, H, s, d] -> [B, K, G, s, d], in float32 at least."""
        return x.unflatten(1, (self.num_keys, -1)).to(torch.promote_types(x.dtype, torch.float32))

    def blocks(self, rank: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """The blocks of this rank's queries and `rank`'s keys that see each other: where they lie, and their mask."""
        for n, queries in _tiles(self.shards.spans):
            for m, keys in _tiles(self.shards.spans_of(rank)):
                block = self.mask.block(queries, keys)
                if not isinstance(block, str):
                    yield n, m, block

    def scores(self, queries: Tensor, keys: Tensor, block: Tensor | None) -> Tensor:
        """[B, K, G, n, d] and [B, K, m, d] -> [B, K, G, n, m], masked."""
        scores = torch.einsum("bkgnd,bkmd->bkgnm", queries, keys.to(queries.dtype)) * self.scale
        if block is None:
            return scores
        block = block.to(scores.device)[(None,) * (4 - block.dim())]
        block = block.unsqueeze(2) if block.shape[1] == 1 else block.unflatten(1, (self.num_keys, -1))
        return scores.masked_fill(~block, float("-inf")) if block.dtype == torch.bool else scores + block


def _tiles(spans: list[Interval]) -> Iterator[tuple[slice, Interval]]:
    """Where a shard's positions lie in it, and which they are, `TILE` at most at a time."""
    offset = 0
    for start, stop in spans:
        for first in range(start, stop, TILE):
            last = min(first + TILE, stop)
            yield slice(offset, offset + last - first), (first, last)
            offset += last - first


def _merge(out: Tensor, lse: Tensor, scores: Tensor, values: Tensor) -> None:
    """Add a block [B, K, G, n, m] and its values [B, K, m, e] to the sum over blocks so far, in place."""
    total = torch.logaddexp(lse, torch.logsumexp(scores, dim=-1))
    shift = total.masked_fill(total == float("-inf"), 0.0)
    probs = torch.exp(scores - shift.unsqueeze(-1))
    out.mul_(torch.exp(lse - shift).unsqueeze(-1))
    out.add_(torch.einsum("bkgnm,bkme->bkgne", probs, values.to(out.dtype)))
    lse.copy_(total)


def _rounds(tensors: list[Tensor], shards: Shards) -> Iterator[tuple[int, list[Tensor]]]:
    """Every rank's tensors [B, K, s, ...] in turn, padded, this rank's first; the next are under way meanwhile."""
    held = [pad(x, 2, shards.step) for x in tensors]
    size = shards.comm.size
    for turn in range(size):
        arriving = _pass_on(held, shards.comm) if turn + 1 < size else None
        yield (shards.comm.rank - turn) % size, held
        if arriving is not None:
            held = arriving()


def _pass_on(tensors: list[Tensor], comm: Communicator) -> Callable[[], list[Tensor]]:
    """Send to the next rank, receive from the one before. Called, what is returned waits for the tensors received."""
    assert comm.group is not None
    sent = torch.cat([x.reshape(-1) for x in tensors])
    received = torch.empty_like(sent)
    after, before = (dist.get_global_rank(comm.group, (comm.rank + by) % comm.size) for by in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, after, group=comm.group),
            dist.P2POp(dist.irecv, received, before, group=comm.group),
        ]
    )

    def wait(alive: Tensor = sent) -> list[Tensor]:
        for work in works:
            work.wait()
        parts = received.split([x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]

    return wait
