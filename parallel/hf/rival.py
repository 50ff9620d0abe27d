"""transformers' own expert parallelism, built for a comparison on the same weights and the same ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeweave.parallel.grad_norm import global_norm, sharding_groups
from moeweave.parallel.hf.build import model_class_of
from moeweave.parallel.hf.random_weights import fill
from moeweave.parallel.mesh import MeshSizes


def why_not() -> str | None:
    """None if the installed transformers has all-to-all expert parallelism, else the reason."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return "transformers has no transformers.distributed.DistributedConfig"
    if not hasattr(DistributedConfig(), "ep_implementation"):
        return "transformers < 5.23 cannot name the all-to-all implementation"
    return None


def transformers_expert_parallel(folder: Path, ep: int, fsdp: int) -> nn.Module:
    """The model of a Hugging Face folder under transformers' FSDP2 and all-to-all EP. Collective."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, distributed_config=_config(MeshSizes(fsdp, ep=ep)))
    return model


def random_transformers_expert_parallel(
    config: Any, sizes: MeshSizes, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> nn.Module:
    """The same from a config alone, with the weights of `random_model` and grouped products of experts. Collective.

    `from_pretrained` without a checkpoint builds on meta, spreads, and gives memory to what it then finds missing.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every weight as missing
    logging.disable_progress_bar()
    try:
        model: nn.Module = model_class_of(config).from_pretrained(
            None,
            config=config,
            state_dict={},
            distributed_config=_config(sizes),
            dtype=dtype,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    model.to(device)  # where all sizes are 1 it was not spread
    fill(model, seed, config.initializer_range, device)
    return model.eval()


def grad_norm(model: nn.Module, device: torch.device) -> Tensor:
    """The global norm of its gradients, as `mw.clip_grad_norm_` gives it of ours. Collective."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return global_norm([(grad, sharding_groups(grad), None) for grad in grads], 2.0, device)


def _config(sizes: MeshSizes) -> Any:
    """transformers' name for a mesh. Raises ValueError for axes that it lacks."""
    from transformers.distributed import DistributedConfig

    if sizes.pp * sizes.sp * sizes.etp > 1:
        raise ValueError(f"transformers' training has no pp, sp or etp, and {sizes} asks for one. Set them to 1.")
    return DistributedConfig(
        tp_size=sizes.tp,
        fsdp_size=sizes.dp,
        dp_replicate_size=sizes.dp_replicate,
        ep_size=sizes.ep,
        ep_implementation="all_to_all",
    )
