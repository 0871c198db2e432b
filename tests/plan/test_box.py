"""Flat ranges as boxes, against the flattened tensor itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import Box, flat_boxes


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
