"""What one rank does for `compare models`: build the model of a method, check its first pass, time the next ones.

Every method gets the same weights and, over all ranks together, the same batches.

Legend: B sequences of this rank's batch, S positions, V tokens that the model knows.
"""

from __future__ import annotations

import functools
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeweave as mw
from moeweave.launch import expert_load
from moeweave.launch.bench.topology import device_name
from moeweave.launch.compare.methods import Method
from moeweave.parallel.hf import rival
from moeweave.parallel.hf.build import load_config
from moeweave.parallel.hf.random_weights import random_model


@dataclass(frozen=True)
class Job:
    """What all methods of a comparison have in common.

    Attributes:
        what: "train" or "prefill".
        source, overrides: the model, as `load_config` takes them.
        dtype: of parameters, gradients, Adam's moments and computation.
        device: "cpu", or None for the accelerator if there is one.
        sequences: of a rank; ranks that share a batch put theirs together.
        seq_length: S.
        warmup, steps: passes before the timed ones, and timed.
        recompute: activation checkpointing.
        limit: seconds after which a rank ends itself.
    """

    what: str
    source: str
    overrides: dict[str, Any]
    dtype: str = "bfloat16"
    device: str | None = None
    sequences: int = 2
    seq_length: int = 4096
    warmup: int = 3
    steps: int = 10
    recompute: bool = True
    limit: int = 150
    seed: int = 0

    def config(self) -> Any:
        """The model's transformers config; it computes no balance loss, which transformers' is one for each rank."""
        own = {"output_router_logits": False, "use_cache": self.what == "prefill"}
        return load_config(self.source, {**self.overrides, **own}, size="given")


@dataclass(frozen=True)
class Subject:
    """A model ready to be timed.

    Attributes:
        run: batch [B, S] -> the pass's first check value, of this rank or the mean of all: the loss, or the mean over
            prompts of the last logits' logsumexp.
        norm: the second, of the pass before: the global gradient norm, or the mean of the largest of the last logits.
        after: what ends a pass and is timed with it: the optimizer's step.
        balance: largest over mean load of the experts since the last call, None where it is not counted.
    """

    run: Callable[[Tensor], Tensor]
    norm: Callable[[], Tensor]
    after: Callable[[], None]
    balance: Callable[[], float | None]


def rank_main(method: Method, job: Job) -> dict[str, Any]:
    """`measure` in a process of its own, which ends itself when the time is up: a rank that waits for a lost one must
    not use up the time of other methods."""
    signal.alarm(job.limit)
    warnings.filterwarnings("ignore")  # of releases to come, on every method's screen
    found = measure(method, job)
    dist.barrier()
    dist.destroy_process_group()
    return found


def measure(method: Method, job: Job) -> dict[str, Any]:
    """One rank's part, a collective of all; the same figures on every rank.

    Returns seconds of each timed pass (the slowest rank's), check values of the first pass (`loss`, `norm`), `balance`
    of experts in it, bytes of the fullest rank (None on CPU) and the device's name.
    """
    mesh = mw.Mesh(**asdict(method.sizes), device=job.device)
    config = job.config()
    subject = (_train if job.what == "train" else _prefill)(method, job, config, mesh)
    batches = [_batch(job, config.vocab_size, mesh, index) for index in range(job.warmup + job.steps)]
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = _mean(subject.run(batches[0]), mesh)
    norm = _mean(subject.norm(), mesh)
    subject.after()
    balance = subject.balance()
    seconds = [timed(functools.partial(_whole_pass, subject, batch), mesh.device) for batch in batches[1:]]
    return {
        "seconds": seconds[job.warmup - 1 :],
        "loss": loss,
        "norm": norm,
        "balance": balance,
        **_memory(mesh),
        "device": device_name(mesh.device),
    }


def _whole_pass(subject: Subject, ids_BS: Tensor) -> None:
    subject.run(ids_BS)
    subject.after()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes on the slowest rank. All ranks begin together; a collective."""
    _settle(device)
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def _settle(device: torch.device) -> None:
    """Every rank is here, and its device has nothing left to do."""
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- the passes


def _train(method: Method, job: Job, config: Any, mesh: mw.Mesh) -> Subject:
    model = _built(method, job, config, mesh).train()
    groups: Any = mw.param_groups(model)
    fast: Any = {"fused": True} if mesh.device.type == "cuda" else {"foreach": False}
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, **fast)
    if not method.rival:
        optimizer = mw.prepare_optimizer(model, optimizer)

    def after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def ours(ids_BS: Tensor) -> Tensor:
        # A stage takes one sequence after the other; elsewhere the batch is one piece.
        parts = ids_BS.shape[0] if mesh.sizes.pp > 1 else 1
        return mw.forward_backward(model, {"input_ids": ids_BS, "labels": ids_BS}, microbatches=parts)

    def theirs(ids_BS: Tensor) -> Tensor:
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        return loss.detach()

    if method.rival:
        return Subject(theirs, lambda: rival.grad_norm(model, mesh.device), after, lambda: None)
    return Subject(ours, lambda: mw.clip_grad_norm_(model, float("inf")), after, lambda: _balance(model, mesh))


def _prefill(method: Method, job: Job, config: Any, mesh: mw.Mesh) -> Subject:
    model = _built(method, job, config, mesh)
    last: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(ids_BS: Tensor) -> Tensor:
        """Keys and values of all positions go into a new cache."""
        out = model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
        if _cache_of(out) is None:
            raise RuntimeError(f"{method.name}: the pass filled no cache, which prefill is for.")
        last["logits_BV"] = out.logits[:, -1].float()
        return last["logits_BV"].logsumexp(-1).mean()

    balance = (lambda: None) if method.rival else (lambda: _balance(model, mesh))
    return Subject(run, lambda: last["logits_BV"].amax(-1).mean(), lambda: None, balance)


def _cache_of(output: Any) -> Any:
    """Newer releases call it `cache`."""
    return next((output[name] for name in ("cache", "past_key_values") if output.get(name) is not None), None)


def _built(method: Method, job: Job, config: Any, mesh: mw.Mesh) -> nn.Module:
    dtype = getattr(torch, job.dtype)
    recompute = job.recompute and job.what == "train"
    if not method.rival:
        plan = mw.Plan.from_dict({"recompute": recompute, **method.plan})
        return random_model(config, mesh, plan, dtype=dtype, seed=job.seed)
    model: Any = rival.random_transformers_expert_parallel(
        config, method.sizes, dtype=dtype, device=mesh.device, seed=job.seed
    )
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _balance(model: nn.Module, mesh: mw.Mesh) -> float | None:
    return expert_load.balance(expert_load.of_step(model, mesh))


# ---- what goes in and what comes out


def _batch(job: Job, vocab_size: int, mesh: mw.Mesh, index: int) -> Tensor:
    """This rank's part of the batch of pass `index`, [B, S]: of all ranks' sequences those of its data rank."""
    generator = torch.Generator().manual_seed(job.seed + index)
    ids_BS = torch.randint(vocab_size, (job.sequences * mesh.world, job.seq_length), generator=generator)
    return ids_BS.chunk(mesh.data_size)[mesh.data_rank].to(mesh.device)


def _mean(value: Tensor, mesh: mw.Mesh) -> float:
    """Over all ranks; those that share a batch, and so a value, count alike."""
    total = value.detach().to(mesh.device, torch.float32, copy=True)
    dist.all_reduce(total)
    return float(total) / mesh.world


def _memory(mesh: mw.Mesh) -> dict[str, int | None]:
    """Bytes of the fullest rank: most that torch had allocated in passes, and all that its device holds at the end
    (with what torch keeps, windows, and what NCCL takes)."""
    if mesh.device.type != "cuda":
        return {"peak_bytes": None, "device_bytes": None}
    free, total = torch.cuda.mem_get_info()
    found = torch.tensor([torch.cuda.max_memory_allocated(), total - free], device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return dict(zip(("peak_bytes", "device_bytes"), found.tolist(), strict=True))
