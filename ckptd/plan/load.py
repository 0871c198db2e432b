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

from ckptd.core.box import Box, padded
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import FormatError, MismatchError
from ckptd.plan import cover
from ckptd.plan.meet import Boxes, meetings

Ints = npt.NDArray[np.int64]

_AT_ONCE = 2**19
"""Wants and rows that are planned together, unless one tensor has more."""

_ROWS_AT_ONCE = 2**16

_FEW_PARTS = 64
"""Of a want with at most so many parts all that is missing is named, else one box of it."""

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
    plan, gaps = _planned(catalog, rank, np.asarray(tensor, np.int64), low, high)
    differences += [_gap(catalog, wants[usable[gap.want]], gap) for gap in gaps]
    return dataclasses.replace(plan, want=np.asarray(usable, np.int64)[plan.want]), differences


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
    plan, gaps = _planned(catalog, rank, *(columns if every else (column[usable] for column in columns)))
    if gaps:
        named = [(catalog.tensors[int(asked[usable[gap.want]])], int(usable[gap.want]), gap) for gap in gaps]
        lines = [
            _gap(catalog, Want(*info, Box(*(tuple(c[want, : len(info.shape)].tolist()) for c in (low, extent)))), gap)
            for info, want, gap in named
        ]
        raise MismatchError(mismatch_message(what, lines))
    return plan if every else dataclasses.replace(plan, want=usable[plan.want])


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
        info = catalog.tensors[tensor]
        fits = info == want[:3]  # as a rule, and much faster than one by one
        if not fits:
            fits = True
            if info.shape != tuple(want.shape):
                differences.append(f"{want.key}: shape {list(info.shape)} in the checkpoint, {list(want.shape)} here")
                fits = False
            if info.dtype != want.dtype and not cast:
                here = f"{want.dtype} here (cast=True converts it)"
                differences.append(f"{want.key}: {info.dtype} in the checkpoint, {here}")
                fits = False
        if fits and 0 not in want.box.sizes:
            usable.append(index)
            tensors.append(tensor)
    return usable, tensors


def _boxes_of(boxes: Sequence[Box], width: int) -> tuple[Ints, Ints]:
    """(low, high), padded to `width` dimensions."""
    low = padded([box.offsets for box in boxes], width, 0)
    return low, low + padded([box.sizes for box in boxes], width, 1)


class _Gap(NamedTuple):
    """Elements that a want lacks: boxes."""

    want: int
    low: Ints
    high: Ints


class _Parts(NamedTuple):
    """Which rows the wants `want` (ascending) take, one after the other: `counts` of them each. A part is what want and
    row have in common, but the parts `own` (indices) are only `own_low` to `own_high` of it."""

    want: Ints
    counts: Ints
    row: Ints
    own: Ints
    own_low: Ints
    own_high: Ints


def _planned(catalog: Catalog, rank: int, tensor: Ints, low: Ints, high: Ints) -> tuple[LoadPlan, list[_Gap]]:
    """The plan of all wants that can be filled, and what the others lack. Wants are boxes that are not empty."""
    order = np.argsort(tensor, kind="stable") if (np.diff(tensor) < 0).any() else None
    ascending = tensor if order is None else tensor[order]
    asked, wants_first = np.unique(ascending, return_index=True)
    wants_first = np.append(wants_first, len(ascending))
    ends = np.cumsum(np.diff(wants_first) + catalog.first[asked + 1] - catalog.first[asked])
    found: list[_Parts] = []
    gaps: list[_Gap] = []
    start = 0
    while start < len(asked):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + _AT_ONCE, "right")), start + 1)
        span = slice(int(wants_first[start]), int(wants_first[stop]))
        numbers = np.arange(span.start, span.stop) if order is None else order[span]
        wants = Boxes(ascending[span], low[numbers], high[numbers])
        hulls = _hulls(wants, wants_first[start:stop] - span.start)
        rows = _rows_near(catalog, rank, hulls)
        chunk_low = catalog.offsets[rows]
        chunks = Boxes(catalog.tensor[rows].astype(np.int64), chunk_low, chunk_low + catalog.sizes[rows])
        for parts, missing in _block(wants, chunks):
            found.append(parts._replace(want=numbers[parts.want], row=rows[parts.row]))
            gaps += [gap._replace(want=int(numbers[gap.want])) for gap in missing]
        start = stop
    return _assembled(catalog, found, low, high), sorted(gaps, key=lambda gap: gap.want)


def _assembled(catalog: Catalog, found: list[_Parts], low: Ints, high: Ints) -> LoadPlan:
    """The plan of all parts, by want. Takes them out of the list as it goes: a plan may be most of the memory there is,
    and its columns are written once, straight to their places."""
    counts = np.zeros(len(low), np.int64)
    for parts in found:
        counts[parts.want] = parts.counts
    first = np.cumsum(counts) - counts
    row = np.empty(int(counts.sum()), np.int64)
    own: list[tuple[Ints, Ints, Ints]] = []
    while found:
        parts = found.pop()
        before = np.cumsum(parts.counts) - parts.counts
        place = np.arange(len(parts.row)) + np.repeat(first[parts.want] - before, parts.counts)
        row[place] = parts.row
        if len(parts.own):
            own.append((place[parts.own], parts.own_low, parts.own_high))
    want = np.repeat(np.arange(len(low)), counts)
    offsets, sizes = (np.empty((len(row), low.shape[1]), np.int64) for _ in range(2))
    for start in range(0, len(row), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        begin = catalog.offsets[row[part]]
        end = np.minimum(high[want[part]], begin + catalog.sizes[row[part]])
        np.maximum(low[want[part]], begin, out=offsets[part])
        np.subtract(end, offsets[part], out=sizes[part])
    for place, own_low, own_high in own:
        offsets[place] = own_low
        sizes[place] = own_high - own_low
    return LoadPlan(want, row, offsets, sizes)


def _hulls(wants: Boxes, first: Ints) -> Boxes:
    """Of each tensor the box around its wants, which begin at `first`."""
    return Boxes(wants.group[first], np.minimum.reduceat(wants.low, first), np.maximum.reduceat(wants.high, first))


def _rows_near(catalog: Catalog, rank: int, hulls: Boxes) -> Ints:
    """The rows that serve `rank` (of each tensor its own if it has any, else those for all ranks) and reach the hull of
    their tensor: few where one rank asks."""
    tensors = hulls.group
    start, stop = int(catalog.first[tensors[0]]), int(catalog.first[tensors[-1] + 1])
    rows: Ints | slice
    if stop - start <= 2 * int((catalog.first[tensors + 1] - catalog.first[tensors]).sum()):
        # Nearly all that lies between is asked for: slices are much faster than indices. No row reaches an empty hull.
        whole = np.arange(tensors[0], tensors[-1] + 1)
        low, high = (np.zeros((len(whole), catalog.offsets.shape[1]), np.int64) for _ in range(2))
        low[tensors - tensors[0]], high[tensors - tensors[0]] = hulls.low, hulls.high
        rows, begin = slice(start, stop), catalog.first[whole[0] : whole[-1] + 2] - start
        hulls = Boxes(whole, low, high)
    else:
        rows, begin = cover.runs(catalog.first, tensors)
    near = _near(catalog, rows, hulls, begin)
    owner = catalog.rank[rows]
    if (owner != ALL_RANKS).any():
        position = np.repeat(np.arange(len(hulls.group)), np.diff(begin))
        overridden = np.bincount(position[owner == rank], minlength=len(hulls.group)) > 0
        near = near[owner[near] == np.where(overridden, rank, ALL_RANKS)[position[near]]]
    return near + start if isinstance(rows, slice) else rows[near]


def _near(catalog: Catalog, rows: Ints | slice, hulls: Boxes, begin: Ints) -> Ints:
    """The indices of the rows that reach the hull of their tensor; its rows are `begin[t]` to `begin[t + 1]`."""
    near: Ints | None = None
    for dimension in range(catalog.offsets.shape[1]):
        low, size = catalog.offsets[rows, dimension], catalog.sizes[rows, dimension]
        bounds = hulls.low[:, dimension], hulls.high[:, dimension]
        if near is None:
            first, last = (np.repeat(bound, np.diff(begin)) for bound in bounds)
        else:
            low, size = low[near], size[near]
            position = np.searchsorted(begin, near, "right") - 1
            first, last = (bound[position] for bound in bounds)
        hit = low < last
        hit &= low + size > first
        if not hit.all():
            near = np.flatnonzero(hit) if near is None else near[hit]
    return np.arange(begin[-1]) if near is None else near


def _block(wants: Boxes, chunks: Boxes) -> Iterator[tuple[_Parts, list[_Gap]]]:
    """The parts of some wants; in several runs of them where they meet very many chunks each."""
    count = len(wants.group)
    pairs = meetings(wants, chunks, None if count == 1 else max(_PAIRS_AT_ONCE, 16 * (count + len(chunks.group))))
    if pairs is not None:
        yield _parts_of(wants, chunks, *pairs)
        return
    rows = _first_alike(chunks.group, chunks.low, chunks.high)
    chunks = Boxes(*(column[rows] for column in chunks))
    _refuse_heaps(chunks)
    for start, stop in ((0, count // 2), (count // 2, count)):
        for parts, gaps in _block(Boxes(*(column[start:stop] for column in wants)), chunks):
            moved = [gap._replace(want=gap.want + start) for gap in gaps]
            yield parts._replace(want=parts.want + start, row=rows[parts.row]), moved


def _refuse_heaps(chunks: Boxes) -> None:
    """FormatError for chunks of one tensor that lie over each other more often than could be sorted out anyway."""
    first = np.flatnonzero(np.diff(chunks.group, prepend=-1))
    # In floating point: volumes of hostile boxes may be anything.
    volumes = np.prod((chunks.high - chunks.low).astype(np.float64), axis=1)
    hulls = np.maximum.reduceat(chunks.high, first) - np.minimum.reduceat(chunks.low, first)
    folds = np.add.reduceat(volumes, first) / np.maximum(np.prod(hulls.astype(np.float64), axis=1), 1)
    if (folds > cover.MAX_OVERLAPPING).any():
        raise FormatError(
            f"overlapping chunks: a tensor's chunks lie {int(folds.max())}-fold over each other; at most "
            f"{cover.MAX_OVERLAPPING} are sorted out. No checkpoint of ckptd has overlapping chunks: write it again "
            "from its origin"
        )


def _first_alike(group: Ints, low: Ints, high: Ints) -> Ints:
    """The first of each kind of boxes that are the same, ascending."""
    columns = (*high.T, *low.T, group)
    order = np.lexsort(columns)
    alike = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        alike &= column[order[1:]] == column[order[:-1]]
    return np.sort(np.delete(order, np.flatnonzero(alike) + 1))


def _parts_of(wants: Boxes, chunks: Boxes, want: Ints, row: Ints) -> tuple[_Parts, list[_Gap]]:
    """What of the chunks goes where, from the pairs that meet. Only wants that are not tiled by their chunks are looked
    at one by one, and not even these if that is because of chunks that exist twice."""
    count = len(wants.group)
    tiled = _tiled(wants, chunks, want, row)
    none = np.zeros((0, wants.low.shape[1]), np.int64)
    if tiled.all():
        counts = np.bincount(want, minlength=count)
        return _Parts(np.arange(count), counts, row, np.zeros(0, np.int64), none, none), []
    doubtful = np.flatnonzero(~tiled[want])
    doubtful = doubtful[_first_alike(want[doubtful], *_common(wants, chunks, want[doubtful], row[doubtful]))]
    settled = _tiled(wants, chunks, want[doubtful], row[doubtful])
    sound = np.concatenate([np.flatnonzero(tiled[want]), doubtful[settled[want[doubtful]]]])
    columns = [(want[sound], row[sound], np.zeros(len(sound), bool))]
    boxes = [(none, none)]
    gaps = []
    first = np.searchsorted(want[doubtful], np.arange(count + 1))
    for number in np.flatnonzero(~tiled & ~settled).tolist():
        region = wants.low[number], wants.high[number]
        span = doubtful[first[number] : first[number + 1]]
        boxes_of_want = _common(wants, chunks, want[span], row[span])
        hole = cover.hole(*region, *boxes_of_want) if len(span) > _FEW_PARTS else None
        if hole is not None:
            gaps.append(_Gap(number, hole[0][None], hole[1][None]))
            continue
        chosen, (left_low, left_high) = cover.disjoint(*region, *boxes_of_want)
        if len(left_low):
            gaps.append(_Gap(number, left_low, left_high))
            continue
        taken = span[chosen.source]
        columns.append((want[taken], row[taken], np.ones(len(taken), bool)))
        boxes.append((chosen.low, chosen.high))
    want, row, own = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((row, want))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    own_low, own_high = (np.concatenate(column) for column in zip(*boxes, strict=True))
    counts = np.bincount(want, minlength=count)
    return _Parts(np.arange(count), counts, row[order], place[own], own_low, own_high), gaps


def _common(wants: Boxes, chunks: Boxes, want: Ints, row: Ints) -> tuple[Ints, Ints]:
    """(low, high) of what each want and row have in common."""
    return np.maximum(wants.low[want], chunks.low[row]), np.minimum(wants.high[want], chunks.high[row])


def _tiled(wants: Boxes, chunks: Boxes, want: Ints, row: Ints) -> npt.NDArray[np.bool_]:
    """Whether the rows of each want cover it exactly once."""
    first = np.searchsorted(want, np.arange(len(wants.group) + 1))
    return cover.tiled(cover.Regions(wants.low, wants.high, first, *_common(wants, chunks, want, row)))


def _gap(catalog: Catalog, want: Want, gap: _Gap) -> str:
    """Says which elements of a want are nowhere."""
    low, high = gap.low, gap.high
    dimensions = len(want.shape)
    if len(low) == 1 and tuple((high - low)[0, :dimensions]) == want.box.sizes:
        rows = catalog.rows(want.key)
        ranks = catalog.rank[rows.start : rows.stop]
        holders = np.unique(ranks[ranks != ALL_RANKS]).tolist()
        if holders:
            named = ", ".join(map(str, holders[:8])) + (", ..." if len(holders) > 8 else "")
            return f"{want.key}: no chunk holds a value for this rank (only for rank {named})"
    span = ", ".join(f"{lo}:{hi}" for lo, hi in zip(low[0, :dimensions], high[0, :dimensions], strict=True))
    more = f" and {len(low) - 1} other parts" if len(low) > 1 else ""
    return f"{want.key}: no chunk holds elements [{span}]{more}"
