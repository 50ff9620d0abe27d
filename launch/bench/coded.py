"""Codecs of MoE operations: which backend runs with which, and how far from the uncoded a result may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moeweave.comm.codec import EXCHANGES, Codec, num_scales
from moeweave.kernels_ext.tolerance import SQNR_FLOOR
from moeweave.launch.schema import BenchConfig, ConfigError

SEVERAL = 6.0  # dB that a result may lie below the floor of its lossiest format: up to four exchanges add their noise


def takes_codec(factory: Callable[..., Any]) -> bool:
    """Whether a backend's factory has an argument `codec`."""
    return "codec" in inspect.signature(factory).parameters


def codecs_of(config: BenchConfig, factory: Callable[..., Any]) -> list[Codec]:
    """The codecs that a backend runs with: those of the config, or none where it knows of none."""
    return [Codec.parse(each) for each in config.codecs] if takes_codec(factory) else [Codec()]


def check(config: BenchConfig, factories: Mapping[str, Callable[..., Any]], width: int) -> None:
    """Raise ConfigError where a codec is none, does not fit the rows' width, or would be run by no backend."""
    try:
        codecs = [Codec.parse(each) for each in config.codecs]
        for codec in codecs:
            num_scales(codec.scale, width)
    except ValueError as error:
        raise ConfigError(f"codec={config.codec}: {error}") from error
    if any(codec != Codec() for codec in codecs) and not any(map(takes_codec, factories.values())):
        shown = ", ".join(factories)
        raise ConfigError(f"codec={config.codec}: backend={shown} takes none. Add alltoall, or leave codec out.")


def floor(codec: Codec) -> float | None:
    """Least signal-to-noise ratio of a result, in dB; None where at most dispatch is coded, which can be foretold."""
    forms = {getattr(codec, exchange) for exchange in EXCHANGES if exchange != "dispatch"} - {"none"}
    return min(SQNR_FLOOR[form][0] for form in forms) - SEVERAL if forms else None
