"""How a model is spread: the one policy object that `parallelize` takes beside the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moeweave.comm.codec import Codec
from moeweave.comm.dispatchers.ascend_limits import AscendOptions, check_codec
from moeweave.comm.dispatchers.select import validate_choice
from moeweave.comm.three_stream_options import FORMS, PLANES, ThreeStreamOptions
from moeweave.parallel.keywords import names_nearest, unknown_keyword
from moeweave.parallel.placed import parse_placement
from moeweave.parallel.schedules import SCHEDULES

_CHOICES: dict[str, tuple[Any, ...]] = {
    "data": ("fsdp2", "ddp", "zero0", "zero1", "zero2", "zero3"),
    "aux": ("global", "rank"),
    "dtype": (None, "float32", "bfloat16"),
    "drop": ("probability", "position"),
    "recompute": (False, True),
    "schedule": SCHEDULES,
    "sequence": ("ulysses", "ring"),
    "tp_sequence": (False, True),
    "overlap": (None, "microbatch", "three_stream"),
    "three_stream_form": FORMS,
    "planes": PLANES,
    "grad_sync": ("last", "each"),
}


@names_nearest
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Policy for `parallelize`.

    Attributes:
        data: engine of the data axes. "fsdp2" shards dense parameters over dp (and replicates over dp_replicate, HSDP);
            "ddp" keeps a full copy on every rank and all-reduces gradients; "zero0" to "zero3" are DeepSpeed's stages.
        ds_config: DeepSpeed's own config for a ZeRO engine, as a path or a mapping; what contradicts plan or mesh is
            refused, the rest is filled in.
        dispatcher: "alltoall", "allgather", "onesided" (CPU ranks of one host, NVIDIA GPUs that reach each
            other), "hierarchical" (CPU ranks of several hosts), "ascend" (inference on NPUs), or "auto" (from top-k,
            ep, hosts and whether ranks share memory, logged once).
        ascend: options of dispatcher="ascend", a mapping of its fields (series, max_tokens, path) or an
            `AscendOptions`, which it is afterwards.
        topology: file that `moeweave-bench op=topology` wrote, read by the first rank for all: "auto" chooses by its
            bandwidths, "auto" and "hierarchical" take its nodes where the job has as many ranks as were measured. None:
            by bytes alone, and hosts are nodes.
        combine: "exact", "prereduced", or None for the dispatcher's default.
        codec: how rows are quantised before they are sent: a format of what dispatch sends ("none", "fp8", "fp8_e5m2",
            "int8"), a `Codec`, or a mapping of its fields; it is a `Codec` afterwards. Gradients go straight through
            unless the codec has a backward format.
        aux: whose tokens the load-balancing loss sees: "global" (all data ranks') or "rank" (each rank's own).
        capacity: an expert takes at most ceil(capacity * tokens * top_k / experts) routes of a rank; None drops none.
        drop: which routes go when an expert is over capacity: the least probable, or the last by position.
        dtype: compute dtype ("bfloat16"); parameters, gradients and reductions stay as the model has them. None: as is.
        schedule: of the pipeline, with pp > 1: "1f1b", "gpipe", "interleaved", "zero_bubble", "dualpipev" (the last
            three with two stages a rank).
        sequence: how attention sees the whole of a sequence that `sp` ranks share: "ulysses" (all-to-all, each rank has
            all positions of some heads) or "ring" (keys and values go round; any number of heads).
        tp_sequence: with tp > 1, `tp` ranks share out the positions of a sequence between attention and MLPs
            (Megatron's sequence parallelism): norms, routers and experts run on a rank's own tokens.
        overlap: what hides the exchange of tokens. None: nothing. "microbatch": while one part of the tokens is on the
            wire another computes; `forward_backward` and passes without gradients run the whole model on `microbatches`
            parts of the batch in turns, any other pass cuts the tokens of each MoE layer. "three_stream": two planes of
            communication beside the router and the shared expert of each MoE block (`comm.three_stream`; dispatcher and
            schedule are one, so `dispatcher` is not used).
        microbatches: parts with overlap="microbatch".
        overlap_min_tokens: a pass in which some rank has fewer tokens runs in one piece; all ranks agree on it.
        three_stream_form: "gathered", rows go to every rank and leave before the router has run; "routed", they go
            where the router says; "hierarchical", across the network once to each node that needs them, and spread
            there while others cross (combine="prereduced"); "auto", as dispatcher="auto" chooses among the three.
        planes: with overlap="three_stream", what carries gathered rows: "windows", writes into the peers' memory;
            "collectives"; "auto", windows where CPU ranks share memory. Between NVIDIA GPUs windows must be named, and
            carry passes in fixed sizes (`max_tokens`): no GPU has run them yet.
        push_share: part of rows and results, 0 to 1, that takes the push plane with overlap="three_stream". None: by
            both planes' rates in the topology file, else 0.25.
        push_sms: multiprocessors that the push plane may take between GPUs over windows, 0 for all.
        max_tokens: with overlap="three_stream" and combine="prereduced", tokens that no rank exceeds in a pass without
            gradients: its sizes are fixed then, and a CUDA graph can capture it. None: agreed in each pass.
        grad_sync: with several micro-batches, gradients are reduced over ranks once ("last"), or with every micro-batch
            while the next computes ("each": that many times the bytes, and no unreduced gradients kept).
        placement: which experts lie on which rank of `ep`: a mapping from paths of experts to the expert of each slot,
            as `mw.place_by_load` makes it, or a JSON file of it. None: in the order of their ids. Checkpoints and
            folders do not depend on it. An expert in several slots (replicas) gets its tokens in turns, and in
            training the sum of its slots' gradients, on every slot the same.
        recompute: activation checkpointing of every block that holds experts; routing is replayed, not recomputed.

    Raises:
        ValueError: a field outside its choices.
        TypeError: an unknown field; the nearest one is named.
    """

    data: str = "fsdp2"
    dispatcher: str = "auto"
    topology: str | None = None
    combine: str | None = None
    codec: Codec | str | Mapping[str, str] | None = "none"
    ascend: AscendOptions | Mapping[str, Any] | None = None
    aux: str = "global"
    capacity: float | None = None
    drop: str = "probability"
    dtype: str | None = None
    recompute: bool = False
    schedule: str = "1f1b"
    sequence: str = "ulysses"
    tp_sequence: bool = False
    overlap: str | None = None
    microbatches: int = 2
    overlap_min_tokens: int = 1024
    three_stream_form: str = "auto"
    planes: str = "auto"
    push_share: float | None = None
    push_sms: int = 0
    max_tokens: int | None = None
    grad_sync: str = "last"
    ds_config: str | Path | Mapping[str, Any] | None = None
    placement: str | Path | Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                shown = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"Plan.{name} ({getattr(self, name)!r}) must be one of {shown}.")
        if self.capacity is not None and not (isinstance(self.capacity, (int, float)) and self.capacity > 0):
            raise ValueError(f"Plan.capacity ({self.capacity!r}) must be positive, or None to drop no token.")
        if self.data == "ddp" and self.dtype is not None:
            raise ValueError(
                f"Plan.dtype ({self.dtype!r}) needs data='fsdp2'. With 'ddp' leave it out, or convert the model itself."
            )
        for name, least in (("microbatches", 2), ("overlap_min_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Plan.{name} ({value!r}) must be a whole number of at least {least}.")
        if self.overlap == "three_stream":
            form, share = self.three_stream_form, 0.0 if self.push_share is None else self.push_share
            combine = self.combine or ("prereduced" if form == "hierarchical" else "exact")
            rest: Any = dict(max_tokens=self.max_tokens, planes=self.planes, num_sms=self.push_sms)
            ThreeStreamOptions(form, share, combine, **rest)
        if self.data == "zero0" and self.dtype == "bfloat16":
            raise ValueError("Plan.dtype ('bfloat16') needs masters in float32, which data='zero0' lacks. Use 'zero1'.")
        if self.ds_config is not None and self.zero_stage is None:
            raise ValueError(f"Plan.ds_config needs data='zero0' to 'zero3'; data is {self.data!r}.")
        validate_choice(self.dispatcher, self.combine)
        object.__setattr__(self, "codec", Codec.parse(self.codec))
        object.__setattr__(self, "ascend", AscendOptions.parse(self.ascend))
        object.__setattr__(self, "placement", parse_placement(self.placement))
        if self.dispatcher == "ascend":
            check_codec(Codec.parse(self.codec))

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage, None with another engine."""
        return int(self.data.removeprefix("zero")) if self.data.startswith("zero") else None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """A plan from a config section. Raises ValueError on an unknown key, naming the nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(unknown_keyword("Plan", key, known))
        return cls(**dict(values))
