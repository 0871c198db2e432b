"""Gaps and repetitions among chunks are found, whatever boxes they are of."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.box import Box, cut
from ckptd.core.catalog import Catalog
from ckptd.plan.whole import missing, repeated


def catalog_of(shape: tuple[int, ...], boxes: list[Box], ranks: list[int] | None = None) -> Catalog:
    width = len(shape)
    return Catalog.build(
        [("x", "int16", shape)],
        [0] * len(boxes),
        np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), width),
        np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), width),
        **({} if ranks is None else {"rank": ranks}),
    )


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(2, 12), st.data())
def test_any_chunk_that_is_left_out_or_doubled_is_found(
    shape: list[int], chunk_bytes: int, data: st.DataObject
) -> None:
    extent = tuple(shape)
    boxes = list(cut(Box.whole(extent), 2, chunk_bytes))
    whole = catalog_of(extent, boxes)
    assert (missing(whole), list(repeated(whole))) == ([], [])
    chosen = data.draw(st.integers(0, len(boxes) - 1))
    doubled = catalog_of(extent, [*boxes, boxes[chosen]])
    assert [{doubled.box(row) for row in pair} for pair in repeated(doubled)] == [{boxes[chosen]}]
    assert missing(doubled) == []
    lacking = catalog_of(extent, boxes[:chosen] + boxes[chosen + 1 :])
    assert bool(missing(lacking)) == bool(len(lacking) and 0 not in shape)


def test_what_is_missing_is_named() -> None:
    left, right = Box((0, 0), (4, 2)), Box((0, 3), (4, 2))
    assert missing(catalog_of((4, 5), [left, right])) == ["tensor 'x': its chunks hold 32 of 40 bytes"]
    overlapping = [left, right, Box((0, 0), (4, 1))]
    assert missing(catalog_of((4, 5), overlapping)) == ["tensor 'x': elements [0:4, 2:3] are in no chunk"]
    assert missing(catalog_of((4, 5), [*overlapping, Box((0, 1), (4, 3))])) == []


def test_rows_of_single_ranks_are_theirs_alone() -> None:
    half = Box((0,), (2,))
    assert missing(catalog_of((4,), [half, half], [3, 4])) == []
    assert list(repeated(catalog_of((4,), [half, half], [3, 4]))) == []
    assert missing(catalog_of((4,), [half, Box((2,), (2,))], [-1, 4])) == ["tensor 'x': its chunks hold 4 of 8 bytes"]


def test_nothing_is_whole() -> None:
    none = Catalog.build([], [], np.zeros((0, 0)), np.zeros((0, 0)))
    assert (missing(none), list(repeated(none))) == ([], [])
