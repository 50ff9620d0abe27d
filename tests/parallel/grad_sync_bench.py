"""What `Plan(grad_sync=...)` costs on CPU ranks: bytes, exposed share, micro-batches a second, and the gradients.

    python tests/parallel/grad_sync_bench.py --out tests/results/grad_sync.json

exposed: the part of a step that it would not take with gradients left unreduced, timed in the same process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from moeweave.launch.runlog import git_state, processor, versions  # noqa: E402
from moeweave.moe.layer import MoELayer  # noqa: E402
from moeweave.parallel.data import no_sync  # noqa: E402
from moeweave.parallel.loss import forward_backward, global_tokens  # noqa: E402
from moeweave.parallel.mesh import Mesh  # noqa: E402
from moeweave.parallel.parallelize import parallelize  # noqa: E402
from moeweave.parallel.plan import Plan  # noqa: E402
from overlapped import ReducedBytes, local  # noqa: E402
from run_ranks import run_ranks  # noqa: E402

SIZES, LAYERS, DIM, HIDDEN, EXPERTS, ROWS, LENGTH = dict(dp=2), 4, 256, 512, 8, 8, 64
MICROBATCHES = 4


class Model(nn.Module):
    """Embedding, MoE layers, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, DIM)
        self.layers = nn.ModuleList(MoELayer(DIM, HIDDEN, EXPERTS, 2) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / global_tokens(labels)


def build(data: str, grad_sync: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The wrapped model and this rank's batch."""
    torch.manual_seed(0)
    mesh = Mesh(**SIZES)
    model = parallelize(Model(), mesh, Plan(data=data, grad_sync=grad_sync))
    ids = torch.randint(256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(mesh.rank))
    return model, {"input_ids": ids, "labels": ids}


def measure(data: str, steps: int) -> dict[str, Any]:
    """One rank's figures of both settings; their steps and those without reductions take turns."""
    made = {name: build(data, name) for name in ("last", "each")}
    found: dict[str, Any] = {name: {} for name in made}
    grads = {}
    for name, (model, batch) in made.items():
        with ReducedBytes() as counted:
            forward_backward(model, batch, MICROBATCHES)
        found[name]["bytes"] = counted.num_bytes
        grads[name] = torch.cat([local(p.grad).flatten() for p in model.parameters() if p.grad is not None])
    found["difference"] = float((grads["each"] - grads["last"]).norm() / grads["last"].norm())
    # With "each" nothing inside a step turns the reductions on again.
    silent = build(data, "each")
    seconds: dict[str, list[float]] = {"last": [], "each": [], "none": []}
    for _ in range(steps):
        for name, times in seconds.items():
            model, batch = made.get(name, silent)
            with no_sync(model) if name == "none" else nullcontext():
                times.append(timed(model, batch))
    for name in made:
        took, alone = median(seconds[name]), median(seconds["none"])
        found[name] |= {"microbatches_per_second": MICROBATCHES / took, "exposed": max(0.0, 1 - alone / took)}
    return found


def timed(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Seconds of one step, of the slower rank."""
    model.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    forward_backward(model, batch, MICROBATCHES)
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="grad_sync on two CPU ranks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    shape = dict(layers=LAYERS, dim=DIM, hidden=HIDDEN, experts=EXPERTS, rows=ROWS, length=LENGTH)
    about = dict(shape, ranks=2, microbatches=MICROBATCHES, steps=arguments.steps, processor=processor())
    about |= dict(versions=versions(), git=git_state(Path(__file__).parent))
    found = {data: run_ranks(2, measure, data, arguments.steps, timeout=500)[0] for data in ("fsdp2", "ddp")}
    for data, figures in found.items():
        print(data, json.dumps(figures))
    arguments.out.write_text(json.dumps({"context": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
