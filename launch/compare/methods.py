"""What `compare models` compares: a mesh and a plan of ours, or a mesh of transformers' own, as one word each.

dp2tp2ep4                                   Mesh(dp=2, tp=2, ep=4) with the default plan
rep2dp2ep2                                  Mesh(dp_replicate=2, dp=2, ep=2)
dp4ep4:overlap=microbatch,microbatches=2    the plan's fields behind a colon
hf:dp4ep4                                   transformers: fsdp_size=4, ep_size=4, all-to-all
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from moeweave.launch.schema import ConfigError
from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan

RIVAL = "hf:"
_AXIS = re.compile(r"(rep|etp|dp|tp|pp|sp|ep)(\d+)")

# Meshes and plans of so many ranks, all of them where memory allows; prefill leaves stages out.
DEFAULTS: dict[int, tuple[str, ...]] = {
    1: ("dp1",),
    2: ("dp2ep2", "dp2ep2:dispatcher=onesided", "dp2ep2:overlap=microbatch", "dp2", "tp2ep2", "sp2ep2", "pp2"),
    4: (
        "dp4ep4",
        "dp4ep4:dispatcher=onesided",
        "dp4ep4:overlap=microbatch",
        "dp4ep2",
        "dp2tp2ep4",
        "rep2dp2ep2",
        "dp2sp2ep4",
        "pp2dp2ep2",
    ),
    8: (
        "dp8ep8",
        "dp8ep8:dispatcher=onesided",
        "dp8ep8:overlap=microbatch",
        "dp8ep4",
        "dp4tp2ep8",
        "rep2dp4ep4",
        "dp4sp2ep8",
        "pp2dp4ep4",
    ),
}


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: the word it was given as.
        sizes: of its mesh.
        plan: fields of `Plan`; of ours only.
        rival: transformers' own expert parallelism.
    """

    name: str
    sizes: MeshSizes
    plan: dict[str, Any] = field(default_factory=dict)
    rival: bool = False


def parse(word: str) -> Method:
    """The method that a word names. Raises ConfigError for an axis, size or field that there is not."""
    mesh, _, given = word.removeprefix(RIVAL).partition(":")
    found = _AXIS.findall(mesh)
    axes = [axis for axis, _ in found]
    if not found or "".join(axis + size for axis, size in found) != mesh or len(set(axes)) < len(axes):
        raise ConfigError(
            f"method {word!r}: its mesh must be axes with sizes, like dp2tp2ep4 (rep, dp, sp, tp, pp, ep, etp)."
        )
    named = {"dp_replicate" if axis == "rep" else axis: int(size) for axis, size in found}
    pairs = [part.partition("=") for part in given.split(",")] if given else []
    plan = {name: yaml.safe_load(value) for name, _, value in pairs}
    try:
        sizes = MeshSizes(**named)
        Plan.from_dict(plan)
    except ValueError as error:
        raise ConfigError(f"method {word!r}: {error}") from None
    return Method(word, sizes, plan, word.startswith(RIVAL))


def check(method: Method, ranks: int, what: str) -> None:
    """Raise ConfigError for a method that so many ranks, or this pass, cannot run."""
    try:
        method.sizes.check_world(ranks)
    except ValueError as error:
        raise ConfigError(f"method {method.name!r}: {error}") from None
    if method.rival and (method.plan or method.sizes.pp * method.sizes.sp * method.sizes.etp > 1):
        raise ConfigError(f"method {method.name!r}: transformers has no pp, sp, etp or plan. Leave them out.")
    if what == "prefill" and method.sizes.pp > 1:
        raise ConfigError(f"method {method.name!r}: prefill is timed without stages. Set pp=1, or --what train.")


def defaults(ranks: int, what: str) -> list[str]:
    """Words of the methods of so many ranks. Raises ConfigError where none are kept."""
    if ranks not in DEFAULTS:
        raise ConfigError(f"--ranks {ranks}: no methods are kept for so many. Name them with --methods.")
    words = list(DEFAULTS[ranks])
    if what == "prefill" and ranks > 1:
        words.insert(3, f"{words[0]}:overlap=three_stream")
    return [word for word in words if what == "train" or parse(word).sizes.pp == 1]


def without_overlap(method: Method) -> tuple[MeshSizes, dict[str, Any]]:
    """Mesh and plan of the same method with nothing hidden."""
    hides = ("overlap", "microbatches", "overlap_min_tokens", "three_stream_form", "push_share", "push_sms", "planes")
    return method.sizes, {name: value for name, value in method.plan.items() if name not in hides}
