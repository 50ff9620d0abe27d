"""Run by test_checkpoint_gpu.py under torchrun: checkpoints and Hugging Face folders on CUDA and NCCL.

PYTHONPATH=tests:. torchrun --nproc-per-node 2 tests/parallel/checkpoint_gpu_case.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import moeweave as mw
from hf_zoo import ZOO, make_batch
from moeweave.parallel.hf.boxes import box_slices, local_pieces


def main(folder: Path) -> None:
    size = torch.cuda.device_count()
    mesh = mw.Mesh(dp=size, ep=size)
    for name, plan in (("qwen3_moe", mw.Plan()), ("deepseek_v3", mw.Plan(data="ddp"))):
        here = folder / f"{name}-{plan.data}"
        found = {
            "model": name,
            "plan": plan.data,
            "loads": from_hugging_face(name, mesh, plan, here / "hf"),
            "exports": to_hugging_face(name, mesh, plan, here / "hf", here / "out"),
            "goes_on": going_on(name, mesh, plan, here / "checkpoint"),
        }
        if mesh.rank == 0:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def from_hugging_face(name: str, mesh: mw.Mesh, plan: mw.Plan, folder: Path) -> bool:
    """Every parameter and buffer is on the GPU, and this rank's part of the file's."""
    reference = ZOO[name]()
    if mesh.rank == 0:
        reference.save_pretrained(folder, max_shard_size="30KB")
    dist.barrier()
    model = mw.from_pretrained(folder, mesh, plan)
    wanted = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    return all(
        view.device == mesh.device and torch.equal(view.cpu(), wanted[key].detach()[box_slices(box)])
        for key, tensor in (*model.named_parameters(), *model.named_buffers())
        for box, view in local_pieces(tensor)
    )


def to_hugging_face(name: str, mesh: mw.Mesh, plan: mw.Plan, reference: Path, folder: Path) -> bool:
    """The export is what transformers wrote, bit by bit."""
    mw.save_pretrained(mw.parallelize(ZOO[name](), mesh, plan), folder, max_shard_size="30KB")
    found, wanted = (
        {key: value for file in sorted(at.glob("*.safetensors")) for key, value in load_file(file).items()}
        for at in (folder, reference)
    )
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def going_on(name: str, mesh: mw.Mesh, plan: mw.Plan, folder: Path) -> bool:
    """A resumed run takes the next step to the same weights, dropout drawn on the GPU included."""
    model, optimizer = prepare(name, mesh, plan)
    step(name, mesh, model, optimizer, 0)
    mw.save(folder, model, optimizer, step=1)
    unbroken = [step(name, mesh, model, optimizer, number) for number in (1, 2)]
    model, optimizer = prepare(name, mesh, plan)
    torch.cuda.manual_seed(99)
    loaded = mw.load(folder, model, optimizer)
    return loaded.step == 1 and [step(name, mesh, model, optimizer, number) for number in (1, 2)] == unbroken


def prepare(name: str, mesh: mw.Mesh, plan: mw.Plan) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mw.parallelize(ZOO[name](), mesh, plan)
    return model, torch.optim.AdamW(mw.param_groups(model, lr=torch.tensor(1e-2, device=mesh.device)), fused=True)


def step(
    name: str, mesh: mw.Mesh, model: nn.Module, optimizer: torch.optim.Optimizer, number: int
) -> tuple[float, float]:
    batch = make_batch(name, mesh.data_rank + 10 * number)
    loss = mw.forward_backward(model, {key: value.to(mesh.device) for key, value in batch.items()})
    optimizer.step()
    optimizer.zero_grad()
    return float(loss), float(torch.rand((), device=mesh.device))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
