"""transformers' own expert parallelism, built for a comparison on the same weights and the same ranks."""

from __future__ import annotations

from pathlib import Path

from torch import nn


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
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(ep_size=ep, fsdp_size=fsdp, ep_implementation="all_to_all")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    return model
