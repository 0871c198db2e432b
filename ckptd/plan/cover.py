"""Whether boxes cover regions, and which parts of them to take so that each element is taken once.

Owns the geometry that the load and save plans share. Boxes are rows of two integer arrays [n, D], `low` inclusive and
`high` exclusive; they lie inside their region and are not empty. Knows nothing of tensors, ranks or bytes.

Work is bounded for any input: `tiled` is n log n, `disjoint` refuses (FormatError) more than MAX_OVERLAPPING boxes,
which only a foreign or hostile catalog can have for one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.errors import FormatError

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MAX_OVERLAPPING = 4096
"""Boxes of one region that `disjoint` sorts out; its cost grows with the square."""

_MAX_CORNERS = 2**26
_CORNERS_AT_ONCE = 2**19
_KEY_LIMIT = 2**62


class Parts(NamedTuple):
    """Disjoint boxes: part i is a piece of box `source[i]`."""

    source: Ints
    low: Ints
    high: Ints


class Regions(NamedTuple):
    """Regions and the boxes inside each: those of region g are `first[g]` to `first[g + 1]`."""

    region_low: Ints
    region_high: Ints
    first: Ints
    low: Ints
    high: Ints

    def take(self, regions: Ints) -> Regions:
        """Some of the regions, with their boxes."""
        boxes, first = runs(self.first, regions)
        return Regions(self.region_low[regions], self.region_high[regions], first, self.low[boxes], self.high[boxes])


def runs(first: Ints, chosen: Ints) -> tuple[Ints, Ints]:
    """The indices `first[g]` to `first[g + 1]` of every chosen g, and where those of each begin among them."""
    counts = first[chosen + 1] - first[chosen]
    begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return np.arange(int(begin[-1])) + np.repeat(first[chosen] - begin[:-1], counts), begin


def volume(low: Ints, high: Ints) -> Ints:
    """Elements of each box."""
    return np.asarray(np.prod(high - low, axis=-1, dtype=np.int64))


def tiles(region_low: Ints, region_high: Ints, low: Ints, high: Ints) -> bool:
    """Whether the boxes cover the region, each element exactly once."""
    first = np.array([0, len(low)], np.int64)
    return bool(tiled(Regions(region_low[None], region_high[None], first, low, high))[0])


def tiled(regions: Regions) -> Flags:
    """Whether the boxes of each region cover it, each element exactly once.

    Boxes that differ from their region in one dimension at most, as nearly all do, only have to follow each other in
    it. For the others: the indicator function of a box is the signed sum of the orthants that start at its corners,
    and orthants are linearly independent; so boxes tile a region if and only if their signed corners add up to its own.
    """
    held = np.diff(regions.first) > 0
    if not held.all():
        found = np.zeros(len(held), bool)
        found[held] = tiled(regions.take(np.flatnonzero(held)))
        return found
    count = len(held)
    owner = np.repeat(np.arange(count), np.diff(regions.first))
    active = np.zeros((count, regions.low.shape[1]), bool)
    for dimension, column in enumerate(active.T):
        differs = regions.low[:, dimension] != regions.region_low[owner, dimension]
        differs |= regions.high[:, dimension] != regions.region_high[owner, dimension]
        column[owner[differs]] = True
    dimensions = active.sum(axis=1)
    found = (dimensions == 0) & (np.diff(regions.first) == 1)
    line = dimensions == 1
    if line.any():
        found |= line & _in_line(regions, owner, active.argmax(axis=1))
    if (dimensions <= 1).all():
        return np.asarray(found)
    # Sums may wrap around for hostile boxes, and are no more than a reason not to look closer.
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(volume(regions.low, regions.high))])
    full = np.diff(sums[regions.first]) == volume(regions.region_low, regions.region_high)
    for number in np.unique(dimensions[full & (dimensions > 1)]).tolist():
        chosen = np.flatnonzero(full & (dimensions == number))
        axes = np.argsort(~active[chosen], axis=1, kind="stable")[:, :number]
        found[chosen] = _corners_agree(regions.take(chosen), axes)
    return np.asarray(found)


def _in_line(regions: Regions, owner: Ints, axis: Ints) -> Flags:
    """Whether the boxes of each region follow each other from end to end in its dimension `axis`. None is without."""
    low, high = (column[np.arange(len(owner)), axis[owner]] for column in (regions.low, regions.high))
    joint = owner[1:] == owner[:-1]
    if (low[1:] < low[:-1])[joint].any():
        order = np.lexsort((low, owner))
        low, high = low[order], high[order]
    wrong = np.zeros(len(axis), bool)
    wrong[owner[1:][joint & (high[:-1] != low[1:])]] = True
    ends = np.arange(len(axis)), axis
    wrong |= low[regions.first[:-1]] != regions.region_low[ends]
    wrong |= high[regions.first[1:] - 1] != regions.region_high[ends]
    return ~wrong


def _corners_agree(regions: Regions, axes: Ints) -> Flags:
    """Whether the signed corners of each region's boxes, in the dimensions `axes`, add up to those of the region."""
    agree = np.zeros(len(axes), bool)
    corners = (
        np.diff(regions.first) + 1 << axes.shape[1] if axes.shape[1] < 26 else np.full(len(axes), _MAX_CORNERS + 1)
    )
    ends = np.cumsum(np.minimum(corners, _MAX_CORNERS + 1))
    start = 0
    while start < len(axes):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + _CORNERS_AT_ONCE, "right")), start + 1)
        if int(ends[stop - 1]) - done <= _MAX_CORNERS:
            chosen = np.arange(start, stop)
            agree[start:stop] = _agreement(regions.take(chosen), axes[start:stop])
        start = stop
    return agree


def _agreement(regions: Regions, axes: Ints) -> Flags:
    """The same for regions that are looked at together: of each, positive corners of the boxes and negative ones of
    the region are as many as the others, and have to be the same."""
    count, number = axes.shape
    owner = np.concatenate([np.repeat(np.arange(count), np.diff(regions.first)), np.arange(count)])
    lows = np.take_along_axis(np.concatenate([regions.low, regions.region_low]), axes[owner], axis=1)
    highs = np.take_along_axis(np.concatenate([regions.high, regions.region_high]), axes[owner], axis=1)
    is_region = np.arange(len(owner)) >= len(regions.low)
    keys = np.broadcast_to(owner, (1 << number, len(owner)))
    bound = count
    upper = np.arange(1 << number)[:, None] >> np.arange(number) & 1 == 1
    for position in range(number):
        coordinate = np.where(upper[:, position, None], highs[None, :, position], lows[None, :, position])
        span = int(highs[:, position].max()) + 1
        if bound * span > _KEY_LIMIT:
            values, ranks = np.unique(keys, return_inverse=True)
            keys, bound = ranks.reshape(keys.shape), len(values)
            values, ranks = np.unique(coordinate, return_inverse=True)
            coordinate, span = ranks.reshape(keys.shape), len(values)
        keys, bound = keys * span + coordinate, bound * span
    positive = (upper.sum(axis=1) % 2 == 0)[:, None] != is_region[None]
    one, other = np.sort(keys[positive]), np.sort(keys[~positive])
    corners = np.diff(regions.first) + 1 << number - 1
    wrong = np.zeros(count, bool)
    wrong[np.repeat(np.arange(count), corners)[one != other]] = True
    return ~wrong


def hole(region_low: Ints, region_high: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints] | None:
    """A box (low, high) of the region that none of the boxes meets, where they are together smaller than the region;
    None where they are not, which says nothing. n log n, while `disjoint` finds all that is left over.

    Along each dimension some stretch between two bounds of boxes must be filled less than the region is, by those that
    reach it; what is left of these, after the last dimension, is nothing.
    """
    start, stop = region_low.copy(), region_high.copy()
    for dimension in range(len(region_low)):
        # Floating point, as volumes may be too large for integers; what is found is verified.
        areas = np.prod(np.delete(high - low, dimension, axis=1), axis=1, dtype=np.float64)
        ends = np.array([start[dimension], stop[dimension]])
        bounds, place = np.unique(np.concatenate([low[:, dimension], high[:, dimension], ends]), return_inverse=True)
        changes = np.bincount(place, np.concatenate([areas, -areas, np.zeros(2)]), len(bounds))
        filled = np.cumsum(changes)[:-1]
        least = int(np.argmin(filled))
        start[dimension], stop[dimension] = bounds[least], bounds[least + 1]
        reaching = (low[:, dimension] <= bounds[least]) & (high[:, dimension] > bounds[least])
        low, high = low[reaching].copy(), high[reaching].copy()
        low[:, dimension], high[:, dimension] = start[dimension], stop[dimension]
    return None if len(low) else (start, stop)


def disjoint(region_low: Ints, region_high: Ints, low: Ints, high: Ints) -> tuple[Parts, tuple[Ints, Ints]]:
    """Parts of the boxes that share no element, earlier boxes first, and what of the region none of them covers."""
    _, first = np.unique(np.concatenate([low, high], axis=1), axis=0, return_index=True)
    first = np.sort(first)
    if len(first) > MAX_OVERLAPPING:
        raise FormatError(
            f"{len(first)} overlapping chunks of one tensor; at most {MAX_OVERLAPPING} are sorted out. "
            "No checkpoint of ckptd has overlapping chunks: write it again from its origin"
        )
    sources: list[Ints] = []
    lows: list[Ints] = []
    highs: list[Ints] = []
    left_low, left_high = region_low[None], region_high[None]
    for index in first:
        cut_low, cut_high = np.maximum(left_low, low[index]), np.minimum(left_high, high[index])
        hit = (cut_low < cut_high).all(axis=1)
        if not hit.any():
            continue
        sources.append(np.full(int(hit.sum()), index, np.int64))
        lows.append(cut_low[hit])
        highs.append(cut_high[hit])
        rest_low, rest_high = _subtract(left_low[hit], left_high[hit], cut_low[hit], cut_high[hit])
        left_low = np.concatenate([left_low[~hit], rest_low])
        left_high = np.concatenate([left_high[~hit], rest_high])
        if not len(left_low):
            break
    width = len(region_low)
    none = np.zeros((0, width), np.int64)
    parts = Parts(
        np.concatenate([np.zeros(0, np.int64), *sources]),
        np.concatenate([none, *lows]),
        np.concatenate([none, *highs]),
    )
    return parts, (left_low, left_high)


def _subtract(low: Ints, high: Ints, cut_low: Ints, cut_high: Ints) -> tuple[Ints, Ints]:
    """What is left of each box without its cut: at most two slabs per dimension."""
    lows: list[Ints] = [np.zeros((0, low.shape[1]), np.int64)]
    highs: list[Ints] = lows.copy()
    low, high = low.copy(), high.copy()
    for dimension in range(low.shape[1]):
        below = low[:, dimension] < cut_low[:, dimension]
        slab = high[below].copy()
        slab[:, dimension] = cut_low[below, dimension]
        lows.append(low[below])
        highs.append(slab)
        above = high[:, dimension] > cut_high[:, dimension]
        slab = low[above].copy()
        slab[:, dimension] = cut_high[above, dimension]
        lows.append(slab)
        highs.append(high[above])
        low[:, dimension], high[:, dimension] = cut_low[:, dimension], cut_high[:, dimension]
    return np.concatenate(lows), np.concatenate(highs)
