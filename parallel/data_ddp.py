"""DDP over the dense parameters, and what it would get wrong without a word."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed._composable.replicate import replicate

from moeweave.parallel.mesh import Mesh


def replicate_dense(model: nn.Module, experts: list[nn.Module], mesh: Mesh) -> None:
    """Average the gradients of `model` over the loss ranks, in place, but for those inside `experts`.

    DDP takes the parameters that are trained at the first forward pass. The gradients of others that are trained later
    would stay each rank's own: such a pass is a ValueError. Without any it would refuse, so it is left out.
    """
    outside = _Dense(model, experts)
    if any(trained for _, trained in outside.now().values()):
        # A text-only step of a vision model leaves parameters without a gradient.
        replicate(model, ignored_modules=experts, process_group=mesh.loss_group, find_unused_parameters=True)
    else:
        outside.seen = outside.now()
    model.register_forward_pre_hook(outside.check, prepend=True)


class _Dense:
    """The parameters outside of `experts`: which they are, and which of them are trained.

    Attributes:
        seen: what DDP knows: by name, each parameter and whether it is trained; None before the first pass.
    """

    def __init__(self, model: nn.Module, experts: list[nn.Module]) -> None:
        self.model = model
        inside = {id(param) for module in experts for param in module.parameters()}
        self.names = [name for name, param in model.named_parameters() if id(param) not in inside]
        self.seen: dict[str, tuple[nn.Parameter, bool]] | None = None

    def now(self) -> dict[str, tuple[nn.Parameter, bool]]:
        params = ((name, self.model.get_parameter(name)) for name in self.names)
        return {name: (param, param.requires_grad) for name, param in params}

    def check(self, *_: Any) -> None:
        now = self.now()
        if self.seen is None:
            if not any(trained for _, trained in now.values()):
                raise ValueError(
                    f"Every parameter of {type(self.model).__name__} outside of experts was frozen after the model was "
                    "wrapped, and Plan(data='ddp') needs one to train. Freeze them before `parallelize`."
                )
            self.seen = now
        for name, (param, trained) in now.items():
            before, was_trained = self.seen[name]
            if param is not before:
                raise ValueError(
                    f"{name} is another tensor than in the first pass, and Plan(data='ddp') would not reduce its "
                    "gradient. Use load_state_dict without assign=True, or Plan(data='fsdp2')."
                )
            if trained and not was_trained:
                raise ValueError(
                    f"{name} was frozen until now, and Plan(data='ddp') would not reduce its gradient. Unfreeze it "
                    "before `parallelize`, or use Plan(data='fsdp2')."
                )
