"""Flat ranges as boxes, against the flattened tensor itself; and many boxes cut at once, against one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import Box, cut, cut_boxes, flat_boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape, and a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_the_boxes_of_a_range_are_its_elements_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    tensor = np.arange(math.prod(shape)).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    runs = [tensor[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1) for box in boxes]
    assert np.concatenate([np.zeros(0, int), *runs]).tolist() == list(range(start, stop))
    assert all(box.inside(shape) and box.elements for box in boxes)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_two_boxes_per_dimension_at_most() -> None:
    boxes = flat_boxes((3, 4, 5), 4, 56)
    assert boxes == [
        Box((0, 0, 4), (1, 1, 1)),
        Box((0, 1, 0), (1, 3, 5)),
        Box((1, 0, 0), (1, 4, 5)),
        Box((2, 0, 0), (1, 3, 5)),
        Box((2, 3, 0), (1, 1, 1)),
    ]


def test_a_range_that_is_no_range_of_the_tensor() -> None:
    for start, stop in ((-1, 2), (2, 1), (0, 13), (13, 13)):
        with pytest.raises(ValueError, match=r"of a tensor of shape \(3, 4\)"):
            flat_boxes((3, 4), start, stop)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_many_boxes_are_cut_as_single_ones_are(data: st.DataObject) -> None:
    chunk_bytes = data.draw(st.sampled_from([8, 16, 40, 200]))
    dimensions = st.integers(0, 4)
    boxes = []
    for width in data.draw(st.lists(dimensions, max_size=5)):
        low = tuple(data.draw(st.lists(st.integers(0, 3), min_size=width, max_size=width)))
        boxes.append(Box(low, tuple(data.draw(st.lists(st.integers(0, 7), min_size=width, max_size=width)))))
    items = data.draw(st.lists(st.sampled_from([1, 2, 8]), min_size=len(boxes), max_size=len(boxes)))
    most = max((len(box.sizes) for box in boxes), default=0)

    def padded(values: list[tuple[int, ...]], fill: int) -> np.ndarray:
        rows = [(*value, *(fill,) * (most - len(value))) for value in values]
        return np.array(rows, np.int64).reshape(len(rows), most)

    columns = padded([box.offsets for box in boxes], 0), padded([box.sizes for box in boxes], 1)
    source, offsets, sizes = cut_boxes(*columns, np.array(items, np.int64), chunk_bytes)
    expected = [
        (number, chunk)
        for number, (box, item) in enumerate(zip(boxes, items, strict=True))
        for chunk in cut(box, item, chunk_bytes)
    ]
    assert source.tolist() == [number for number, _ in expected]
    assert np.array_equal(offsets, padded([chunk.offsets for _, chunk in expected], 0))
    assert np.array_equal(sizes, padded([chunk.sizes for _, chunk in expected], 1))
