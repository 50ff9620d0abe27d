"""Micro-batches in turns compute what they compute one after the other, bit by bit, on wrapped models."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.overlap import in_lane
from moeweave.kernels_ext.tolerance import assert_close
from moeweave.parallel.grad_norm import param_groups
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh, MeshSizes
from moeweave.parallel.microbatch import refuse_lanes
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.record import record_of
from overlapped import ReducedBytes, batch_of, build, gradients
from run_ranks import run_ranks

# Passes of older releases record router logits in one place, so the plan is refused there.
LANES = pytest.mark.transformers("5.2", "older ones record the router logits of all passes in one place")
IN_TURNS = dict(overlap="microbatch", microbatches=2, overlap_min_tokens=0)


def in_turns_and_not(
    name: str, sizes: dict[str, int], plan: dict[str, Any], microbatches: int, rows: tuple[int, ...]
) -> list[dict[str, Tensor]]:
    plain = gradients(name, sizes, plan, 2 * microbatches, rows, 2)
    threads = threading.active_count()
    found = gradients(name, sizes, {**plan, **IN_TURNS}, microbatches, rows, 2)
    assert threading.active_count() <= threads, threading.enumerate()
    return [found, plain]


CASES = [
    pytest.param("packed", dict(dp=2, ep=2), {}, 1, (2, 4), id="uneven"),
    pytest.param("registered", dict(dp=2, ep=2), dict(data="ddp"), 1, (2,), id="ddp"),
    pytest.param("modulelist", dict(dp=4, ep=2), {}, 1, (3,), id="edp2"),
    pytest.param("packed", dict(dp=2, ep=2), dict(recompute=True, dispatcher="alltoall"), 1, (2,), id="recompute"),
    pytest.param("qwen3_moe", dict(dp=2, ep=2), {}, 1, (2, 5), id="qwen3", marks=LANES),
    pytest.param("deepseek_v3", dict(dp=4, ep=4), dict(dispatcher="alltoall"), 1, (2,), id="deepseek", marks=LANES),
    pytest.param("qwen3_moe", dict(sp=2, ep=2), dict(dispatcher="onesided"), 1, (2,), id="sp", marks=LANES),
    pytest.param("qwen3_moe", dict(tp=2, ep=2), dict(tp_sequence=True), 1, (3,), id="tp-sequence", marks=LANES),
    pytest.param(
        "mixtral",
        dict(sp=2, tp=2, ep=4),
        dict(sequence="ring", tp_sequence=True, recompute=True, dispatcher="alltoall"),
        1,
        (2,),
        id="ring-tp-sequence",
        marks=[pytest.mark.slow, LANES],
    ),
    pytest.param(
        "deepseek_v3", dict(dp=2, sp=2, ep=4), {}, 1, (2, 2, 4, 4), id="dp-sp", marks=[pytest.mark.slow, LANES]
    ),
    pytest.param(
        "packed", dict(dp=2, dp_replicate=2, ep=2), dict(codec="int8"), 1, (3, 2), id="hsdp", marks=pytest.mark.slow
    ),
    pytest.param("mixtral", dict(dp=2, tp=2, ep=4), {}, 1, (2,), id="tp-ep4", marks=[pytest.mark.slow, LANES]),
]


@pytest.mark.parametrize("name, sizes, plan, microbatches, rows", CASES)
def test_same_bits_as_one_after_the_other(
    name: str, sizes: dict[str, int], plan: dict[str, Any], microbatches: int, rows: tuple[int, ...]
) -> None:
    pytest.importorskip("transformers")
    for rank, (found, plain) in enumerate(
        run_ranks(MeshSizes(**sizes).world, in_turns_and_not, name, sizes, plan, microbatches, rows)
    ):
        assert found.keys() == plain.keys() and len(found) > 5
        differing = [key for key in plain if not torch.equal(found[key], plain[key])]
        assert not differing, f"rank {rank}"


def after_counting(rank: int, run: Callable[[], Any]) -> Any:
    """What `run` returns, on a thread that has numbered more of autograd's nodes on that rank than on others."""
    found: list[Any] = []

    def thread() -> None:
        for _ in range(60 if dist.get_rank() == rank else 0):
            torch.ones(1, requires_grad=True).neg()
        found.append(run())

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    return found[0]


def unlike_ranks(name: str, sizes: dict[str, int], plan: dict[str, Any], ahead: int) -> dict[str, Tensor]:
    return after_counting(ahead, lambda: gradients(name, sizes, {**plan, **IN_TURNS}, 1, (2,)))


@LANES
@pytest.mark.parametrize("ahead", [0, 1])
def test_ranks_that_did_other_work_before(ahead: int) -> None:
    """All issue the collectives of backward in one order, those of attention's own group too."""
    pytest.importorskip("transformers")
    setting = ("mixtral", dict(tp=2, ep=2), dict(dispatcher="alltoall"))
    alike = run_ranks(2, gradients, *setting, 2, (2,))
    for found, want in zip(run_ranks(2, unlike_ranks, *setting, ahead), alike, strict=True):
        assert [key for key in want if not torch.equal(found[key], want[key])] == []


def outputs(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> dict[str, Tensor]:
    """A pass without gradients, and generated tokens."""
    mesh = Mesh(**sizes)
    model = parallelize(build(name).eval(), mesh, Plan(**plan))
    model.config.output_router_logits = False
    prompt = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(mesh.data_rank))
    turns = []
    order = [call.run_local for call in record_of(model).calls]
    for call, own in zip(record_of(model).calls, order, strict=True):
        call.run_local = lambda *rows, own=own: (turns.append(in_lane()), own(*rows))[1]
    with torch.no_grad():
        out = model(input_ids=prompt, use_cache=True)
    assert turns == [plan.get("overlap") is not None] * len(turns), "the pass ran in lanes if it was to"
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = model.generate(prompt[: 2 + mesh.data_rank], max_new_tokens=3 + 2 * mesh.data_rank, **options)
    keys = torch.stack([layer.keys for layer in out.past_key_values.layers])
    return dict(logits=out.logits, keys=keys, tokens=tokens)


@LANES
@pytest.mark.parametrize("sizes", [dict(dp=2, ep=2), dict(sp=2, ep=2)], ids=["dp", "sp"])
def test_prefill_and_generate(sizes: dict[str, int]) -> None:
    pytest.importorskip("transformers")
    found, plain = (run_ranks(2, outputs, "mixtral", sizes, plan) for plan in (IN_TURNS, {}))
    for got, want in zip(found, plain, strict=True):
        assert torch.equal(got["tokens"], want["tokens"])
        for key in ("logits", "keys"):
            assert_close(key, got[key], want[key], torch.float32)


def test_a_release_that_mixes_the_records_of_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model, plain = build("mixtral"), build("packed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM in turns.*transformers>=5\.2, or set overlap=None"):
        refuse_lanes(model, Plan(overlap="microbatch"))
    refuse_lanes(model, Plan())
    refuse_lanes(plain, Plan(overlap="microbatch"))


def lanes_seen(rows: tuple[int, ...], least: int) -> set[bool]:
    """Whether this rank's experts ran in lanes."""
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(build("packed"), mesh, Plan(**{**IN_TURNS, "overlap_min_tokens": least}))
    seen = set()
    for call in record_of(model).calls:
        call.run_local = lambda *args, own=call.run_local: (seen.add(in_lane()), own(*args))[1]
    forward_backward(model, batch_of("packed", mesh.rank, rows[mesh.rank]))
    return seen


@pytest.mark.parametrize("rows, least, lanes", [((2, 4), 18, True), ((2, 4), 19, False), ((1, 4), 0, False)])
def test_all_ranks_take_the_same_path(rows: tuple[int, ...], least: int, lanes: bool) -> None:
    """Rows of nine tokens: the rank with the fewest decides for both."""
    assert run_ranks(2, lanes_seen, rows, least) == [{lanes}, {lanes}]


# Where a sum has more than two terms its order may differ: four micro-batches as two pairs; a shared expert that the
# block runs before its router; reductions of parts instead of the sum; bf16 gradients, which are summed over lanes
# before they are widened.
CLOSE = [
    pytest.param("stacked", dict(dp=2, ep=2), {}, 2, (4,), id="two-pairs"),
    pytest.param("qwen2_moe", dict(dp=2, ep=2), {}, 1, (2,), id="shared-before", marks=LANES),
    pytest.param("packed", dict(dp=2, ep=2), dict(grad_sync="each"), 2, (4,), id="each"),
    pytest.param("packed", dict(dp=4, ep=2), dict(dtype="bfloat16"), 1, (2,), id="bf16"),
]


@pytest.mark.parametrize("name, sizes, plan, microbatches, rows", CLOSE)
def test_equal_within_rounding(
    name: str, sizes: dict[str, int], plan: dict[str, Any], microbatches: int, rows: tuple[int, ...]
) -> None:
    pytest.importorskip("transformers")
    for found, plain in run_ranks(sizes["dp"], in_turns_and_not, name, sizes, plan, microbatches, rows):
        for key, want in plain.items():
            assert_close(key, found[key], want, getattr(torch, plan.get("dtype", "float32")))


def reduced(name: str, sizes: dict[str, int], plan: dict[str, Any]) -> dict[str, Any]:
    with ReducedBytes() as counted:
        found = gradients(name, sizes, plan, 3, (3,), 2)
    return found | {"bytes": counted.num_bytes}


@pytest.mark.parametrize(
    "name, sizes, data",
    [("stacked", dict(dp=4, ep=2), "fsdp2"), ("packed", dict(dp=4, ep=2), "ddp"), ("modulelist", dict(dp=2), "ddp")],
)
def test_gradients_reduced_with_each_micro_batch_or_once(name: str, sizes: dict[str, int], data: str) -> None:
    """Equal gradients; three micro-batches send three times the bytes."""
    each, last = (
        run_ranks(sizes["dp"], reduced, name, sizes, dict(data=data, grad_sync=grad_sync))
        for grad_sync in ("each", "last")
    )
    for often, once in zip(each, last, strict=True):
        assert often.pop("bytes") == 3 * once.pop("bytes") > 0
        for key, want in once.items():
            assert_close(key, often[key], want, torch.float32)


def many_steps(overlap: dict[str, Any], microbatches: int) -> tuple[list[float], list[int]]:
    """Losses of 200 steps on one stream of batches, and resident memory now and then."""
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(build("deepseek_v3"), mesh, Plan(**overlap))
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    losses, memory = [], []
    for step in range(200):
        losses.append(
            float(forward_backward(model, batch_of("deepseek_v3", mesh.rank + 10 * (step % 7), 4), microbatches))
        )
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    return losses, memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlap, unscheduled, microbatches",
    [(IN_TURNS, {}, 2), (dict(overlap="three_stream", three_stream_form="gathered"), dict(dispatcher="allgather"), 1)],
    ids=["microbatch", "three-stream"],
)
def test_200_steps(overlap: dict[str, Any], unscheduled: dict[str, Any], microbatches: int) -> None:
    """Not one bit apart from the same parts one after the other, and no more memory at the end than early on."""
    pytest.importorskip("transformers")
    losses, memory = run_ranks(2, many_steps, overlap, 1, timeout=600)[0]
    plain, _ = run_ranks(2, many_steps, unscheduled, microbatches, timeout=600)[0]
    assert plain[-1] < 0.7 * plain[0], "it learns"
    assert losses == plain
    assert memory[-1] - memory[0] < 16 << 20, f"memory grows: {memory}"
