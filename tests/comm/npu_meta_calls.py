"""Run in a process of its own with torch-npu over stand-ins: prints the shapes that every recorded call returns on meta
tensors, and what a call with one argument too many says, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch_npu  # noqa: F401  (brings torch.ops.npu)
from torch_npu.op_plugin.meta import _meta_registrations

from moeweave.comm.planes import _hccl_options, hccl_config
from npu_calls import record

A3 = 250  # torch-npu's number for the chip of Atlas A3; off an NPU there is none to ask
_meta_registrations.get_soc_version = lambda: A3


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(each) for each in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def shapes(result: Any) -> list[list[Any]]:
    flat = [result] if isinstance(result, torch.Tensor) else list(result)
    return [[list(each.shape), str(each.dtype)[6:]] for each in flat]


def refusal(name: str, arguments: dict[str, Any]) -> str:
    try:
        getattr(torch.ops.npu, name)(**arguments, no_such_keyword=1)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


found = []
for name, given in record():
    arguments = {key: on_meta(value) for key, value in given.items()}
    result = getattr(torch.ops.npu, name)(**arguments)
    found.append(dict(name=name, shapes=shapes(result), refusal=refusal(name, arguments)))
options = _hccl_options()
options.hccl_config = hccl_config("push")
print("\n" + json.dumps(dict(calls=found, hccl_config=dict(options.hccl_config))))
