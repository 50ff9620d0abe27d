"""The three-stream schedule on the MoE blocks of a wrapped model, whose code stays as it is.

    1. as a block is entered, its rows leave for the other ranks              (gathered form)
    2. the block's own code runs its router
    3. the call of the experts sends ids and weights, and runs the block's shared expert while rows are under way
    4. where the block's code calls the shared expert, it gets that result

A block whose experts take other rows than the block was given (projected, or changed in place) runs the routed form.

Legend: T tokens here, K routes a token, D width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.select import check_alike, choose_over
from moeweave.comm.nodes import Nodes
from moeweave.comm.plane_links import over_windows
from moeweave.comm.planes import new_plane_group
from moeweave.comm.shares import form_over_windows, rates_of_planes, share_of
from moeweave.comm.streams import Streams, make_streams
from moeweave.comm.three_stream import Gathering, ThreeStream
from moeweave.comm.three_stream_options import FORM_OF, ThreeStreamOptions
from moeweave.comm.topology import Topology
from moeweave.parallel.adapter import MoEBlock
from moeweave.parallel.expert import ExpertCall
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.plan import Plan

logger = logging.getLogger("moeweave")


def refuse_three_stream(mesh: Mesh, plan: Plan) -> None:
    """Raise ValueError where ranks do not hold tokens of their own."""
    if plan.overlap == "three_stream" and mesh.sizes.tp > 1 and not plan.tp_sequence:
        raise ValueError(
            f"Plan.overlap ('three_stream') needs ranks with tokens of their own: with tp ({mesh.sizes.tp}) they hold "
            "the same tokens, and each would run router and shared expert on all of these. Set tp=1, "
            "tp_sequence=True or overlap='microbatch'."
        )


def options_of(
    plan: Plan, top_k: int, group: ProcessGroup | None, topology: Topology | None = None
) -> ThreeStreamOptions:
    """The plan's; what it leaves open is chosen from the topology file, alike on all ranks. A collective over `group`.

    Form "auto" is chosen as a dispatcher is, between nodes as well; where windows carry gathered rows, by their rates.
    """
    form, share, size = plan.three_stream_form, plan.push_share, 1 if group is None else group.size()
    if form == "auto":
        name, reason = choose_over(group, top_k, plan.combine, topology)
        form = FORM_OF[name]
        rates = rates_of_planes(topology, size)
        if topology and rates and form != "hierarchical" and over_windows(group, plan.planes):
            form, reason = form_over_windows(size, top_k, rates, topology.all_to_all_gbps)
            form = "gathered" if plan.combine == "prereduced" else form
        logger.info("three_stream_form auto -> %s: %s", form, reason)
    if share is None:
        share, reason = share_of(topology, size, plan.push_sms)
        logger.info("push_share -> %s: %s", share, reason)
    check_alike(f"{form} and push_share {share}", group)
    combine = plan.combine or ("prereduced" if form == "hierarchical" else "exact")
    planes = plan.planes if form == "gathered" else "auto"
    codec = Codec.parse(plan.codec)
    return ThreeStreamOptions(form, share, combine, codec, plan.max_tokens, planes=planes, num_sms=plan.push_sms)


class PlanesOfModel:
    """What the blocks of one model share: two groups, and the streams beside the computing one.

    Making it is a collective over the ranks of `ep`.
    """

    def __init__(self, mesh: Mesh, streams: Streams | None = None, topology: Topology | None = None) -> None:
        ranks = torch.distributed.get_process_group_ranks(mesh.group("ep"))
        kind = mesh.device.type
        self.push, self.dma = (new_plane_group(plane, ranks, kind) for plane in ("push", "dma"))
        self.streams: Streams = streams or make_streams(mesh.device)
        self.topology = topology

    def schedule(self, num_experts: int, top_k: int, plan: Plan) -> ThreeStream:
        options = options_of(plan, top_k, self.push, self.topology)
        nodes = Nodes.found(self.push, self.topology) if options.form == "hierarchical" else None
        return ThreeStream(self.push, self.dma, num_experts, self.streams, options, top_k, nodes)


def install_three_stream(model: nn.Module, block: MoEBlock, call: ExpertCall, schedule: ThreeStream) -> BlockSchedule:
    """Make `call` and the block around it follow `schedule`."""
    shared = [model.get_submodule(path) for path in block.shared_paths]
    installed = BlockSchedule(schedule, call, [SharedExpert(module) for module in shared], block.block_path)
    call.route = installed.route
    home = model.get_submodule(block.block_path)
    # A model that is nothing but experts has no block around them: their rows leave when they are called.
    if home is not block.experts and home is not model:
        home.register_forward_pre_hook(installed.enter)
    return installed


class SharedExpert:
    """Stands in for a shared expert's forward: computed ahead once, handed out when the block asks for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own_forward = module, module.forward
        self.asked = False
        self._ahead: tuple[Tensor, Tensor] | None = None
        module.forward = self

    def start(self) -> None:
        """A new pass of the block."""
        self.asked, self._ahead = False, None

    def run_ahead(self, x_TD: Tensor) -> None:
        if not self.asked:
            # A node of its own: its gradient is summed before the routed experts' is added, as in the block's order.
            y_TD = self.module(x_TD.view_as(x_TD))
            self._ahead = x_TD, y_TD

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        ahead, self._ahead = self._ahead, None
        if ahead is None or args or kwargs or not _same_rows(x, ahead[0]):
            return self.own_forward(x, *args, **kwargs)
        return ahead[1].view(*x.shape[:-1], ahead[1].shape[-1])


class BlockSchedule:
    """One block's passes.

    Attributes:
        schedule: the exchange.
        gathered: rows leave when the block is entered; off for good once the experts were seen to take other rows.
    """

    def __init__(self, schedule: ThreeStream, call: ExpertCall, shared: list[SharedExpert], path: str) -> None:
        self.schedule, self.call, self.shared, self.path = schedule, call, shared, path
        self.gathered = schedule.gathered
        self._leaving: Gathering | None = None
        self._version = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the block's forward."""
        for shared in self.shared:
            shared.start()
        self._leaving = None
        if self.gathered and args and isinstance(args[0], Tensor) and not torch.compiler.is_compiling():
            x = args[0]
            self._leaving = self.schedule.leave(x.detach().reshape(-1, x.shape[-1]))
            self._version = _version(x)

    def route(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The routed experts: x_TD -> y_TD. Compiled code has no streams: there the dispatcher moves the rows."""
        if torch.compiler.is_compiling():
            return self.call.in_one_piece(x_TD, ids_TK, weights_TK)
        leaving, self._leaving = self._leaving, None
        if leaving is not None and not (_same_rows(x_TD, leaving.x_TD) and _version(x_TD) == self._version):
            self._give_up(leaving)
            leaving = None
        if leaving is None and self.schedule.prereduced:
            leaving = self.schedule.leave(x_TD)

        def beside() -> None:
            for shared in self.shared:
                shared.run_ahead(x_TD)

        return self.schedule.routed(leaving, x_TD, ids_TK, weights_TK, self.call.run_local, beside)

    def _give_up(self, leaving: Gathering) -> None:
        leaving.codes.wait()
        if leaving.scales is not None:
            leaving.scales.wait()
        self.gathered = False
        logger.info("%s: its experts take other rows than the block; they leave after the router", self.path)


def _same_rows(x: Tensor, other_TD: Tensor) -> bool:
    """Whether both are the same memory seen as rows of the same width."""
    same = x.data_ptr() == other_TD.data_ptr() and x.numel() == other_TD.numel() and x.dtype == other_TD.dtype
    return same and x.shape[-1:] == other_TD.shape[-1:] and x.is_contiguous() and other_TD.is_contiguous()


def _version(x: Tensor) -> int:
    """How often the memory was written to; inference mode does not count."""
    return 0 if x.is_inference() else x._version
