"""Expert parallelism: replaces the call `experts(hidden, ids, weights)` and nothing else.

Each rank of the mesh axis `ep` keeps a contiguous block of the experts. A call then is

    1. dispatch   tokens to the ranks of their experts
    2. experts    this rank's, on rows sorted by expert (one grouped GEMM a projection where the layout is known)
    3. combine    the weighted sum back on the tokens' ranks

Parameters become DTensors, Shard(0) over `ep` and by columns over `etp`, under their own names.

Legend: T tokens here, K routes a token, D width, R rows here, E experts, e experts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from moeweave.comm.codec import Codec, num_scales
from moeweave.comm.communicator import Communicator
from moeweave.comm.dispatch import TokenDispatcher
from moeweave.comm.dispatchers.ascend_limits import AscendOptions
from moeweave.comm.dispatchers.select import make_dispatcher
from moeweave.comm.overlap import in_lane, least_of_ranks, run_routed
from moeweave.comm.topology import Topology
from moeweave.moe.balance import apply_capacity, load
from moeweave.moe.experts import ExpertWeights, is_swiglu, local_experts
from moeweave.moe.layer import accumulate, unflatten
from moeweave.parallel.adapter import MoEBlock, is_gated
from moeweave.parallel.expert_width import ExpertWidth, placements_of, slice_of
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.placed import SlotTable
from moeweave.parallel.plan import Plan
from moeweave.parallel.seam import seam_arguments, shadowed, weights_first
from moeweave.parallel.span import current_span
from moeweave.parallel.token_shares import TokenShares

# (slice [e, ...], first expert of the slice, number of experts in it) -> the slice with an adapter's update.
Delta = Callable[[Tensor, int, int], Tensor]


def shard_experts(block: MoEBlock, mesh: Mesh) -> None:
    """Keep this rank's block of the experts: slices as DTensors over `ep` and `etp`, or the ModuleList entries it owns.

    Raises:
        ValueError: the number of experts does not divide over `ep`.
    """
    mesh.sizes.check_experts(block.num_slots, block.path or type(block.experts).__name__)
    if mesh.sizes.ep == 1 and mesh.sizes.etp == 1:
        return
    if block.kind == "modulelist":
        _drop_remote(block, mesh.expert.get_local_rank("ep"), mesh.sizes.ep)
        return
    etp = mesh.sizes.etp
    widths = placements_of(block, etp) if etp > 1 else {}
    expert_mesh = mesh.expert["ep", "etp"] if etp > 1 else mesh.expert["ep"]
    for name in block.params:
        param = block.experts.get_parameter(name)
        local = _own_experts(param.detach(), block, mesh)
        if etp > 1:
            local = slice_of(local, widths[name], mesh.expert.get_local_rank("etp"), etp)
        sharded = DTensor.from_local(
            # A clone: the slice would keep the whole parameter alive.
            local.clone(memory_format=torch.contiguous_format),
            expert_mesh,
            [Shard(0), widths[name]] if etp > 1 else [Shard(0)],
            run_check=False,
            shape=torch.Size((block.num_slots, *param.shape[1:])),
            stride=param.stride(),
        )
        block.experts.register_parameter(name, nn.Parameter(sharded, requires_grad=param.requires_grad))


def _own_experts(param: Tensor, block: MoEBlock, mesh: Mesh) -> Tensor:
    """The rows of this rank's experts: a block of them, or those of its slots."""
    at = mesh.expert.get_local_rank("ep")
    if block.slots is None:
        return param.chunk(mesh.sizes.ep)[at]
    count = block.num_slots // mesh.sizes.ep
    return param[list(block.slots[at * count : (at + 1) * count])]


def _drop_remote(block: MoEBlock, ep_rank: int, ep_size: int) -> None:
    experts = expert_list(block)
    per_rank = len(experts) // ep_size
    for index in range(len(experts)):
        if index // per_rank != ep_rank:
            # A hole keeps the indices, and so the names, of the experts that stay.
            experts.register_module(str(index), None)


def check_codec_width(block: MoEBlock, plan: Plan) -> None:
    """Raise ValueError where the codec's scales do not fit the experts' width; of packed experts, where it shows."""
    if block.kind != "packed":
        return
    down: Any = block.experts.get_parameter("down_proj")
    width = down.shape[2] if getattr(block.experts, "is_transposed", False) else down.shape[1]
    try:
        num_scales(Codec.parse(plan.codec).scale, width)
    except ValueError as error:
        raise ValueError(f"{block.path or type(block.experts).__name__}: codec ({plan.codec}): {error}") from None


def expert_list(block: MoEBlock) -> nn.ModuleList:
    """The ModuleList of a "modulelist" block."""
    if isinstance(block.experts, nn.ModuleList):
        return block.experts
    return next(child for child in block.experts.children() if isinstance(child, nn.ModuleList))


class ExpertCall:
    """What stands in for an experts module's forward.

    Attributes:
        load_E: int64 routes per expert (whole range) of this rank's tokens since `reset`, recomputation not counted.
        step_E: the same in training mode only, since the last update of the router's bias.
        kept_E: like load_E, after capacity dropped some; stays zero without a capacity.
        deltas: by parameter name, what low-rank adapters add to this rank's slice.
        shares: how tp ranks, which all hold the same tokens, share them out; None without tp.
        width: the ranks that share each expert's width; None without etp.
        route: (x_TD, ids_TK, weights_TK) -> y_TD: dispatch, experts and combine, as the plan schedules them.
        masked: while True this rank's tokens are routed nowhere; it only serves the other ranks' rows.
        table: from experts to the slots in which a plan has placed them, or None.
    """

    def __init__(self, block: MoEBlock, dispatcher: TokenDispatcher, plan: Plan, mesh: Mesh) -> None:
        self.block = block
        self.dispatcher = dispatcher
        self.plan = plan
        self.num_local = block.num_slots // mesh.sizes.ep
        self.first_local = mesh.expert.get_local_rank("ep") * self.num_local
        self.own_forward = type(block.experts).forward
        self.weights_first = weights_first(self.own_forward)
        self.run_local = {"packed": self._packed, "stacked": self._stacked, "modulelist": self._listed}[block.kind]
        self.deltas: dict[str, Delta] = {}
        self.masked = False
        self.shares: TokenShares | None = TokenShares(mesh.dense["tp"]) if mesh.sizes.tp > 1 else None
        self.width = ExpertWidth(mesh.group("etp"), block) if mesh.sizes.etp > 1 else None
        first = mesh.expert.get_local_rank("ep")
        self.table: SlotTable | None = None
        if block.slots is not None:
            self.table = SlotTable(block.slots, block.num_experts, first, mesh.device)
        self.group = Communicator(mesh.group("ep") if mesh.sizes.ep > 1 else None).name
        self.route = self._in_chunks if plan.overlap == "microbatch" else self.in_one_piece
        self.load_E = torch.zeros(block.num_experts, dtype=torch.int64, device=mesh.device)
        self.kept_E = torch.zeros_like(self.load_E)
        self.step_E = torch.zeros_like(self.load_E)

    def reset(self) -> None:
        """Forget the load counted so far."""
        self.load_E.zero_()
        self.kept_E.zero_()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, ids_TK, weights_TK = seam_arguments(self.own_forward, args, kwargs)
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        ids_TK, weights_TK = self._routes(ids_TK, weights_TK)
        num_tokens = x_TD.shape[0]
        span = current_span()
        # Under tp_sequence a tp rank has tokens of its own already.
        shares = self.shares if span is None or span.tp is None else None
        if shares is not None:
            start, end = shares.bounds(num_tokens)
            x_TD, ids_TK, weights_TK = shares.take(x_TD), ids_TK[start:end], shares.take(weights_TK)
        y_TD = (self._of_group if self.width is not None else self.route)(x_TD, ids_TK, weights_TK)
        y_TD = y_TD.to(hidden.dtype)
        if shares is not None:
            y_TD = shares.join(y_TD, num_tokens)
        return unflatten(y_TD, hidden.shape)

    def in_one_piece(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Dispatch, experts, combine, one after the other: x_TD -> y_TD."""
        dispatched = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK)
        rows_RD = self.run_local(dispatched.rows_RD, dispatched.offsets_e)
        return self.dispatcher.combine(rows_RD, weights_TK, dispatched)

    def _of_group(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`route` of the tokens of all ranks that share the experts' width; this rank's own outputs."""
        width = self.width
        assert width is not None
        sizes = width.sizes(x_TD)
        x_tD, weights_tK = width.gather(x_TD, sizes), width.gather_weights(weights_TK, sizes)
        return width.reduce(self.route(x_tD, width.gather(ids_TK, sizes), weights_tK), sizes)

    def _in_chunks(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Overlapped: as one of several lanes, or else in chunks if every rank has tokens enough."""
        if torch.compiler.is_compiling():
            return self.in_one_piece(x_TD, ids_TK, weights_TK)
        # In a lane nothing is cut; asked all the same, so that a recomputation outside of it takes the same path.
        if in_lane():  # on the host: reading the device would hold up every lane in every layer
            least = int(least_of_ranks(torch.tensor([-1]), ""))
        else:
            least = int(least_of_ranks(torch.tensor([x_TD.shape[0]], device=x_TD.device), self.group))
        if 0 <= least < max(self.plan.overlap_min_tokens, 1):
            return self.in_one_piece(x_TD, ids_TK, weights_TK)
        num_chunks = 1 if least < 0 else self.plan.microbatches
        return run_routed(self.dispatcher, x_TD, ids_TK, weights_TK, self.run_local, num_chunks)

    def _routes(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights in the dispatcher's convention (-1 is not routed), counted, capacity applied."""
        num_experts = self.block.num_experts
        ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1]).to(torch.int64)
        weights_TK = weights_TK.reshape(ids_TK.shape[0], -1 if ids_TK.shape[0] else ids_TK.shape[1])
        if weights_TK.shape[1] != ids_TK.shape[1]:
            weights_TK = weights_TK.gather(1, ids_TK.clamp(0, num_experts - 1))
        if self.masked:
            ids_TK = torch.full_like(ids_TK, -1)
        load_E = load(ids_TK, num_experts)
        accumulate(self.load_E, load_E)
        if self.block.experts.training:
            accumulate(self.step_E, load_E)
        if self.plan.capacity is not None:
            per_expert = math.ceil(self.plan.capacity * ids_TK.numel() / num_experts)
            ids_TK, weights_TK, _ = apply_capacity(ids_TK, weights_TK, per_expert, by=self.plan.drop)
            accumulate(self.kept_E, load(ids_TK, num_experts))
        return (ids_TK if self.table is None else self.table(ids_TK)), weights_TK

    def _local(self, name: str) -> Tensor:
        """This rank's slice of a parameter, in the compute dtype, low-rank deltas added."""
        param = getattr(self.block.experts, name)
        param = param.to_local() if isinstance(param, DTensor) else param
        if self.plan.torch_dtype is not None and param.is_floating_point():
            param = param.to(self.plan.torch_dtype)
        delta = self.deltas.get(name)
        return param if delta is None else delta(param, self.first_local, self.num_local)

    def _packed(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        experts: Any = self.block.experts
        gated = is_gated(experts)
        up = "gate_up_proj" if gated else "up_proj"
        bias = experts.has_bias
        up_bias, down_bias = (self._local(f"{name}_bias") if bias else None for name in (up, "down_proj"))
        post_norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        if self.width is not None:
            up_bias = None if up_bias is None else self.width.own_columns(up_bias)
            down_bias = None if down_bias is None else self.width.once(down_bias)
            post_norm = None if post_norm is None else _after(self.width.sum_rows, post_norm)
        weights = ExpertWeights(
            gate_up=self._local(up),
            down=self._local("down_proj"),
            gate_up_bias=up_bias,
            down_bias=down_bias,
            is_transposed=experts.is_transposed,
            apply_gate=experts._apply_gate if gated else experts.act_fn,
            post_norm=post_norm,
            is_swiglu=gated and is_swiglu(experts),
        )
        return local_experts(weights, rows_RD.to(weights.gate_up.dtype), offsets_e, exact=True)

    def _stacked(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        """The module's own forward, with this rank's slices as its parameters and one route of weight 1 a row."""
        if rows_RD.shape[0] == 0:
            # Most forwards cannot run on no row: one dummy keeps the graph whole, and none of its output is used.
            rows = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
            return self._stacked(rows, torch.ones_like(offsets_e))[:0] + rows_RD
        expert_R = torch.searchsorted(offsets_e, torch.arange(rows_RD.shape[0], device=offsets_e.device), right=True)
        local: dict[str, Any] = {name: self._local(name) for name in self.block.params}
        # What the module calls its number of experts (num_experts, n_routed_experts, ...) is this rank's meanwhile.
        for name, value in vars(self.block.experts).items():
            if type(value) is int and value == self.block.num_experts and "experts" in name and "_per_" not in name:
                local[name] = self.num_local
        with shadowed(self.block.experts, local):
            ids_R1 = expert_R.unsqueeze(1)
            ones_R1 = torch.ones(ids_R1.shape, dtype=rows_RD.dtype, device=rows_RD.device)
            routes = (ones_R1, ids_R1) if self.weights_first else (ids_R1, ones_R1)
            return self.own_forward(self.block.experts, rows_RD, *routes)

    def _listed(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        experts = expert_list(self.block)
        outputs, start = [], 0
        for local, end in enumerate(offsets_e.tolist()):
            # Experts without rows run too: their parameters get zero gradients, not none.
            outputs.append(self._one(experts[self.first_local + local], rows_RD[start:end]))
            start = end
        return torch.cat(outputs)

    def _one(self, expert: nn.Module, rows_ND: Tensor) -> Tensor:
        """One expert of a list, in the compute dtype; FSDP casts those that it shards."""
        dtype = self.plan.torch_dtype
        if dtype is None or isinstance(expert, FSDPModule) or isinstance(self.block.experts, FSDPModule):
            return expert(rows_ND)
        params = {name: param.to(dtype) for name, param in expert.named_parameters()}
        return torch.func.functional_call(expert, params, (rows_ND.to(dtype),))


def _after(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: then(first(rows))


def install_expert_call(
    block: MoEBlock,
    top_k: int,
    mesh: Mesh,
    plan: Plan,
    parent: nn.Module,
    return_group: dist.ProcessGroup | None = None,
    topology: Topology | None = None,
) -> ExpertCall:
    """Put an `ExpertCall` in place of the experts' forward (or, for an adapted block, of the block's).

    return_group, topology: see `make_dispatcher`.
    """
    ep = mesh.sizes.ep
    group = mesh.group("ep") if ep > 1 else None
    dispatcher = make_dispatcher(
        plan.dispatcher,
        group,
        block.num_slots,
        top_k=top_k,
        topology=topology,
        combine=plan.combine,
        return_group=return_group,
        codec=Codec.parse(plan.codec),
        ascend=AscendOptions.parse(plan.ascend),
    )
    call = ExpertCall(block, dispatcher, plan, mesh)
    if block.adapter is None:
        block.experts.forward = call
        return call
    adapter = block.adapter

    def forward(x: Tensor) -> Any:
        x_TD = x.reshape(-1, x.shape[-1])
        ids_TK, weights_TK = adapter.route(parent, x_TD)
        return adapter.output(parent, x, call(x_TD, ids_TK, weights_TK))

    parent.forward = forward
    return call
