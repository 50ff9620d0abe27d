"""`op=moe_layer ablate=true`: what each ingredient of the three-stream schedule gives, alone and left out.

    rank_local   router and shared expert run on this rank's tokens, and not on all ranks' gathered ones
    by_node      a token crosses the network once to each node that needs it         (backend=hierarchical alone)
    quantise     rows are quantised before they are sent (in the first format of `codec`, else int8)
    two_planes   rows and results take push and dma at the same time, and not push alone; by node: rows spread inside
                 the node while others cross the network
    overlap      exchanges run beside the computation, and not one after the other
    windows      both planes are writes into the peers' memory, and not collectives  (where ranks reach it)

Every way is a whole layer with a router, routed experts and a shared expert, checked against a plain loop over experts
on the rows that it ought to see. Rows are gathered in all of them, as router and shared expert may have to run on
gathered rows; with backend=hierarchical they go where they are needed, and a gather comes on top where it must.

Legend: T tokens here, D width, E experts, K routes a token, F width of the shared expert, W ranks, N = W * T.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.codec import Codec, decode_rows, encode_rows
from moeweave.comm.communicator import Communicator
from moeweave.comm.plane_links import can_share, link_of
from moeweave.comm.planes import new_plane_group
from moeweave.comm.streams import make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.timeline import STREAMS, Timeline, exposed
from moeweave.comm.two_planes import Planes, TwoPlanes
from moeweave.comm.window_planes import WindowPlanes
from moeweave.launch.bench import routed, traffic
from moeweave.launch.bench.ablation_ways import Ingredients, NodeIngredients, WindowIngredients, ways
from moeweave.launch.bench.case import Case, Work
from moeweave.launch.bench.memory import peak_bytes
from moeweave.launch.schema import BenchConfig
from moeweave.moe.experts import ExpertWeights, local_experts
from moeweave.moe.layer import SharedExperts
from moeweave.moe.router import Router
from moeweave.parallel.mesh import Mesh

Line = dict[str, Any]


def cases(config: BenchConfig, mesh: Mesh) -> Iterator[Case]:
    """A case for each way."""
    layer = Layer(config, mesh)
    for way in ways(layer.none_of("hierarchical" in config.backends)):
        yield layer.case(way, config)


class Layer:
    """Weights, tokens and groups of one rank, the same for every way."""

    def __init__(self, config: BenchConfig, mesh: Mesh) -> None:
        self.mesh, self.task = mesh, routed.Task(config, mesh, Codec())
        formats = [codec.dispatch for codec in map(Codec.parse, config.codecs) if codec.dispatch != "none"]
        self.format, self.share, self.num_parts = (formats or ["int8"])[0], config.push_share, config.num_parts
        shape, device, dtype = self.task.shape, mesh.device, self.task.dtype
        ranks = list(range(mesh.world))
        self.push, self.dma = (new_plane_group(plane, ranks, device.type) for plane in ("push", "dma"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.router = Router(shape.hidden, shape.experts, shape.topk).to(device, dtype)
            self.shared = SharedExperts(shape.hidden, config.shared_hidden).to(device, dtype)
        up, down = routed.expert_weights(self.task, config.seed)
        self.weights = ExpertWeights(gate_up=up, down=down, apply_gate=routed.swiglu, is_swiglu=True)
        self.shared_hidden = config.shared_hidden
        self.x_TD = self.task.x_TD

    def none_of(self, by_node: bool) -> Ingredients:
        """The way without any of the ingredients that there can be here. A collective."""
        if by_node:
            return NodeIngredients()
        return WindowIngredients() if can_share(self.push) else Ingredients()

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, ids_TK = self.router(x_TD)
        return ids_TK, weights_TK

    def codec(self, way: Ingredients) -> Codec:
        return Codec(dispatch=self.format if way.quantise else "none")

    def options(self, way: Ingredients) -> ThreeStreamOptions:
        return way.options(self.codec(way), self.share, self.num_parts, self.task.shape.tokens)

    def schedule(self, way: Ingredients, timeline: Timeline | None = None) -> ThreeStream:
        options = self.options(way)
        streams = make_streams(self.mesh.device, overlap=way.overlap, timeline=timeline)
        shape, nodes = self.task.shape, self.task.nodes
        return ThreeStream(self.push, self.dma, shape.experts, streams, options, shape.topk, nodes)

    @torch.no_grad()
    def forward(self, way: Ingredients, schedule: ThreeStream) -> Tensor:
        if way.rank_local:
            return schedule.layer(self.x_TD, self.route, self._experts, self.shared)
        leaving = schedule.leave(self.x_TD)
        all_ND = schedule.rows_of(leaving)
        own = slice(self.mesh.rank * leaving.max_tokens, self.mesh.rank * leaving.max_tokens + self.x_TD.shape[0])
        with schedule.computing("router"):
            ids_NK, weights_NK = self.route(all_ND)
        with schedule.computing("shared expert"):
            shared_ND = self.shared(all_ND)
        routes = (ids_NK[own].contiguous(), weights_NK[own].contiguous())
        arriving = leaving if schedule.gathered else None
        return schedule.routed(arriving, self.x_TD, *routes, self._experts, lambda: None) + shared_ND[own]

    def _experts(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        return local_experts(self.weights, rows_RD, offsets_e, exact=True)  # nobody reads past the last

    @torch.no_grad()
    def expected(self, way: Ingredients) -> Tensor:
        """The layer as a loop over this rank's experts on everybody's tokens, summed over ranks."""
        shape, world, rank = self.task.shape, self.mesh.world, self.mesh.rank
        x_ND = torch.cat([self.task.tokens(each) for each in range(world)])
        sent_ND = _through(x_ND, self.codec(way))
        seen_ND = x_ND if way.rank_local else sent_ND
        ids_NK, weights_NK = self.route(seen_ND)
        y_ND = torch.zeros(x_ND.shape, device=x_ND.device)
        for local in range(self.task.num_local):
            token, column = torch.where(ids_NK == self.task.first + local)
            gate_up = sent_ND[token] @ self.weights.gate_up[local].T
            out = routed.swiglu(gate_up) @ self.weights.down[local].T
            y_ND.index_add_(0, token, out.float() * weights_NK[token, column, None].float())
        dist.all_reduce(y_ND)
        own = slice(rank * shape.tokens, (rank + 1) * shape.tokens)
        return (y_ND[own] + self.shared(seen_ND[own]).float()).to(self.task.dtype)

    def case(self, way: Ingredients, config: BenchConfig) -> Case:
        shape = self.task.shape
        timelines: list[Timeline] = []
        schedule = self.schedule(way)
        results: list[Tensor] = []

        def run() -> None:
            timelines[:] = [Timeline(self.mesh.device)]
            schedule.streams.timeline = timelines[0]
            results[:] = [self.forward(way, schedule)]

        def off() -> int:
            wanted = self.expected(way)
            return self.task.num_off(results[0], wanted, self.task.dtype) if results else wanted.numel()

        def sides() -> dict[str, float]:
            spans = timelines[0].spans()
            busy = {name: sum(s.end - s.start for s in spans if s.stream == name) * 1e6 for name in STREAMS}
            return {**busy, "exposed": exposed(spans) * 1e6}

        def facts() -> Line:
            spans = [astuple(span) for span in timelines[0].spans()]
            peak = peak_bytes(lambda: self.forward(way, schedule), self.mesh.device)
            return dict(ablation=self._facts(way), peak_memory=peak, spans=spans)

        row = shape.hidden * self.task.dtype.itemsize
        sent = self.sent_bytes(way)
        return Case(
            "moe_layer",
            way.name,
            shape.tokens * row,
            shape.tokens * shape.hidden,
            config.dtype,
            Work(run, results.clear, off),
            logical_bytes=self.task.remote_pairs * row * 2,
            wire_bytes=sent[0],
            network_bytes=sent[1],
            label="ablation",
            graph=False,
            sides=sides,
            facts=facts,
        )

    def sent_bytes(self, way: Ingredients) -> tuple[int, int]:
        """What leaves this rank, and of that its node: rows there and back, scales, ids and by node the weights."""
        shape, item = self.task.shape, self.task.dtype.itemsize
        there, back = shape.hidden + 4 if way.quantise else shape.hidden * item, shape.hidden * item
        ids_TK, weights_TK = self.route(self.x_TD)
        rows = traffic.count(ids_TK, self.mesh.rank, self.task.num_local, self.task.nodes)
        if isinstance(way, NodeIngredients):
            unit, about = ("by_node", 8 * shape.topk) if way.by_node else ("routed", 0)
            sides = [n * (there + back) for n in rows[unit]]
            sides[0] += rows[unit].across * about
            if not way.rank_local:
                sides = [a + n * there for a, n in zip(sides, rows["gathered"], strict=True)]
        else:
            # A row there and a sum back for each token and other rank.
            about = shape.topk * (ids_TK.element_size() + weights_TK.element_size())
            sides = [n * (there + about + back) for n in rows["gathered"]]
        return sum(sides), sides[0]

    def _facts(self, way: Ingredients) -> Line:
        shape = self.task.shape
        tokens = shape.tokens * (1 if way.rank_local else self.mesh.world)
        return dict(
            way.on,
            router_flops=2 * tokens * shape.hidden * shape.experts,
            shared_flops=6 * tokens * shape.hidden * self.shared_hidden,
            **({} if isinstance(way, NodeIngredients) else self._planes_alone(way)),
        )

    def _planes_alone(self, way: Ingredients) -> Line:
        """Microseconds of one exchange of this rank's rows: on push alone, on dma alone, shared out over both."""
        found, link = {}, link_of(self.push, self.options(way))
        for name, share in (("push", 1.0), ("dma", 0.0), ("both", self.share)):
            streams = make_streams(self.mesh.device)
            planes: Planes = TwoPlanes(Communicator(self.push), Communicator(self.dma), streams, share)
            planes = planes if link is None else WindowPlanes(link, streams, share)
            found[f"{name}_us"] = _best_us(functools.partial(_gather, planes, self.x_TD), self.mesh)
            streams.close()
        return found


def _gather(planes: Planes, x_TD: Tensor) -> Tensor:
    return planes.all_gather("rows", x_TD).wait()


def _through(x_ND: Tensor, codec: Codec) -> Tensor:
    if codec.dispatch == "none":
        return x_ND
    wire = encode_rows(x_ND, codec.dispatch, codec.scale)
    return decode_rows(wire, codec.dispatch, codec.scale, x_ND.shape[1], x_ND.dtype)


def _best_us(run: Callable[[], object], mesh: Mesh, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        run()
        if mesh.device.type != "cpu":
            torch.accelerator.synchronize()
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64).to(mesh.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest) * 1e6)
    return min(times)


def relate(lines: list[Line]) -> None:
    """Adds to each line `gain`, the time of "none" over its own, and `slowdown`: each stream's busy time over that of
    the same ingredients without overlap, where that was measured. On a CPU a push counts as busy until it is joined,
    which says nothing of its speed, so it has no slow-down there."""
    found = [line for line in lines if "ablation" in line]
    times = {line["backend"]: line["median"] for line in found}
    alone = {_key(line): line["sides"] for line in found if not line["ablation"]["overlap"]}
    for line in found:
        line["gain"] = times["none"] / line["median"]
        other = alone.get(_key(line))
        if line["ablation"]["overlap"] and other is not None:
            told = [name for name in STREAMS if other[name] and (name != "push" or line["device"] != "cpu")]
            line["slowdown"] = {name: line["sides"][name] / other[name] for name in told}


def _key(line: Line) -> tuple[bool | None, ...]:
    return tuple(line["ablation"].get(name) for name in ("rank_local", "by_node", "quantise", "two_planes", "windows"))


def table(lines: list[Line]) -> list[str]:
    """What the ablation prints below the columns of every op; times in microseconds, bytes and FLOPs of a rank."""
    found = [line for line in lines if "ablation" in line]
    if not found:
        return []
    head = f"# {'ingredients':>24} {'time':>10} {'gain':>6} {'exposed':>10} {'wire':>12} {'network':>12}"
    out = [
        "#",
        "# ablation",
        f"{head} {'router FLOP':>12} {'shared FLOP':>12} {'peak bytes':>12}  slow-down of each side",
    ]
    for line in found:
        facts, slower = line["ablation"], line.get("slowdown", {})
        sides = " ".join(f"{name} {value:.2f}x" for name, value in slower.items()) or "-"
        sent, across = (line[name] // line["ranks"] for name in ("wire_bytes", "network_bytes"))
        out.append(
            f"# {line['backend']:>24} {line['median']:>10.1f} {line['gain']:>6.2f} {line['sides']['exposed']:>10.1f} "
            f"{sent:>12} {across:>12} {facts['router_flops']:>12} {facts['shared_flops']:>12} "
            f"{line['peak_memory']:>12}  {sides}"
        )
    for windows in (False, True):
        told = [line["ablation"] for line in found if line["ablation"].get("windows", False) == windows]
        if told and "both_us" in told[-1]:
            push, dma, both = (told[-1][f"{name}_us"] for name in ("push", "dma", "both"))
            times = f"push {push:.1f}, on dma {dma:.1f}, on both {both:.1f} us: {min(push, dma) / both:.2f}x"
            out.append(f"# rows over {'windows' if windows else 'collectives'}, on {times}")
    return out
