"""Which ranks do what: one world, seen twice.

    dense view    (pp, dp_replicate, dp_shard, sp, tp)    attention, dense MLPs, norms, embeddings
    expert view   (pp, dp_replicate, edp,      ep, etp)   experts

Both number the same ranks row-major; pp and dp_replicate are common, and edp (copies of an expert) is derived:
edp * ep * etp = dp * sp * tp.

Worked example, `Mesh(dp=4, ep=2)`: four batches; ranks (0, 1) and (2, 3) each share out the experts; ranks (0, 2) hold
the same experts, as do (1, 3), so edp is 2.
"""

from __future__ import annotations

import atexit
import sys
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moeweave.parallel.keywords import names_nearest

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "sp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "edp", "ep", "etp")
_BACKENDS = {"cuda": "nccl", "cpu": "gloo", "npu": "hccl"}


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the axes; `dp` is dp_shard. Checked without starting anything: a launcher calls this first.

    Raises:
        ValueError: a size below one; expert axes that do not divide the ranks they regroup.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sp: int = 1
    ep: int = 1
    etp: int = 1
    dp_replicate: int = 1

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} ({size!r}) must be a whole number of at least 1.")
        regrouped = self.dp * self.sp * self.tp
        if regrouped % (self.ep * self.etp):
            legal = [str(n) for n in range(1, regrouped + 1) if regrouped % (n * self.etp) == 0]
            raise ValueError(
                f"ep * etp ({self.ep} * {self.etp}) must divide dp * sp * tp ({regrouped}), the ranks that share out "
                f"the experts. With etp={self.etp}, ep can be {', '.join(legal) or 'nothing: lower etp'}."
            )

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp * self.sp * self.tp * self.pp

    @property
    def edp(self) -> int:
        """Copies of each expert within one dp_replicate and pp coordinate."""
        return self.dp * self.sp * self.tp // (self.ep * self.etp)

    @property
    def dense(self) -> tuple[int, ...]:
        return (self.pp, self.dp_replicate, self.dp, self.sp, self.tp)

    @property
    def expert(self) -> tuple[int, ...]:
        return (self.pp, self.dp_replicate, self.edp, self.ep, self.etp)

    def check_world(self, world: int) -> None:
        """Raise ValueError unless `world` ranks are exactly what the sizes ask for."""
        if world != self.world:
            others = self.world // self.dp
            remedy = f"Set dp={world // others}" if world % others == 0 else f"Start a multiple of {others} ranks"
            raise ValueError(
                f"dp_replicate * dp * sp * tp * pp ({self.world}) must equal the number of ranks ({world}). "
                f"{remedy}, or start {self.world} ranks."
            )

    def check_experts(self, num_experts: int, where: str = "the model") -> None:
        """Raise ValueError unless `num_experts` can be shared out over ep ranks."""
        if num_experts % self.ep:
            regrouped = self.dp * self.sp * self.tp
            legal = [n for n in range(1, regrouped + 1) if regrouped % (n * self.etp) == 0 and num_experts % n == 0]
            raise ValueError(
                f"ep ({self.ep}) must divide the number of experts ({num_experts}) of {where}. "
                f"On this many ranks ep can be {', '.join(map(str, legal))}."
            )


@names_nearest
class Mesh:
    """The ranks of a job, named by axis. Creating one starts torch.distributed if nothing has yet: with the ranks that
    torchrun (or `moeweave-train`) made, or with this process alone.

    Args:
        dp: ranks that shard parameters and feed different data (dp_shard).
        tp, pp, sp: tensor, pipeline and sequence (context) parallel ranks.
        ep, etp: how dp * sp * tp ranks regroup for experts, and how many share one expert.
        dp_replicate: copies of the whole (HSDP); the world has dp_replicate * dp * sp * tp * pp ranks.
        device: "cuda", "npu" or "cpu"; by default the accelerator that torch finds, else "cpu".

    Attributes:
        sizes: `MeshSizes`.
        dense, expert: the two `DeviceMesh` views.
        device: `torch.device` of this rank.
        rank, world: of torch.distributed.
        data_group: all data ranks that share this rank's other coordinates (dp_replicate x dp).
        loss_group, loss_size: the ranks over whose losses the global one is the mean (dp_replicate x dp x sp).
        token_group: all ranks whose experts see different tokens (dp_replicate x dp x sp x tp).
        copies_group: all ranks that hold the same experts as this one (dp_replicate x edp).
        shard_mesh: over which FSDP shards dense parameters: dp_shard and sp as one axis, behind dp_replicate where
            there is one.
        data_rank, data_size: which part of the data this rank feeds, of how many. Ranks that share a batch (tp, sp, pp)
            have the same data_rank and are fed the same whole batch.

    Raises:
        ValueError: sizes that do not fit each other or the number of ranks; legal ones are listed.
        TypeError: an unknown axis; the nearest one is named.

    Example:
        >>> mesh = mw.Mesh(dp=2, ep=2)          # torchrun --nproc-per-node 2
    """

    def __init__(
        self,
        dp: int = 1,
        tp: int = 1,
        pp: int = 1,
        sp: int = 1,
        ep: int = 1,
        etp: int = 1,
        dp_replicate: int = 1,
        device: str | None = None,
    ) -> None:
        self.sizes = MeshSizes(dp, tp, pp, sp, ep, etp, dp_replicate)
        kind = device or _default_device()
        if kind not in _BACKENDS:
            raise ValueError(f"device ({device!r}) must be one of {', '.join(_BACKENDS)}.")
        if kind == "npu" and not hasattr(torch, "npu"):
            raise ValueError(
                "device ('npu') must have torch-npu and CANN, and this process has no torch.npu. Install moeweave[npu] "
                "and load CANN's set_env.sh before the program starts, or use another device."
            )
        if kind != "cpu":
            _take_own_device()
        if not dist.is_initialized():
            _start(kind)
        self.sizes.check_world(dist.get_world_size())
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = _own_device(kind)
        self.dense: DeviceMesh = init_device_mesh(kind, self.sizes.dense, mesh_dim_names=DENSE_AXES)
        self.expert: DeviceMesh = init_device_mesh(kind, self.sizes.expert, mesh_dim_names=EXPERT_AXES)
        # Made now, by all ranks together: making a group is a collective.
        self.data_group: dist.ProcessGroup = self.dense["dp_replicate", "dp_shard"]._flatten("data").get_group()
        losses = self.dense["dp_replicate", "dp_shard", "sp"]._flatten("losses") if sp > 1 else None
        self.loss_group: dist.ProcessGroup = self.data_group if losses is None else losses.get_group()
        tokens = self.dense["dp_replicate", "dp_shard", "sp", "tp"]._flatten("tokens")
        self.token_group: dist.ProcessGroup = tokens.get_group()
        copies = self.expert["dp_replicate", "edp"]._flatten("expert_copies")
        self.copies_group: dist.ProcessGroup = copies.get_group()
        self.shard_mesh = self._shard_mesh()

    def _shard_mesh(self) -> DeviceMesh:
        replicas = self.dense["dp_replicate"]
        if self.sizes.sp == 1:
            return self.dense["dp_replicate", "dp_shard"] if replicas.size() > 1 else self.dense["dp_shard"]
        shards: DeviceMesh = self.dense["dp_shard", "sp"]._flatten("dp_shard_sp")
        return shards if replicas.size() == 1 else DeviceMesh._concatenate([replicas, shards])

    @property
    def data_size(self) -> int:
        return self.sizes.dp_replicate * self.sizes.dp

    @property
    def loss_size(self) -> int:
        return self.data_size * self.sizes.sp

    @property
    def data_rank(self) -> int:
        coordinate = self.dense.get_coordinate()
        assert coordinate is not None
        return coordinate[1] * self.sizes.dp + coordinate[2]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of one axis of either view, e.g. `mesh.group("ep")`."""
        view = self.dense if axis in DENSE_AXES else self.expert
        if axis not in (*DENSE_AXES, *EXPERT_AXES):
            raise ValueError(f"axis ({axis!r}) must be one of {', '.join(dict.fromkeys((*DENSE_AXES, *EXPERT_AXES)))}.")
        return view.get_group(axis)

    def new_group(self, axis: str) -> dist.ProcessGroup | None:
        """Another process group of the ranks of one axis, None if that is this rank alone: a class of traffic with a
        group of its own never waits behind another's. Collective over these ranks."""
        group = self.group(axis)
        if group.size() == 1:
            return None
        made = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={size}" for name, size in asdict(self.sizes).items() if size > 1)
        return f"Mesh({shown or 'one rank'}, device={self.device})"


def _default_device() -> str:
    # torch.accelerator knows cuda and npu alike; it names a device only when its runtime works.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None and accelerator.type in _BACKENDS else "cpu"


def _start(kind: str) -> None:
    """Join the ranks that a launcher described in the environment, or be the only rank; leave them at exit."""
    atexit.register(_end)
    try:
        dist.init_process_group(_BACKENDS[kind])
    except ValueError as error:
        # torch says so when no launcher left a rank; a description that is there but not whole is the user's to mend.
        if "RANK expected" not in str(error):
            raise
        dist.init_process_group(_BACKENDS[kind], store=dist.HashStore(), rank=0, world_size=1)


def _end() -> None:
    """Close the groups while Python still runs.

    A thread of gloo that frees its last tensor once the interpreter has begun to end aborts the process, after the
    program's work was done. A process that ends by an error leaves at once: its peers may never answer again.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def _take_own_device() -> None:
    """Under a launcher each rank takes the device of its local rank, unless it has been given one already."""
    local = dist.get_node_local_rank(fallback_rank=0)
    if torch.accelerator.current_device_index() == 0 and local < torch.accelerator.device_count():
        torch.accelerator.set_device_index(local)


def _own_device(kind: str) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
