"""The comparison's arithmetic: ratios and intervals from seconds per round."""

import numpy as np
import pytest

from moeweave.launch.compare.quickstart import CONTROL, OURS, summarise


def test_ratio_is_the_geometric_mean_of_speeds_round_by_round():
    result = summarise({OURS: [1.0, 2.0, 4.0], CONTROL: [1.0, 2.0, 4.0], "other": [2.0, 1.0, 8.0]}, tokens=100)
    assert result["tokens_per_second"] == {OURS: 50.0, CONTROL: 50.0, "other": 50.0}
    assert result["ratios"][CONTROL] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert result["ratios"]["other"]["ratio"] == pytest.approx((2.0 * 0.5 * 2.0) ** (1 / 3))


def test_interval_covers_the_true_ratio_and_narrows_with_rounds():
    rng = np.random.default_rng(1)
    widths = []
    for rounds in (20, 320):
        ours, other = np.exp(rng.normal(0, 0.1, rounds)), 1.3 * np.exp(rng.normal(0, 0.1, rounds))
        ratio = summarise({OURS: ours.tolist(), "other": other.tolist()}, tokens=1)["ratios"]["other"]
        assert ratio["low"] < 1.3 < ratio["high"]
        widths.append(ratio["high"] - ratio["low"])
    assert widths[1] < 0.5 * widths[0]
