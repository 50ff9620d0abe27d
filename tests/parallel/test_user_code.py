"""What user code does to a model between steps: freezes and unfreezes, converts, replaces. Right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_zoo
from moeweave.parallel.checkpoint import load, save
from moeweave.parallel.loss import forward_backward
from moeweave.parallel.mesh import Mesh
from moeweave.parallel.parallelize import parallelize
from moeweave.parallel.plan import Plan
from moeweave.parallel.prepare_optimizer import prepare_optimizer
from run_ranks import run_ranks
from train_steps import whole

NAME = "mixtral"


def build() -> Any:
    return hf_zoo.build(NAME, num_hidden_layers=1).train()


def set_trained(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    for name, param in model.named_parameters():
        param.requires_grad_(chosen(name))
    return model


def is_expert(name: str) -> bool:
    return ".experts." in name


def grads_of(model: nn.Module, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    forward_backward(model, hf_zoo.make_batch(NAME, rank))
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def unfrozen(model: nn.Module, mesh: Mesh, plan: Plan, folder: str) -> nn.Module:
    """Experts frozen when the model is wrapped, for a step, and trained then."""
    parallelize(set_trained(model, lambda name: not is_expert(name)), mesh, plan)
    assert not any(is_expert(name) for name in grads_of(model, mesh.rank))
    return set_trained(model, lambda name: True)


def converted(model: nn.Module, mesh: Mesh, plan: Plan, folder: str) -> nn.Module:
    return parallelize(model, mesh, plan).to(torch.bfloat16).float()


def assigned(model: nn.Module, mesh: Mesh, plan: Plan, folder: str) -> nn.Module:
    parallelize(model, mesh, plan)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def loaded_frozen(model: nn.Module, mesh: Mesh, plan: Plan, folder: str) -> nn.Module:
    """Built on meta with frozen experts, filled, and unfrozen."""
    save(f"{folder}/weights", parallelize(model, mesh, plan))
    other = set_trained(build().to("meta"), lambda name: not is_expert(name))
    load(f"{folder}/weights", parallelize(other, mesh, plan))
    return set_trained(other, lambda name: True)


CHANGES = {each.__name__: each for each in (unfrozen, converted, assigned, loaded_frozen)}


def changed_and_plain(change: str, data: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh, plan = Mesh(dp=2, ep=2), Plan(data=data)
    rounded = build().to(torch.bfloat16).float() if change == "converted" else build()
    plain = grads_of(parallelize(rounded, mesh, plan), mesh.rank)
    return grads_of(CHANGES[change](build(), mesh, plan, folder), mesh.rank), plain


@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_gradients_are_reduced_whatever_became_of_the_parameters(change: str, data: str, tmp_path: Any) -> None:
    changed, plain = run_ranks(2, changed_and_plain, change, data, str(tmp_path))[0]
    assert changed.keys() == plain.keys()
    assert any(is_expert(name) and bool(grad.any()) for name, grad in plain.items())
    for name, grad in plain.items():
        assert torch.equal(changed[name], grad), name


def only_experts_trained(data: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh, plan = Mesh(dp=2, ep=2), Plan(data=data)
    plain = grads_of(parallelize(build(), mesh, plan), mesh.rank)
    return grads_of(parallelize(set_trained(build(), is_expert), mesh, plan), mesh.rank), plain


@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
def test_experts_train_alone(data: str) -> None:
    alone, plain = run_ranks(2, only_experts_trained, data)[0]
    assert alone.keys() == {name for name in plain if is_expert(name)}
    for name, grad in alone.items():
        assert torch.equal(grad, plain[name]), name


def refused(change: str) -> str:
    mesh, plan = Mesh(dp=2, ep=2), Plan(data="ddp")
    model = build()
    if change == "unfrozen":
        parallelize(set_trained(model, is_expert), mesh, plan)
        grads_of(model, mesh.rank)
        set_trained(model, lambda name: True)
    elif change == "refrozen":
        parallelize(model, mesh, plan)
        set_trained(model, lambda name: "norm" in name)
        grads_of(model, mesh.rank)
        set_trained(model, lambda name: True)
    elif change == "replaced":
        parallelize(model, mesh, plan)
        grads_of(model, mesh.rank)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        set_trained(parallelize(model, mesh, plan), lambda name: False)
    with pytest.raises(ValueError) as error:
        grads_of(model, mesh.rank)
    return str(error.value)


REFUSED = {
    "unfrozen": "was frozen until now, and Plan(data='ddp') would not reduce its gradient",
    "refrozen": "was frozen until now, and Plan(data='ddp') would not reduce its gradient",
    "replaced": "lm_head.weight is another tensor than in the first pass",
    "frozen": "was frozen after the model was wrapped, and Plan(data='ddp') needs one to train",
}


@pytest.mark.parametrize("change", list(REFUSED))
def test_what_ddp_would_not_reduce_is_refused(change: str) -> None:
    assert all(REFUSED[change] in message for message in run_ranks(2, refused, change))


def backbone_outputs(data: str) -> list[tuple[int, float]]:
    mesh = Mesh(dp=2, ep=2)
    ids = hf_zoo.make_batch(NAME, mesh.rank)["input_ids"]
    asked = dict(output_hidden_states=True, output_router_logits=True)
    theirs = build().model(input_ids=ids, **asked)
    ours = parallelize(build().model, mesh, Plan(data=data))(input_ids=ids, **asked)
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in ("hidden_states", "router_logits")]
    return [(len(a), max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))) for a, b in pairs]


@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
def test_a_wrapped_backbone_records_hidden_states_and_router_logits(data: str) -> None:
    for (states, state_error), (logits, logit_error) in run_ranks(2, backbone_outputs, data):
        assert (states, logits) == (2, 1)
        assert state_error < 1e-5 and logit_error < 1e-5


def mixed_dtypes() -> None:
    mesh = Mesh(dp=2, ep=2)
    model = build().to(torch.bfloat16)
    model.model.norm.float()
    parallelize(model, mesh)
    with pytest.raises(ValueError, match=r"and model.norm.weight \(torch.float32\) are both trained"):
        forward_backward(model, hf_zoo.make_batch(NAME, mesh.rank))


def compiled() -> None:
    mesh = Mesh(dp=2, ep=2)
    with pytest.raises(ValueError, match="Wrap the model itself, and compile it afterwards, in place"):
        parallelize(torch.compile(build()), mesh)
    model = torch.compile(parallelize(build(), mesh))
    with pytest.raises(ValueError, match=r"is what .* returned. Pass the model that"):
        forward_backward(model, hf_zoo.make_batch(NAME, mesh.rank))


def tuples() -> None:
    for sizes in (dict(dp=2, ep=2), dict(sp=2, ep=2)):
        mesh = Mesh(**sizes)
        model = parallelize(build(), mesh)
        batch = hf_zoo.make_batch(NAME, mesh.data_rank)
        with pytest.raises(ValueError, match="return_dict=False gives a tuple"):
            model(**batch, return_dict=False, output_router_logits=True)
        assert isinstance(model(**batch, return_dict=False, output_router_logits=False), tuple)


def optimizers() -> None:
    mesh = Mesh(dp=2, ep=2)
    model = parallelize(build(), mesh, Plan(data="ddp"))
    with pytest.raises(ValueError, match="cannot have sharded and whole parameters in one group"):
        prepare_optimizer(model, torch.optim.AdamW(model.parameters(), foreach=True))
    with pytest.raises(ValueError, match="Adafactor takes means over rows, columns and whole parameters"):
        prepare_optimizer(model, torch.optim.Adafactor(model.parameters()))


def no_dict() -> None:
    mesh = Mesh(dp=2, ep=2)
    model: Any = parallelize(build(), mesh)
    batch: Any = list(hf_zoo.make_batch(NAME, mesh.rank).values())
    with pytest.raises(TypeError, match=r"batch \(list\) must be a dict of what forward takes"):
        forward_backward(model, batch)


def other_seed() -> None:
    mesh = Mesh(dp=2, ep=2)
    model = build()
    if mesh.rank == 1:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="the ranks were given different weights of MixtralForCausalLM"):
        parallelize(model, mesh)


def ddp_on_top() -> None:
    mesh = Mesh(dp=2, ep=2)
    with pytest.raises(ValueError, match=r"DistributedDataParallel .* would spread it once more. Train it by"):
        nn.parallel.DistributedDataParallel(parallelize(build(), mesh))


@pytest.mark.parametrize("case", [mixed_dtypes, compiled, tuples, optimizers, no_dict, other_seed, ddp_on_top])
def test_refused_in_one_line(case: Callable[[], None]) -> None:
    run_ranks(2, case)
