"""Geometry against a painted grid: every answer is checked element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import FormatError
from ckptd.plan import cover


@st.composite
def boxes_in_region(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A region and boxes inside it, overlapping at will."""
    width = draw(st.integers(0, 3))
    region_low = np.array([draw(st.integers(0, 3)) for _ in range(width)], np.int64)
    region_high = region_low + np.array([draw(st.integers(1, 4)) for _ in range(width)], np.int64)
    lows, highs = [], []
    for _ in range(draw(st.integers(0, 6))):
        low = [draw(st.integers(int(lo), int(hi) - 1)) for lo, hi in zip(region_low, region_high, strict=True)]
        lows.append(low)
        highs.append([draw(st.integers(lo + 1, int(hi))) for lo, hi in zip(low, region_high, strict=True)])
    shape = (len(lows), width)
    return region_low, region_high, np.array(lows, np.int64).reshape(shape), np.array(highs, np.int64).reshape(shape)


def painted(region_high: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many boxes hold each element."""
    grid = np.zeros(tuple(region_high), int)
    for lo, hi in zip(low, high, strict=True):
        grid[tuple(slice(x, y) for x, y in zip(lo, hi, strict=True))] += 1
    return grid


def window(region_low: np.ndarray, region_high: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in zip(region_low, region_high, strict=True))


@settings(max_examples=200, deadline=None)
@given(boxes_in_region())
def test_tiles_agrees_with_counting(boxes: tuple[np.ndarray, ...]) -> None:
    region_low, region_high, low, high = boxes
    counts = painted(region_high, low, high)[window(region_low, region_high)]
    assert cover.tiles(region_low, region_high, low, high) == bool((counts == 1).all())


@settings(max_examples=200, deadline=None)
@given(boxes_in_region())
def test_disjoint_parts_and_the_rest_make_up_the_region(boxes: tuple[np.ndarray, ...]) -> None:
    region_low, region_high, low, high = boxes
    parts, (left_low, left_high) = cover.disjoint(region_low, region_high, low, high)
    covered = painted(region_high, low, high) > 0
    taken = painted(region_high, parts.low, parts.high)
    left = painted(region_high, left_low, left_high)
    inside = window(region_low, region_high)
    assert ((taken + left)[inside] == 1).all()
    assert ((taken == 1) == covered)[inside].all()
    for source, part_low, part_high in zip(parts.source, parts.low, parts.high, strict=True):
        assert (part_low >= low[source]).all()
        assert (part_high <= high[source]).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(boxes_in_region(), max_size=6), st.sampled_from([1, 2**40, 2**60]))
def test_many_regions_at_once_as_one_by_one(cases: list[tuple[np.ndarray, ...]], scale: int) -> None:
    """Regions of different dimensions, padded to one width; coordinates up to the largest that there are."""
    width = max((len(case[0]) for case in cases), default=0)

    def padded(column: np.ndarray, fill: int) -> np.ndarray:
        column = np.atleast_2d(column) * scale
        return np.pad(column, ((0, 0), (0, width - column.shape[1])), constant_values=fill)

    columns = [[padded(case[i], i % 2) for case in cases] for i in range(4)]
    region_low, region_high, low, high = (np.concatenate([np.zeros((0, width), np.int64), *some]) for some in columns)
    first = np.cumsum([0, *(len(case[2]) for case in cases)])
    expected = [cover.tiles(*(np.asarray(column) for column in case)) for case in cases]
    assert cover.tiled(cover.Regions(region_low, region_high, first, low, high)).tolist() == expected


def test_regions_are_looked_at_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quarters of squares, every third of them with a gap and an overlap of one size."""
    squares = np.arange(30)
    first = np.arange(31) * 4
    quarter = np.array([[0, 0], [0, 5], [5, 0], [5, 5]])
    low = (quarter[None] + squares[:, None, None]).reshape(-1, 2)
    high = low + 5
    high[first[1::3] - 1, 0] -= 1
    low[first[1::3] - 2, 0] -= 1
    region_low = np.repeat(squares[:, None], 2, axis=1)
    monkeypatch.setattr(cover, "_CORNERS_AT_ONCE", 50)
    found = cover.tiled(cover.Regions(region_low, region_low + 10, first, low, high))
    assert found.tolist() == [number % 3 != 0 for number in range(30)]


def test_more_corners_than_there_is_room_for_are_no_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T
    region = np.zeros(4, np.int64), np.full(4, 2)
    assert cover.tiles(*region, corners, corners + 1)
    monkeypatch.setattr(cover, "_MAX_CORNERS", 100)
    assert not cover.tiles(*region, corners, corners + 1)


def test_disjoint_prefers_the_first() -> None:
    low, high = np.array([[0], [2]]), np.array([[6], [9]])
    parts, (left, _) = cover.disjoint(np.array([0]), np.array([9]), low, high)
    assert parts.source.tolist() == [0, 1]
    assert parts.low.tolist() == [[0], [6]]
    assert not len(left)


@settings(max_examples=300, deadline=None)
@given(boxes_in_region())
def test_a_hole_is_met_by_no_box_and_found_where_there_must_be_one(boxes: tuple[np.ndarray, ...]) -> None:
    region_low, region_high, low, high = boxes
    hole = cover.hole(*boxes)
    if hole is None:
        assert cover.volume(low, high).sum() >= cover.volume(region_low, region_high)
        return
    assert (hole[0] >= region_low).all()
    assert (hole[1] <= region_high).all()
    assert (hole[0] < hole[1]).all()
    assert not painted(region_high, low, high)[window(*hole)].any()


def test_overlap_with_a_gap_of_the_same_size_is_no_tiling() -> None:
    low, high = np.array([[0], [1], [3]]), np.array([[2], [3], [4]])
    assert not cover.tiles(np.array([0]), np.array([5]), low, high)
    assert cover.tiles(np.array([0]), np.array([4]), *(np.array(x) for x in ([[0], [2]], [[2], [4]])))


def test_many_tiles_are_recognised() -> None:
    rows, columns = np.divmod(np.arange(300 * 300), 300)
    low = np.stack([rows * 3, columns * 5], axis=1)
    assert cover.tiles(np.zeros(2, np.int64), np.array([900, 1500]), low, low + np.array([3, 5]))


def test_hostile_overlaps_are_refused() -> None:
    low = np.arange(cover.MAX_OVERLAPPING + 1)[:, None]
    with pytest.raises(FormatError, match="overlapping"):
        cover.disjoint(np.array([0]), np.array([10**6]), low, low + 2)
