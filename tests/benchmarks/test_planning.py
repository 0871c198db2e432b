"""The questions of the planning benchmark, small: what is wanted is there, and the figures are of what was asked."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers.dcp_planner import Comparison, peer_table, shard
from benchmarks.planning import LAYOUTS, exponents, measure, scaling_table, slope


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_planned(layout: str) -> None:
    trial = measure(layout, 3000, 180)
    assert 2000 <= trial.chunks <= 3100
    assert trial.parts >= trial.wants > 0
    assert trial.unevenness < 3
    other = measure(layout, 6000, 180)
    assert set(exponents([trial, other])) == {layout}
    rows = [line for line in scaling_table([trial, other]).splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1


def test_the_slope_of_a_power() -> None:
    sizes = [1e4, 1e5, 1e6]
    assert slope(sizes, [3 * size**1.25 for size in sizes]) == pytest.approx(1.25)


@pytest.mark.parametrize("rows", [1, 5, 192, 1000])
def test_shards_are_the_whole_tensor(rows: int) -> None:
    shards = [shard((rows, 3), rank, 192) for rank in range(192)]
    held = np.concatenate([np.arange(low[0], low[0] + size[0]) for low, size in shards])
    assert np.array_equal(held, np.arange(rows))
    assert "| 4 |" in peer_table([Comparison("question", 0.5, 2.0, 7)])
