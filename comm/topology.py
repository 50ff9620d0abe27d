"""What connects the ranks of a job: hosts, links, and bandwidths that were measured.

`moeweave-bench op=topology` measures and writes a file; `Plan(topology=path)` reads it. A file is of use to jobs on the
same kind of device. What it says of collectives holds for groups of as many ranks as were measured; which ranks form a
node, for jobs of as many ranks, in the same places.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch.distributed as dist

FORMAT = 1


@dataclass(frozen=True)
class Topology:
    """Facts about W ranks; matrices are [from][to], and None on their diagonal.

    Attributes:
        device: "cuda", "npu" or "cpu". device_names: of each rank. hosts: of each rank.
        links: what joins two ranks: "NV18" and the like from the driver, "memory" on one CPU host, "network" between
            hosts, "unknown" where nothing tells.
        peer_access: whether a rank can write into the other's memory.
        pair_gbps: one direction between two ranks while the others rest, GB/s (10^9 bytes).
        all_to_all_gbps, all_gather_gbps: bytes that leave a rank (or reach it) over the time, all ranks at once.
        all_to_all_us: time of the smallest all-to-all: what an exchange costs before it carries anything.
        measured_bytes: size of the array behind the bandwidths.
        push_gbps, dma_gbps: bytes that leave a rank by stores of its cores, and by copy engines, over the time, all
            ranks at once; None where ranks cannot write into each other's memory.
        push_sms: multiprocessors that the stores took, 0 on a CPU.
    """

    device: str
    device_names: list[str]
    hosts: list[str]
    links: list[list[str | None]]
    peer_access: list[list[bool | None]]
    pair_gbps: list[list[float | None]]
    all_to_all_gbps: float
    all_gather_gbps: float
    all_to_all_us: float
    measured_bytes: int
    push_gbps: float | None = None
    dma_gbps: float | None = None
    push_sms: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.hosts)

    @property
    def num_hosts(self) -> int:
        return len(set(self.hosts))

    @property
    def is_one_memory(self) -> bool:
        """Whether every rank can write into every other's memory."""
        return all(access is not False for row in self.peer_access for access in row)

    @property
    def nodes(self) -> list[int]:
        """The node of each rank, named by its first rank: ranks that can write into each other's memory share one."""
        ranks = range(self.num_ranks)
        return [next(a for a in ranks if a == b or (self.peer_access[a][b] and self.peer_access[b][a])) for b in ranks]

    def nodes_in(self, group: dist.ProcessGroup) -> list[int] | None:
        """The node of each rank of `group`; None where the job has another number of ranks than were measured."""
        if dist.get_world_size() != self.num_ranks:
            return None
        nodes = self.nodes
        return [nodes[rank] for rank in dist.get_process_group_ranks(group)]

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a reader never sees half of a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> Topology:
        """Read what `save` wrote. Raises ValueError for a missing file or another content."""
        remedy = "Write one with `moeweave-bench op=topology topology=<path>`."
        try:
            values = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(f"topology ({path}) must be a file. {remedy}") from None
        except ValueError as error:
            raise ValueError(f"topology ({path}) must be JSON ({error}). {remedy}") from None
        names = {"format", *(field.name for field in fields(Topology))}
        needed = {"format", *(field.name for field in fields(Topology) if field.default is MISSING)}
        if not isinstance(values, dict) or values.get("format") != FORMAT or not needed <= set(values) <= names:
            raise ValueError(f"topology ({path}) must hold format {FORMAT} and its fields alone. {remedy}")
        del values["format"]
        return Topology(**values)

    @staticmethod
    def shared(path: str | Path, group: dist.ProcessGroup | None) -> Topology:
        """`load` on the group's first rank, given to all of them: files may differ between hosts, choices must not.

        Raises ValueError on every rank alike.
        """
        found: list[Topology | ValueError | None] = [None]
        if group is None or group.rank() == 0:
            try:
                found = [Topology.load(path)]
            except ValueError as error:
                found = [error]
        if group is not None:
            dist.broadcast_object_list(found, group=group, group_src=0)
        if isinstance(found[0], ValueError):
            raise found[0]
        assert found[0] is not None
        return found[0]
