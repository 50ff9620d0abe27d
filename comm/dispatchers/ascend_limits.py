"""What Ascend's dispatch and combine operators accept on each Atlas series, and the window that they need.

From the operators' documentation in torch-npu (npu_moe_distribute_dispatch_v2). Checked before the first call: the
operator itself fails late, on the device. A2 uses the algorithm "fullmesh", A3 the default one: the others
("hierarchy", "fullmesh_v2") take neither an active mask nor token counts that differ between ranks.

Letters: T tokens a rank at most, D width, K routes a token, E experts, e experts of a rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moeweave.comm.codec import Codec

MEGABYTE = 1 << 20
PATHS = ("operators", "gathered")
DEFAULT_WINDOW = 200  # of HCCL_BUFFSIZE, in MB


@dataclass(frozen=True)
class AscendOptions:
    """How the ascend dispatcher runs; equal on every rank of the group.

    Attributes:
        series: "A2" or "A3", the Atlas series of the machine.
        max_tokens: tokens of a rank at most. A3 pads every call to it, as "gathered" does everywhere; rows and window
            are sized by it.
        path: "operators", the dispatch and combine operators; "gathered", an all-gather of fixed size and the routing
            operators (`gathered.py`), which has none of the others' limits on sizes.

    Raises:
        ValueError: an unknown series or path; max_tokens out of the series' range.
    """

    series: str = "A3"
    max_tokens: int = 128
    path: str = "operators"

    def __post_init__(self) -> None:
        if self.series not in _SERIES:
            raise ValueError(
                f"series ({self.series!r}) must be one of {', '.join(_SERIES)}. Name the machine's series."
            )
        if self.path not in PATHS:
            raise ValueError(f"path ({self.path!r}) must be one of {', '.join(PATHS)}. Name one of them.")
        if self.path == "gathered":
            if self.max_tokens < 1:
                raise ValueError(f"max_tokens ({self.max_tokens}) must be at least 1. Raise it.")
            return
        most = _SERIES[self.series].tokens
        if not 0 < self.max_tokens <= most:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be 1 to {most} on {self.series}. "
                "Lower it, or use dispatcher='alltoall' for longer batches."
            )

    @staticmethod
    def parse(value: AscendOptions | Mapping[str, Any] | None) -> AscendOptions:
        """Options as a config has them: a mapping of fields, or None for the defaults. Raises ValueError on others."""
        if isinstance(value, AscendOptions):
            return value
        known = [field.name for field in fields(AscendOptions)]
        for key in value or {}:
            if key not in known:
                raise ValueError(f"ascend.{key} is unknown. Use one of {', '.join(known)}.")
        return AscendOptions(**dict(value or {}))


@dataclass(frozen=True)
class _Series:
    ranks: Collection[int]
    ranks_said: str
    dims: range
    tokens: int
    local_experts: int


_SERIES = {
    "A2": _Series((*range(2, 9), 16, 32, 64, 128, 256), "2 to 8, 16, 32, 64, 128 or 256", range(32, 7169, 32), 256, 24),
    "A3": _Series(range(2, 769), "2 to 768", range(1024, 8193), 512, 1024),
}
MOST_EXPERTS, MOST_ROUTES, MOST_SLOTS = 1024, 16, 2048


def series_of(device_name: str) -> str:
    """The Atlas series of an NPU by its name: A2 of Ascend910B2, A3 of Ascend910_9392. Raises ValueError on others."""
    for start, series in (("Ascend910B", "A2"), ("Ascend910_93", "A3")):
        if device_name.startswith(start):
            return series
    raise ValueError(f"device ({device_name!r}) must be an Ascend910B (A2) or an Ascend910_93 (A3).")


def check_codec(codec: Codec) -> None:
    """Raise ValueError unless the dispatch operator can send rows in the codec's formats."""
    if codec not in (Codec(), Codec(dispatch="int8")):
        raise ValueError(
            f"codec ({codec}) must be 'none' or 'int8' for dispatcher='ascend': its operators quantise what dispatch "
            "sends, to int8. Set codec='int8', or use dispatcher='alltoall'."
        )


def refuse_grad(*tensors: Tensor) -> None:
    """Raise RuntimeError where a gradient would be lost."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "requires_grad (True) must be False for dispatcher='ascend': its operators have no gradient. "
            "Train with dispatcher='alltoall', or run under torch.no_grad()."
        )


def check_group(options: AscendOptions, size: int, num_experts: int) -> None:
    """Raise ValueError unless `size` ranks with `num_experts` experts fit the series."""
    series, local = _SERIES[options.series], num_experts // size
    _require(size in series.ranks, "ep", size, f"{series.ranks_said} on {options.series}", "Change the mesh")
    _require(num_experts <= MOST_EXPERTS, "num_experts", num_experts, f"at most {MOST_EXPERTS}", "Use fewer experts")
    _require(
        local <= series.local_experts,
        "num_experts / ep",
        local,
        f"at most {series.local_experts} on {options.series}",
        "Raise ep",
    )
    if options.series == "A3":
        _require(local * size <= MOST_SLOTS, "num_experts", num_experts, f"at most {MOST_SLOTS}", "Use fewer experts")


def check_call(options: AscendOptions, num_tokens: int, dim: int, top_k: int, num_experts: int) -> None:
    """Raise ValueError unless one call's sizes fit the series and the options."""
    series = _SERIES[options.series]
    steps = f", a multiple of {series.dims.step}" if series.dims.step > 1 else ""
    dims = f"{series.dims.start} to {series.dims[-1]}{steps} on {options.series}"
    most_routes = min(MOST_ROUTES, num_experts)
    _require(dim in series.dims, "dim", dim, dims, "Use dispatcher='alltoall'")
    _require(0 < top_k <= most_routes, "top_k", top_k, f"1 to {most_routes}", "Use dispatcher='alltoall'")
    most = options.max_tokens
    _require(num_tokens <= most, "tokens of this rank", num_tokens, f"at most max_tokens={most}", "Raise max_tokens")
    if options.series == "A2":
        remedy = "Give every rank a token, or use dispatcher='alltoall'"
        _require(num_tokens > 0, "tokens of this rank", num_tokens, "at least 1 on A2", remedy)


def window_bytes(options: AscendOptions, size: int, dim: int, top_k: int, num_experts: int) -> int:
    """Bytes of HCCL's buffer that dispatch and combine need in their group; one shared expert is counted on A3.

    Example, A3, 4 ranks, 2 experts a rank, T 1, D 1024, K 2: rows of align512(2048 + 64) = 2560 bytes, 8 of them, and
    3 of 2048: 2 * (20480 + 6144) = 53248 bytes.
    """
    local, most = num_experts // size, options.max_tokens
    if options.series == "A2":
        return 2 * (most * size * min(local, top_k) * dim * 2 + 2 * MEGABYTE)
    sent = local * most * size * _align(_align(2 * dim, 32) + 64, 512)
    return 2 * (sent + (top_k + 1) * most * _align(2 * dim, 512))


def check_window(options: AscendOptions, window_mb: int, size: int, dim: int, top_k: int, num_experts: int) -> None:
    """Raise ValueError unless HCCL_BUFFSIZE (`window_mb`) holds the window."""
    needed = -(-window_bytes(options, size, dim, top_k, num_experts) // MEGABYTE)
    _require(
        window_mb >= needed,
        "HCCL_BUFFSIZE",
        window_mb,
        f"at least {needed} MB for max_tokens={options.max_tokens}, dim {dim}, top_k {top_k}, ep {size}, "
        f"{num_experts} experts",
        f"Set HCCL_BUFFSIZE={needed} before the processes start, or lower max_tokens",
    )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


def _require(holds: bool, field: str, value: int, rule: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{field} ({value}) must be {rule} for dispatcher='ascend'. {remedy}.")
