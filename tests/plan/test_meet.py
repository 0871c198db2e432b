"""The spatial join against every pair, and how many pairs it looks at for layouts that are large or made to be bad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import Box, cut, flat_boxes
from ckptd.plan import meet
from ckptd.plan.meet import Boxes, meetings


def boxes(entries: list[tuple[int, tuple[int, ...], tuple[int, ...]]], width: int) -> Boxes:
    """Boxes of (group, low, high), sorted by group."""
    entries = sorted(entries, key=lambda entry: entry[0])
    columns = ([entry[i] for entry in entries] for i in range(3))
    group, low, high = (np.array(column, np.int64) for column in columns)
    return Boxes(group, low.reshape(len(entries), width), high.reshape(len(entries), width))


def every_pair(wants: Boxes, chunks: Boxes) -> list[tuple[int, int]]:
    low = np.maximum(wants.low[:, None], chunks.low[None])
    high = np.minimum(wants.high[:, None], chunks.high[None])
    hit = (low < high).all(axis=2) & (wants.group[:, None] == chunks.group[None])
    return list(zip(*(column.tolist() for column in np.nonzero(hit)), strict=True))


def found(wants: Boxes, chunks: Boxes) -> list[tuple[int, int]]:
    pairs = meetings(wants, chunks)
    assert pairs is not None
    return list(zip(*(column.tolist() for column in pairs), strict=True))


@st.composite
def many_boxes(draw: st.DrawFn, width: int, scale: int) -> Boxes:
    """Boxes of a few groups, of all sizes, empty ones among them, overlapping at will."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    count, groups = draw(st.integers(0, 60)), draw(st.integers(1, 3))
    low = random.integers(0, draw(st.sampled_from([1, 4, 40])), (count, width)) * scale
    high = low + random.integers(0, draw(st.sampled_from([2, 3, 40])), (count, width)) * scale
    return Boxes(np.sort(random.integers(0, groups, count)), low, high)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_pair_once_in_order(data: st.DataObject) -> None:
    """Also with coordinates so large that keys made of them would overflow."""
    width = data.draw(st.integers(0, 3))
    scale = data.draw(st.sampled_from([1, 2**55]))
    wants, chunks = data.draw(many_boxes(width, scale)), data.draw(many_boxes(width, scale))
    few, at_once = meet._FEW, meet._AT_ONCE
    meet._FEW, meet._AT_ONCE = data.draw(st.sampled_from([(0, 7), (1, 1000), (few, at_once)]))
    try:
        assert found(wants, chunks) == every_pair(wants, chunks)
    finally:
        meet._FEW, meet._AT_ONCE = few, at_once


def test_more_pairs_than_are_wanted() -> None:
    some = boxes([(0, (0,), (9,))] * 5, 1)
    assert meetings(some, some, 24) is None
    assert found(some, some) == [(i, j) for i in range(5) for j in range(5)]


class Counted:
    """How many pairs a join looks at, and the most copies of boxes that it makes in one pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked = 0
        self.copies = 0
        look, copies = meet._look, meet._copies

        def counting_look(wants: Boxes, chunks: Boxes, asked: meet._Items, held: meet._Items) -> object:
            each = np.searchsorted(held.task, asked.task, "right") - np.searchsorted(held.task, asked.task, "left")
            self.looked += int(each.sum())
            return look(wants, chunks, asked, held)

        def counting_copies(*arguments: object) -> meet._Items:
            made = copies(*arguments)  # type: ignore[arg-type]
            self.copies = max(self.copies, len(made.task))
            return made

        monkeypatch.setattr(meet, "_look", counting_look)
        monkeypatch.setattr(meet, "_copies", counting_copies)


def layout(kind: str, count: int) -> Boxes:
    """About `count` boxes that tile a two-dimensional tensor."""
    side = int(count**0.5)
    if kind == "rows":
        low = np.stack([np.arange(count) * 3, np.zeros(count, np.int64)], axis=1)
        return Boxes(np.zeros(count, np.int64), low, low + np.array([3, 1000]))
    if kind == "grid":
        low = np.stack(np.divmod(np.arange(side * side), side), axis=1) * np.array([3, 5])
        return Boxes(np.zeros(len(low), np.int64), low, low + np.array([3, 5]))
    if kind == "columns of different cuts":
        entries = []
        for column in range(8):
            bounds = np.unique(np.random.default_rng(column).integers(1, 10 * count, count // 8))
            for start, stop in zip([0, *bounds.tolist()], [*bounds.tolist(), 10 * count], strict=True):
                entries.append((0, (start, column), (stop, column + 1)))
        return boxes(entries, 2)
    shape, entries = (count // 2, 1009), []
    bounds = np.unique(np.random.default_rng(0).integers(1, shape[0] * shape[1], count // 3)).tolist()
    for start, stop in zip([0, *bounds], [*bounds, shape[0] * shape[1]], strict=True):
        for box in flat_boxes(shape, start, stop):
            entries.append((0, box.offsets, tuple(o + s for o, s in zip(*box, strict=True))))
    return boxes(entries, 2)


def half_shifted(chunks: Boxes) -> Boxes:
    """Wants that are no chunks: two halves of neighbours each."""
    shift = (chunks.high - chunks.low) // 2
    end = chunks.high.max(axis=0)
    low, high = np.minimum(chunks.low + shift, end), np.minimum(chunks.high + shift, end)
    return Boxes(chunks.group, low, np.maximum(high, low))


@pytest.mark.parametrize("kind", ["rows", "grid", "columns of different cuts", "flat ranges"])
@pytest.mark.parametrize("asking", ["the same", "shifted", "one rank", "all columns"])
def test_work_is_near_linear(kind: str, asking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, not seconds: what is looked at is a small multiple of boxes and answers."""
    chunks = layout(kind, 20_000)
    end = chunks.high.max(axis=0)
    starts = np.arange(0, end[1], max(end[1] // 50, 1))
    columns = np.stack([np.zeros_like(starts), starts], axis=1)
    wants = {
        "the same": chunks,
        "shifted": half_shifted(chunks),
        "one rank": Boxes(np.zeros(1, np.int64), end[None] // 3, end[None] // 2),
        "all columns": Boxes(
            np.zeros(len(starts), np.int64),
            columns,
            np.stack([np.full_like(starts, end[0]), np.append(starts[1:], end[1])], axis=1),
        ),
    }[asking]
    counted = Counted(monkeypatch)
    answer = len(found(wants, chunks))
    assert answer >= min(len(wants.group) * 0.9, 1000)
    boxes_and_answers = len(chunks.group) + len(wants.group) + answer
    assert counted.looked <= 40 * boxes_and_answers
    assert counted.copies <= 8 * boxes_and_answers


def test_many_tensors_take_no_more_than_one_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    group = np.repeat(np.arange(5000), 40)
    low = np.tile(np.arange(40), 5000)[:, None] * 7
    chunks = Boxes(group, low, low + 7)
    counted = Counted(monkeypatch)
    assert len(found(half_shifted(chunks), chunks)) == 5000 * (40 + 39)
    assert counted.looked <= 40 * 5000 * 16 * 2


@pytest.mark.parametrize("kind", ["one place", "nested", "diagonal", "chain", "crosses"])
def test_chunks_that_are_made_to_be_bad(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than want by chunk, and no copies without end."""
    number = np.arange(2000)
    low, high = {
        "one place": (np.zeros((2000, 2), np.int64), np.full((2000, 2), 5000)),
        "nested": (np.stack([number, number], 1), np.stack([5000 - number, 5000 - number], 1)),
        "diagonal": (np.stack([number, number], 1), np.stack([number + 1, number + 1], 1)),
        "chain": (np.stack([number, number], 1), np.stack([number + 500, number + 500], 1)),
        "crosses": (
            np.stack([np.where(number % 2, 0, number), np.where(number % 2, number, 0)], 1),
            np.stack([np.where(number % 2, 5000, number + 1), np.where(number % 2, number + 1, 5000)], 1),
        ),
    }[kind]
    chunks = Boxes(np.zeros(2000, np.int64), low, high)
    starts = np.stack(np.divmod(np.arange(400), 20), axis=1) * 250
    wants = Boxes(np.zeros(400, np.int64), starts, starts + 250)
    counted = Counted(monkeypatch)
    assert found(wants, chunks) == every_pair(wants, chunks)
    assert counted.looked <= 400 * 2000
    assert counted.copies <= 400 * 2000


def test_chunks_as_the_format_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and rows over 4 x 6 ranks, cut into small chunks, wanted by 5 x 3."""
    shape = (600, 960)

    def grid(rows: int, columns: int) -> list[Box]:
        return [
            Box((r * 600 // rows, c * 960 // columns), (600 // rows, 960 // columns))
            for r in range(rows)
            for c in range(columns)
        ]

    def entry(box: Box) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        return 0, box.offsets, tuple(o + s for o, s in zip(*box, strict=True))

    chunks = boxes([entry(chunk) for shard in grid(4, 6) for chunk in cut(shard, 4, 128)], 2)
    wants = boxes([entry(box) for box in grid(5, 3)], 2)
    counted = Counted(monkeypatch)
    pairs = found(wants, chunks)
    assert len(pairs) == len(chunks.group) == shape[0] * shape[1] // 32
    assert counted.looked <= 20 * len(pairs)
