"""The shape of every config: frozen dataclasses that YAML and the command line merge into, strictly.

`strict.build(TrainConfig, values)` refuses a name that does not exist (offering the nearest) and a value of the wrong
type; a value against its rule is refused here. What each field means stands above it in `configs/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moeweave.parallel.mesh import MeshSizes

DEVICES = ("cuda", "npu", "cpu")


class ConfigError(ValueError):
    """A config that cannot run; the message says field, value, rule and remedy."""


def require(ok: bool, name: str, value: Any, rule: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value}: {rule}. {remedy}")


def at_least(low: float, **values: float) -> None:
    """Raises ConfigError for a value below `low`; a dot of the field's name is written as two underscores."""
    for name, value in values.items():
        name = name.replace("__", ".")
        require(value >= low, name, value, f"must be at least {low}", f"Set {name}={low} or more.")


def check_seed(seed: int) -> None:
    require(0 <= seed < 1 << 63, "seed", seed, "must be at least 0 and below 2**63", "Choose such a number.")


def one_of(name: str, value: str, legal: Iterable[str]) -> None:
    legal = list(legal)
    near = difflib.get_close_matches(str(value), legal, n=1)
    remedy = f"Did you mean {name}={near[0]}?" if near else f"Set {name} to one of them."
    require(value in legal, name, value, f"must be one of {', '.join(legal)}", remedy)


@dataclass(frozen=True)
class RunConfig:
    root: str = "runs"
    dir: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    source: str = "qwen3_moe"
    size: str = "auto"
    weights: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("model.size", self.size, ("auto", "tiny", "given"))


@dataclass(frozen=True)
class MeshConfig:
    dp: int = 1
    tp: int = 1
    pp: int = 1
    sp: int = 1
    ep: int = 1
    etp: int = 1
    dp_replicate: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        self.sizes()  # raises where they do not fit each other
        if self.device is not None:
            one_of("mesh.device", self.device, DEVICES)

    @property
    def data_size(self) -> int:
        """How many ranks, or groups of ranks, see a batch of their own."""
        return self.dp_replicate * self.dp

    def sizes(self) -> MeshSizes:
        values = dataclasses.asdict(self)
        del values["device"]
        return MeshSizes(**values)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    field: str = "text"
    dtype: str = "uint16"
    seq_length: int = 128

    def __post_init__(self) -> None:
        one_of("data.dtype", self.dtype, ("uint16", "uint32"))
        at_least(2, data__seq_length=self.seq_length)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    router_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        at_least(
            0,
            optim__lr=self.lr,
            optim__warmup_steps=self.warmup_steps,
            optim__weight_decay=self.weight_decay,
            optim__clip_norm=self.clip_norm,
            optim__router_bias_rate=self.router_bias_rate,
        )
        ratio = self.min_lr_ratio
        require(0 <= ratio <= 1, "optim.min_lr_ratio", ratio, "must be between 0 and 1", "Choose a number in between.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must be at least 0 and below 1", "Choose such a number.")
        for name in ("lr", "weight_decay", "clip_norm", "router_bias_rate"):
            value = getattr(self, name)
            require(math.isfinite(value), f"optim.{name}", value, "must be finite", "Choose a number.")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(0, checkpoint__every=self.every)
        at_least(1, checkpoint__keep=self.keep)


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    load_every: int = 10
    progress: str = "auto"

    def __post_init__(self) -> None:
        at_least(1, log__every=self.every, log__load_every=self.load_every)
        one_of("log.progress", self.progress, ("auto", "bar", "lines", "off"))


@dataclass(frozen=True)
class RanksConfig:
    max_restarts: int = 0
    hang_timeout: float = 1800.0
    elastic: bool = False

    def __post_init__(self) -> None:
        at_least(0, ranks__max_restarts=self.max_restarts, ranks__hang_timeout=self.hang_timeout)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `moeweave-train` reads."""

    name: str = "train"
    steps: int = 100
    batch_size: int = 16
    microbatches: int = 1
    seed: int = 0
    resume: str = "auto"
    proof: bool = True
    on_nan: str = "stop"
    max_skips: int = 10
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    plan: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size, microbatches=self.microbatches)
        at_least(0, max_skips=self.max_skips)
        check_seed(self.seed)
        require(bool(self.name) and "/" not in self.name, "name", self.name, "is no file name", "Leave out any /.")
        one_of("on_nan", self.on_nan, ("stop", "skip"))
        parts = self.mesh.data_size * self.microbatches
        require(
            self.batch_size % parts == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of data ranks x microbatches = {self.mesh.data_size} x {self.microbatches} = {parts}",
            f"Set batch_size={max(1, round(self.batch_size / parts)) * parts}.",
        )


@dataclass(frozen=True)
class BatchConfig:
    rows: int = 2
    length: int = 32

    def __post_init__(self) -> None:
        at_least(1, batch__rows=self.rows)
        at_least(4, batch__length=self.length)


@dataclass(frozen=True)
class VerifyConfig:
    """Everything that `moeweave-verify` reads."""

    seed: int = 0
    show: int = 8
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    plan: dict[str, Any] = field(default_factory=dict)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        at_least(1, show=self.show)
        check_seed(self.seed)


@dataclass(frozen=True)
class BenchConfig:
    """Everything that `moeweave-bench` reads; whether operations and backends exist is theirs to say."""

    op: Any = "all_reduce"
    backend: Any = None
    codec: Any = "none"
    ranks: int = 2
    device: str | None = None
    dtype: str = "float32"
    min_size: int = 1024
    max_size: int = 1 << 22
    factor: int = 4
    in_place: bool = True
    shape: str | None = None
    tokens: int = 512
    hidden: int = 256
    experts: int = 16
    topk: int = 4
    expert_hidden: int = 256
    routing: str = "uniform"
    iterations: int = 20
    warmup: int = 5
    flush: bool = True
    graph: bool = False
    average: bool = False
    kernel_times: bool = False
    seed: int = 0
    ablate: bool = False
    shared_hidden: int = 256
    push_share: float = 0.25
    num_parts: int = 2
    overlap: list[str] = field(default_factory=lambda: ["all_to_all", "all_gather"])
    programs: int | None = None
    num_sms: list[int] = field(default_factory=list)
    topology: str = "topology.json"
    out: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        at_least(2, ranks=self.ranks, factor=self.factor)
        at_least(1, programs=1 if self.programs is None else self.programs, num_sms=min(self.num_sms, default=1))
        at_least(1, tokens=self.tokens, hidden=self.hidden, experts=self.experts, topk=self.topk)
        at_least(1, shared_hidden=self.shared_hidden, num_parts=self.num_parts)
        at_least(1, expert_hidden=self.expert_hidden, iterations=self.iterations, min_size=self.min_size)
        at_least(0, warmup=self.warmup)
        check_seed(self.seed)
        if self.device is not None:
            one_of("device", self.device, DEVICES)
        at_least(self.min_size, max_size=self.max_size)
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        require(bool(self.op), "op", self.op, "names no operation", "Write op=all_reduce, or a list.")
        require(0 <= self.push_share <= 1, "push_share", self.push_share, "is no share", "Set 0 to 1.")
        one_of("routing", self.routing, ("uniform", "balanced", "zipf", "one_hot"))

    @property
    def ops(self) -> list[str]:
        return [self.op] if isinstance(self.op, str) else list(self.op)

    @property
    def backends(self) -> list[str]:
        return [self.backend] if isinstance(self.backend, str) else list(self.backend or [])

    @property
    def codecs(self) -> list[Any]:
        """What `Codec.parse` takes."""
        return list(self.codec) if isinstance(self.codec, list) else [self.codec]
