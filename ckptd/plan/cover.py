"""Whether boxes cover a region, and which parts of them to take so that each element is taken once.

Owns the geometry that the load and save plans share. Boxes are rows of two integer arrays [n, D], `low` inclusive and
`high` exclusive; they lie inside the region and are not empty. Knows nothing of tensors, ranks or bytes.

Work is bounded for any input: `tiles` is n log n, `disjoint` refuses (FormatError) more than MAX_OVERLAPPING boxes,
which only a foreign or hostile catalog can have for one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.errors import FormatError

Ints = npt.NDArray[np.int64]

MAX_OVERLAPPING = 4096
"""Boxes of one region that `disjoint` sorts out; its cost grows with the square."""

_MAX_CORNERS = 2**26


class Parts(NamedTuple):
    """Disjoint boxes: part i is a piece of box `source[i]`."""

    source: Ints
    low: Ints
    high: Ints


def volume(low: Ints, high: Ints) -> Ints:
    """Elements of each box."""
    return np.asarray(np.prod(high - low, axis=-1, dtype=np.int64))


def tiles(region_low: Ints, region_high: Ints, low: Ints, high: Ints) -> bool:
    """Whether the boxes cover the region, each element exactly once.

    The indicator function of a box is the signed sum of the orthants that start at its corners, and orthants are
    linearly independent; so the boxes tile the region if and only if their signed corners add up to the region's own.
    """
    if int(volume(low, high).sum()) != int(volume(region_low, region_high)):
        return False
    active = ((low != region_low) | (high != region_high)).any(axis=0)
    dimensions = int(active.sum())
    if dimensions == 0:
        return len(low) == 1
    if len(low) << dimensions > _MAX_CORNERS:
        return False
    lows = np.concatenate([low[:, active], region_low[None, active]])
    highs = np.concatenate([high[:, active], region_high[None, active]])
    own = np.ones(len(lows), np.int64)
    own[-1] = -1
    upper = np.array([[mask >> d & 1 for d in range(dimensions)] for mask in range(1 << dimensions)], bool)
    corners = np.where(upper[:, None, :], highs[None], lows[None]).reshape(-1, dimensions)
    signs = (np.where(upper.sum(axis=1) % 2, -1, 1)[:, None] * own[None]).reshape(-1)
    order = np.lexsort(corners.T)
    corners, signs = corners[order], signs[order]
    first = np.flatnonzero(np.concatenate([[True], (corners[1:] != corners[:-1]).any(axis=1)]))
    return not np.add.reduceat(signs, first).any()


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
