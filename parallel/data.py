"""Data parallelism: FSDP2, HSDP or DDP on the dense view of the mesh, and the same engine's way for the experts.

Convention, everywhere: a rank's loss is scaled so that the MEAN over loss ranks (data ranks, times `sp`) is the global
loss. Dense gradients are averaged over the loss ranks. An expert's gradient already sums the tokens of every rank of
its `ep` group, so it is summed over its copies and divided by the same number of loss ranks, not by that of copies. An
expert in several slots is then summed over these too (`replicas`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.data_ddp import replicate_dense
from moeweave.parallel.expert import expert_list
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.plan import Plan
from moeweave.parallel.replicas import ReplicaSum, replica_sums

# From a new gradient to what is accumulated instead.
Hook = Callable[[Tensor], Tensor]


def repeated_blocks(model: nn.Module, blocks: list[MoEBlock]) -> list[nn.Module]:
    """The units of sharding and recomputation: entries of the outermost ModuleLists that are no lists of experts.

    For a transformer these are its decoder layers; a model without such a list has none.
    """
    units: list[nn.Module] = []
    inside = {id(module) for block in blocks for module in block.experts.modules()}
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        units.extend(entry for entry in module if any(True for _ in entry.parameters()))
        inside.update(id(child) for child in module.modules())
    return units


def splits_tokens(mesh: Mesh) -> bool:
    """Whether a rank's experts see other tokens than its dense part, so that their gradients are reduced apart."""
    return mesh.sizes.ep > 1 or mesh.sizes.tp > 1 or mesh.sizes.etp > 1


def apply_data_parallel(model: nn.Module, blocks: list[MoEBlock], mesh: Mesh, plan: Plan, sync: GradSync) -> None:
    """Shard or replicate `model`, in place. Experts of split tokens (ep, tp, etp) go over their own copies only."""
    if plan.zero_stage is not None:
        return  # DeepSpeed's engine takes the parameters in `prepare_optimizer`.
    sharded = [block for block in blocks if splits_tokens(mesh)]
    own = {param: None for block in sharded for param in expert_params(block)}.keys()
    homes = _homes([block.experts for block in sharded])
    # Parameters inside an experts module that all experts share (a norm after them): dense, but each rank's gradient
    # covers the rows of its own experts only, so it is summed over data ranks apart from the enclosing group.
    apart = homes.keys() - own
    for param in apart:
        # Ranks that share an expert's width see the same rows.
        sync.attach(*homes[param], mesh.token_group, mesh.loss_size * mesh.sizes.etp)
    copies = mesh.sizes.edp * mesh.sizes.dp_replicate
    sums = replica_sums(sharded, mesh)
    if plan.data == "fsdp2" and copies > 1:
        for block in sharded:
            # Experts of a block that was registered are called one by one, past the list that holds them.
            units = [block.experts] if block.adapter is None else list(filter(None, expert_list(block)))
            for unit in units:
                _fully_shard_experts(unit, set(apart), mesh, plan, sums.get(block.path))
    else:
        path_of = {param: block.path for block in sharded for param in expert_params(block)}
        for param in own:
            group = mesh.copies_group if copies > 1 else None
            sync.attach(*homes[param], group, mesh.loss_size, sums.get(path_of[param]))
        apart |= own
    if mesh.loss_size == 1 and plan.dtype is None:
        return
    if plan.data == "ddp":
        if mesh.loss_size > 1:
            replicate_dense(model, [block.experts for block in sharded], mesh)
        return
    options: dict[str, Any] = {"mesh": mesh.shard_mesh, "mp_policy": _precision(plan), "ignored_params": apart}
    units = repeated_blocks(model, blocks)
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    _check_dtypes_once(model, [*units, model], apart)


def _check_dtypes_once(model: nn.Module, units: list[nn.Module], apart: AbstractSet[nn.Parameter]) -> None:
    """In the first pass, before FSDP's own assertion: until then a model may be frozen or converted."""

    @torch.compiler.disable(reason="checked once, outside of graphs")
    def check(*_: Any) -> None:
        _check_dtypes(model, units, apart)
        first.remove()

    first = model.register_forward_pre_hook(check, prepend=True)


def _check_dtypes(model: nn.Module, units: list[nn.Module], apart: AbstractSet[nn.Parameter]) -> None:
    """Raise ValueError where trained parameters of one unit differ in dtype: FSDP reduces them as one tensor."""
    taken: set[nn.Parameter] = set(apart)
    names = {param: name for name, param in model.named_parameters()}
    for unit in units:
        params = [param for param in unit.parameters() if param not in taken]
        taken.update(params)
        trained = [param for param in params if param.requires_grad]
        other = next((param for param in trained if param.dtype != trained[0].dtype), None)
        if other is not None:
            raise ValueError(
                f"{names[trained[0]]} ({trained[0].dtype}) and {names[other]} ({other.dtype}) are both trained, and "
                "FSDP2 reduces one dtype. Convert the model first, e.g. model.float() with Plan(dtype='bfloat16'), or "
                "freeze those of one dtype."
            )


def _homes(modules: list[nn.Module]) -> dict[nn.Parameter, tuple[nn.Module, str]]:
    """Each parameter of `modules` with the module that holds it and its name there."""
    homes: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for owner in (owner for module in modules for owner in module.modules()):
        for name, param in owner.named_parameters(recurse=False):
            homes.setdefault(param, (owner, name))
    return homes


def expert_params(block: MoEBlock) -> list[nn.Parameter]:
    """Parameters that belong to single experts."""
    if block.kind == "modulelist":
        return list(expert_list(block).parameters())
    return [block.experts.get_parameter(name) for name in block.params]


def _fully_shard_experts(
    experts: nn.Module, ignored: set[nn.Parameter], mesh: Mesh, plan: Plan, replicas: ReplicaSum | None
) -> None:
    expert_mesh = mesh.expert["dp_replicate", "edp"] if mesh.sizes.dp_replicate > 1 else mesh.expert["edp"]
    edp = mesh.sizes.edp

    def placement(param: nn.Parameter) -> Shard | None:
        # dim 0 holds num_experts / ep experts here. Where the copies do not divide it, empty shards would break saving.
        local_shape = param.to_local().shape if isinstance(param, DTensor) else param.shape
        # Nor by slots where an expert has several: those must find each other's numbers on one coordinate of edp.
        even = [dim for dim, size in enumerate(local_shape) if size % edp == 0 and (dim > 0 or replicas is None)]
        if mesh.sizes.etp > 1 and isinstance(param, DTensor):
            # DTensor cannot put together a tensor sharded twice along a dim and in two pieces along another.
            taken = {one.dim for one in param.placements if not isinstance(one, Replicate)}  # type: ignore[attr-defined]
            even = [dim for dim in even if dim not in taken] or even
        return Shard(even[0]) if even else None

    def finish(grads: Tensor) -> None:
        if replicas is not None:
            for grad in _views(grads, experts):
                replicas.sum_(grad)
        grads /= mesh.loss_size

    fully_shard(
        experts, mesh=expert_mesh, mp_policy=_precision(plan), shard_placement_fn=placement, ignored_params=ignored
    )
    assert isinstance(experts, FSDPModule)
    # Summed, and divided once at the end: FSDP's own factor goes through PREMUL_SUM, which gloo lacks and NCCL rounds
    # to zero in bf16 (pytorch/pytorch#190747), and with one shard it is applied twice to float16 and float64.
    experts.set_gradient_divide_factor(1.0)
    experts.set_force_sum_reduction_for_comms(True)
    experts.set_all_reduce_hook(finish)


def _views(grads: Tensor, module: nn.Module) -> list[Tensor]:
    """The shards' gradients of one FSDP module, in the flat tensor that its hook gets: one after the other, none of
    them padded where all are sharded evenly."""
    shards = [shard for group in _param_groups(module) for shard in group.fsdp_params]
    sizes = [shard.sharded_size for shard in shards if shard.sharded_param.requires_grad]
    parts = grads.split([size.numel() for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


class GradSync:
    """Whether gradients of parameters outside FSDP and DDP are reduced over ranks now, or kept for a later backward.

    Attributes:
        now: False keeps what comes in; the next backward with True reduces the sum.
        num_bytes: handed to reductions so far, on this rank.
    """

    def __init__(self) -> None:
        self.now = True
        self.num_bytes = 0
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}
        self._attached: list[tuple[nn.Module, str, Hook]] = []

    def attach(
        self,
        owner: nn.Module,
        name: str,
        group: dist.ProcessGroup | None,
        loss_size: int,
        replicas: ReplicaSum | None = None,
    ) -> None:
        """Sum each new gradient of a parameter over `group` and `replicas`, and divide it by the loss ranks."""
        if loss_size > 1 or replicas is not None or (group is not None and group.size() > 1):
            hook = functools.partial(self._take, (owner, name), group, loss_size, replicas)
            self._attached.append((owner, name, hook))
            self.hold()

    def hold(self) -> None:
        """Put the hooks onto parameters that came without them: `model.to(dtype)` and `load_state_dict(assign=True)`
        exchange a parameter, or what is in it."""
        for owner, name, hook in self._attached:
            param = owner.get_parameter(name)
            # Swapping what is in a parameter keeps the dict of its hooks, and they are called no more until it is set.
            param._backward_hooks = param._backward_hooks
            if not param.is_floating_point() or hook in (param._backward_hooks or {}).values():
                continue
            # What is frozen now may be trained later.
            trained = param.requires_grad
            param.requires_grad_(True).register_hook(hook)
            param.requires_grad_(trained)

    def _take(
        self,
        home: tuple[nn.Module, str],
        group: dist.ProcessGroup | None,
        loss_size: int,
        replicas: ReplicaSum | None,
        grad: Tensor,
    ) -> Tensor:
        if group is None and replicas is None:
            return grad / loss_size
        # A clone: autograd may hand the same gradient to another parameter.
        local = (grad.to_local() if isinstance(grad, DTensor) else grad).clone(memory_format=torch.contiguous_format)
        kept = self._kept.pop(home, None)
        if kept is not None:
            local += kept
        if not self.now:
            self._kept[home] = local
            return torch.zeros_like(grad)
        if group is not None:
            dist.all_reduce(local, group=group)
            self.num_bytes += local.numel() * local.element_size()
        if replicas is not None:
            self.num_bytes += replicas.sum_(local)
        local /= loss_size
        if isinstance(grad, DTensor):
            return DTensor.from_local(local, grad.device_mesh, grad.placements, run_check=False)
        return local


def _precision(plan: Plan) -> MixedPrecisionPolicy:
    if plan.torch_dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=plan.torch_dtype, reduce_dtype=torch.float32)


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside accumulate gradients without reducing them; the first one outside reduces the sum."""
    engine: Any = model
    record = vars(model).get("_moeweave")
    if record is not None:
        record.grad_sync.now = False
    if hasattr(model, "set_requires_gradient_sync"):
        engine.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        if record is not None:
            record.grad_sync.now = True
        if hasattr(model, "set_requires_gradient_sync"):
            engine.set_requires_gradient_sync(True)


@contextmanager
def not_last(model: nn.Module) -> Iterator[None]:
    """Backward passes inside reduce their gradients and do not wait for it: FSDP's reductions run on its own stream
    and group while the next micro-batch computes, and the first backward outside waits for all."""
    fsdp = model if isinstance(model, FSDPModule) else None
    if fsdp is not None:
        fsdp.set_is_last_backward(False)
    try:
        yield
    finally:
        if fsdp is not None:
            fsdp.set_is_last_backward(True)


def keep_gathered(model: nn.Module) -> None:
    """Under pp a parameter is gathered once a step and not once a micro-batch; `reduce_gradients` ends the step."""
    for module in fsdp_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.set_requires_gradient_sync(False, recurse=False)


def reduce_gradients(model: nn.Module) -> None:
    """Reduce what backward passes since the last call left in the gradients of gathered parameters, and shard both.

    A pipeline's schedule may compute gradients of weights apart from those of inputs, where FSDP's hooks do not see
    them; torch's own runtime ends a step like this too (`perform_reduce_grad` of its stages).
    """
    states = []
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_reshard_after_backward(True, recurse=False)
        states.append(module._get_fsdp_state())
    for module in fsdp_modules(model):
        for group in _param_groups(module):
            group.post_backward()
    for state in states:
        if state._is_root:
            state._root_post_backward_final_callback()
    keep_gathered(model)


def shard_again(model: nn.Module) -> None:
    """Free what passes without a backward have left gathered, so that `model.parameters()` are those that train."""
    for module in fsdp_modules(model):
        module.reshard()


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    # torch 2.11 has one group of parameters a module.
    return list(getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]))


def fsdp_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
