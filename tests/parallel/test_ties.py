"""Weights that two parts of a model share: kept where they stay one, refused where sharding would part them."""

import pytest
from torch import nn

import moeweave as mw
from run_ranks import run_ranks


class Tied(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.layers = nn.ModuleList([mw.MoELayer(8, 6, 4, 2), mw.MoELayer(8, 6, 4, 2)])
        if where == "ends":
            self.head.weight = self.embed.weight
        elif where == "layers":
            self.layers[1].router.weight = self.layers[0].router.weight
        elif where == "experts":
            self.layers[1].experts.down_proj = self.layers[0].experts.down_proj


def wrap(where: str, sizes: dict, plan: dict) -> bool:
    model = mw.parallelize(Tied(where), mw.Mesh(device="cpu", **sizes), mw.Plan(**plan))
    return model.head.weight is model.embed.weight


def test_tied_ends_stay_one_weight():
    assert run_ranks(2, wrap, "ends", {"dp": 2, "ep": 2}, {}) == [True, True]


@pytest.mark.parametrize(
    ("where", "sizes", "plan"),
    [("layers", {"dp": 2}, {}), ("experts", {"dp": 2, "ep": 2}, {}), ("experts", {"dp": 2, "ep": 2}, {"data": "ddp"})],
)
def test_a_weight_shared_by_units_sharded_apart_is_refused_by_name(where, sizes, plan):
    with pytest.raises(Exception, match=r"layers\.0\..*and layers\.1\..* are one weight") as caught:
        run_ranks(2, wrap, where, sizes, plan)
    assert "UnsupportedModel" in str(caught.value)


def test_under_ddp_without_ep_a_shared_weight_stays_one():
    assert run_ranks(2, wrap, "layers", {"dp": 2}, {"data": "ddp"}) == [False, False]
