"""The load plan: which part of which chunk goes into which wanted shard.

Owns the intersection of wanted boxes with a catalog. Invariants: every wanted element is covered exactly once; rows of
the asking rank override rows for all ranks, tensor by tensor; the same question gets the same plan everywhere; work
and memory are near-linear in what is asked and answered: the wants, the rows of their tensors, and the parts. Moves
nothing and touches no tensor.

One rank's question is a list of `Want`; that of thousands of ranks at once is columns (`plan_boxes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import MismatchError
from ckptd.plan import cover
from ckptd.plan.meet import Boxes, meetings

Ints = npt.NDArray[np.int64]

_AT_ONCE = 2**19
"""Wants and rows that are planned together, unless one tensor has more."""

_ROWS_AT_ONCE = 2**16

_PAIRS_AT_ONCE = 2**24
"""Pairs of wants and rows that are kept before they are known to be parts; more only where all have so many."""


class Want(NamedTuple):
    """A shard somebody wants: the part `box` of tensor `key`, which they take to have `dtype` and global `shape`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box


@dataclasses.dataclass(frozen=True, eq=False)
class LoadPlan:
    """Parts to read, ordered by want: part i is the box (`offsets[i]`, `sizes[i]`) of catalog row `row[i]`, in global
    coordinates padded like the catalog's, and goes into want `want[i]`. Empty wants have no parts."""

    want: Ints
    row: Ints
    offsets: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.want)


def plan_load(
    catalog: Catalog, wants: Sequence[Want], *, rank: int, cast: bool = False, what: str = "the checkpoint"
) -> LoadPlan:
    """The plan that fills every want for `rank` (ALL_RANKS: only values that serve every rank).

    Raises MismatchError that lists every difference: keys that `what` lacks, shapes, dtypes (unless `cast`), and
    elements no chunk holds.
    """
    plan, differences = plan_partially(catalog, wants, rank=rank, cast=cast)
    if differences:
        raise MismatchError(mismatch_message(what, differences))
    return plan


def plan_partially(
    catalog: Catalog, wants: Sequence[Want], *, rank: int, cast: bool = False
) -> tuple[LoadPlan, list[str]]:
    """The plan for the wants that can be filled, and every difference that keeps the others from it."""
    differences: list[str] = []
    usable, tensor = _compare(catalog, wants, cast, differences)
    low, high = _boxes_of([wants[index].box for index in usable], catalog.offsets.shape[1])
    found, gaps = _planned(catalog, rank, np.asarray(tensor, np.int64), low, high)
    differences += [_gap(catalog, wants[usable[gap.want]], gap) for gap in gaps]
    return found.plan(np.asarray(usable, np.int64)), differences


def plan_boxes(
    catalog: Catalog,
    tensor: npt.ArrayLike,
    offsets: npt.ArrayLike,
    sizes: npt.ArrayLike,
    *,
    rank: int = ALL_RANKS,
    what: str = "the checkpoint",
) -> LoadPlan:
    """The plan that fills the boxes `offsets`, `sizes` [n, D] (padded like the catalog's) of the tensors of the numbers
    `tensor`: the wants of any number of ranks, from the rows that serve `rank`.

    Raises MismatchError that lists all elements that no chunk of `what` holds.
    """
    asked = np.asarray(tensor, np.int64)
    shape = (len(asked), catalog.offsets.shape[1])
    low, extent = (np.asarray(column, np.int64).reshape(shape) for column in (offsets, sizes))
    usable = np.flatnonzero((extent > 0).all(axis=1)).astype(np.int64)
    every = len(usable) == len(asked)
    columns = (asked, low, low + extent)
    found, gaps = _planned(catalog, rank, *(columns if every else (column[usable] for column in columns)))
    if gaps:
        named = [(catalog.tensors[int(asked[usable[gap.want]])], int(usable[gap.want]), gap) for gap in gaps]
        lines = [
            _gap(catalog, Want(*info, Box(*(tuple(c[want, : len(info.shape)].tolist()) for c in (low, extent)))), gap)
            for info, want, gap in named
        ]
        raise MismatchError(mismatch_message(what, lines))
    return found.plan(None if every else usable)


def served_rows(catalog: Catalog, rank: int) -> Ints:
    """The rows that `rank` reads: per tensor its own where it has any, else those for all ranks."""
    return _served(catalog, rank, np.arange(len(catalog.tensors)))


def _served(catalog: Catalog, rank: int, tensors: Ints) -> Ints:
    """The same, of some tensors."""
    rows, begin = cover.runs(catalog.first, tensors)
    owner = catalog.rank[rows]
    if (owner == ALL_RANKS).all():
        return rows
    mine = owner == rank
    position = np.repeat(np.arange(len(tensors)), np.diff(begin))
    overridden = np.bincount(position[mine], minlength=len(tensors)) > 0
    return np.asarray(rows[mine | ((owner == ALL_RANKS) & ~overridden[position])])


def mismatch_message(what: str, differences: Sequence[str]) -> str:
    """One message for all differences."""
    count = "1 difference" if len(differences) == 1 else f"{len(differences)} differences"
    return f"{what} does not fit the state it is loaded into, {count}:\n" + "\n".join(f"  {d}" for d in differences)


def _compare(
    catalog: Catalog, wants: Sequence[Want], cast: bool, differences: list[str]
) -> tuple[list[int], list[int]]:
    """The wants whose tensor exists with the right shape and dtype, and its number; the others become differences."""
    usable: list[int] = []
    tensors: list[int] = []
    for index, want in enumerate(wants):
        tensor = catalog.index.get(want.key)
        if tensor is None:
            differences.append(f"{want.key}: not in the checkpoint")
            continue
        _, dtype, shape = catalog.tensors[tensor]
        fits = True
        if shape != tuple(want.shape):
            differences.append(f"{want.key}: shape {list(shape)} in the checkpoint, {list(want.shape)} here")
            fits = False
        if dtype != want.dtype and not cast:
            differences.append(f"{want.key}: {dtype} in the checkpoint, {want.dtype} here (cast=True converts it)")
            fits = False
        if fits and 0 not in want.box.sizes:
            usable.append(index)
            tensors.append(tensor)
    return usable, tensors


def _boxes_of(boxes: Sequence[Box], width: int) -> tuple[Ints, Ints]:
    """(low, high), padded to `width` dimensions."""
    zeros, ones = (0,) * width, (1,) * width
    low: list[int] = []
    sizes: list[int] = []
    for box in boxes:
        low += box.offsets
        low += zeros[len(box.offsets) :]
        sizes += box.sizes
        sizes += ones[len(box.sizes) :]
    start = np.array(low, np.int64).reshape(len(boxes), width)
    return start, start + np.array(sizes, np.int64).reshape(len(boxes), width)


class _Gap(NamedTuple):
    """Elements that a want lacks: boxes."""

    want: int
    low: Ints
    high: Ints


class _Found(NamedTuple):
    """Parts, by want, then row."""

    want: Ints
    row: Ints
    low: Ints
    high: Ints

    def take(self, chosen: npt.NDArray[np.generic]) -> _Found:
        return _Found(self.want[chosen], self.row[chosen], self.low[chosen], self.high[chosen])

    @classmethod
    def joined(cls, found: list[_Found], width: int) -> _Found:
        """All parts of several. Takes the columns out of the list as it goes, since they may be large."""
        none = np.zeros(0, np.int64), np.zeros((0, width), np.int64)
        empty = _Found(none[0], none[0], none[1], none[1])
        columns = [list(column) for column in zip(empty, *found, strict=True)]
        found.clear()
        made = []
        while columns:
            made.append(np.concatenate(columns.pop(0)))
        return cls(*made)

    def plan(self, names: Ints | None) -> LoadPlan:
        """The load plan, with the wants' names instead of their numbers."""
        sizes = self.high
        sizes -= self.low
        return LoadPlan(self.want if names is None else names[self.want], self.row, self.low, sizes)


def _planned(catalog: Catalog, rank: int, tensor: Ints, low: Ints, high: Ints) -> tuple[_Found, list[_Gap]]:
    """The parts of all wants that can be filled, and what the others lack. Wants are boxes that are not empty."""
    order = np.argsort(tensor, kind="stable") if (np.diff(tensor) < 0).any() else None
    ascending = tensor if order is None else tensor[order]
    asked, wants_first = np.unique(ascending, return_index=True)
    wants_first = np.append(wants_first, len(ascending))
    ends = np.cumsum(np.diff(wants_first) + catalog.first[asked + 1] - catalog.first[asked])
    found: list[_Found] = []
    gaps: list[_Gap] = []
    start = 0
    while start < len(asked):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + _AT_ONCE, "right")), start + 1)
        span = slice(int(wants_first[start]), int(wants_first[stop]))
        numbers = np.arange(span.start, span.stop) if order is None else order[span]
        wants = Boxes(ascending[span], low[numbers], high[numbers])
        hulls = _hulls(wants, wants_first[start:stop] - span.start)
        rows = _reaching(catalog, _served(catalog, rank, hulls.group), hulls)
        chunk_low = catalog.offsets[rows]
        chunks = Boxes(catalog.tensor[rows].astype(np.int64), chunk_low, chunk_low + catalog.sizes[rows])
        for parts, missing in _block(wants, chunks):
            found.append(parts._replace(want=numbers[parts.want], row=rows[parts.row]))
            gaps += [gap._replace(want=int(numbers[gap.want])) for gap in missing]
        start = stop
    joined = _Found.joined(found, low.shape[1])
    if (np.diff(joined.want) < 0).any():
        joined = joined.take(np.argsort(joined.want, kind="stable"))
    return joined, sorted(gaps, key=lambda gap: gap.want)


def _hulls(wants: Boxes, first: Ints) -> Boxes:
    """Of each tensor the box around its wants, which begin at `first`."""
    return Boxes(wants.group[first], np.minimum.reduceat(wants.low, first), np.maximum.reduceat(wants.high, first))


def _reaching(catalog: Catalog, rows: Ints, hulls: Boxes) -> Ints:
    """The rows that reach the hull of their tensor: few where one rank asks. Takes little memory beside them."""
    kept = np.ones(len(rows), bool)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some, fits = rows[start : start + _ROWS_AT_ONCE], kept[start : start + _ROWS_AT_ONCE]
        hull = np.searchsorted(hulls.group, catalog.tensor[some])
        for dimension in range(hulls.low.shape[1]):
            low = catalog.offsets[some, dimension]
            fits &= low < hulls.high[hull, dimension]
            low += catalog.sizes[some, dimension]
            fits &= low > hulls.low[hull, dimension]
    return rows if kept.all() else rows[kept]


def _block(wants: Boxes, chunks: Boxes) -> Iterator[tuple[_Found, list[_Gap]]]:
    """The parts of some wants; in several runs of them where they meet very many chunks each."""
    count = len(wants.group)
    pairs = meetings(wants, chunks, None if count == 1 else max(_PAIRS_AT_ONCE, 16 * (count + len(chunks.group))))
    if pairs is not None:
        yield _parts(wants, chunks, *pairs)
        return
    rows = _first_alike(chunks.group, chunks.low, chunks.high)
    chunks = Boxes(*(column[rows] for column in chunks))
    for part in (slice(count // 2), slice(count // 2, count)):
        for found, gaps in _block(Boxes(*(column[part] for column in wants)), chunks):
            moved = [gap._replace(want=gap.want + (part.start or 0)) for gap in gaps]
            yield found._replace(want=found.want + (part.start or 0), row=rows[found.row]), moved


def _first_alike(group: Ints, low: Ints, high: Ints) -> Ints:
    """The first of each kind of boxes that are the same, ascending."""
    columns = (*high.T, *low.T, group)
    order = np.lexsort(columns)
    alike = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        alike &= column[order[1:]] == column[order[:-1]]
    return np.sort(np.delete(order, np.flatnonzero(alike) + 1))


def _parts(wants: Boxes, chunks: Boxes, want: Ints, row: Ints) -> tuple[_Found, list[_Gap]]:
    """What of the chunks goes where, from the pairs that meet. Only wants that are not tiled by their chunks are looked
    at one by one, and not even these if that is because of chunks that exist twice."""
    low = np.maximum(wants.low[want], chunks.low[row])
    high = np.minimum(wants.high[want], chunks.high[row])
    found = _Found(want, row, low, high)
    tiled = _tiled(wants, found)
    if tiled.all():
        return found, []
    doubtful = found.take(~tiled[want])
    doubtful = doubtful.take(_first_alike(doubtful.want, doubtful.low, doubtful.high))
    settled = _tiled(wants, doubtful)
    parts = [found.take(tiled[want]), doubtful.take(settled[doubtful.want])]
    gaps = []
    first = np.searchsorted(doubtful.want, np.arange(len(tiled) + 1))
    for number in np.flatnonzero(~tiled & ~settled).tolist():
        span = slice(int(first[number]), int(first[number + 1]))
        region = wants.low[number], wants.high[number]
        if span.start == span.stop:
            gaps.append(_Gap(number, region[0][None], region[1][None]))
            continue
        chosen, (left_low, left_high) = cover.disjoint(*region, doubtful.low[span], doubtful.high[span])
        if len(left_low):
            gaps.append(_Gap(number, left_low, left_high))
            continue
        rows = doubtful.row[span][chosen.source]
        parts.append(_Found(np.full(len(rows), number, np.int64), rows, chosen.low, chosen.high))
    joined = _Found.joined(parts, wants.low.shape[1])
    return joined.take(np.lexsort((joined.row, joined.want))), gaps


def _tiled(wants: Boxes, parts: _Found) -> npt.NDArray[np.bool_]:
    """Whether the parts of each want cover it exactly once."""
    first = np.searchsorted(parts.want, np.arange(len(wants.group) + 1))
    return cover.tiled(cover.Regions(wants.low, wants.high, first, parts.low, parts.high))


def _gap(catalog: Catalog, want: Want, gap: _Gap) -> str:
    """Says which elements of a want are nowhere."""
    low, high = gap.low, gap.high
    dimensions = len(want.shape)
    if len(low) == 1 and tuple((high - low)[0, :dimensions]) == want.box.sizes:
        holders = sorted(set(catalog.rank[list(catalog.rows(want.key))].tolist()) - {ALL_RANKS})
        if holders:
            named = ", ".join(map(str, holders[:8])) + (", ..." if len(holders) > 8 else "")
            return f"{want.key}: no chunk holds a value for this rank (only for rank {named})"
    span = ", ".join(f"{lo}:{hi}" for lo, hi in zip(low[0, :dimensions], high[0, :dimensions], strict=True))
    more = f" and {len(low) - 1} other parts" if len(low) > 1 else ""
    return f"{want.key}: no chunk holds elements [{span}]{more}"
