"""Which chunks of a checkpoint are read together: runs of neighbours in one data file.

Pure functions on columns of a catalog. A run has no gaps but those that alignment leaves, so reading runs instead of
chunks costs no bytes; it saves requests, of which an object store answers few a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.format.layout import LARGE_BYTES, SMALL_ALIGNMENT

Ints = npt.NDArray[np.int64]

RUN_BYTES = 8 * 1024 * 1024
"""Most bytes of a run, stored or decoded. Chunks of LARGE_BYTES or more are runs by themselves, however long."""


def in_place_order(catalog: Catalog, rows: npt.ArrayLike) -> Ints:
    """Those of `rows` that have bytes, each once, in order of their places in the data files."""
    given = np.unique(np.asarray(rows, np.int64))
    given = given[catalog.raw[given] > 0]
    return given[np.lexsort((catalog.file_offset[given], catalog.file[given], catalog.writer[given]))]


def run_starts(catalog: Catalog, order: Ints, kind: Ints | None = None) -> Ints:
    """Where runs begin in `order`, which is `in_place_order`. Rows of one run have the same `kind`, if it is given
    (one number for each entry of `order`)."""
    if not len(order):
        return order
    writer, file, stored, raw = (getattr(catalog, name)[order] for name in ("writer", "file", "stored", "raw"))
    offset = catalog.file_offset[order]
    large = raw >= LARGE_BYTES
    begins = large.copy()
    begins[:1] = True
    gap = offset[1:] - (offset[:-1] + stored[:-1])
    begins[1:] |= (writer[1:] != writer[:-1]) | (file[1:] != file[:-1]) | (gap >= SMALL_ALIGNMENT) | large[:-1]
    if kind is not None:
        begins[1:] |= kind[1:] != kind[:-1]
    # A stretch is cut where its bytes pass multiples of a size that leaves room for the chunk that passes it.
    ends = np.cumsum(np.maximum(raw, stored) + SMALL_ALIGNMENT)
    first = np.flatnonzero(begins)
    before = np.repeat(np.append(0, ends[first[1:] - 1]), np.diff(np.append(first, len(order))))
    piece = (ends - before) // (RUN_BYTES - LARGE_BYTES - SMALL_ALIGNMENT)
    begins[1:] |= (piece[1:] != piece[:-1]) & ~large[1:]
    return np.flatnonzero(begins)
