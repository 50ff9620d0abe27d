"""Which sizes a mesh accepts, which ranks its axes name, and what it says to sizes that do not fit."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch.distributed as dist

from moeweave.parallel.mesh import DENSE_AXES, EXPERT_AXES, Mesh, MeshSizes
from run_ranks import RankError, run_ranks

SIZES = [
    dict(dp=dp, tp=tp, sp=sp, ep=ep, etp=etp, dp_replicate=copies)
    for dp, tp, sp, ep, etp, copies in itertools.product((1, 2, 3, 4), (1, 2), (1, 2), (1, 2, 3, 4, 8), (1, 2), (1, 2))
]


def test_sizes_are_accepted_exactly_when_the_experts_regroup_whole() -> None:
    accepted = 0
    for sizes in SIZES:
        ranks, wanted = sizes["dp"] * sizes["sp"] * sizes["tp"], sizes["ep"] * sizes["etp"]
        if ranks % wanted:
            with pytest.raises(ValueError, match=re.escape(f"must divide dp * sp * tp ({ranks})")):
                MeshSizes(**sizes)
            continue
        mesh = MeshSizes(**sizes)
        accepted += 1
        assert mesh.world == ranks * sizes["dp_replicate"]
        assert mesh.edp * wanted == ranks
        assert mesh.dense[1:] == (sizes["dp_replicate"], sizes["dp"], sizes["sp"], sizes["tp"])
        assert mesh.expert[1:] == (sizes["dp_replicate"], mesh.edp, sizes["ep"], sizes["etp"])
        mesh.check_world(mesh.world)
    assert accepted > 100


@pytest.mark.parametrize(
    "sizes, legal",
    [
        (dict(dp=4, ep=3), "ep can be 1, 2, 4."),
        (dict(dp=6, ep=4), "ep can be 1, 2, 3, 6."),
        (dict(dp=4, tp=2, etp=2, ep=8), "With etp=2, ep can be 1, 2, 4."),
        (dict(dp=2, ep=1, etp=3), "ep can be nothing: lower etp."),
    ],
)
def test_a_refusal_lists_what_is_legal(sizes: dict[str, int], legal: str) -> None:
    with pytest.raises(ValueError, match=re.escape(legal)):
        MeshSizes(**sizes)
    for number in re.findall(r"\d+", legal.rpartition("can be")[2]):
        MeshSizes(**{**sizes, "ep": int(number)})


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None, True])
def test_a_size_is_a_whole_number(size: object) -> None:
    with pytest.raises(ValueError, match=r"dp \(.*\) must be a whole number of at least 1"):
        MeshSizes(dp=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes, world, remedy",
    [
        (dict(dp=2), 4, "Set dp=4, or start 2 ranks."),
        (dict(dp=2, tp=2), 8, "Set dp=4, or start 4 ranks."),
        (dict(dp=2, tp=3), 8, "Start a multiple of 3 ranks, or start 6 ranks."),
    ],
)
def test_the_number_of_ranks_must_fit(sizes: dict[str, int], world: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must equal the number of ranks ({world}). {remedy}")):
        MeshSizes(**sizes).check_world(world)


def test_experts_must_divide_over_ep() -> None:
    sizes = MeshSizes(dp=8, ep=4)
    sizes.check_experts(8)
    text = "ep (4) must divide the number of experts (6) of layers.0.mlp.experts. On this many ranks ep can be 1, 2."
    with pytest.raises(ValueError, match=re.escape(text)):
        sizes.check_experts(6, "layers.0.mlp.experts")


def whereabouts(sizes: dict[str, int]) -> dict[str, object]:
    mesh = Mesh(**sizes)
    ranks = {
        axis: dist.get_process_group_ranks(mesh.group(axis)) for axis in dict.fromkeys((*DENSE_AXES, *EXPERT_AXES))
    }
    return {
        **ranks,
        "data": (mesh.data_rank, mesh.data_size),
        "data_group": dist.get_process_group_ranks(mesh.data_group),
        "copies_group": dist.get_process_group_ranks(mesh.copies_group),
        "rank": (mesh.rank, mesh.world, str(mesh.device)),
        "repr": repr(mesh),
    }


def test_axes_of_data_and_experts() -> None:
    found = run_ranks(4, whereabouts, dict(dp=4, ep=2))
    assert [each["data"] for each in found] == [(rank, 4) for rank in range(4)]
    assert [each["ep"] for each in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["edp"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [each["copies_group"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(each["data_group"] == [0, 1, 2, 3] for each in found)
    assert [each["rank"] for each in found] == [(rank, 4, "cpu") for rank in range(4)]
    assert found[0]["repr"] == "Mesh(dp=4, ep=2, device=cpu)"


def test_axes_of_replicas() -> None:
    found = run_ranks(4, whereabouts, dict(dp=2, ep=2, dp_replicate=2))
    assert [each["data"] for each in found] == [(rank, 4) for rank in range(4)]
    assert [each["ep"] for each in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["dp_shard"] for each in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["copies_group"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(each["data_group"] == [0, 1, 2, 3] for each in found)


def test_ranks_that_share_a_batch_have_one_data_rank() -> None:
    found = run_ranks(4, whereabouts, dict(dp=2, tp=2, ep=4))
    assert [each["data"] for each in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [each["tp"] for each in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(each["ep"] == [0, 1, 2, 3] for each in found)
    assert [each["data_group"] for each in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_one_rank_needs_no_launcher() -> None:
    (found,) = run_ranks(1, alone, fresh=True)
    assert found == (0, 1, 0, 1, True)


def alone() -> tuple[int, int, int, int, bool]:
    dist.destroy_process_group()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    mesh = Mesh()
    return mesh.rank, mesh.world, mesh.data_rank, mesh.data_size, dist.is_initialized()


def wrong(sizes: dict[str, object]) -> None:
    Mesh(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes, text",
    [
        (dict(dp=3), r"dp_replicate \* dp \* sp \* tp \* pp \(3\) must equal the number of ranks \(2\)"),
        (dict(dp=2, ep=3), r"ep \* etp \(3 \* 1\) must divide .* ep can be 1, 2\."),
        (dict(dp=2, device="tpu"), r"device \('tpu'\) must be one of cuda, cpu, npu"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: dict[str, object], text: str) -> None:
    with pytest.raises(RankError, match=text):
        run_ranks(2, wrong, sizes, fresh=True)


def unknown_axis() -> None:
    Mesh(dp=2).group("dp")


def test_an_unknown_axis_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RankError, match=r"axis \('dp'\) must be one of pp, dp_replicate, dp_shard, sp, tp, edp, ep, etp"
    ):
        run_ranks(2, unknown_axis, fresh=True)


def test_an_unknown_keyword_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(TypeError, match=r"Mesh has no field 'edp'\. Did you mean '\w+'\?"):
        Mesh(dp=2, edp=2)  # type: ignore[call-arg]
