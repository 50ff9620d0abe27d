"""The tables of tolerances, and the two measures that go with them.

Data that was moved must be bitwise equal (`torch.equal`). Data that was computed is compared here, by relative RMS.
Data that went through a lossy codec is compared by its signal-to-noise ratio (`sqnr`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Relative RMS error allowed between two ways to compute the same thing in a dtype.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


# What quantised rows keep at least, in dB (`sqnr`), by kind of `quantize_rows`: of normal rows; of normal rows with one
# column in 256 fifty times as large; of those, the other columns alone. Measured at 7168 columns, less than 1 dB above.
# e5m2 is 6 dB behind e4m3 also on rows like gradients (heavy tails, scales that differ from row to row), for each row
# has its own scale. It wins only where columns a million times smaller than the row's largest must survive.
SQNR_FLOOR: dict[str, tuple[float, float, float]] = {
    "int8": (40.0, 21.0, 10.5),
    "fp8": (31.0, 32.0, 31.0),
    "fp8_group128": (31.3, 41.5, 31.2),
    "fp8_e5m2": (25.0, 26.0, 25.0),
    "fp8_e5m2_group128": (25.3, 35.5, 25.2),
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``||got - want|| / ||want||`` in float64.

    0 where both are zero (or empty), infinity where only `want` is, or where `got` holds a value that is not finite.
    Shapes must be equal. [2.0, 1.0] against [2.0, 2.0] gives 1 / sqrt(8).
    """
    if got.shape != want.shape:
        raise ValueError(f"got.shape {tuple(got.shape)} must be want.shape {tuple(want.shape)}. Reshape one.")
    got64, want64 = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    difference = float(torch.linalg.vector_norm(got64 - want64))
    scale = float(torch.linalg.vector_norm(want64))
    if math.isnan(difference):
        return math.inf
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise AssertionError unless the relative RMS error is within the table's entry for `dtype` (default: got's)."""
    limit = TOLERANCE[dtype or got.dtype]
    error = relative_error(got, want)
    if not error <= limit:
        raise AssertionError(f"{name}: relative RMS error {error:.3e} exceeds {limit:.0e} ({dtype or got.dtype})")


def sqnr(got: Tensor, want: Tensor) -> float:
    """Return the signal-to-noise ratio of `got` against `want` in dB: ``20 log10(||want|| / ||got - want||)``."""
    error = relative_error(got, want)
    if error == 0.0:
        return math.inf
    return -math.inf if math.isinf(error) else -20.0 * math.log10(error)
