"""Distributed MoE parallelism for PyTorch: `import moeweave as mw`.

Spread a model
    Mesh                which ranks do what: dp, tp, pp, sp, ep, etp, dp_replicate
    Plan, Codec         policy: data engine, dispatcher, overlap, ...; how rows are quantised before they are sent
    parallelize         spread a Hugging Face or plain model over a mesh, in place
    from_pretrained     build a Hugging Face model on a mesh, each rank reading its own shards; save_pretrained: back
    MoELayer            a mixture-of-experts layer: router, experts, shared experts
    register_moe        say, by an MoEAdapter, how a block is cut whose experts `parallelize` does not find; what cannot
                        be wrapped is an UnsupportedModel
    place_by_load       which rank holds which experts, from measured load: `Plan(placement=...)`
    suggest             meshes that hold a model, each a Suggestion, on the given Hardware

Train it
    prepare_optimizer   hand the optimizer to the plan's engine; param_groups: what to build it over
    forward_backward    loss and gradients of the whole batch, on every mesh and engine
    clip_grad_norm_     one true global norm
    global_tokens       labels of all ranks, the denominator of a plain model's loss
    no_sync             backward passes inside accumulate gradients without reducing them
    replay_routing      `context_fn` of torch.utils.checkpoint that keeps the routes of the first pass
    expert_load         routes per expert since the last reset; update_router_bias: bias updates without a loss

Keep and prove it
    save, load, latest  training checkpoints that another mesh can read; load gives a LoadedState; CheckpointError
    gradient_parity     loss and every gradient of a step against one process, as a ParityReport
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
from moeweave.parallel.placement import place_by_load
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
    "place_by_load",
    "prepare_optimizer",
    "register_moe",
    "replay_routing",
    "save",
    "save_pretrained",
    "suggest",
    "update_router_bias",
]
