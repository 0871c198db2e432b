"""Where chunks lie in data files: alignment and tiling (docs/format.md, section 3).

Invariant of a checked layout: the chunks of every data file tile it, in order, with no gap but alignment; only tied
rows share a place, and they agree in everything that decoding needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import BYTEPLANES_ZSTD, RAW, Catalog
from ckptd.core.errors import FormatError
from ckptd.format.chunk import CODECS, plane_width

SMALL_ALIGNMENT = 64
LARGE_ALIGNMENT = 4096
LARGE_BYTES = 1024 * 1024
"""Chunks that store at least so much are aligned to LARGE_ALIGNMENT."""
FILE_BYTES = 1024 * 1024 * 1024
"""A data file should not grow beyond this."""

_MAX_OFFSET = 2**50


def aligned(position: int, stored: int) -> int:
    """Where a chunk that stores `stored` bytes begins, if the one before ends at `position`."""
    alignment = LARGE_ALIGNMENT if stored >= LARGE_BYTES else SMALL_ALIGNMENT
    return -(-position // alignment) * alignment


def check_layout(catalog: Catalog, writer: int, lengths: Sequence[int]) -> None:
    """Checks the places in one writer's rows against the lengths of its data files; raises FormatError."""
    _check_columns(catalog, writer, len(lengths))
    filled = np.flatnonzero(catalog.raw)
    order = filled[np.lexsort((catalog.file_offset[filled], catalog.file[filled]))]
    file, offset = catalog.file[order], catalog.file_offset[order]
    tied = np.zeros(len(order), bool)
    tied[1:] = (file[1:] == file[:-1]) & (offset[1:] == offset[:-1])
    _check_ties(catalog, order, tied)
    _check_tiling(catalog, order[~tied], lengths)


def _refuse(catalog: Catalog, bad: npt.NDArray[np.bool_], rule: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise FormatError(
            f"tensor {catalog.tensors[catalog.tensor[row]].key!r}, chunk in row {row}: {rule}; found writer "
            f"{catalog.writer[row]}, file {catalog.file[row]}, file_offset {catalog.file_offset[row]}, stored "
            f"{catalog.stored[row]}, raw {catalog.raw[row]}, codec {catalog.codec[row]}"
        )


def _check_columns(catalog: Catalog, writer: int, files: int) -> None:
    raw, stored, codec = catalog.raw, catalog.stored, catalog.codec
    empty = raw == 0
    _refuse(catalog, catalog.writer != writer, f"expected writer {writer}, whose part lists it")
    _refuse(catalog, ~np.isin(codec, list(CODECS)), f"expected a codec of {sorted(CODECS)}")
    placed = (catalog.file != 0) | (catalog.file_offset != 0) | (stored != 0) | (codec != RAW) | (catalog.crc != 0)
    _refuse(catalog, empty & placed, "an empty chunk has no place, codec or checksum")
    _refuse(catalog, ~empty & ((stored < 1) | (stored > raw)), "expected 1 to raw stored bytes")
    _refuse(catalog, ~empty & (codec == RAW) & (stored != raw), "expected stored = raw")
    _refuse(catalog, ~empty & ((catalog.file < 0) | (catalog.file >= files)), f"expected one of {files} files")
    _refuse(catalog, (catalog.file_offset < 0) | (catalog.file_offset > _MAX_OFFSET), "file_offset out of range")
    narrow = np.array([plane_width(info.dtype) < 2 for info in catalog.tensors], bool)
    if len(narrow):
        _refuse(catalog, (codec == BYTEPLANES_ZSTD) & narrow[catalog.tensor], "byte planes of single bytes")


def _check_ties(catalog: Catalog, order: npt.NDArray[np.int64], tied: npt.NDArray[np.bool_]) -> None:
    """Rows of `order` marked in `tied` share the place of the row before."""
    later = np.flatnonzero(tied)
    if not len(later):
        return
    dtypes = {name: number for number, name in enumerate({info.dtype for info in catalog.tensors})}
    dtype = np.array([dtypes[info.dtype] for info in catalog.tensors])[catalog.tensor]
    source, target = order[later - 1], order[later]
    differs = np.zeros(len(catalog), bool)
    for column in (dtype, catalog.raw, catalog.stored, catalog.codec, catalog.crc):
        differs[target] |= column[source] != column[target]
    _refuse(catalog, differs, "shares its place with a chunk that differs")


def _check_tiling(catalog: Catalog, order: npt.NDArray[np.int64], lengths: Sequence[int]) -> None:
    file, offset, stored = catalog.file[order], catalog.file_offset[order], catalog.stored[order]
    end = offset + stored
    first = np.ones(len(order), bool)
    first[1:] = file[1:] != file[:-1]
    before = np.zeros(len(order), np.int64)
    before[1:] = np.where(first[1:], 0, end[:-1])
    alignment = np.where(stored >= LARGE_BYTES, LARGE_ALIGNMENT, SMALL_ALIGNMENT)
    wrong = np.zeros(len(catalog), bool)
    wrong[order] = offset != -(-before // alignment) * alignment
    _refuse(catalog, wrong, "overlaps its neighbour in the file, or leaves a gap")
    last = np.append(first[1:], True) if len(order) else first
    used = dict(zip(file[last].tolist(), end[last].tolist(), strict=True))
    for number, length in enumerate(lengths):
        if used.get(number) != length:
            raise FormatError(
                f"data file {number} of the writer: chunks end at {used.get(number, 'no place')}, COMMIT says {length}"
            )
