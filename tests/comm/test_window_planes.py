"""The two planes over windows: what collectives would bring, no memory written before it was read, and errors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeweave.comm.blocks_cpu import AREAS, HostBlocks
from moeweave.comm.blocks_cuda import CHANNELS
from moeweave.comm.codec import Codec
from moeweave.comm.communicator import Communicator
from moeweave.comm.plane_links import link_of
from moeweave.comm.streams import make_streams
from moeweave.comm.three_stream import ThreeStream
from moeweave.comm.three_stream_back import WayBack
from moeweave.comm.three_stream_options import ThreeStreamOptions
from moeweave.comm.two_planes import TwoPlanes
from moeweave.comm.window_planes import Blocks, WindowPlanes
from nan_empty import nan_empty
from plain_moe import Case, ids_of, leaves_of, run_experts, tokens_of
from run_ranks import run_ranks
from thread_blocks import World

SHARES = (0.0, 0.3, 1.0)


def as_collectives(world: int, rounds: int) -> int:
    """Exchanges that differ from those of collectives; sizes grow and shrink, some blocks are empty."""
    rank, wrong = dist.get_rank(), 0
    link, groups = HostBlocks(dist.group.WORLD), [dist.new_group() for _ in range(2)]
    with nan_empty():
        for number in range(rounds):
            streams = make_streams("cpu")
            share, width, most = SHARES[number % 3], (24, 3, 1)[number % 3], (0, 1, 7, 40, 5)[number % 5]
            planes = WindowPlanes(link, streams, share)
            plain = TwoPlanes(*map(Communicator, groups), make_streams("cpu", overlap=False), 1.0)
            counts = torch.randint(0, most + 1, (world, world), generator=torch.Generator().manual_seed(number))
            sends, receives = counts[rank].tolist(), counts[:, rank].tolist()
            x_MD = torch.randn(most, width, generator=torch.Generator().manual_seed(number * world + rank))
            rows, ids = torch.randn(sum(sends), width), torch.randint(0, 99, (most, 2))
            found = [planes.all_gather("rows", x_MD), planes.gather_on_push("ids", ids)]
            found.append(planes.all_to_all("results", rows, sends, receives, most))
            want = [plain.all_gather("rows", x_MD), plain.gather_on_push("ids", ids)]
            want.append(plain.all_to_all("results", rows, sends, receives, most))
            wrong += sum(not torch.equal(a.wait(), b.wait()) for a, b in zip(found, want, strict=True))
            streams.close()
    return wrong


@pytest.mark.parametrize("world, rounds", [(2, 4 * AREAS), (3, 15), pytest.param(4, 500, marks=pytest.mark.slow)])
def test_blocks_are_what_collectives_bring(world: int, rounds: int) -> None:
    assert run_ranks(world, as_collectives, world, rounds) == [0] * world


def link_in_use(world: int) -> str:
    groups = [dist.new_group() for _ in range(2)]
    schedules = [
        ThreeStream(*groups, 8, make_streams("cpu"), ThreeStreamOptions(form, planes=planes))
        for form, planes in (
            ("gathered", "auto"),
            ("gathered", "windows"),
            ("gathered", "collectives"),
            ("routed", "auto"),
        )
    ]
    kinds = [type(schedule.back.planes).__name__ for schedule in schedules]
    assert schedules[0].back.planes.link is schedules[1].back.planes.link, "layers share the windows of their group"
    return " ".join(kinds)


def test_windows_carry_gathered_rows_where_ranks_share_memory() -> None:
    assert run_ranks(2, link_in_use, 2) == ["WindowPlanes WindowPlanes TwoPlanes TwoPlanes"] * 2


def apart() -> Any:
    from moeweave.comm import nodes, peers

    nodes.host_name = peers.host_name = lambda: f"host {dist.get_rank()}"
    group = dist.new_group()
    assert link_of(group, ThreeStreamOptions("gathered")) is None
    with pytest.raises(ValueError, match=r"planes \('windows'\) needs CPU ranks of one host.*planes='collectives'"):
        link_of(group, ThreeStreamOptions("gathered", planes="windows"))


def test_windows_by_name_are_refused_between_hosts() -> None:
    run_ranks(2, apart, fresh=True)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(planes="both"), r"planes \('both'\) must be one of auto, windows, collectives"),
        (dict(planes="windows", form="routed"), r"planes \('windows'\) carry gathered rows. Set form='gathered'"),
        (dict(num_sms=-1), r"num_sms \(-1\) must be at least 0"),
    ],
)
def test_options_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreeStreamOptions(**fields)


def errors_of(fate: str, plane: str) -> str:
    """What rank 0 is told when rank 1 does not take part."""
    rank, share = dist.get_rank(), float(plane == "push")
    link, streams = HostBlocks(dist.group.WORLD, timeout=60.0), make_streams("cpu")
    planes, told = WindowPlanes(link, streams, share), ""
    planes.all_gather("rows", torch.ones(4, 32)).wait()
    dist.barrier()
    if fate == "late":
        link.exchanges[plane].peers.timeout = 1.0
    if rank == 1 and fate == "died":
        link.exchanges[plane].peers._drop()  # what the kernel does with the sockets of a process that ends
    elif rank == 1 and fate == "other sizes":
        with pytest.raises(RuntimeError, match="rank 0"):
            planes.all_gather("results", torch.ones(4, 9)).wait()
    if rank == 0:
        with pytest.raises(RuntimeError) as error:
            planes.all_gather("results", torch.ones(4, 8)).wait()
        told = str(error.value)
        with pytest.raises(RuntimeError, match=f"{plane} plane, rank 0 of 2"):
            planes.all_gather("rows", torch.ones(4, 32)).wait()
    dist.barrier()
    streams.close()
    return told


@pytest.mark.parametrize("plane", ["push", "dma"])
@pytest.mark.parametrize(
    "fate, text",
    [
        ("died", "results (round 1): rank 1 died"),
        ("late", "results (round 1): rank 1 did not answer within 1 s"),
        ("other sizes", "results (round 1): width is 9 on rank 1 and 8 here"),
    ],
)
def test_errors_name_plane_exchange_and_rank(fate: str, text: str, plane: str) -> None:
    told = run_ranks(2, errors_of, fate, plane)[0]
    assert f"{plane} plane, rank 0 of 2: " in told
    assert text in told or (fate == "other sizes" and "rank 1 reports: results (round 1): width is 8" in told), told


def test_parts_of_a_block_meet() -> None:
    blocks = Blocks("rows", torch.arange(20).view(10, 2), (4, 6), (3, 6), 6, 0.4)
    assert blocks.planes == ["dma", "push"] and replace(blocks, push_share=1.0).planes == ["push"]
    for num_rows in range(11):
        push, dma = (blocks.part(plane, num_rows) for plane in ("push", "dma"))
        assert push.start == 0 and push.stop == dma.start and dma.stop == num_rows
    assert blocks.block_for(1).flatten().tolist() == list(range(8, 20)) and blocks.starts == [0, 3]


class TestBetweenDevices:
    """`CudaBlocks`, with threads for ranks and tensors for windows."""

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_what_comes(self, share: float) -> None:
        world = World(3)

        def task(rank: int) -> bool:
            planes, right = WindowPlanes(world.link(rank), make_streams("cpu", overlap=False), share), True
            for number in range(6):
                width = 8 * (1 + number % 3)  # areas grow, and hold less than they have room for
                xs = [torch.randn(5, width, generator=torch.Generator().manual_seed(number * 3 + r)) for r in range(3)]
                gathered = planes.all_gather("rows", xs[rank]).wait()
                right &= torch.equal(gathered, torch.cat(xs))
                all_WWN = [torch.cat([x[:2] * peer for peer in range(3)]) for x in xs]
                back = planes.all_to_all("results", all_WWN[rank], [2] * 3, [2] * 3, 2).wait()
                right &= torch.equal(back, torch.cat([x[:2] * rank for x in xs]))
            return right

        assert world.run(task) == [True] * 3

    def test_an_area_is_not_written_before_its_reader_goes_on(self) -> None:
        """Rank 0 reads only when rank 1 has already asked to write again."""
        world, channel = World(2), CHANNELS.index(("push", "rows"))

        def task(rank: int) -> list[float]:
            planes, seen = WindowPlanes(world.link(rank), make_streams("cpu", overlap=False), 1.0), []
            for number in range(1, 4):
                came = planes.all_gather("rows", torch.full((1, 4), float(number * 10 + rank))).wait()
                if rank == 0 and number < 3:
                    world.wait(lambda again=number + 1: world.opening.get((1, channel)) == again, "rank 1 goes on")
                seen += came[:, 0].tolist()
            return seen

        assert world.run(task) == [[10, 11, 20, 21, 30, 31]] * 2

    def test_an_exchange_that_was_not_joined_is_neither_acknowledged_nor_started_again(self) -> None:
        world = World(1)
        link = world.link(0)
        planes = WindowPlanes(link, make_streams("cpu", overlap=False), 1.0)
        scales, reads = planes.gather_on_push("scales", torch.ones(2, 4)), []
        open_now = link._signals.open
        link._signals.open = lambda channel, read: (reads.append(read), open_now(channel, read))[1]
        planes.gather_on_push("ids", torch.ones(2, 4)).wait()
        scales.wait()
        planes.gather_on_push("weights", torch.ones(2, 4))
        bit = 1 << CHANNELS.index(("push", "scales"))
        assert not reads[0] & bit and reads[1] & bit
        assert all(not read >> n & 1 for read in reads for n, (plane, _) in enumerate(CHANNELS) if plane == "dma")
        with pytest.raises(RuntimeError, match=r"exchange \('weights'\) must be joined before it is started again"):
            planes.gather_on_push("weights", torch.ones(2, 4))


FIXED = ThreeStreamOptions("gathered", 0.3, "prereduced", Codec(dispatch="int8"), max_tokens=20)
CASE = Case((5, 17, 0, 9), routing="holes", top_k=3)


def layer_on(case: Case, rank: int, schedule: ThreeStream) -> Tensor:
    x_TD, weights_TK, mine = leaves_of(case, rank)

    def experts(rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        end = int(offsets_e[-1])
        return torch.cat([run_experts(mine, rows_RD[:end], offsets_e), torch.full_like(rows_RD[end:], float("nan"))])

    with torch.no_grad():
        return schedule.layer(x_TD, lambda x: (ids_of(case, rank), weights_TK), experts, torch.tanh)


def layer_by(planes: str) -> Tensor:
    groups, streams = [dist.new_group() for _ in range(2)], make_streams("cpu")
    options = replace(FIXED, planes=planes)
    schedule = ThreeStream(*groups, CASE.num_experts, streams, options, CASE.top_k)
    results = [layer_on(CASE, dist.get_rank(), schedule) for _ in range(3)]
    streams.close()
    assert all(torch.equal(each, results[0]) for each in results)
    return results[0]


def test_the_layer_has_the_same_bits_over_collectives_windows_and_device_areas() -> None:
    want = run_ranks(4, layer_by, "collectives")
    assert all(map(torch.equal, run_ranks(4, layer_by, "windows"), want))
    world = World(4)

    def task(rank: int) -> Tensor:
        streams = make_streams("cpu", overlap=False)
        schedule = ThreeStream(None, None, CASE.num_experts, streams, FIXED, CASE.top_k)
        schedule.push = SimpleNamespace(rank=rank, size=4, name="")  # type: ignore[assignment]
        planes = WindowPlanes(world.link(rank), streams, FIXED.push_share)
        schedule.fixed_back = WayBack(planes, 4, FIXED.codec, schedule.computing)
        return [layer_on(CASE, rank, schedule) for _ in range(3)][-1]

    found = world.run(task)
    assert all(map(torch.equal, found, want))
    assert any(bool((y_TD - torch.tanh(tokens_of(CASE, rank))).any()) for rank, y_TD in enumerate(found))
