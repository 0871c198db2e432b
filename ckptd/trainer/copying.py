"""Copying a rank's chunks from its tensors into a slot, checksums on the way.

Owns the jobs: per chunk an address in a source tensor, strides, and an offset in the slot, prepared once and made anew
when tensors are replaced. Chunks at one place (tied keys) are copied once. `copy` and `checksum` are synchronous: CPU
tensors natively without the GIL, tensors on devices through torch. Captures copy from CUDA devices by transfer.py, to
which `columns` says what to copy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckptd.core.box import Box, contiguous_strides
from ckptd.core.catalog import Catalog
from ckptd.core.native import address_of, copy_boxes
from ckptd.core.types import itemsize
from ckptd.trainer.device import HOST, devices_of
from ckptd.trainer.state_tensors import Source

Ints = npt.NDArray[np.int64]
Rows = Ints
Column = npt.NDArray[np.uint64]

WITNESS_BYTES = 64
"""Of each chunk: looked at before and after a lazy copy, since a write through `.data` changes no version."""


class Witness(NamedTuple):
    """(version, address) of tensors, by their number, and a checksum of where each chunk begins. A version counts
    writes through torch; inference tensors have none."""

    tensors: dict[int, tuple[int, int]]
    begins: npt.NDArray[np.uint32]


class CopyJobs:
    """The copies that capture one layout from one set of tensors.

    `rows` are rows of `catalog`, one for each place in the slot; each is in `windowed` or in `eager`.
    """

    def __init__(self, catalog: Catalog, sources: Sequence[Source], aliases: dict[str, str]) -> None:
        """Every chunk of `catalog` lies in one of `sources`, under its key or the key that it is an alias of."""
        self.catalog = catalog
        count, width = catalog.offsets.shape
        empty = catalog.raw == 0
        place = np.where(empty, -1 - np.arange(count), catalog.file_offset)
        _, first, inverse = np.unique(place, return_index=True, return_inverse=True)
        self._first, self._inverse = first, inverse
        by_key: dict[str, list[int]] = {}
        for index, source in enumerate(sources):
            by_key.setdefault(source.key, []).append(index)
        self._source = np.zeros(count, np.int64)
        self._inside = np.zeros(count, np.int64)
        self._strides = np.zeros((count, width), np.int64)
        self._packed = np.zeros((count, width), np.int64)
        self._items = np.array([itemsize(catalog.tensors[t].dtype) for t in catalog.tensor], np.int64)
        self._innermost = np.zeros(count, np.int64)
        self._boxes: list[Box] = []
        windowed = np.zeros(count, np.bool_)
        for row in range(count):
            key = catalog.tensors[catalog.tensor[row]].key
            box = catalog.box(row)
            index = next(i for i in by_key[aliases.get(key, key)] if _contains(sources[i].box, box))
            windowed[row] = sources[index].windowed
            self._place(row, box, index, sources[index])
        chosen = np.zeros(count, np.bool_)
        chosen[first] = True
        chosen &= ~empty
        self.rows: Rows = np.flatnonzero(chosen)
        self.windowed: Rows = np.flatnonzero(chosen & windowed)
        self.eager: Rows = np.flatnonzero(chosen & ~windowed)
        self.sources = sources
        self._tensors: list[torch.Tensor] = []
        self._address = np.zeros(count, np.uint64)
        self._device = np.full(count, HOST, np.int64)
        self.refresh()

    def refresh(self, sources: Sequence[Source] | None = None) -> bool:
        """Takes the addresses of the sources' tensors as they are now and holds their storage; False where a tensor
        has been replaced by one with other strides, for which these jobs do not serve. `sources`: those of a later walk
        of the same state."""
        self.sources = self.sources if sources is None else sources
        tensors = [source.tensor for source in self.sources]
        if self._tensors and any(
            new is not old and new.stride() != old.stride() for new, old in zip(tensors, self._tensors, strict=True)
        ):
            return False
        self._tensors = tensors
        if len(self._source):
            pointers = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
            self._address = (pointers[self._source] + self._inside).astype(np.uint64)
            self._device = np.array(devices_of(tensors), np.int64)[self._source]
        return True

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """What these jobs read from at present."""
        return self._tensors

    def _place(self, row: int, box: Box, index: int, source: Source) -> None:
        local = box.shifted([-o for o in source.box.offsets])
        strides = source.tensor.stride()
        item, n = self._items[row], len(box.sizes)
        self._source[row] = index
        self._inside[row] = sum(o * s for o, s in zip(local.offsets, strides, strict=True)) * item
        self._strides[row, :n] = np.array(strides, np.int64) * item
        self._packed[row, :n] = np.array(contiguous_strides(box.sizes), np.int64) * item
        self._innermost[row] = max(n - 1, 0)
        self._boxes.append(local)

    def copy(self, rows: Rows, target: int, crcs: npt.NDArray[np.uint32], threads: int) -> None:
        """Copies the chunks of `rows` to the slot's data at address `target` and notes their checksums in `crcs`."""
        addresses = (target + self.catalog.file_offset[rows]).astype(np.uint64)
        device = self._device[rows] != HOST
        for row, address in zip(rows[device].tolist(), addresses[device].tolist(), strict=True):
            self._copy_from_device(row, address)
        sources = self._address[rows]
        sources[device] = addresses[device]
        strides = np.where(device[:, None], self._packed[rows], self._strides[rows])
        targets = np.where(device, np.uint64(0), addresses)
        self._run(rows, self.catalog.sizes[rows], sources, strides, targets, crcs, threads)

    def lazy(self, capture: str) -> Rows:
        """The rows of `windowed` that are copied in the window: those on CUDA devices unless the option `capture` is
        "eager", those in main memory if it is "lazy"."""
        device = self._device[self.windowed]
        lazy: Rows = self.windowed[((device >= 0) & (capture != "eager")) | ((device == HOST) & (capture == "lazy"))]
        return lazy

    def on_cuda(self, rows: Rows) -> dict[int, Rows]:
        """Those of `rows` that are on CUDA devices, by device."""
        devices = self._device[rows]
        return {int(device): rows[devices == device] for device in np.unique(devices[devices >= 0])}

    def columns(self, rows: Rows, target: int) -> tuple[Column, Column, Ints, Ints, Ints]:
        """Source addresses, addresses in the slot at `target`, sizes, strides of the sources, bytes of elements."""
        addresses = (target + self.catalog.file_offset[rows]).astype(np.uint64)
        sizes = self.catalog.sizes[rows]
        return self._address[rows], addresses, sizes, self._strides[rows], self._items[rows]

    def checksum_copies(self, rows: Rows, target: int, crcs: npt.NDArray[np.uint32], threads: int) -> None:
        """The checksums of what is in the slot at `target`, wherever it came from."""
        addresses = (target + self.catalog.file_offset[rows]).astype(np.uint64)
        nowhere = np.zeros(len(rows), np.uint64)
        self._run(rows, self.catalog.sizes[rows], addresses, self._packed[rows], nowhere, crcs, threads)

    def copy_eagerly(self, keys: Collection[str]) -> None:
        """From now on the chunks of these tensors are copied at the boundary: somebody writes to them in the window."""
        written = np.array([source.key in keys for source in self.sources], np.bool_)[self._source]
        moved = written[self.windowed]
        self.eager = np.sort(np.concatenate([self.eager, self.windowed[moved]]))
        self.windowed = self.windowed[~moved]

    def checksum(self, rows: Rows, crcs: npt.NDArray[np.uint32], threads: int) -> None:
        """Only the checksums of the sources."""
        device = self._device[rows] != HOST
        staging = bytearray(int(self.catalog.raw[rows[device]].max(initial=0)))
        for row in rows[device]:
            self._copy_from_device(int(row), address_of(staging))
            self.checksum_copies(row[None], address_of(staging) - int(self.catalog.file_offset[row]), crcs, threads)
        near = rows[~device]
        nowhere = np.zeros(len(near), np.uint64)
        self._run(near, self.catalog.sizes[near], self._address[near], self._strides[near], nowhere, crcs, threads)

    def _run(
        self,
        rows: Rows,
        sizes: Ints,
        sources: Column,
        strides: Ints,
        targets: Column,
        crcs: npt.NDArray[np.uint32],
        threads: int,
    ) -> None:
        found = np.zeros(len(rows), np.uint32)
        copy_boxes(
            sources,
            targets,
            sizes,
            strides,
            self._packed[rows],
            self._items[rows],
            crc=found,
            threads=threads,
        )
        crcs[rows] = found

    def slices(self, rows: Rows, most_bytes: int) -> Iterator[Rows]:
        """`rows` in groups of about `most_bytes`."""
        ends = np.cumsum(self.catalog.raw[rows])
        cuts = np.flatnonzero(np.diff(ends // most_bytes)) + 1
        return iter(np.split(rows, cuts))

    def witness(self, rows: Rows) -> Witness:
        """What changes with most writes to the tensors behind `rows` that an audit would find; of tensors on devices
        no bytes are looked at."""
        near = rows[self._device[rows] == HOST]
        sizes = np.ones_like(self.catalog.sizes[near])
        each, inner = np.arange(len(near)), self._innermost[near]
        most = np.maximum(WITNESS_BYTES // self._items[near], 1)
        sizes[each, inner] = np.minimum(self.catalog.sizes[near, inner], most)
        begins = np.zeros(len(self.catalog), np.uint32)
        nowhere = np.zeros(len(near), np.uint64)
        self._run(near, sizes, self._address[near], self._strides[near], nowhere, begins, 1)
        seen = ((i, self._tensors[i]) for i in np.unique(self._source[rows]).tolist())
        tensors = {i: (0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for i, tensor in seen}
        return Witness(tensors, begins)

    def written(
        self,
        rows: Rows,
        before: Witness | None,
        expected: npt.NDArray[np.uint32] | None,
        found: npt.NDArray[np.uint32],
    ) -> list[str]:
        """Keys of the tensors behind `rows` that were written since `before`, or whose copy has another checksum than
        was `expected`."""
        differing: set[int] = set()
        changed = np.zeros(len(rows), np.bool_)
        if before is not None:
            now = self.witness(rows)
            differing.update(i for i, seen in now.tensors.items() if seen != before.tensors[i])
            changed |= now.begins[rows] != before.begins[rows]
        if expected is not None:
            changed |= expected[rows] != found[rows]
        differing.update(self._source[rows[changed]].tolist())
        return sorted({self.sources[i].key for i in differing})

    def spread(self, crcs: npt.NDArray[np.uint32]) -> None:
        """Gives chunks at one place the checksum of the one that was copied."""
        if len(crcs):
            crcs[:] = crcs[self._first][self._inverse]

    def _copy_from_device(self, row: int, address: int) -> None:
        box, tensor = self._boxes[row], self._tensors[self._source[row]]
        view = tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        _tensor_at(address, box.sizes, tensor.dtype).copy_(view)


def _contains(outer: Box, inner: Box) -> bool:
    return all(
        p <= q and q + t <= p + s
        for p, s, q, t in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True)
    )


def _tensor_at(address: int, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous CPU tensor over memory that somebody else owns."""
    size = math.prod(sizes) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).reshape(tuple(sizes))
