"""Flushing: a sealed snapshot in memory becomes a committed checkpoint, in a thread that yields to training.

Reads slots by descriptor and verifies each chunk's checksum on the way, so that what is stored is what was captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable

from ckptd.core.types import SnapshotId
from ckptd.tiers.arena import SnapshotReader
from ckptd.tiers.store import Store

NICE = 10
_IOPRIO_SET = 251 if os.uname().machine == "x86_64" else 30
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7


class Progress:
    """Bytes read so far of the flush of `snapshot`, for `ckptd status`."""

    def __init__(self, snapshot: SnapshotId) -> None:
        self.snapshot, self.total_bytes, self.done_bytes = snapshot, 0, 0
        self._lock = threading.Lock()

    def report(self) -> dict[str, int]:
        """JSON-able."""
        return {"step": self.snapshot.step, "done_bytes": self.done_bytes, "total_bytes": self.total_bytes}

    def add(self, size: int) -> None:
        """`size` more bytes were read."""
        with self._lock:
            self.done_bytes += size


def flush(
    reader: SnapshotReader,
    store: Store,
    job: str,
    keep: int | None,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> None:
    """Commits the snapshot of `reader` to a store and prunes it to `keep`. Raises StoreError, CorruptionError.

    A step that is committed already is left as it is. Leftovers of an interrupted flush are removed on failure.
    """
    catalog = reader.catalog()
    progress.total_bytes = int(catalog.raw.sum())

    def read(row: int, into: memoryview) -> None:
        reader.read(row, into)
        progress.add(len(into))

    if not store.committed(reader.snapshot):
        writer = store.writer(reader.snapshot, job)
        try:
            part = writer.part(0).write(catalog, read, threads=_workers(), cancelled=cancelled)
            writer.commit([part], reader.objects())
        except BaseException:
            with contextlib.suppress(Exception):
                writer.abort()
            raise
    if keep is not None:
        store.prune(keep)


def yield_to_training() -> None:
    """Lowers CPU and I/O priority of the calling thread; the threads that it starts inherit both."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, NICE)
    ctypes.CDLL(None).syscall(_IOPRIO_SET, 1, thread, _IOPRIO_BEST_EFFORT_LOWEST)


def _workers() -> int:
    return max(1, min(4, (os.cpu_count() or 1) // 2))
