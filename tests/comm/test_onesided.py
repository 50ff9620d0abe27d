"""One-sided dispatch beyond the contract of all dispatchers: rounds under way at once, windows that grow, epochs that
go
round, thousands of iterations, and what is left when a group ends.

Letters: T tokens of a rank, K routes a token, D width.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm import engines, rounds
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.rounds import Exchange
from moeweave.comm.slots import EPOCHS
from moeweave.comm.windows_cpu import SharedWindows
from nan_empty import nan_empty
from plain_moe import Case, ids_of, probe_of, tokens_of, weights_of
from run_ranks import run_ranks

COMBINES = ["exact", "prereduced"]


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    return tokens_of(case, rank), ids_of(case, rank), weights_of(case, rank)


def random_inputs(step: int, num_experts: int, top_k: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of this rank in a step: now and then none, now and then many; a fifth of the routes go nowhere."""
    generator = torch.Generator().manual_seed(step * 1009 + dist.get_rank())
    num_tokens = int(torch.randint(0, 24, (1,), generator=generator)) * (1 + 3 * (step % 50 == 7))
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    ids_TK = ids_TK.masked_fill(torch.rand(num_tokens, top_k, generator=generator) < 0.2, -1)
    x_TD = torch.randint(-8, 9, (num_tokens, dim), generator=generator).float()
    return x_TD, ids_TK, torch.randint(1, 5, (num_tokens, top_k), generator=generator).float()


def soak(num_steps: int) -> int:
    """Steps of which any value was wrong. Small integers, so that every order of addition gives the same sum."""
    num_experts = 4 * dist.get_world_size()
    dispatchers = [make_dispatcher("onesided", dist.group.WORLD, num_experts, combine=way) for way in COMBINES]
    num_wrong = 0
    for step in range(num_steps):
        top_k, dim = 1 + step % 4, (4, 24, 7)[step % 3]
        x_TD, ids_TK, weights_TK = random_inputs(step, num_experts, top_k, dim)
        dispatcher = dispatchers[step // 2 % 2]
        first = dispatcher.dispatch_async(x_TD, ids_TK, weights_TK)
        if step % 5 == 0:
            dispatcher.dispatch(-x_TD, ids_TK, weights_TK)  # without a combine
        dispatched = first.wait()
        num_rows = int(dispatched.offsets_e[-1])
        experts_R = torch.bucketize(torch.arange(num_rows), dispatched.offsets_e.long(), right=True)
        factors = (1 + dist.get_rank() * 4 + experts_R).float().unsqueeze(1)
        y_TD = dispatcher.combine(dispatched.rows_RD[:num_rows] * factors, weights_TK, dispatched)
        routed = torch.where(ids_TK >= 0, weights_TK * (ids_TK + 1), 0.0)
        num_wrong += not torch.equal(y_TD, x_TD * routed.sum(1, keepdim=True))
    return num_wrong


def test_hundreds_of_steps_without_a_wrong_value() -> None:
    assert run_ranks(4, soak, 300) == [0] * 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_ten_thousand_steps_without_a_wrong_value(world: int) -> None:
    assert run_ranks(world, soak, 10_000, timeout=1200) == [0] * world


def many_under_way(combine: str) -> list[bool]:
    """Two dispatchers of other sizes, seven exchanges posted before any is waited for, waits in another order."""
    cases = [Case((5, 17), routing="holes"), Case((9, 3), dim=40, top_k=3, num_experts=4)]
    dispatchers = [make_dispatcher("onesided", dist.group.WORLD, c.num_experts, combine=combine) for c in cases]
    equal, order = [], (3, 0, 6, 1, 5, 2, 4)
    pending = [
        dispatchers[i % 2].dispatch_async(x * (i + 1), *rest) for i in range(7) for x, *rest in [given(cases, i)]
    ]
    arrived = {i: pending[i].wait() for i in order}
    back = [dispatchers[i % 2].combine_async(arrived[i].rows_RD, given(cases, i)[2], arrived[i]) for i in range(7)]
    results = {i: back[i].wait() for i in reversed(order)}
    for i in range(7):
        x_TD, ids_TK, weights_TK = given(cases, i)
        alone = dispatchers[i % 2].dispatch(x_TD * (i + 1), ids_TK, weights_TK)
        y_TD = dispatchers[i % 2].combine(alone.rows_RD, weights_TK, alone)
        equal += [torch.equal(arrived[i].rows_RD, alone.rows_RD), torch.equal(results[i], y_TD)]
    return equal


def given(cases: list[Case], i: int) -> tuple[Tensor, Tensor, Tensor]:
    return inputs_of(cases[i % 2])


@pytest.mark.parametrize("combine", COMBINES)
def test_exchanges_under_way_do_not_mix(combine: str) -> None:
    for equal in run_ranks(2, many_under_way, combine):
        assert all(equal), equal


def posted_before_the_peer() -> list[float]:
    """Rank 0 posts and goes on; rank 1 comes half a second later. Seconds that posting took on rank 0."""
    import time

    dispatcher = make_dispatcher("onesided", dist.group.WORLD, 8)
    x_TD, ids_TK, weights_TK = inputs_of(Case((5, 17)))
    dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)
    start = time.monotonic()
    pending = [dispatcher.dispatch_async(x_TD, ids_TK, weights_TK)]
    took = time.monotonic() - start
    pending[0].wait()
    return [took, time.monotonic() - start]


def test_posting_does_not_wait_for_the_peer() -> None:
    (posted, done), _ = run_ranks(2, posted_before_the_peer)
    assert posted < 0.4 <= done


def grown(max_tokens: int | None) -> list[Any]:
    """Dispatches of more and more tokens, on one rank first; bytes of the windows after each."""
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, 8, max_tokens=max_tokens)
    _, engine = engines.engine_of(dist.group.WORLD)
    found = []
    for tokens in ((3, 2), (40, 2), (2, 70), (1, 1)):
        x_TD, ids_TK, weights_TK = inputs_of(Case(tokens, routing="holes"))
        for _ in range(3):
            with nan_empty():
                x_TD.requires_grad_()
                dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
                y_TD = dispatcher.combine(dispatched.rows_RD, weights_TK, dispatched)
                y_TD.sum().backward()
            want = (x_TD * (weights_TK * (ids_TK >= 0)).sum(1, keepdim=True)).detach()
            assert torch.allclose(y_TD, want, rtol=1e-5, atol=1e-6)
        found.append(engine.exchange._windows.num_bytes)  # type: ignore[attr-defined]
    return found


def test_windows_grow_alike_and_never_shrink() -> None:
    first, second = run_ranks(2, grown, None)
    assert first == second == sorted(first)
    assert first[0] < first[1] < first[2] == first[3]


def too_many(max_tokens: int) -> str:
    try:
        grown(max_tokens)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_fixed_windows_are_sized_once_and_say_what_does_not_fit() -> None:
    first, second = run_ranks(2, grown, 70)
    assert len(set(first)) == len(set(second)) == 1
    asks, hears = run_ranks(2, too_many, 39)
    text = "max_tokens (39) must be at least the tokens of any rank (40 on rank 0). Raise max_tokens, or leave it out"
    assert asks.startswith(f"ValueError: {text}")
    assert hears.startswith("PeerError") and f"rank 0 reports: {text}" in hears


def around_the_epochs() -> int:
    exchange, group = engines.Exchange, dist.new_group()
    engines.Exchange = lambda group: Exchange(group, first_epoch=EPOCHS - 5)  # type: ignore[misc,assignment]
    try:
        dispatcher = make_dispatcher("onesided", group, 8)
    finally:
        engines.Exchange = exchange  # type: ignore[misc]
    x_TD, ids_TK, weights_TK = inputs_of(Case((5, 17)))
    for _ in range(12):
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        y_TD = dispatcher.combine(dispatched.rows_RD, weights_TK, dispatched)
        assert torch.allclose(y_TD, x_TD * weights_TK.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    _, engine = engines.engine_of(group)
    return int(engine.exchange._epoch)  # type: ignore[attr-defined]


def test_epochs_wrap() -> None:
    assert run_ranks(2, around_the_epochs) == [24 - 5] * 2


def spoilt_windows(combine: str) -> list[bool]:
    """Windows full of NaN before every step, gradients included: the same bits as without."""
    case = Case((5, 17, 0, 9), routing="holes", top_k=3)
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, case.num_experts, combine=combine)
    _, engine = engines.engine_of(dist.group.WORLD)
    results = []
    for spoil in (False, True):
        x_TD, ids_TK, weights_TK = inputs_of(case)
        x_TD, weights_TK = x_TD.requires_grad_(), weights_TK.requires_grad_()

        def step(spoil: bool = spoil) -> None:
            if spoil:
                dist.barrier()
                windows: SharedWindows = engine.exchange._windows  # type: ignore[attr-defined]
                windows.of(dist.get_rank()).fill_(255)
                dist.barrier()

        step()
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        step()
        y_TD = dispatcher.combine(dispatched.rows_RD * 2, weights_TK, dispatched)
        step()
        y_TD.backward(probe_of(case, dist.get_rank()))
        results.append((dispatched.rows_RD.detach(), y_TD.detach(), x_TD.grad, weights_TK.grad))
    return [torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("combine", COMBINES)
def test_what_lay_in_a_window_reaches_no_output(combine: str) -> None:
    for equal in run_ranks(4, spoilt_windows, combine):
        assert all(equal), equal


def window_maps() -> tuple[int, int]:
    """Mappings of windows, and descriptors of windows and sockets to peers, of this process."""
    gc.collect()
    descriptors = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    maps = Path("/proc/self/maps").read_text().count("moeweave-window")
    return maps, sum("moeweave-window" in name for name in descriptors)


def used_and_ended(by_close: bool) -> list[Any]:
    group = dist.new_group()
    dispatcher = make_dispatcher("onesided", group, 8)
    x_TD, ids_TK, weights_TK = inputs_of(Case((5, 17)))
    dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    open_now = window_maps()
    if by_close:
        dispatcher.close()  # type: ignore[attr-defined]
    else:
        dist.destroy_process_group(group)
        del group
    rows = dispatched.rows_RD.clone()
    left = window_maps()
    with pytest.raises(RuntimeError, match=r"Make a new dispatcher|were closed"):
        dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    return [min(open_now) > 0, left == (0, 0), torch.equal(rows, dispatched.rows_RD)]


@pytest.mark.parametrize("by_close", [False, True], ids=["destroyed", "closed"])
def test_windows_end_with_their_group(by_close: bool) -> None:
    for held in run_ranks(2, used_and_ended, by_close, fresh=True):
        assert all(held), held


def saved_memory(combine: str) -> list[bool]:
    """A step's rows and what its graph keeps are not changed by the steps after it."""
    case = Case((5, 17))
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, case.num_experts, combine=combine)
    x_TD, ids_TK, weights_TK = inputs_of(case)
    kept: list[Tensor] = []
    x_TD, weights_TK = x_TD.requires_grad_(), weights_TK.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        dispatcher.combine(dispatched.rows_RD.tanh(), weights_TK, dispatched)
    before = [tensor.detach().clone() for tensor in kept]
    for _ in range(2 * rounds.NUM_AREAS):
        dispatcher.dispatch(x_TD.detach() + 1, ids_TK.flip(0), weights_TK.detach())
    return [len(kept) > 10, *(torch.equal(a, b) for a, b in zip(kept, before, strict=True))]


@pytest.mark.parametrize("combine", COMBINES)
def test_what_a_graph_keeps_is_no_window_memory(combine: str) -> None:
    for equal in run_ranks(2, saved_memory, combine):
        assert all(equal), equal


def out_of_step() -> str:
    """Rank 1 calls combine where rank 0 calls dispatch; then other sizes."""
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, 8)
    x_TD, ids_TK, weights_TK = inputs_of(Case((5, 17)))
    dispatched = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    calls = (
        lambda: dispatcher.dispatch(x_TD, ids_TK, weights_TK),
        lambda: dispatcher.combine(dispatched.rows_RD, weights_TK, dispatched),
    )
    with pytest.raises(RuntimeError) as caught:
        calls[dist.get_rank()]()
    return str(caught.value)


def other_width() -> str:
    dispatcher = make_dispatcher("onesided", dist.group.WORLD, 8)
    x_TD, ids_TK, weights_TK = inputs_of(Case((5, 17), dim=24 + 8 * dist.get_rank()))
    with pytest.raises(RuntimeError) as caught:
        dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    return str(caught.value)


def test_ranks_out_of_step_are_told_so() -> None:
    for text in run_ranks(2, out_of_step):
        assert "rank 1 is in a combine of sums" in text or "rank 0 is in a dispatch" in text
    for text in run_ranks(2, other_width):
        assert "width is 32 on rank 1 and 24 here" in text or "width is 24 on rank 0 and 32 here" in text
