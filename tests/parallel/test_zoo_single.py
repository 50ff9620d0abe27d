"""What the zoo promises, on one process: the parity tests over ranks stand on it.

Every architecture: finite and repeatable loss and gradients, a gradient for every expert, batch rows that do not see
each other (so that the sum over ranks can equal the whole batch), and the one balance-loss formula there is.
"""

import hashlib
import importlib.metadata
from pathlib import Path

import pytest
import torch

from hf_zoo import CORE, NOT_WRAPPABLE, SPECS, ZOO, make_batch
from run_ranks import run_ranks

pytest.importorskip("transformers")

# Relative error of fp32 gradients when the same rows are summed in another order; scalars whose terms cancel are worst.
TOLERANCE = 1e-5
EVERY = [pytest.param(name, marks=() if name in CORE else pytest.mark.slow) for name in ZOO]
COMPARABLE = [param for param in EVERY if param.values[0] not in NOT_WRAPPABLE]


def whole_batch(name: str, ranks: int) -> dict[str, torch.Tensor]:
    batches = [make_batch(name, rank) for rank in range(ranks)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def count_labels(batch: dict[str, torch.Tensor], shifted: bool = False) -> int:
    return int((batch["labels"][:, 0 if shifted else 1 :] != -100).sum())


def gradients(model, batches, weights=(1.0,)):
    """Weighted sum of the batches' losses and its gradient per parameter."""
    model.zero_grad(set_to_none=True)
    losses = [model(**batch).loss * weight for batch, weight in zip(batches, weights, strict=True)]
    sum(losses).backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return float(sum(losses).detach()), grads


def without_aux_loss(model):
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", None):
            config.output_router_logits = False
    return model


def digest(name: str) -> str:
    hasher = hashlib.sha256()
    for key, tensor in sorted(ZOO[name]().state_dict().items()):
        hasher.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def test_every_architecture_of_transformers_is_listed() -> None:
    if not importlib.metadata.version("transformers").startswith("5.24."):
        pytest.skip("the list is of transformers 5.24")
    models = Path(next(iter(importlib.import_module("transformers").__path__))) / "models"
    decorated = {f.parent.name for f in models.glob("*/modeling_*.py") if "@use_experts_impl" in f.read_text()}
    assert decorated <= set(SPECS)
    assert len(ZOO) == 68


@pytest.mark.parametrize("name", CORE[:3])
def test_two_processes_build_the_same_weights(name: str) -> None:
    assert run_ranks(2, digest, name) == [digest(name)] * 2


def test_batches_differ_in_tokens_and_padding() -> None:
    batches = [make_batch("mixtral", rank) for rank in range(4)]
    assert len({tuple(batch["attention_mask"].sum(1).tolist()) for batch in batches}) == 4
    assert len({count_labels(batch) for batch in batches}) > 1
    assert all(batch["input_ids"].shape == (2, 16) for batch in batches)
    for batch in batches:
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


@pytest.mark.parametrize("name", COMPARABLE)
def test_loss_and_gradients_are_finite_and_repeatable(name: str) -> None:
    model, batch = ZOO[name](), whole_batch(name, 4)
    loss, grads = gradients(model, [batch])
    again, grads_again = gradients(model, [batch])
    assert loss == again
    assert torch.isfinite(torch.tensor(loss))
    for key, grad in grads.items():
        assert torch.isfinite(grad).all(), key
        assert torch.equal(grad, grads_again[key]), key


@pytest.mark.parametrize("name", COMPARABLE)
def test_every_expert_gets_a_gradient(name: str) -> None:
    model = ZOO[name]()
    _, grads = gradients(model, [whole_batch(name, 4)])
    # Text alone never reaches the vision experts of ernie4_5_vl_moe.
    experts = [key for key in grads if ".experts." in key and grads[key].dim() == 3]
    assert len(experts) >= 4  # two layers of two projections
    for key in experts:
        idle = int((grads[key].abs().amax((1, 2)) == 0).sum())
        assert idle <= (2 if SPECS[name].overrides.get("num_experts_per_tok") == 1 else 0), key


@pytest.mark.parametrize("name", COMPARABLE)
def test_batch_rows_do_not_see_each_other(name: str) -> None:
    model = without_aux_loss(ZOO[name]())
    parts = [make_batch(name, rank) for rank in range(2)]
    loss, grads = gradients(model, [whole_batch(name, 2)])
    counts = [count_labels(part, shifted=model.loss_type == "ForTokenClassification") for part in parts]
    loss_of_parts, grads_of_parts = gradients(model, parts, [count / sum(counts) for count in counts])
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert set(grads_of_parts) == set(grads)
    for key, grad in grads.items():
        assert (grads_of_parts[key] - grad).norm() <= TOLERANCE * grad.norm(), key


@pytest.mark.parametrize("name", COMPARABLE)
def test_balance_loss_is_the_one_formula_over_router_logits(name: str) -> None:
    model, batch = ZOO[name](), whole_batch(name, 2)
    with torch.no_grad():
        output = model(**batch)
        plain = without_aux_loss(model)(**batch)
    aux = getattr(output, "aux_loss", None)
    if aux is None:
        assert output.loss == plain.loss
        return
    config = model.config.get_text_config()
    top_k = getattr(model, "num_experts_per_tok", None) or config.num_experts_per_tok
    mask_T1 = batch["attention_mask"].reshape(-1, 1).float()
    probs_TE = [torch.softmax(logits_TE, -1) for logits_TE in output.router_logits]
    chosen_TE = [torch.zeros_like(p).scatter_(1, p.topk(top_k, -1).indices, 1.0) for p in probs_TE]
    rows = mask_T1.sum() * len(probs_TE)
    share_E, prob_E = ((torch.stack(each) * mask_T1).sum((0, 1)) / rows for each in (chosen_TE, probs_TE))
    torch.testing.assert_close(aux, share_E.numel() * (share_E * prob_E).sum(), rtol=1e-5, atol=0)
    coef = getattr(model, "router_aux_loss_coef", None) or config.router_aux_loss_coef
    torch.testing.assert_close(output.loss - plain.loss, coef * aux, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_why_one_cannot_be_compared() -> None:
    if "diffusion_gemma" not in ZOO:
        pytest.skip("this transformers has no diffusion_gemma")
    output = ZOO["diffusion_gemma"]()(**make_batch("diffusion_gemma", 0))
    assert getattr(output, "loss", None) is None
