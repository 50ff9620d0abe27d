"""Architectures whose float32 gradients lie near the tolerance: the model's own rounding, not the wrapping.

muse_spark scales normalised queries by 5.5, so that softmax is steep and its gradient a difference of nearly equal
numbers; bailing_hybrid multiplies decays along the sequence. Both are compared where rounding is out of the way: in
float64, casts to float32 inside the models widened as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_zoo
import moeweave as mw
from moeweave.kernels_ext.tolerance import relative_error
from moeweave.parallel.hf.boxes import whole_tensor
from moeweave.parallel.loss import forward_backward, loss_of
from moeweave.parallel.names import named_params
from moeweave.parallel.verify import concatenate
from run_ranks import run_ranks


@contextmanager
def widened() -> Iterator[None]:
    """What asks for float32 gets float64: norms, softmax, routers and rotary embeddings of Hugging Face models."""
    to, softmax = Tensor.to, F.softmax

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(wide, args), **{name: wide(value) for name, value in kwargs.items()})

    def wide_softmax(*args: Any, **kwargs: Any) -> Tensor:
        return softmax(*args, **{name: wide(value) for name, value in kwargs.items()})

    with (
        patch.object(Tensor, "float", Tensor.double),
        patch.object(Tensor, "to", wide_to),
        patch.object(F, "softmax", wide_softmax),
    ):
        yield


def gradients(name: str, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Of one step over ranks ("ranks") and of one process on the whole batch ("one")."""
    mesh = mw.Mesh(**sizes)
    models = [hf_zoo.build(name).train(hf_zoo.SPECS[name].training) for _ in range(2)]
    for model in models:
        if dtype is torch.float64:
            model.set_experts_implementation("eager")  # the grouped product knows no float64
        model.to(dtype)
    whole = range(mesh.data_size)
    batches = [concatenate([hf_zoo.make_batch(name, rank, length=15)], mesh.device) for rank in whole]
    with nullcontext() if dtype is torch.float32 else widened():
        wrapped = mw.parallelize(models[0], mesh)
        forward_backward(wrapped, batches[mesh.data_rank])
        loss_of(models[1](**concatenate(batches, mesh.device))).backward()
    ranks = {key: whole_tensor(param.grad) for key, param in named_params(wrapped).items() if param.grad is not None}
    one = {key: param.grad for key, param in models[1].named_parameters() if param.grad is not None}
    return {"ranks": ranks, "one": one}


MESHES = [dict(dp=2, tp=2, ep=2), dict(dp=2, ep=2), dict(tp=2)]
CASES = [
    pytest.param("bailing_hybrid", dict(tp=2, ep=2), id="bailing_hybrid-tp2-ep2"),
    *(pytest.param("bailing_hybrid", sizes, marks=pytest.mark.slow) for sizes in MESHES),
    *(pytest.param("muse_spark", sizes, marks=pytest.mark.slow) for sizes in MESHES),
]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_float64_agrees_where_float32_is_noise(name: str, sizes: dict[str, int]) -> None:
    hf_zoo.needs(name)
    count = sizes.get("dp", 1) * sizes.get("tp", 1)
    narrow, exact = (run_ranks(count, gradients, name, sizes, dtype)[0] for dtype in (torch.float32, torch.float64))
    assert exact["ranks"].keys() >= exact["one"].keys() and len(exact["one"]) > 20
    for key, want in exact["one"].items():
        # Gradients of routing weights travel in float32, as the weights do.
        limit = 1e-7 if key.endswith(("mlp.gate.weight", "gate.proj.weight")) else 1e-12
        assert relative_error(exact["ranks"][key], want) <= limit, key
    # One process in float32 is as far from the truth as ranks are from it: no rule of rounding is better than that.
    truth = exact["one"]
    errors = {kind: max(relative_error(narrow[kind][key].double(), truth[key]) for key in truth) for kind in narrow}
    assert errors["one"] > 2e-6
    assert errors["ranks"] <= 4 * errors["one"]
