"""DeepSpeed's engine with the groups of a moeweave mesh: its expert groups, and the data ranks beside `tp`.

Written against DeepSpeed 0.19.8, whose engine knows experts only as modules of its own. The overridden methods are its
internals; other releases may have moved them, so `prepare_optimizer` checks the version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn

from moeweave.parallel.mesh import Mesh

# Files of one rank, named so that a checkpoint's manifest counts them.
_MODEL_FILE, _OPTIMIZER_FILE = "__{rank}_engine.pt", "__{rank}_zero.pt"


class Units:
    """The mesh in the words that DeepSpeed asks a model-parallel unit ("mpu")."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.data_group

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data_size

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.mesh.data_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.group("tp")

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.sizes.tp

    def get_model_parallel_rank(self) -> int:
        return self.mesh.dense.get_local_rank("tp")

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def expert_group_name(mesh: Mesh) -> str:
    """DeepSpeed reads the size out of the name."""
    return f"ep_size_{mesh.sizes.ep}"


def _register_groups(mesh: Mesh) -> None:
    """Fill DeepSpeed's registry, which belongs to the process and keeps what an earlier engine left."""
    groups._release_process_group_references()
    name, ep, copies = expert_group_name(mesh), mesh.group("ep"), mesh.copies_group
    groups._EXPERT_PARALLEL_GROUP[name] = ep
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(ep)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = copies
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(copies)


class Engine(DeepSpeedEngine):
    """DeepSpeed's engine over `mesh`. Not wrapped but inherited from: it offers no other place for the groups.

    Args:
        model: with plain parameters; experts' carry `allreduce=False` and `group_name`.
        optimizer: over them, experts in groups with `moe=True`.
        config: for DeepSpeed, complete. num_experts: of each block whose experts have groups of their own.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, config: dict[str, Any], mesh: Mesh, num_experts: list[int]
    ) -> None:
        self.own_experts = num_experts
        _register_groups(mesh)
        units = Units(mesh)
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            mpu=units,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, units),
        )
        # Every rank has experts, or a slice of layers, of its own to save.
        self.save_non_zero_checkpoint = True
        self.save_zero_checkpoint = self.zero_optimization()

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = bool(self.own_experts)
        self.num_experts = list(self.own_experts)

    def _validate_zero3_moe_compatibility(self) -> None:
        """DeepSpeed allows stage 3 for its own expert layers only; ours carry the same marks on their parameters."""

    # ---- checkpoints: files of one rank each, weights left to moeweave

    @contextmanager
    def _rank_files(self) -> Iterator[None]:
        """As if there were neither experts nor tp: files by rank cover both."""
        engine: Any = self
        before = engine.has_moe_layers, engine.mp_world_size, engine.checkpoint_mp_rank
        engine.has_moe_layers, engine.mp_world_size, engine.checkpoint_mp_rank = False, 1, 0
        try:
            yield
        finally:
            engine.has_moe_layers, engine.mp_world_size, engine.checkpoint_mp_rank = before

    def save_checkpoint(self, save_dir: str, *args: Any, **kwargs: Any) -> Any:
        with self._rank_files():
            return super().save_checkpoint(save_dir, *args, **kwargs)

    def load_checkpoint(self, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        with self._rank_files():
            return super().load_checkpoint(load_dir, *args, **kwargs)

    def _get_ckpt_name(self, checkpoints_path: str, *args: Any, **kwargs: Any) -> str:
        return str(Path(checkpoints_path, _MODEL_FILE.format(rank=self.global_rank)))

    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        return [self._get_ckpt_name(checkpoints_path)]

    def _get_zero_ckpt_name(self, checkpoints_path: str, tag: str) -> str:
        return str(Path(checkpoints_path, _OPTIMIZER_FILE.format(rank=self.global_rank)))

    def _get_all_zero_checkpoint_names(self, load_dir: str, tag: str, bf16_mode: bool) -> list[str]:
        # DeepSpeed reads the one at this rank's place only.
        return [self._get_zero_ckpt_name(load_dir, tag)] * dist.get_world_size(self.optimizer.dp_process_group)

    def module_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def load_module_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _copy_recovery_script(self, save_path: str) -> None:
        pass
