"""Whether chunks are whole tensors: what no chunk holds, and what two chunks hold.

One question asked by a save plan, by whoever commits what several nodes have written, and by `verify`. Looks at the
rows that serve every rank; a tensor that only has rows of single ranks is theirs alone, and no question. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.types import itemsize
from ckptd.plan import cover

Ints = npt.NDArray[np.int64]


def missing(catalog: Catalog) -> list[str]:
    """The tensors of which some elements are in no chunk, one line each."""
    regions, rows = _regions(catalog)
    found = []
    for number in np.flatnonzero(~cover.tiled(regions)).tolist():
        info = catalog.tensors[number]
        total = math.prod(info.shape) * itemsize(info.dtype)
        span = slice(int(regions.first[number]), int(regions.first[number + 1]))
        held = int(catalog.raw[rows[span]].sum())
        if not total or not (catalog.rank[catalog.first[number] : catalog.first[number + 1]] == ALL_RANKS).any():
            continue
        if held < total:
            found.append(f"tensor {info.key!r}: its chunks hold {held} of {total} bytes")
        elif (hole := gap(regions.region_low[number], regions.region_high[number], *_boxes(regions, span))) is not None:
            found.append(f"tensor {info.key!r}: elements {spoken(hole, len(info.shape))} are in no chunk")
    return found


def repeated(catalog: Catalog) -> Iterator[tuple[int, int]]:
    """Pairs of rows that hold the same box of the same tensor for the same ranks."""
    columns = [*catalog.sizes.T, *catalog.offsets.T, catalog.rank, catalog.tensor]
    order = np.lexsort(columns) if len(catalog) else np.zeros(0, np.int64)
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    for position in np.flatnonzero(same).tolist():
        yield int(order[position]), int(order[position + 1])


def gap(region_low: Ints, region_high: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints] | None:
    """A box of the region (low, high) that none of the boxes holds; None where all of it is held."""
    if ((low == region_low) & (high == region_high)).all(axis=1).any():
        return None
    found = cover.hole(region_low, region_high, low, high)
    if found is None:
        _, (left, end) = cover.disjoint(region_low, region_high, low, high)
        found = (left[0], end[0]) if len(left) else None
    return found


def spoken(box: tuple[Ints, Ints], dimensions: int) -> str:
    """A box as slices, for messages."""
    bounds = zip(*(end[:dimensions] for end in box), strict=True)
    return f"[{', '.join(f'{low}:{high}' for low, high in bounds)}]"


def _regions(catalog: Catalog) -> tuple[cover.Regions, Ints]:
    """The boxes of each tensor's rows that serve every rank and are not empty; and which rows these are."""
    rows = np.flatnonzero((catalog.rank == ALL_RANKS) & (catalog.raw > 0))
    count, width = len(catalog.tensors), catalog.offsets.shape[1]
    shapes = np.ones((count, width), np.int64)
    for number, info in enumerate(catalog.tensors):
        shapes[number, : len(info.shape)] = info.shape
    first = np.searchsorted(catalog.tensor[rows], np.arange(count + 1)).astype(np.int64)
    low = catalog.offsets[rows]
    return cover.Regions(np.zeros_like(shapes), shapes, first, low, low + catalog.sizes[rows]), rows


def _boxes(regions: cover.Regions, span: slice) -> tuple[Ints, Ints]:
    return regions.low[span], regions.high[span]
