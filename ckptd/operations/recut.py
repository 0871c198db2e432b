"""Putting chunks together anew, in bounded memory: decoded source chunks in, chunks of the target out.

Owns the memory of it and its order: two slots that hold a batch of target chunks each, one being emptied while the
other is filled, and threads that come for a chunk and help to fill the batch it is in. Where the source's bytes come
from is a function, so a checkpoint, somebody else's file and a test are the same. Writes no files.

Invariants: a source chunk is decoded once per batch that needs it; whoever waits for a batch is told of the error
that keeps it from being filled; memory is `Room` and nothing else that grows.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from typing import NamedTuple

import numpy as np

from ckptd.core import native
from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import Catalog
from ckptd.core.errors import ConfigError
from ckptd.plan.recut import Assembly
from ckptd.plan.share import Read

DEFAULT_MEMORY = 1024**3
LEAST_MEMORY = 320 * 1024**2

_MAX_THREADS = 8
_FIXED_BYTES = 40 * 1024**2
"""Staging of the file being written, and the plan of one part."""
_PIPELINE_BYTES = 2 * CHUNK_BYTES
"""Per chunk on its way to the file: raw and compressed; as many as threads, and two."""
_THREAD_BYTES = 3 * CHUNK_BYTES + 4 * 1024**2
"""Per thread: stored and raw bytes of a source chunk, byte planes, contexts of the codec."""


class Room(NamedTuple):
    """Threads, and bytes of each of the two slots, that `memory` has room for."""

    threads: int
    slot_bytes: int

    @classmethod
    def of(cls, memory: int, threads: int | None = None) -> Room:
        """As many threads as there are cores, if the slots stay useful; ConfigError if `memory` is too little.

        A slot is larger than all chunks on their way to the file: what waits for the batch after the next can then
        never be what keeps this one from being emptied.
        """
        if memory < LEAST_MEMORY:
            raise ConfigError(f"memory: {memory} bytes; expected at least {LEAST_MEMORY} (320M)")
        most = threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        for count in range(most, 0, -1):
            used = _FIXED_BYTES + (count + 2) * _PIPELINE_BYTES + count * _THREAD_BYTES
            slot = (memory - used) // 2 // CHUNK_BYTES * CHUNK_BYTES
            if slot >= max((count + 3) * CHUNK_BYTES, memory // 5) or count == 1:
                return cls(count, slot)
        raise AssertionError("one thread always fits")


class Slots:
    """The memory of two batches; pages are taken when they are first used, and kept from part to part."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.memory = [memoryview(mmap.mmap(-1, slot_bytes)) for _ in range(2)]


class Assembler:
    """Gives the chunks of one part. Chunks must be asked for in rising order of their batches; any threads may ask."""

    def __init__(self, assembly: Assembly, catalog: Catalog, read: Read, slots: Slots) -> None:
        self._assembly = assembly
        self._catalog = catalog
        self._read = read
        self._slots = slots
        self._addresses = [native.address_of(slot) for slot in slots.memory]
        pieces = assembly.pieces
        starts = np.flatnonzero((np.diff(np.stack([pieces.batch, pieces.row]), axis=1, prepend=-1) != 0).any(axis=0))
        self._starts = [*starts.tolist(), len(pieces)]
        batches = np.arange(len(assembly.loads) + 1)
        # Of each batch: the source rows not yet taken by a thread, those not yet in the slot, the chunks not fetched.
        self._next = np.searchsorted(pieces.batch[starts], batches).tolist()
        self._missing = np.diff(self._next).tolist()
        self._last = list(itertools.accumulate(self._missing))
        self._waiting = assembly.loads.tolist()
        self._begun = -1
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._local = threading.local()

    def read(self, chunk: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a chunk. Raises what reading the source raised."""
        straight, batch = int(self._assembly.straight[chunk]), int(self._assembly.batch[chunk])
        if straight >= 0:
            self._read(straight, into)
            return
        if batch < 0:
            return
        self._begin(batch)
        while (group := self._take(batch)) is not None:
            try:
                self._fill(self._starts[group], self._starts[group + 1])
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                raise
            with self._changed:
                self._missing[batch] -= 1
                self._changed.notify_all()
        self._settle(batch)
        position = int(self._assembly.position[chunk])
        into[:] = self._slots.memory[batch % 2][position : position + into.nbytes]
        with self._changed:
            self._waiting[batch] -= 1
            self._changed.notify_all()

    def _begin(self, batch: int) -> None:
        """Waits until the batch may use its slot: all chunks of the one before in it have been fetched."""
        with self._changed:
            while self._begun < batch:
                self._check()
                following = self._begun + 1
                if following < 2 or self._waiting[following - 2] == 0:
                    self._begun = following
                else:
                    self._changed.wait()

    def _take(self, batch: int) -> int | None:
        """A source row of the batch that nobody has taken yet."""
        with self._changed:
            self._check()
            if self._next[batch] == self._last[batch]:
                return None
            self._next[batch] += 1
            return int(self._next[batch]) - 1

    def _settle(self, batch: int) -> None:
        """Waits until all of the batch is in its slot."""
        with self._changed:
            while self._missing[batch]:
                self._check()
                self._changed.wait()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fill(self, start: int, stop: int) -> None:
        """Decodes the one source row that pieces `start` to `stop` are of, and copies them into their slot."""
        pieces = self._assembly.pieces
        row, slot = int(pieces.row[start]), int(pieces.batch[start]) % 2
        raw = int(self._catalog.raw[row])
        if pieces.direct[start]:
            target = int(pieces.target[start])
            self._read(row, self._slots.memory[slot][target : target + raw])
            return
        staging = self._staging(raw)
        self._read(row, staging)
        native.copy_boxes(
            np.asarray(pieces.source[start:stop] + native.address_of(staging), np.uint64),
            np.asarray(pieces.target[start:stop] + self._addresses[slot], np.uint64),
            pieces.sizes[start:stop],
            pieces.source_strides[start:stop],
            pieces.target_strides[start:stop],
            pieces.itemsize[start:stop],
        )

    def _staging(self, size: int) -> memoryview:
        """This thread's buffer for a decoded source chunk."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, max(size, mmap.PAGESIZE)))
        return buffer[:size]
