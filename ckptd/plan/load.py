"""The load plan: which part of which chunk goes into which wanted shard.

Owns the intersection of wanted boxes with a catalog. Invariants: every wanted element is covered exactly once; rows of
the asking rank override rows for all ranks, tensor by tensor; the same question gets the same plan everywhere; the
work grows with rows and wants, not with their product over different tensors. Moves nothing and touches no tensor.
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

Ints = npt.NDArray[np.int64]

_PAIRS_AT_ONCE = 2**20
"""Bounds the memory of one pass: (want, row) pairs that are intersected together."""


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
    usable = _compare(catalog, wants, cast, differences)
    rows = served_rows(catalog, rank)
    blocks = [_intersect(catalog, rows, wants, block, differences) for block in _blocks(catalog, wants, usable)]
    width = catalog.offsets.shape[1]
    none = LoadPlan(np.zeros(0, np.int64), np.zeros(0, np.int64), *(np.zeros((0, width), np.int64),) * 2)
    names = [field.name for field in dataclasses.fields(LoadPlan)]
    columns = [np.concatenate([getattr(block, name) for block in (none, *blocks)]) for name in names]
    return LoadPlan(*columns), differences


def served_rows(catalog: Catalog, rank: int) -> Ints:
    """The rows that `rank` reads: per tensor its own where it has any, else those for all ranks."""
    mine = catalog.rank == rank
    overridden = np.zeros(len(catalog.tensors) + 1, bool)
    overridden[catalog.tensor[mine]] = True
    shared = (catalog.rank == ALL_RANKS) & ~overridden[catalog.tensor]
    return np.flatnonzero(mine | shared).astype(np.int64)


def mismatch_message(what: str, differences: Sequence[str]) -> str:
    """One message for all differences."""
    count = "1 difference" if len(differences) == 1 else f"{len(differences)} differences"
    return f"{what} does not fit the state it is loaded into, {count}:\n" + "\n".join(f"  {d}" for d in differences)


def _compare(catalog: Catalog, wants: Sequence[Want], cast: bool, differences: list[str]) -> list[int]:
    """The wants whose tensor exists with the right shape and dtype; the others become differences."""
    usable = []
    for index, want in enumerate(wants):
        if want.key not in catalog:
            differences.append(f"{want.key}: not in the checkpoint")
            continue
        info = catalog.info(want.key)
        fits = True
        if info.shape != tuple(want.shape):
            differences.append(f"{want.key}: shape {list(info.shape)} in the checkpoint, {list(want.shape)} here")
            fits = False
        if info.dtype != want.dtype and not cast:
            differences.append(f"{want.key}: {info.dtype} in the checkpoint, {want.dtype} here (cast=True converts it)")
            fits = False
        if fits and want.box.elements:
            usable.append(index)
    return usable


def _blocks(catalog: Catalog, wants: Sequence[Want], usable: list[int]) -> Iterator[list[int]]:
    """`usable` in runs of at most _PAIRS_AT_ONCE (want, row) pairs, or of one want."""
    pairs = 0
    block: list[int] = []
    for index in usable:
        block.append(index)
        pairs += len(catalog.rows(wants[index].key))
        if pairs >= _PAIRS_AT_ONCE:
            yield block
            block, pairs = [], 0
    if block:
        yield block


class _Pairs(NamedTuple):
    """Chunks that meet wants, ordered by want: `want[i]` indexes the want boxes, `row[i]` the catalog, and `low[i]` to
    `high[i]` is what they have in common."""

    want_low: Ints
    want_high: Ints
    want: Ints
    row: Ints
    low: Ints
    high: Ints


def _pairs(catalog: Catalog, rows: Ints, wants: Sequence[Want]) -> _Pairs:
    """All (want, row) that share elements."""
    width = catalog.offsets.shape[1]
    want_low, want_high = np.zeros((len(wants), width), np.int64), np.ones((len(wants), width), np.int64)
    bounds = np.zeros((len(wants), 2), np.int64)
    for position, want in enumerate(wants):
        box = want.box
        want_low[position, : len(box.offsets)] = box.offsets
        want_high[position, : len(box.offsets)] = [o + s for o, s in zip(box.offsets, box.sizes, strict=True)]
        mine = catalog.rows(want.key)
        bounds[position] = mine.start, mine.stop
    starts = np.searchsorted(rows, bounds[:, 0])
    counts = np.searchsorted(rows, bounds[:, 1]) - starts
    before = np.cumsum(counts) - counts
    index = np.repeat(np.arange(len(wants)), counts)
    row = rows[np.arange(int(counts.sum())) + np.repeat(starts - before, counts)]
    low = np.maximum(want_low[index], catalog.offsets[row])
    high = np.minimum(want_high[index], catalog.offsets[row] + catalog.sizes[row])
    hit = (low < high).all(axis=1)
    return _Pairs(want_low, want_high, index[hit], row[hit], low[hit], high[hit])


def _intersect(
    catalog: Catalog, rows: Ints, wants: Sequence[Want], chosen: list[int], differences: list[str]
) -> LoadPlan:
    """Parts for the `chosen` wants, all at once. Most wants are one whole chunk or tiled by several: only the others
    are looked at box by box."""
    want_low, want_high, want, row, low, high = _pairs(catalog, rows, [wants[index] for index in chosen])
    first = np.searchsorted(want, np.arange(len(chosen) + 1))
    single = np.diff(first) == 1
    full = np.zeros(len(chosen), bool)
    full[single] = cover.volume(low, high)[first[:-1][single]] == cover.volume(want_low, want_high)[single]
    parts: list[cover.Parts] = []
    replaced = np.zeros(len(want), bool)
    for position in np.flatnonzero(~full).tolist():
        span = slice(int(first[position]), int(first[position + 1]))
        region = want_low[position], want_high[position]
        if cover.tiles(*region, low[span], high[span]):
            continue
        found, (left_low, left_high) = cover.disjoint(*region, low[span], high[span])
        replaced[span] = True
        if len(left_low):
            differences.append(_gap(catalog, wants[chosen[position]], left_low, left_high))
            continue
        parts.append(found._replace(source=found.source + span.start))
    source = np.concatenate([np.flatnonzero(~replaced), *(p.source for p in parts)])
    low = np.concatenate([low[~replaced], *(p.low for p in parts)])
    high = np.concatenate([high[~replaced], *(p.high for p in parts)])
    order = np.argsort(source, kind="stable")
    source, low, high = source[order], low[order], high[order]
    return LoadPlan(np.asarray(chosen, np.int64)[want[source]], row[source], low, high - low)


def _gap(catalog: Catalog, want: Want, low: Ints, high: Ints) -> str:
    """Says which elements of a want are nowhere."""
    dimensions = len(want.shape)
    if len(low) == 1 and tuple((high - low)[0, :dimensions]) == want.box.sizes:
        holders = sorted(set(catalog.rank[list(catalog.rows(want.key))].tolist()) - {ALL_RANKS})
        if holders:
            named = ", ".join(map(str, holders[:8])) + (", ..." if len(holders) > 8 else "")
            return f"{want.key}: no chunk holds a value for this rank (only for rank {named})"
    span = ", ".join(f"{lo}:{hi}" for lo, hi in zip(low[0, :dimensions], high[0, :dimensions], strict=True))
    more = f" and {len(low) - 1} other parts" if len(low) > 1 else ""
    return f"{want.key}: no chunk holds elements [{span}]{more}"
