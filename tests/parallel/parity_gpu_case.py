"""Run by test_parity_gpu.py under torchrun: gradient parity on CUDA and NCCL, a line of JSON a case on rank 0.

torchrun --nproc-per-node 2 tests/parallel/parity_gpu_case.py
"""

import functools
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

import moeweave as mw  # noqa: E402
from hf_zoo import CORE, ZOO, make_batch  # noqa: E402

PLANS = [{}, {"data": "ddp"}, {"dispatcher": "allgather", "combine": "prereduced"}, {"recompute": True}]


def main() -> None:
    mesh = mw.Mesh(dp=torch.cuda.device_count(), ep=torch.cuda.device_count())
    assert mesh.device.type == "cuda"
    cases = [(name, {}) for name in CORE] + [("qwen3_moe", plan) for plan in PLANS[1:]]
    cases += [(name, {"dtype": "bfloat16"}) for name in ("mixtral", "deepseek_v3")]
    for name, plan in cases:
        report = mw.gradient_parity(ZOO[name], functools.partial(make_batch, name), mesh, mw.Plan(**plan))
        if mesh.rank == 0:
            found = {"model": name, "plan": plan, "ok": report.ok, "loss_error": report.loss_error}
            print(json.dumps(found | {"worst": report.worst, "name": report.worst_name}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
