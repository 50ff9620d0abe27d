"""DeepSpeed's ZeRO as the engine of the data axes: `Plan(data="zero0".."zero3")`.

    parallelize          experts over ep, layers over tp, as with every engine; parameters stay whole on data ranks
    prepare_optimizer    slices become plain parameters, DeepSpeed's engine takes model and optimizer
    forward_backward     engine(...), engine.backward, the boundary of a step at the last micro-batch
    clip_grad_norm_      the norm of what the engine has reduced, and its clipping of this step
    optimizer.step       engine.step
    save, load           weights as with every engine; the optimizer's partitions by engine.save_checkpoint

Gradients follow the library's convention: an expert's is summed over its copies and divided by the data ranks. Norm and
clipping replace DeepSpeed's own, which is wrong with experts at stage 0 (deepspeedai/DeepSpeed#8475) and under tp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from moeweave.parallel.data import expert_params, splits_tokens
from moeweave.parallel.data_deepspeed_config import check_params, fill_config
from moeweave.parallel.data_deepspeed_engine import Engine, expert_group_name
from moeweave.parallel.data_deepspeed_params import localize, split_of
from moeweave.parallel.record import Record

_OLDEST = (0, 19, 8)


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, record: Record) -> EngineOptimizer:
    """See `moeweave.prepare_optimizer`. A collective."""
    _check_environment(record)
    if record.zero is not None:
        raise ValueError("the model has its engine already: call prepare_optimizer once.")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("the model's parameters are on meta. Give them their weights first: mw.load(path, model).")
    bf16 = check_params(model, record.plan)
    config = fill_config(record.plan, record.mesh.data_size, bf16)
    _check_optimizer(optimizer, model)
    experts = {id(module) for block in record.blocks for module in block.experts.modules()}
    replaced = localize(model, experts)
    _mark_experts(record)
    _sum_shared_over_tp(record)
    _regroup(optimizer, replaced)
    _start_comm()
    own = [block.num_experts for block in record.blocks] if splits_tokens(record.mesh) else []
    engine = Engine(model, optimizer, config, record.mesh, own)
    record.zero = Zero(engine, model, record, config["gradient_clipping"])
    return EngineOptimizer(record.zero, optimizer)


def _check_environment(record: Record) -> None:
    found = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if found < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise RuntimeError(f"deepspeed ({deepspeed.__version__}) must be {wanted} or newer. pip install -U deepspeed")
    kind, device = get_accelerator().device_name(), record.mesh.device.type
    if kind != device:
        raise RuntimeError(
            f"DeepSpeed runs on {kind} here, and the mesh on {device}. Set DS_ACCELERATOR={device} in the environment, "
            f"or Mesh(device={kind!r})."
        )


def _start_comm() -> None:
    """DeepSpeed's communication over the groups that exist."""
    # On a CPU it would compile an all-reduce for inference first, which takes minutes and is not used here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _expert_params(record: Record) -> list[nn.Parameter]:
    return [param for block in record.blocks for param in expert_params(block)] if splits_tokens(record.mesh) else []


def _mark_experts(record: Record) -> None:
    """What stages 0 to 2 read (allreduce, group_name), and stage 3 (the rest: whose peers share the parameter)."""
    name = expert_group_name(record.mesh)
    for param in _expert_params(record):
        marked: Any = param
        marked.allreduce, marked.group_name = False, name
        marked.ds_zero_placement_family, marked.ds_zero_partition_group_name = "autoep_expert", name


def _sum_shared_over_tp(record: Record) -> None:
    """A norm that all experts share sees the rows of this rank's experts; DeepSpeed sums over data ranks alone."""
    if record.mesh.sizes.tp == 1:
        return
    own = set(_expert_params(record))
    group = record.mesh.group("tp")

    def hook(grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    for param in {p for block in record.blocks for p in block.experts.parameters()} - own:
        if param.requires_grad:
            param.register_hook(hook)


def _kind(param: nn.Parameter) -> tuple[bool, bool]:
    """(an expert's, split over tp): parameters of one kind are reduced and counted over the same ranks."""
    expert = getattr(param, "allreduce", True) is False
    return expert, not expert and split_of(param) is not None


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if optimizer.state:
        raise ValueError("prepare_optimizer needs a new optimizer: this one has taken steps. Load its state after.")
    known = set(model.parameters())
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if param not in known:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(param.shape)} that is not the model's. Create it "
                "after parallelize, from mw.param_groups(model)."
            )


def _regroup(optimizer: torch.optim.Optimizer, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put the new parameters into the optimizer, each group split by kind; experts' groups are marked for DeepSpeed."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for param in group["params"]:
            param = replaced.get(param, param)
            kinds.setdefault(_kind(param), []).append(param)
        for (expert, _), params in kinds.items():
            marks = {"moe": True, "name": params[0].group_name} if expert else {}  # type: ignore[attr-defined]
            groups.append({**group, **marks, "params": params})
    optimizer.param_groups[:] = groups
    optimizer.state.clear()


class Zero:
    """The engine of one model.

    Attributes:
        engine: DeepSpeed's.
        clipping: largest norm by the user's config, 0 for none.
    """

    def __init__(self, engine: Engine, model: nn.Module, record: Record, clipping: float) -> None:
        self.engine, self.model, self.record, self.clipping = engine, model, record, float(clipping)
        self.stage = engine.zero_optimization_stage()
        self._norm: Tensor | None = None
        self._ready = False
        optimizer: Any = engine.optimizer
        if self.stage == 0:
            engine.clip_fp32_gradients = self._clip_gradients
        elif self.stage == 3:
            optimizer._get_norm_groups = lambda: [self.norm()]
        else:
            optimizer.scaled_global_norm = lambda norm_type=2: self.norm()

    # ---- a step

    def run(self, passes: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Forward and backward of every pass; returns the sum of their losses, detached."""
        total = torch.zeros((), device=self.record.mesh.device)
        for index, one in enumerate(passes):
            loss = one()
            self._backward(loss, last=index == len(passes) - 1)
            total = total + loss.detach()
        return total

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; with the last the engine ends the reduction of gradients."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        self._ready, self._norm = last, None

    def clip(self, max_norm: float) -> Tensor:
        """Let the engine's next step clip to `max_norm`. Returns the norm, before clipping."""
        self._require_gradients("clip_grad_norm_")
        if self.clipping and max_norm != self.clipping:
            raise ValueError(
                f"max_norm ({max_norm}) contradicts ds_config.gradient_clipping ({self.clipping}). Pass the same, or "
                "remove the field."
            )
        self._set_clipping(0.0 if math.isinf(max_norm) else max_norm)
        return self.norm()

    def step(self) -> None:
        self._require_gradients("optimizer.step")
        self.engine.step()
        self._set_clipping(self.clipping)
        self._ready, self._norm = False, None

    def zero_grad(self) -> None:
        """Forget gradients that no step has used."""
        if self._ready and self.stage > 0:
            for key in list(self.engine.optimizer.averaged_gradients):
                self.engine.optimizer.averaged_gradients[key] = None
            self.engine.optimizer.zero_grad()
        self.engine.zero_grad()
        self._ready, self._norm = False, None

    def _require_gradients(self, what: str) -> None:
        if not self._ready:
            raise RuntimeError(
                f"{what} needs the gradients of mw.forward_backward, which drives DeepSpeed's engine; loss.backward() "
                "does not. Call forward_backward once before each step."
            )

    def _set_clipping(self, max_norm: float) -> None:
        self.engine._config.gradient_clipping = max_norm
        if self.stage > 0:
            self.engine.optimizer.clip_grad = max_norm

    def _clip_gradients(self) -> None:
        scale = torch.clamp(self.engine.gradient_clipping() / (self.norm() + 1e-6), max=1.0)
        for param in self.model.parameters():
            if param.grad is not None:
                param.grad.mul_(scale.to(param.grad.dtype))

    # ---- the norm

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The 2-norm of all gradients, each logical parameter counted once; float32 scalar, equal on every rank."""
        if self._norm is None:
            total = torch.zeros((), dtype=torch.float64, device=self.record.mesh.device)
            for kind, pieces, partition in self._pieces():
                # On a CPU a sum of many float32 squares is off by 1e-3 at 20 million elements.
                squares = sum(
                    (torch.linalg.vector_norm(piece, dtype=torch.float64) ** 2 for piece in pieces), total * 0
                )
                for group in self._groups(kind, partition):
                    dist.all_reduce(squares, group=group)
                total = total + squares
            self._norm = total.sqrt().to(torch.float32)
        return self._norm

    def _groups(self, kind: tuple[bool, bool], partition: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
        expert, split = kind
        found = [] if partition is None else [partition]
        if expert:
            found.append(self.record.mesh.group("ep"))
        elif split:
            found.append(self.record.mesh.group("tp"))
        return [group for group in found if group.size() > 1]

    def _pieces(self) -> Iterator[tuple[tuple[bool, bool], list[Tensor], dist.ProcessGroup | None]]:
        """Kind, this rank's reduced gradients, and the group that they are partitioned over; in the same order on
        every rank."""
        optimizer: Any = self.engine.optimizer
        if self.stage == 0:
            for group in optimizer.param_groups:
                params = [param for param in group["params"] if param.grad is not None]
                if group["params"]:
                    yield _kind(group["params"][0]), [param.grad for param in params], None
        elif self.stage == 3:
            for index, params in enumerate(optimizer.fp16_groups):
                yield _kind(params[0]), optimizer.averaged_gradients[index], params[0].ds_process_group
        else:
            for index, params in enumerate(optimizer.bit16_groups):
                yield _kind(params[0]), optimizer.averaged_gradients[index], optimizer.real_dp_process_group[index]

    # ---- weights and checkpoints

    def gradient(self, param: nn.Parameter) -> Tensor | None:
        """The reduced gradient of a parameter, of the whole if it is split. A collective of all ranks."""
        local = deepspeed.utils.safe_get_full_grad(param)
        split = split_of(param)
        return local if local is None or split is None else split.whole(local.view(param_shape(param))).full_tensor()

    @contextmanager
    def whole(self, *, write: bool = False) -> Iterator[None]:
        """Inside, stage 3 has its parameters gathered; what was written to them (`write`), alike on all ranks that
        hold a parameter, is kept after, in the engine's masters as well."""
        params = list(self.model.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(params, modifier_rank=0 if write else None, enabled=self.stage == 3):
            yield
        if write and self.stage > 0:
            self.engine.optimizer._restore_from_bit16_weights()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of the optimizer state that the engine wrote."""
        sizes = {axis: size for axis, size in asdict(self.record.mesh.sizes).items() if size > 1}
        kind = type(self.engine.basic_optimizer).__name__
        return {"engine": f"zero{self.stage}", "kind": kind, "ranks": self.record.mesh.world, "mesh": sizes}

    def save(self, folder: Path) -> None:
        """Write the optimizer's partitions, a file or two a rank. A collective."""
        self.engine.save_checkpoint(str(folder), tag="", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. A collective."""
        self.engine.load_checkpoint(str(folder), tag="")
        self._set_clipping(self.clipping)


def param_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a rank's slice, which stage 3 keeps beside the parameter."""
    return getattr(param, "ds_shape", param.shape)


class EngineOptimizer(torch.optim.Optimizer):
    """What stands for the optimizer once the engine has it: `step` and `zero_grad` are the engine's.

    A torch.optim.Optimizer because torch's learning-rate schedulers take nothing else. Groups and state are those of
    the optimizer inside, whose parameters are the engine's partitions now.
    """

    def __init__(self, zero: Zero, inner: torch.optim.Optimizer) -> None:
        self.zero, self.inner, self.defaults = zero, inner, inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zero.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("the optimizer's state is in partitions of the engine: use mw.save and mw.load.")

    def load_state_dict(self, state_dict: Any) -> None:
        raise RuntimeError("the optimizer's state is in partitions of the engine: use mw.save and mw.load.")

    def __repr__(self) -> str:
        return f"EngineOptimizer(zero{self.zero.stage}, {self.inner!r})"
