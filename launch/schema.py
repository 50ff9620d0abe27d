"""The shape of every config: frozen dataclasses that YAML and the command line merge into, strictly.

`build(TrainConfig, values)` refuses a name that does not exist (offering the nearest), a value of the wrong type (with
its path), and a value against its rule. What each field means stands above it in `configs/`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moeweave.parallel.mesh import MeshSizes
from moeweave.parallel.plan import Plan

T = TypeVar("T")


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
        for name in ("beta1", "beta2", "min_lr_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}", value, "must be between 0 and 1", "Choose a number in between.")


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
    seed: int = 0
    ablate: bool = False
    shared_hidden: int = 256
    push_share: float = 0.25
    overlap: list[str] = field(default_factory=lambda: ["all_to_all", "all_gather"])
    programs: int | None = None
    num_sms: list[int] = field(default_factory=list)
    topology: str = "topology.json"
    out: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        at_least(2, ranks=self.ranks, factor=self.factor)
        at_least(1, programs=self.programs or 1, num_sms=min(self.num_sms, default=1))
        at_least(1, tokens=self.tokens, hidden=self.hidden, experts=self.experts, topk=self.topk)
        at_least(1, shared_hidden=self.shared_hidden)
        at_least(1, expert_hidden=self.expert_hidden, iterations=self.iterations, min_size=self.min_size)
        at_least(0, warmup=self.warmup)
        at_least(self.min_size, max_size=self.max_size)
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
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


# Dicts of a config whose keys are another package's dataclass, and those whose keys are free.
TYPED_DICTS: dict[str, type] = {"plan": Plan}
FREE_DICTS = {"model.overrides", "env"}


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `schema` with `values` merged over its defaults. Raises ConfigError."""
    for name, value in values.items():
        _check_names(schema, name, value)
    try:
        merged = OmegaConf.merge(_writable(OmegaConf.structured(schema)), dict(values))
        built: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or schema.__name__}: {first_line}. Correct the value.") from error
    return built


def check_name(schema: type, name: str) -> None:
    """Raises ConfigError with the nearest name when dotted `name` is no field of the dataclass `schema`."""
    legal, path = _fields(schema), ""
    for part in name.split("."):
        if part not in legal:
            near = [path + other for other in difflib.get_close_matches(part, legal, n=1)] or _elsewhere(schema, part)
            remedy = f"Did you mean {near[0]}?" if near else "--help lists all of them."
            group = f" of {path[:-1]}" if path else ""
            raise ConfigError(f"unknown config key {path + part}: the fields{group} are {', '.join(legal)}. {remedy}")
        path += f"{part}."
        inner = legal[part]
        if path[:-1] in FREE_DICTS:
            return
        inner = TYPED_DICTS.get(path[:-1], inner)
        if not dataclasses.is_dataclass(inner):
            # A value, or a dict of another package, which checks it for itself.
            rest = name[len(path) :]
            if rest and inner in (int, float, str, bool):
                raise ConfigError(f"unknown config key {name}: {path[:-1]} is one value, not a group of fields.")
            return
        legal = _fields(inner)


def _check_names(schema: type, name: str, value: Any) -> None:
    check_name(schema, name)
    kind = TYPED_DICTS.get(name, _fields(schema).get(name))
    if dataclasses.is_dataclass(kind) and not isinstance(value, Mapping):
        shown = ", ".join(f"{name}.{inner}" for inner in _fields(kind))
        raise ConfigError(f"{name}={value}: is a group of fields, not one value. Set one of {shown}.")
    if isinstance(value, Mapping) and name not in FREE_DICTS:
        for inner_name, inner_value in value.items():
            _check_names(schema, f"{name}.{inner_name}", inner_value)


def _fields(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _elsewhere(schema: Any, part: str) -> list[str]:
    """Where a field of that name, or nearly, lives in a group: lr is optim.lr."""
    kinds = {group: TYPED_DICTS.get(group, kind) for group, kind in _fields(schema).items()}
    inner = {
        f"{group}.{name}": name
        for group, kind in kinds.items()
        if dataclasses.is_dataclass(kind)
        for name in _fields(kind)
    }
    near = difflib.get_close_matches(part, list(inner.values()), n=1, cutoff=0.7)
    return [path for path, name in inner.items() if near and name == near[0]]


def _writable(node: DictConfig) -> DictConfig:
    """OmegaConf takes frozen dataclasses for read-only nodes; merging fills them before they are built."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if isinstance(node._get_node(name), DictConfig):
            _writable(node[name])
    return node
