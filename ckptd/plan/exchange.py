"""The exchange plan: which rank reads each chunk that a load needs, and to whom it passes it on.

Owns the rule by which every byte is read once per job. Invariants: each wanted row has one reader, and that is a rank
that wants it itself, or, where not every rank can read everything (`Readers`: the memory of several nodes), one that
can read it; bytes are level over the ranks, and so over nodes by their ranks, as far as who may read what allows; where
that leaves a choice, a rank reads on whose node most others may; the same question gets the same plan on every rank
(what is computed in floating point is so in one order, with operations that IEEE 754 defines). Knows nothing of boxes,
files or messages.

How: rows that one rank may read have no choice. The others are grouped by who may read them; each group's bytes are
shared out in proportion to weights of the ranks, which are scaled until the loads are level; then each group is cut
into runs of rows in that proportion, so that ranks read neighbouring chunks; at last single rows are moved where that
helps.
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


class Readers(NamedTuple):
    """Who can read what: row r can be read by the ranks `ranks[place[r]]`."""

    place: Ints
    ranks: Sequence[Sequence[int] | Ints]


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


def plan_exchange(
    raw: Ints,
    wanted: Sequence[Ints],
    nodes: Sequence[int] | Ints | None = None,
    *,
    readers: Readers | None = None,
    load: Ints | None = None,
) -> Exchange:
    """The exchange for ranks that want the catalog rows `wanted[rank]` (ascending, each once).

    `raw`: bytes of every row of the catalog. `nodes`: a number for the node of each rank; None: all are on one node.
    `readers`: who can read what, wanted or not; None: whoever wants it. `load`: bytes that each rank reads besides.
    Raises ValueError where a list is not ascending, names rows that there are not, or a row that nobody can read.
    """
    lists = tuple(np.asarray(rows, np.int64) for rows in wanted)
    for rank, rows in enumerate(lists):
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(raw) or (np.diff(rows) <= 0).any()):
            raise ValueError(f"rank {rank} wants rows that are not ascending numbers from 0 to {len(raw) - 1}")
    node = np.zeros(len(lists), np.int64) if nodes is None else np.asarray(nodes, np.int64)
    if len(node) != len(lists):
        raise ValueError(f"nodes of {len(node)} ranks for {len(lists)} ranks")
    reader = np.full(len(raw), -1, np.int64)
    choices = _Choices.of_wanting(lists) if readers is None else _Choices.of_able(lists, readers)
    if len(choices.row):
        before = np.zeros(len(lists), np.int64) if load is None else np.asarray(load, np.int64)
        reader[choices.row] = _chosen(choices, np.asarray(raw, np.int64)[choices.row], node, before)
    return Exchange(reader, lists)


class _Choices(NamedTuple):
    """Who may read each wanted row (`row`, ascending): the ranks of its `group`, which for group g are
    `rank[first[g]]` to `rank[first[g + 1]]`, ascending."""

    row: Ints
    group: Ints
    first: Ints
    rank: Ints

    @classmethod
    def of_wanting(cls, lists: Sequence[Ints]) -> _Choices:
        """Whoever wants a row. Group r is rank r alone; after these come the sets of several ranks."""
        row = np.concatenate([np.zeros(0, np.int64), *lists])
        rank = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        if (np.diff(row) < 0).any():
            order = np.argsort(row, kind="stable")
            row, rank = row[order], rank[order]
        begin = np.flatnonzero(np.diff(row, prepend=-1))
        counts = np.diff(np.append(begin, len(row)))
        several = np.flatnonzero(counts > 1)
        group, ranks, sizes = rank[begin], np.arange(len(lists)), np.ones(len(lists), np.int64)
        if len(several):
            start = np.cumsum(counts[several]) - counts[several]
            wanting = rank[_spans(begin[several], counts[several])]
            signature = _signature(wanting, start, counts[several])
            _, leader, set_of = np.unique(signature, return_index=True, return_inverse=True)
            group[several] = len(lists) + set_of
            sizes = np.concatenate([sizes, counts[several][leader]])
            ranks = np.concatenate([ranks, wanting[_spans(start[leader], counts[several][leader])]])
        return cls(row[begin], group, np.append(0, np.cumsum(sizes)), ranks)

    @classmethod
    def of_able(cls, lists: Sequence[Ints], readers: Readers) -> _Choices:
        """Whoever can read a row."""
        row = np.unique(np.concatenate([np.zeros(0, np.int64), *lists]))
        sets: dict[tuple[int, ...], int] = {}
        able = [tuple(sorted(map(int, ranks))) for ranks in readers.ranks]
        group = np.array([sets.setdefault(ranks, len(sets)) for ranks in able], np.int64)[readers.place[row]]
        if () in sets and (group == sets[()]).any():
            raise ValueError(f"row {row[group == sets[()]][0]}: no rank can read it")
        sizes = np.array([len(ranks) for ranks in sets], np.int64)
        members = np.array([rank for ranks in sets for rank in ranks], np.int64)
        return cls(row, group, np.append(0, np.cumsum(sizes)), members)


def _spans(begin: Ints, counts: Ints) -> Ints:
    """The indices `begin[i]` to `begin[i] + counts[i]` of all i, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    spans: Ints = np.arange(total) + np.repeat(begin - (ends - counts), counts)
    return spans


def _chosen(choices: _Choices, weight: Ints, node: Ints, before: Ints) -> Ints:
    """The reader of every row, of ranks that have so many bytes to read `before`."""
    chosen = choices.rank[choices.first[choices.group]]
    choice = np.diff(choices.first)[choices.group] > 1
    load = before + _sums(chosen[~choice], weight[~choice], len(node))
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
        """Those rows of `choices`, and the groups that they are in."""
        used = np.zeros(len(choices.first) - 1, bool)
        used[choices.group[free]] = True
        sizes = np.diff(choices.first)[used]
        ranks = choices.rank[_spans(choices.first[:-1][used], sizes)]
        return cls(weight[free], (np.cumsum(used) - 1)[choices.group[free]], np.append(0, np.cumsum(sizes)), ranks)

    def level_shares(self, load: Ints, node: Ints) -> Floats:
        """Of each group and rank the part of the group's weight that levels the ranks' loads, as far as that goes."""
        groups = np.repeat(np.arange(len(self.group_first) - 1), np.diff(self.group_first))
        weights = _sums(self.group, self.weight, len(self.group_first) - 1)
        total = weights.astype(np.float64)[groups]
        goal = self._goals(load, weights)
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

    def _goals(self, load: Ints, weights: Ints) -> Floats:
        """What is to be added to each rank so that those are level between which groups can hand on bytes."""
        island = self.islands(len(load))
        ranks = np.unique(self.rank)
        ranks = ranks[np.argsort(island[ranks], kind="stable")]
        total = _sums(island[self.rank[self.group_first[:-1]]], weights, len(load))
        goal = np.zeros(len(load))
        for members in np.split(ranks, np.flatnonzero(np.diff(island[ranks])) + 1):
            goal[members] = _levelling(load[members], float(total[island[members[0]]]))
        return goal

    def islands(self, ranks: int) -> Ints:
        """The lowest rank that each rank is connected with by groups."""
        lowest = np.arange(ranks)
        sizes = np.diff(self.group_first)
        while True:
            lower = lowest.copy()
            of_group = np.minimum.reduceat(lowest[self.rank], self.group_first[:-1])
            np.minimum.at(lower, self.rank, np.repeat(of_group, sizes))
            lower = lower[lower]
            if np.array_equal(lower, lowest):
                return lowest
            lowest = lower

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


def _levelling(height: Ints, total: float) -> Floats:
    """How `total` is added so that all are level: those above that level already get nothing."""
    ascending = np.sort(height.astype(np.float64))
    levels = (total + np.cumsum(ascending)) / np.arange(1, len(height) + 1)
    level = levels[np.argmax(levels <= np.append(ascending[1:], np.inf))]
    added: Floats = np.maximum(level - height, 0.0)
    return added


def _improved(free: _Free, picked: Ints, load: Ints) -> Ints:
    """The reader of each row, after rows were moved from fuller to emptier ranks as long as that helps."""
    chosen = free.rank[picked]
    load = load + _sums(chosen, free.weight, len(load))
    island = free.islands(len(load))
    level = (_sums(island, load, len(load)) / np.maximum(np.bincount(island, minlength=len(load)), 1))[island]
    for _ in range(_MOVES):
        moving = np.flatnonzero(load[chosen] > level[chosen] * _LEVEL_ENOUGH)
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
