"""The kernel of `triton_impl`, in a module of its own because it cannot be defined without triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rank", "num_ranks"])
def push_kernel(x, addresses, rank, num_ranks, num_words, x_stride, window_stride, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of x [ranks, num_words] of int32 to row `rank` of each peer's window, WORDS words a step. Strides in words.

    Consecutive steps go to different peers, so that all links carry data from the first step on. With 2 programs,
    3 ranks and blocks of 2 steps, rank 0's program 0 does (peer 1, step 0), (1, 1) and program 1 (2, 0), (2, 1).
    """
    num_peers = num_ranks - 1
    steps = num_peers * tl.cdiv(num_words, WORDS)
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        peer = (rank + 1 + step % num_peers) % num_ranks
        offsets = (step // num_peers).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        mask = offsets < num_words
        values = tl.load(x + peer.to(tl.int64) * x_stride + offsets, mask=mask)
        window = tl.load(addresses + peer).to(tl.pointer_type(tl.int32))
        window = tl.multiple_of(window, 16)
        tl.store(window + rank.to(tl.int64) * window_stride + offsets, values, mask=mask)
