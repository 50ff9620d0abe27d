"""The mesh for another number of ranks: exactly that many, the data axes first, and refused where it cannot be."""

import pytest

from moeweave.launch import remesh
from moeweave.parallel.mesh import MeshSizes


@pytest.mark.parametrize(
    "sizes, world, wanted",
    [
        (dict(dp=4, ep=4), 2, dict(dp=2, ep=2)),
        (dict(dp=2, ep=2), 4, dict(dp=4, ep=2)),
        (dict(dp=4, ep=4, tp=2), 4, dict(dp=2, ep=4, tp=2)),
        (dict(dp=4, ep=4, tp=2), 2, dict(dp=1, ep=2, tp=2)),
        (dict(dp=4, ep=4, tp=2), 1, dict()),
        (dict(dp=2, sp=2, tp=2, pp=2), 8, dict(dp=1, sp=2, tp=2, pp=2)),
        (dict(dp=2, sp=2, tp=2, pp=2), 4, dict(tp=2, pp=2)),  # sp gives way before pp, pp before tp
        (dict(dp=2, sp=2, tp=2, pp=2), 2, dict(tp=2)),
        (dict(dp=2, dp_replicate=2), 6, dict(dp=2, dp_replicate=3)),  # shards keep their size, copies come and go
        (dict(dp=4, dp_replicate=2), 6, dict(dp=6)),
        (dict(dp=4, ep=2, etp=2), 2, dict(dp=2, ep=1, etp=2)),
    ],
)
def test_which_axes_give_way(sizes, world, wanted):
    assert remesh.derive(MeshSizes(**sizes), world, batch_size=48, microbatches=1) == MeshSizes(**wanted)


def test_every_mesh_has_exactly_the_ranks_and_divides_what_the_configured_one_divided():
    sizes = MeshSizes(dp=4, tp=2, pp=2, sp=2, ep=8, etp=2)
    for world in range(1, 65):
        found = remesh.derive(sizes, world, batch_size=world * 12, microbatches=2) if world != 32 else sizes
        assert found.world == world
        for axis in ("tp", "pp", "sp", "ep", "etp"):
            assert getattr(sizes, axis) % getattr(found, axis) == 0


def test_a_batch_that_cannot_be_shared_out_is_refused_with_what_would_help():
    with pytest.raises(
        ValueError, match=r"ranks \(6\).*batch_size \(8\) must be a multiple.*Set a batch_size that 6 x 1"
    ):
        remesh.derive(MeshSizes(dp=8), 6, batch_size=8, microbatches=1)
