"""Which boxes meet which: all pairs of a wanted box and a chunk that share elements, for many tensors at once.

Owns one question, a spatial join in any number of dimensions. Invariants: each pair once, ordered by want, then chunk;
memory is what the answer takes and a multiple of the boxes; work is near-linear in boxes and answer for chunks that
hardly overlap, and never more than want by chunk of the same tensor. Knows nothing of coverage, ranks or bytes.

How: wants and chunks of one tensor are a *task*. A task with few pairs has each of them looked at. A larger one is cut
along the dimension in which its chunks begin at the most places, into bins bounded by those places; a box goes into
every bin that it reaches, and each bin is a task again. Bins are made so coarse that a chunk has about two copies at
most on average, and a task is only cut where that halves its pairs. A pair that meets in several bins counts in the
first of them alone. All tasks of all tensors are cut in the same few passes over arrays, so that many small tensors
cost what a large one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_AT_ONCE = 2**18
"""Pairs that are looked at together, and copies of wants that one pass may make in any case."""

_FEW = 16
"""A task with at most so many pairs for each of its boxes is not cut further."""

_MOST_COPIES = 8
"""Copies of chunks, on average, from which on nothing is cut further."""

_MOST_PASSES = 24

_KEY_LIMIT = 2**62


class Boxes(NamedTuple):
    """Boxes grouped by tensor: `group` ascending; `low` inclusive and `high` exclusive, [n, D]."""

    group: Ints
    low: Ints
    high: Ints


class _Items(NamedTuple):
    """Copies of boxes in tasks: `task` ascending; `box` is its index; bit b of `first` is cleared in the copies that
    pass b put into other bins than the first."""

    task: Ints
    box: Ints
    first: npt.NDArray[np.int32]

    def take(self, chosen: npt.NDArray[np.generic] | slice) -> _Items:
        return _Items(self.task[chosen], self.box[chosen], self.first[chosen])


def meetings(wants: Boxes, chunks: Boxes, limit: int | None = None) -> tuple[Ints, Ints] | None:
    """(want, chunk) of every pair of one group that shares elements, by want, then chunk; None if there are more than
    `limit`. Empty boxes meet nothing."""
    # One number a pair: sorted in place, and half the memory of two.
    width = max(len(chunks.group), 1)
    found = [np.zeros(0, np.int64)]
    total = 0
    for want, chunk in _join(wants, chunks, _whole(wants), _whole(chunks), 0):
        found.append(want * width + chunk)
        total += len(want)
        if limit is not None and total > limit:
            return None
    pairs = np.concatenate(found)
    del found
    pairs.sort()
    want = pairs // width
    pairs -= want * width
    return want, pairs


def _whole(boxes: Boxes) -> _Items:
    """Every box once, in the task of its group; empty ones nowhere."""
    held = np.flatnonzero((boxes.low < boxes.high).all(axis=1)).astype(np.int64)
    return _Items(boxes.group[held], held, np.full(len(held), -1, np.int32))


def _join(wants: Boxes, chunks: Boxes, asked: _Items, held: _Items, passes: int) -> Iterator[tuple[Ints, Ints]]:
    """The pairs of all tasks, in any order."""
    asked, held, tasks = _matched(asked, held)
    asking, holding = np.bincount(asked.task, minlength=tasks), np.bincount(held.task, minlength=tasks)
    large = asking * holding > _FEW * (asking + holding)
    if passes == _MOST_PASSES or len(held.task) > _MOST_COPIES * len(chunks.group):
        large[:] = False
    if not large.any():
        yield from _look(wants, chunks, asked, held)
        return
    yield from _look(wants, chunks, *(items.take(~large[items.task]) for items in (asked, held)))
    asked, held, tasks = _matched(*(items.take(large[items.task]) for items in (asked, held)))
    cuts = _best_cuts(wants, chunks, asked, held, tasks)
    useful = _useful(cuts, asked, held, tasks)
    yield from _look(wants, chunks, *(items.take(~useful[items.task]) for items in (asked, held)))
    if not useful.any():
        return
    base = np.cumsum(cuts.bins) - cuts.bins
    chosen = useful[held.task]
    held = _copies(held.take(chosen), cuts.held[:, chosen], base, passes)
    chosen = useful[asked.task]
    asked, reach = asked.take(chosen), cuts.asked[:, chosen]
    del cuts, chosen, useful
    for part in _bounded(reach, len(held.task)):
        yield from _join(wants, chunks, _copies(asked.take(part), reach[:, part], base, passes), held, passes + 1)


def _matched(asked: _Items, held: _Items) -> tuple[_Items, _Items, int]:
    """The tasks that have wants as well as chunks, numbered anew; and how many they are."""
    both = np.intersect1d(_distinct(asked.task), _distinct(held.task), assume_unique=True)
    matched = []
    for items in (asked, held):
        position = np.searchsorted(both, items.task)
        kept = position < len(both)
        kept[kept] = both[position[kept]] == items.task[kept]
        items = items._replace(task=position)
        matched.append(items if kept.all() else items.take(kept))
    return matched[0], matched[1], len(both)


def _distinct(ascending: Ints) -> Ints:
    return np.asarray(ascending[np.diff(ascending, prepend=-1) != 0])


def _look(wants: Boxes, chunks: Boxes, asked: _Items, held: _Items) -> Iterator[tuple[Ints, Ints]]:
    """The pairs of tasks, by looking at every pair of a want and a chunk of one task."""
    starts = np.searchsorted(held.task, asked.task, "left")
    ends = np.cumsum(np.searchsorted(held.task, asked.task, "right") - starts)
    shift = starts - np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    copied = bool((asked.first != -1).any() and (held.first != -1).any())
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, _AT_ONCE):
        end = min(begin + _AT_ONCE, total)
        run = slice(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(ends, end - 1, "right")) + 1)
        counts = np.diff(np.minimum(ends[run], end), prepend=begin)
        left = np.repeat(np.arange(run.start, run.stop), counts)
        right = np.arange(begin, end) + np.repeat(shift[run], counts)
        if copied:
            counted = (asked.first[left] | held.first[right]) == -1
            left, right = left[counted], right[counted]
        want, chunk = asked.box[left], held.box[right]
        for dimension in range(wants.low.shape[1]):
            hit = wants.low[want, dimension] < chunks.high[chunk, dimension]
            hit &= chunks.low[chunk, dimension] < wants.high[want, dimension]
            if not hit.all():
                want, chunk = want[hit], chunk[hit]
        if len(want):
            yield want, chunk


class _Cuts(NamedTuple):
    """How tasks may be cut: into how many bins, and the first and last bin [2, n] that wants and chunks reach (last <
    first: none)."""

    bins: Ints
    asked: Ints
    held: Ints


def _best_cuts(wants: Boxes, chunks: Boxes, asked: _Items, held: _Items, tasks: int) -> _Cuts:
    """Each task along the dimension that makes the most bins of it."""
    best = _Cuts(np.ones(tasks, np.int64), *(np.zeros((2, len(items.task)), np.int64) for items in (asked, held)))
    starts = np.searchsorted(held.task, np.arange(tasks))
    for dimension in range(chunks.low.shape[1]):
        low = chunks.low[held.box, dimension]
        varied = np.minimum.reduceat(low, starts) != np.maximum.reduceat(low, starts)
        if not varied.any():
            continue
        chosen = varied[held.task]
        task, low, high = held.task[chosen], low[chosen], chunks.high[held.box[chosen], dimension]
        places = _Places.of(task, low, tasks)
        begin, end = places.reached(task, low, high)
        # In floating point the sum cannot wrap around, and how coarse the bins are is no matter of single copies.
        further = np.bincount(task, (end - begin).astype(np.float64), tasks)
        stride = np.maximum(np.ceil(further / np.maximum(np.bincount(task, minlength=tasks), 1)).astype(np.int64), 1)
        bins = -(-np.diff(places.first) // stride)
        better = varied & (bins > best.bins)
        best.bins[better] = bins[better]
        kept = better[task]
        task = task[kept]
        best.held[:, better[held.task]] = np.stack([begin[kept], end[kept]]) // stride[task]
        chosen = better[asked.task]
        task, index = asked.task[chosen], asked.box[chosen]
        reached = places.reached(task, wants.low[index, dimension], wants.high[index, dimension])
        best.asked[:, chosen] = np.stack(reached) // stride[task]
    return best


class _Places(NamedTuple):
    """Where the chunks of tasks begin in one dimension: keys of (task, coordinate), ascending and distinct; those of
    task t are `first[t]` to `first[t + 1]`. Coordinates are counted by `ranks` where keys would be too large."""

    keys: Ints
    first: Ints
    ranks: Ints | None
    span: int

    @classmethod
    def of(cls, task: Ints, low: Ints, tasks: int) -> _Places:
        """The places of all tasks; some may have none."""
        ranks = None
        span = int(low.max()) + 2
        if span * (tasks + 1) > _KEY_LIMIT:
            ranks = np.unique(low)
            low = np.searchsorted(ranks, low)
            span = len(ranks) + 1
        keys = task * span + low
        if (np.diff(keys) < 0).any():
            keys.sort()
        keys = _distinct(keys)
        return cls(keys, np.searchsorted(keys, np.arange(tasks + 1) * span), ranks, span)

    def reached(self, task: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """The first and last place, counted from the task's own first, whose stretch (up to the next one) boxes reach;
        last < first for boxes that end before the first place."""
        first = self.first[task]
        begin = self._before(task, low + 1) - first
        return np.maximum(begin, 0), np.maximum(self._before(task, high) - first, -1)

    def _before(self, task: Ints, coordinate: Ints) -> Ints:
        """The last place before a coordinate, maybe of a task before."""
        if self.ranks is not None:
            coordinate = np.searchsorted(self.ranks, coordinate)
        return np.searchsorted(self.keys, task * self.span + np.minimum(coordinate, self.span - 1)) - 1


def _useful(cuts: _Cuts, asked: _Items, held: _Items, tasks: int) -> Flags:
    """The tasks of which the cut halves the pairs."""
    base = np.cumsum(cuts.bins) - cuts.bins
    total = int(cuts.bins.sum())
    counts = []
    for items, reach in ((asked, cuts.asked), (held, cuts.held)):
        begin, end = base[items.task] + reach
        there = begin <= end
        changes = np.bincount(begin[there], minlength=total + 1) - np.bincount(end[there] + 1, minlength=total + 1)
        counts.append(np.cumsum(changes[:total]))
    pairs = np.add.reduceat(counts[0] * counts[1], base)
    before = np.bincount(asked.task, minlength=tasks) * np.bincount(held.task, minlength=tasks)
    return np.asarray(2 * pairs <= before)


def _copies(items: _Items, reach: Ints, base: Ints, passes: int) -> _Items:
    """The items in all the bins that they reach, as tasks of the next pass."""
    counts = np.maximum(reach[1] - reach[0] + 1, 0)
    source = np.repeat(np.arange(len(counts)), counts)
    further = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    task = base[items.task[source]] + reach[0][source] + further
    first = items.first[source]
    first[further > 0] &= ~np.int32(1 << passes)
    copies = _Items(task, items.box[source], first)
    if (np.diff(task) < 0).any():
        copies = copies.take(np.argsort(task, kind="stable"))
    return copies


def _bounded(reach: Ints, chunks: int) -> Iterator[slice]:
    """Runs of wants of which a pass makes a bounded number of copies: all of them, unless wants reach many bins."""
    ends = np.cumsum(np.maximum(reach[1] - reach[0] + 1, 0))
    most = max(_AT_ONCE, 4 * (chunks + len(ends)))
    start = 0
    while start < len(ends):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + most, "right")), start + 1)
        yield slice(start, stop)
        start = stop
