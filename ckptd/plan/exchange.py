"""The exchange plan: which rank reads each chunk that a load needs, and to whom it passes it on.

Owns the rule by which every byte is read once per job. Invariants: each wanted row has one reader, and that is a rank
that wants it itself; bytes are level over the ranks, and so over nodes by their ranks, as far as who wants what allows;
where that leaves a choice, a rank reads on whose node the row is wanted most; the same question gets the same plan on
every rank (what is computed in floating point is so in one order, with operations that IEEE 754 defines). Knows nothing
of boxes, files or messages.

How: rows wanted by one rank have no choice. The others are grouped by who wants them; each group's bytes are shared out
in proportion to weights of the ranks, which are scaled until the loads are level; then each group is cut into runs of
rows in that proportion, so that ranks read neighbouring chunks; at last single rows are moved where that helps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_SCALINGS = 40
_MOVES = 64
"""Rounds of moving rows; in each every overloaded rank loses one row at most."""

_LEVEL_ENOUGH = 1.01
"""Loads up to this multiple of what is possible at best are left as they are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """Who reads what: `reader[row]` is a rank, or -1 for a catalog row that nobody wants. Everything else follows.

    All answers are sorted by row; so what one rank sends to another and what that one receives have one order.
    """

    reader: Ints
    wanted: tuple[Ints, ...]

    def reads(self, rank: int) -> Ints:
        """The rows that a rank reads."""
        order, first = self._read
        return order[first[rank] : first[rank + 1]]

    def sends(self, rank: int) -> tuple[Ints, Ints]:
        """(rows, target ranks): what a rank passes on to the other ranks that want it."""
        rows, targets, first = self._sent
        span = slice(int(first[rank]), int(first[rank + 1]))
        return rows[span], targets[span]

    def receives(self, rank: int) -> tuple[Ints, Ints]:
        """(rows, source ranks): what a rank gets from other ranks."""
        rows = self.wanted[rank]
        sources = self.reader[rows]
        foreign = sources != rank
        return rows[foreign], sources[foreign]

    @functools.cached_property
    def _read(self) -> tuple[Ints, Ints]:
        """Rows by reader, and where those of each rank begin."""
        rows = np.flatnonzero(self.reader >= 0)
        rows = rows[np.argsort(self.reader[rows], kind="stable")]
        return rows, np.searchsorted(self.reader[rows], np.arange(len(self.wanted) + 1))

    @functools.cached_property
    def _sent(self) -> tuple[Ints, Ints, Ints]:
        """Rows that change hands and their targets, by reader and row, and where those of each reader begin."""
        received = [self.receives(rank) for rank in range(len(self.wanted))]
        none = np.zeros(0, np.int64)
        rows = np.concatenate([none, *(rows for rows, _ in received)])
        sources = np.concatenate([none, *(sources for _, sources in received)])
        targets = np.repeat(np.arange(len(received)), [len(rows) for rows, _ in received])
        order = np.lexsort((rows, sources))
        first = np.searchsorted(sources[order], np.arange(len(received) + 1))
        return rows[order], targets[order], first


def plan_exchange(raw: Ints, wanted: Sequence[Ints], nodes: Sequence[int] | Ints | None = None) -> Exchange:
    """The exchange for ranks that want the catalog rows `wanted[rank]` (ascending, each once).

    `raw`: bytes of every row of the catalog. `nodes`: a number for the node of each rank; None: all are on one node.
    Raises ValueError where a list is not ascending or names rows that there are not.
    """
    lists = tuple(np.asarray(rows, np.int64) for rows in wanted)
    for rank, rows in enumerate(lists):
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(raw) or (np.diff(rows) <= 0).any()):
            raise ValueError(f"rank {rank} wants rows that are not ascending numbers from 0 to {len(raw) - 1}")
    node = np.zeros(len(lists), np.int64) if nodes is None else np.asarray(nodes, np.int64)
    if len(node) != len(lists):
        raise ValueError(f"nodes of {len(node)} ranks for {len(lists)} ranks")
    reader = np.full(len(raw), -1, np.int64)
    choices = _Choices.of(lists)
    if len(choices.row):
        reader[choices.row] = _chosen(choices, np.asarray(raw, np.int64)[choices.row], node)
    return Exchange(reader, lists)


class _Choices(NamedTuple):
    """Of every wanted row (`row`, ascending) the ranks that want it: `rank[first[i]]` to `rank[first[i + 1]]`,
    ascending."""

    row: Ints
    first: Ints
    rank: Ints

    @classmethod
    def of(cls, lists: Sequence[Ints]) -> _Choices:
        row = np.concatenate([np.zeros(0, np.int64), *lists])
        rank = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        if (np.diff(row) < 0).any():
            order = np.argsort(row, kind="stable")
            row, rank = row[order], rank[order]
        begin = np.flatnonzero(np.diff(row, prepend=-1))
        return cls(row[begin], np.append(begin, len(row)), rank)


def _chosen(choices: _Choices, weight: Ints, node: Ints) -> Ints:
    """The reader of every row."""
    chosen = choices.rank[choices.first[:-1]]
    choice = np.diff(choices.first) > 1
    load = _sums(chosen[~choice], weight[~choice], len(node))
    free = np.flatnonzero(choice)
    if len(free):
        some = _Free.of(choices, free, weight)
        picked = some.rounded(some.level_shares(load, node))
        chosen[free] = _improved(some, picked, load)
    return chosen


def _sums(index: Ints, values: Ints, length: int) -> Ints:
    """Sums of integers by index, exact."""
    order = np.argsort(index, kind="stable")
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values[order])])
    return np.diff(sums[np.searchsorted(index[order], np.arange(length + 1))])


class _Free(NamedTuple):
    """The rows that have a choice, and the groups of them that have the same: those of group g choose between
    `rank[group_first[g]]` to `rank[group_first[g + 1]]`."""

    weight: Ints
    group: Ints
    group_first: Ints
    rank: Ints

    @classmethod
    def of(cls, choices: _Choices, free: Ints, weight: Ints) -> _Free:
        counts = choices.first[free + 1] - choices.first[free]
        begin = np.cumsum(counts) - counts
        ranks = choices.rank[np.arange(int(counts.sum())) + np.repeat(choices.first[free] - begin, counts)]
        _, leader, group = np.unique(_signature(ranks, begin, counts), return_index=True, return_inverse=True)
        sizes = counts[leader]
        group_first = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        source = np.arange(int(group_first[-1])) + np.repeat(begin[leader] - group_first[:-1], sizes)
        return cls(weight[free], group, group_first, ranks[source])

    def level_shares(self, load: Ints, node: Ints) -> Floats:
        """Of each group and rank the part of the group's weight that levels the ranks' loads, as far as that goes."""
        count = len(self.group_first) - 1
        groups = np.repeat(np.arange(count), np.diff(self.group_first))
        total = _sums(self.group, self.weight, count).astype(np.float64)[groups]
        goal = _goals(load, np.unique(self.rank), float(self.weight.sum()))
        # Before loads are looked at: the more of the group are on the node the better.
        _, place, others = np.unique(
            groups * (node.max() + 1) + node[self.rank], return_inverse=True, return_counts=True
        )
        bias = (others[place] ** 3).astype(np.float64)
        factor = np.ones(len(load))
        for _ in range(_SCALINGS):
            part = factor[self.rank] * bias
            part /= np.bincount(groups, part)[groups]
            added = np.bincount(self.rank, part * total, len(load))
            there = added > 0
            if (added[there] <= goal[there] * _LEVEL_ENOUGH).all():
                break
            factor[there] *= np.clip(goal[there] / added[there], 2**-10, 2**10)
            factor = np.clip(factor / factor.max(), 2.0**-100, 1.0)
        return part * total

    def rounded(self, shares: Floats) -> Ints:
        """A choice (index into `rank`) for every row: runs of each group's rows of about the weight of the shares."""
        order = np.argsort(self.group, kind="stable")
        middle = (np.cumsum(self.weight[order]) - self.weight[order] / 2).astype(np.float64)
        place = np.searchsorted(np.cumsum(shares), middle)
        group = self.group[order]
        picked = np.empty(len(order), np.int64)
        picked[order] = np.clip(place, self.group_first[group], self.group_first[group + 1] - 1)
        return picked


def _signature(ranks: Ints, begin: Ints, counts: Ints) -> npt.NDArray[np.uint64]:
    """A number for each row that is the same for the same choice: a hash, as only balance depends on it."""
    mixed = (ranks.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return np.asarray(np.add.reduceat(mixed, begin) * np.uint64(2**16 + 1) + counts.astype(np.uint64))


def _goals(load: Ints, ranks: Ints, total: float) -> Floats:
    """What is to be added to each of `ranks` so that they are level: those above that level already get nothing."""
    height = load[ranks].astype(np.float64)
    order = np.argsort(height, kind="stable")
    levels = (total + np.cumsum(height[order])) / np.arange(1, len(ranks) + 1)
    level = levels[np.argmax(levels <= np.append(height[order][1:], np.inf))]
    goal = np.zeros(len(load))
    goal[ranks] = np.maximum(level - height, 0.0)
    return goal


def _improved(free: _Free, picked: Ints, load: Ints) -> Ints:
    """The reader of each row, after rows were moved from fuller to emptier ranks as long as that helps."""
    chosen = free.rank[picked]
    load = load + _sums(chosen, free.weight, len(load))
    level = float(load.sum()) / len(load)
    for _ in range(_MOVES):
        moving = np.flatnonzero(load[chosen] > level * _LEVEL_ENOUGH)
        if not len(moving):
            break
        # The emptiest rank of each group, the lowest of equals.
        order = np.argsort(load, kind="stable")
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        emptiest = order[np.minimum.reduceat(position[free.rank], free.group_first[:-1])]
        target, source, weight = emptiest[free.group[moving]], chosen[moving], free.weight[moving]
        gain = np.minimum(load[source] - load[target] - weight, weight)
        useful = np.flatnonzero(gain > 0)
        # One row a source, the one that helps it most; one row a target, from the fullest source; and no chains.
        useful = useful[np.lexsort((useful, -gain[useful], source[useful]))]
        useful = useful[_first_of_each(source[useful])]
        useful = useful[np.lexsort((useful, -load[source[useful]], target[useful]))]
        useful = useful[_first_of_each(target[useful])]
        useful = useful[~np.isin(target[useful], source[useful])]
        if not len(useful):
            break
        chosen[moving[useful]] = target[useful]
        np.subtract.at(load, source[useful], weight[useful])
        np.add.at(load, target[useful], weight[useful])
    return chosen


def _first_of_each(ascending: Ints) -> npt.NDArray[np.bool_]:
    return np.asarray(np.diff(ascending, prepend=-1) != 0)
