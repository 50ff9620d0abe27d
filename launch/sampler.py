"""Which tokens each rank sees in each step: a pure function of the seed and of how many samples went before.

The source is cut into windows of S tokens. Every epoch visits all of them once, in an order of its own. A step takes
the next `batch_size` windows, and data rank r of D the r-th D-th part of them, so another number of ranks sees the
same batches, and a resumed run goes on at the window after the last.

Shape legend: B sequences of this rank, S tokens of a sequence, W windows of the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moeweave.launch.data import Tokens, check_ids


@dataclass(frozen=True)
class Sampler:
    """Batches of one data rank. The position is the number of samples that all ranks together have taken."""

    tokens: Tokens
    seq_length: int
    batch_size: int
    seed: int
    data_rank: int = 0
    data_size: int = 1
    vocab_size: int | None = None

    @property
    def num_windows(self) -> int:
        return len(self.tokens) // self.seq_length

    def batch(self, position: int) -> dict[str, torch.Tensor]:
        """This rank's part of the batch that starts at sample `position`: ids_BS and labels_BS, both int64."""
        per_rank = self.batch_size // self.data_size
        start = position + self.data_rank * per_rank
        rows = [self._window(sample) for sample in range(start, start + per_rank)]
        ids = np.stack(rows).astype(np.int64)
        check_ids(ids, self.vocab_size, self.tokens.source)
        ids_BS = torch.from_numpy(ids)
        return {"input_ids": ids_BS, "labels": ids_BS.clone()}

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what must be the same for it to mean the same."""
        return {"position": position, **self._identity()}

    def resume(self, state: dict[str, Any]) -> int:
        """The position to go on from. Raises ValueError when the data is not what the checkpoint was trained on."""
        for name, now in self._identity().items():
            if state[name] != now:
                raise ValueError(
                    f"checkpoint: its data has {name}={state[name]}, this run {name}={now}, so the position "
                    f"{state['position']} would mean another text. Use the same data and seed, or resume=never."
                )
        return int(state["position"])

    def _identity(self) -> dict[str, int]:
        return {"num_tokens": len(self.tokens), "seq_length": self.seq_length, "seed": self.seed}

    def _window(self, sample: int) -> np.ndarray:
        epoch, place = divmod(sample, self.num_windows)
        window = int(_permutation(self.num_windows, self.seed, epoch)[place]) * self.seq_length
        return np.asarray(self.tokens.ids_N[window : window + self.seq_length])


@lru_cache(maxsize=2)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """order_W of one epoch. PCG64 seeded by both numbers gives the same order on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_windows)
