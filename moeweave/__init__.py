"""Distributed MoE parallelism for PyTorch: `import moeweave as mw`.

Mesh          which ranks do what: dp, tp, pp, sp, ep
Plan          policy: data engine, dispatcher, codec, balance loss, compute dtype, recomputation
Codec         how rows are quantised before they are sent, one format an exchange
parallelize   spread a Hugging Face or plain model over a mesh, in place
suggest       meshes that hold a model, by estimated memory and communication
save, load    training checkpoints that another mesh can read; from_pretrained, save_pretrained: Hugging Face folders
"""

from moeweave.kernels_ext.cann import set_torch_npu_aside

set_torch_npu_aside()  # before anything below imports torch

# ruff: noqa: E402
from moeweave.comm.codec import Codec
from moeweave.moe.layer import MoELayer
from moeweave.parallel.adapter import MoEAdapter, UnsupportedModel, register_moe
from moeweave.parallel.agreement import CheckpointError
from moeweave.parallel.checkpoint import LoadedState, latest, load, save
from moeweave.parallel.data import no_sync
from moeweave.parallel.grad_norm import clip_grad_norm_, param_groups
from moeweave.parallel.hf.io import from_pretrained, save_pretrained
from moeweave.parallel.loss import forward_backward, global_tokens
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.prepare_optimizer import prepare_optimizer
from moeweave.parallel.recompute import replay_routing
from moeweave.parallel.record import expert_load, update_router_bias
from moeweave.parallel.suggest import Hardware, Suggestion, suggest
from moeweave.parallel.verify import ParityReport, gradient_parity

__all__ = [
    "CheckpointError",
    "Codec",
    "Hardware",
    "LoadedState",
    "Mesh",
    "MoEAdapter",
    "MoELayer",
    "ParityReport",
    "Plan",
    "Suggestion",
    "UnsupportedModel",
    "clip_grad_norm_",
    "expert_load",
    "forward_backward",
    "from_pretrained",
    "global_tokens",
    "gradient_parity",
    "latest",
    "load",
    "no_sync",
    "parallelize",
    "param_groups",
    "prepare_optimizer",
    "register_moe",
    "replay_routing",
    "save",
    "save_pretrained",
    "suggest",
    "update_router_bias",
]
