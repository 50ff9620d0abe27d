"""Tensor parallelism: gradients, norm, tokens and checkpoints of one process, and refusals that say what would fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hf_zoo
import moeweave as mw
import plain_models
from moeweave.comm.communicator import Communicator
from moeweave.parallel.verify import ParityReport, gradient_parity
from moeweave.parallel.vocabulary import _split_loss, split_logits
from run_ranks import run_ranks

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3")
MESHES = [
    pytest.param(2, dict(tp=2), id="tp2"),
    pytest.param(2, dict(tp=2, ep=2), id="tp2-ep2"),
    pytest.param(4, dict(dp_replicate=2, tp=2), id="rep2-tp2", marks=pytest.mark.slow),
]


def parity(name: str, sizes: dict[str, int]) -> ParityReport:
    # An odd number of tokens: the shares of the tp ranks differ.
    batch = partial(hf_zoo.make_batch, name, rows=3, length=15)
    return gradient_parity(hf_zoo.ZOO[name], batch, mw.Mesh(**sizes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "sizes"), MESHES)
def test_every_gradient_and_the_norm_are_those_of_one_process(name: str, ranks: int, sizes: dict[str, int]) -> None:
    for report in run_ranks(ranks, parity, name, sizes):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.loss_error <= 1e-6
        assert report.norm_error <= 1e-6
        assert set(report.errors) == {key for key, _ in hf_zoo.ZOO[name]().named_parameters()}


# Sinks; a norm over all heads; gates that the model's own plan splits. Linear attention: test_ill_conditioned.
@pytest.mark.parametrize("name", ["gpt_oss", "olmoe", "laguna"])
def test_attention_that_is_computed_whole_or_with_gates(name: str) -> None:
    if name not in hf_zoo.ZOO:
        pytest.skip("not in this release of transformers")
    for report in run_ranks(2, parity, name, dict(tp=2, ep=2)):
        assert report.worst <= 1e-5, (report.worst_name, report.worst)
        assert report.norm_error <= 1e-6


def logits_seen(name: str) -> tuple[list[int], int, float, float]:
    """Width of the logits that the head gives inside `forward_backward`, that a direct call returns; both losses."""
    model = mw.parallelize(hf_zoo.ZOO[name](), mw.Mesh(tp=2))
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[-1]))
    batch = hf_zoo.make_batch(name, 0)
    loss = mw.forward_backward(model, batch)
    output = model(**batch)
    return widths[:1], output.logits.shape[-1], float(loss), float(output.loss.detach())


def test_logits_stay_split_where_only_the_loss_reads_them() -> None:
    for split, whole, loss, direct in run_ranks(2, logits_seen, "qwen3_moe"):
        assert (split, whole) == ([hf_zoo.VOCAB // 2], hf_zoo.VOCAB)
        assert loss == pytest.approx(direct, rel=1e-6)


def losses(dtype: torch.dtype) -> list[tuple[float, float]]:
    """Errors of loss and gradient of logits far from zero, labels ignored and on both ranks, against torch's."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    mesh = mw.Mesh(tp=2)
    generator = torch.Generator().manual_seed(4)
    whole = (torch.randn(2, 5, 12, generator=generator) * 30 + 200).to(dtype).requires_grad_()
    labels = torch.randint(0, 12, (2, 5), generator=generator)
    labels[0, 1:3] = -100
    found = []
    for options in ({}, {"num_items_in_batch": torch.tensor(3.0)}, {"shift_labels": labels}):
        want = ForCausalLMLoss(whole, labels, 12, **options)
        (wanted,) = torch.autograd.grad(want, whole)
        own = whole.detach().chunk(2, dim=-1)[mesh.rank].clone().requires_grad_()
        split = _split_loss(ForCausalLMLoss, Communicator(mesh.group("tp")))
        with split_logits():
            got = split(own, labels, 12, **options)
        (grad,) = torch.autograd.grad(got, own)
        error = (grad - wanted.chunk(2, dim=-1)[mesh.rank]).float().norm() / wanted.float().norm()
        found.append((abs(float(got.detach()) / float(want.detach()) - 1), float(error)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_split_logits(dtype: torch.dtype) -> None:
    for found in run_ranks(2, losses, dtype):
        for loss, grad in found:
            assert loss <= 1e-6
            assert grad <= 1e-5


def split_names(name: str) -> set[str]:
    model = mw.parallelize(hf_zoo.ZOO[name](), mw.Mesh(tp=2))
    return {
        key.removeprefix("model.layers.1.")
        for key, param in model.named_parameters()
        if isinstance(param, DTensor) and "tp" in (param.device_mesh.mesh_dim_names or ()) and "layers.0" not in key
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("qwen3_moe", {f"self_attn.{part}_proj.weight" for part in "qkvo"}),
        ("deepseek_v3", {f"self_attn.{part}_proj.weight" for part in ("q_b", "kv_b", "o")}),
    ],
)
def test_attention_embedding_and_head_are_split(name: str, layer: set[str]) -> None:
    for found in run_ranks(2, split_names, name):
        assert layer | {"model.embed_tokens.weight", "lm_head.weight"} <= found
        shared = {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
        assert (
            not (shared - found)
            if name == "deepseek_v3"
            else found
            == layer
            | {
                "model.embed_tokens.weight",
                "lm_head.weight",
            }
        )


def trained(name: str, sizes: dict[str, int], optimizer_class: Any) -> list[float]:
    """Relative error of every parameter's update after two clipped steps, against one process."""
    mesh = mw.Mesh(**sizes)
    models = hf_zoo.ZOO[name](), mw.parallelize(hf_zoo.ZOO[name](), mesh)
    start = {key: param.detach().clone() for key, param in models[0].named_parameters()}
    solo = optimizer_class(models[0].parameters(), lr=0.01)
    optimizer = optimizer_class(mw.param_groups(models[1], lr=0.01), foreach=True)
    for step in range(2):
        parts = [hf_zoo.make_batch(name, rank + 10 * step, rows=4) for rank in range(mesh.data_size)]
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        models[0](**whole).loss.backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
        mw.forward_backward(models[1], parts[mesh.data_rank])
        mw.clip_grad_norm_(models[1], 0.5)
        for each in (solo, optimizer):
            each.step()
            each.zero_grad()
    errors = []
    for key, param in models[1].named_parameters():
        want = dict(models[0].named_parameters())[key].detach() - start[key]
        got = (param.full_tensor() if isinstance(param, DTensor) else param).detach() - start[key]
        errors.append(float((got - want).norm() / want.norm().clamp(min=1e-12)))
    return errors


@pytest.mark.parametrize("sizes", [dict(dp=2, tp=2, ep=4), dict(dp=2, tp=2, ep=2)])
def test_clipped_steps_over_mixed_meshes_are_those_of_one_process(sizes: dict[str, int]) -> None:
    for errors in run_ranks(4, trained, "mixtral", sizes, torch.optim.SGD):
        assert max(errors) < 1e-4
    # A large eps: Adam turns noise around zero into whole steps otherwise.
    for errors in run_ranks(4, trained, "deepseek_v3", sizes, partial(torch.optim.AdamW, eps=1e-2)):
        assert max(errors) < 1e-4


def recomputed(sizes: dict[str, int]) -> ParityReport:
    batch = partial(hf_zoo.make_batch, "qwen3_moe", rows=2)
    return gradient_parity(hf_zoo.ZOO["qwen3_moe"], batch, mw.Mesh(**sizes), mw.Plan(recompute=True))


def test_recomputed_activations() -> None:
    assert all(report.worst <= 1e-5 for report in run_ranks(2, recomputed, dict(tp=2, ep=2)))


def tied() -> tuple[ParityReport, bool]:
    build = partial(hf_zoo.build, "qwen3_moe", tie_word_embeddings=True)
    model = mw.parallelize(build(), mw.Mesh(tp=2))
    one = model.lm_head.weight is model.model.embed_tokens.weight
    return gradient_parity(build, partial(hf_zoo.make_batch, "qwen3_moe"), mw.Mesh(tp=2)), one


def test_tied_weights_stay_tied() -> None:
    for report, one in run_ranks(2, tied):
        assert one
        assert report.worst <= 1e-5


def generated(name: str, sizes: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = mw.Mesh(**sizes)
    model, solo = mw.parallelize(hf_zoo.ZOO[name]().eval(), mesh), hf_zoo.ZOO[name]().eval()
    prompt = hf_zoo.make_batch(name, mesh.data_rank, rows=1)["input_ids"][:, : 5 + mesh.data_rank]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5 + mesh.data_rank}
    for each in (model, solo):
        each.config.output_router_logits = False
    return model.generate(prompt, **options), solo.generate(prompt, **options)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("sizes", [dict(tp=2, ep=2), pytest.param(dict(dp=2, tp=2, ep=4), marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_one_process(name: str, sizes: dict[str, int]) -> None:
    for got, want in run_ranks(2 * sizes.get("dp", 1), generated, name, sizes):
        assert torch.equal(got, want)


def own_layers() -> list[float]:
    """`mw.MoELayer` with a shared expert: gradients against one process, and the load that its ranks count."""
    torch.manual_seed(3)
    models = [mw.MoELayer(16, 24, num_experts=4, top_k=2, shared_hidden_dim=8, aux_coef=0.1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x_TD = torch.randn(5, 16)
    models[0](x_TD).square().mean().backward()
    wrapped = mw.parallelize(models[1], mw.Mesh(tp=2, ep=2))
    wrapped(x_TD).square().mean().backward()
    wanted = {key: param.grad for key, param in models[0].named_parameters()}
    assert [int(load_E.sum()) for load_E in mw.expert_load(wrapped).values()] == [10]
    grads = {key: param.grad for key, param in wrapped.named_parameters()}
    whole = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in grads.items()}
    return [float((whole[key] - want).norm() / want.norm()) for key, want in wanted.items()]


def test_own_layer_with_shared_expert() -> None:
    assert all(max(errors) <= 1e-5 for errors in run_ranks(2, own_layers))


def saved(folder: str, save: dict[str, int], load: dict[str, int]) -> list[bool]:
    """Whether all of a model comes back: through `mw.load` on another mesh, and from a Hugging Face folder."""
    want = hf_zoo.ZOO["deepseek_v3"]()
    model = mw.parallelize(hf_zoo.ZOO["deepseek_v3"](), mw.Mesh(**save))
    mw.save(f"{folder}/own", model)
    mw.save_pretrained(model, f"{folder}/hf")
    same = []
    for path in ("own", "hf"):
        if path == "hf":
            other = mw.from_pretrained(f"{folder}/hf", mw.Mesh(**load))
        else:
            other = hf_zoo.ZOO["deepseek_v3"]()
            with torch.no_grad():
                for param in other.parameters():
                    param.zero_()
            other = mw.parallelize(other, mw.Mesh(**load))
            mw.load(f"{folder}/own", other)
        state = dict(other.named_parameters())
        for key, param in want.named_parameters():
            got = state[key]
            same.append(torch.equal(got.full_tensor() if isinstance(got, DTensor) else got, param))
    whole = type(want).from_pretrained(f"{folder}/hf")
    return [*same, all(torch.equal(a, b) for a, b in zip(whole.parameters(), want.parameters(), strict=True))]


@pytest.mark.parametrize(
    ("save", "load"),
    [
        (dict(dp=2, tp=2, ep=2), dict(dp=4, ep=2)),
        pytest.param(dict(dp=4, ep=2), dict(dp=2, tp=2, ep=4), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_change_the_mesh(tmp_path: Path, save: dict[str, int], load: dict[str, int]) -> None:
    for same in run_ranks(4, saved, str(tmp_path), save, load):
        assert all(same)


def refuse(what: str) -> str:
    mesh = mw.Mesh(tp=2)
    if what == "nothing":
        with pytest.raises(ValueError) as caught:
            mw.parallelize(plain_models.build("packed"), mesh)
        return str(caught.value)
    changes = {"heads": dict(num_key_value_heads=1)}.get(what, {})
    with pytest.raises(ValueError) as caught:
        mw.parallelize(hf_zoo.build("mixtral", **changes), mesh, mw.Plan(data="ddp" if what == "ddp" else "fsdp2"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("heads", "tp (2) must divide the heads of model.layers.0.self_attn, queries and keys alike (1). tp can be 1."),
        (
            "nothing",
            (
                "tp (2) splits attention (q_proj, k_proj, v_proj, o_proj) and MLPs (gate_proj, up_proj, down_proj), "
                "and Model has neither. Set tp=1 and use the ranks for dp or ep."
            ),
        ),
        ("ddp", "tp (2) needs Plan(data='fsdp2'): DDP cannot hold split parameters."),
    ],
)
def test_what_tp_cannot_split_is_refused_by_name(what: str, text: str) -> None:
    assert run_ranks(2, refuse, what) == [text] * 2
