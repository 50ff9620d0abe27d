"""`generate` on wrapped models: the tokens of the unwrapped model, and no hang when ranks end at different times."""

import pytest
import torch

import moeweave as mw
from hf_zoo import ZOO
from run_ranks import run_ranks


def prompt(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(3, 60, (1 + rank % 2, 4 + 3 * rank), generator=generator)


def generate(model: torch.nn.Module, rank: int) -> torch.Tensor:
    model.config.output_router_logits = False  # early releases fail on it with a cache, wrapped or not
    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt(rank), max_new_tokens=2 + 5 * rank, **options)


def wrapped_against_unwrapped(name: str, sizes: dict, plan: dict) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    mesh = mw.Mesh(**sizes)
    model = mw.parallelize(ZOO[name]().eval(), mesh, mw.Plan(**plan))
    got = generate(model, mesh.rank)
    load = [int(load_E.sum()) for load_E in mw.expert_load(model).values()]
    again = generate(model, mesh.rank)
    assert torch.equal(got, again)
    return got, generate(ZOO[name]().eval(), mesh.rank), load


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    ("ranks", "sizes", "plan"),
    [
        pytest.param(2, {"dp": 2, "ep": 2}, {}, id="ep2"),
        pytest.param(4, {"dp": 4, "ep": 2}, {"dispatcher": "alltoall"}, id="ep2-edp2"),
        pytest.param(2, {"dp": 2}, {}, id="fsdp"),
    ],
)
def test_unequal_lengths_end_together_with_the_right_tokens(name, ranks, sizes, plan):
    for rank, (got, want, load) in enumerate(run_ranks(ranks, wrapped_against_unwrapped, name, sizes, plan)):
        assert got.shape == want.shape == (1 + rank % 2, 4 + 3 * rank + 2 + 5 * rank)
        assert torch.equal(got, want)
        # Ranks that were done early served the others with no token of their own: a route for every token seen, top-2.
        rows, seen = got.shape[0], got.shape[1] - 1
        assert load == [2 * rows * seen] * len(load)
