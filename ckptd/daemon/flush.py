"""The daemon's side of stores: epoch records, and flushing: a sealed snapshot in memory becomes a committed checkpoint,
in a thread that yields to training.

Reads slots by descriptor and verifies each chunk's checksum on the way, so that what is stored is what was captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from ckptd.core.errors import CkptdError, StoreError
from ckptd.core.types import SnapshotId
from ckptd.protocol.actions import StartFlush, WriteRecord
from ckptd.tiers.arena import SnapshotReader
from ckptd.tiers.store import Store
from ckptd.tiers.store.names import parse_checkpoint

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


class Stores:
    """The stores of one daemon, each opened once: a Store remembers what is in doubt after a failed fsync. Methods that
    write run on worker threads."""

    def __init__(self, job: str) -> None:
        self.progress: Progress | None = None
        self._job = job
        self._opened: dict[str, Store] = {}
        self._untidy: set[str] = set()
        self._complaints: list[str] = []
        self._cancelled = threading.Event()
        self._recording = threading.Lock()

    def cancel(self) -> None:
        """Whatever flush runs is given up."""
        self._cancelled.set()

    def complaints(self) -> list[str]:
        """What went wrong after checkpoints were committed, told once."""
        told, self._complaints = self._complaints, []
        return told

    def write_record(self, action: WriteRecord) -> None:
        """Makes the beginning of an epoch durable; StoreError where the store cannot be written and read back.
        Leftovers are for the first flush to remove: nobody waits for that."""
        store = self._open(action.store)
        with self._recording:
            store.write_record(action.record)
        if action.record not in store.records():
            raise StoreError(f"{store.uri}: the record of epoch {action.record.epoch} cannot be read back")
        self._untidy.add(action.store)

    def flush(self, reader: SnapshotReader, action: StartFlush) -> None:
        """Commits the snapshot of `reader`, then prunes. A step that is committed already is left as it is. Raises
        StoreError, CorruptionError; a failure to prune is a complaint, for the checkpoint exists."""
        yield_to_training()
        self.progress = progress = Progress(action.snapshot)
        try:
            store = self._open(action.store)
            if action.store in self._untidy:
                self._tidy(action.store)
            if not store.committed(action.snapshot):
                self._write(reader, store, action, progress)
            if action.keep is not None:
                self._prune(store, action)
        finally:
            self.progress = None

    def _write(self, reader: SnapshotReader, store: Store, action: StartFlush, progress: Progress) -> None:
        catalog = reader.catalog()
        progress.total_bytes = int(catalog.raw.sum())

        def read(row: int, into: memoryview) -> None:
            reader.read(row, into)
            progress.add(len(into))

        writer = store.writer(action.snapshot, self._job)
        try:
            part = writer.part(0).write(catalog, read, threads=_workers(), cancelled=self._cancelled.is_set)
            writer.commit([part], reader.objects())
        except BaseException:
            self._untidy.add(action.store)
            with contextlib.suppress(Exception):
                writer.abort()
            raise

    def _open(self, uri: str) -> Store:
        if uri not in self._opened:
            self._opened[uri] = Store.open(uri, create=True)
            self._untidy.add(uri)
        return self._opened[uri]

    def _prune(self, store: Store, action: StartFlush) -> None:
        assert action.keep is not None
        try:
            store.prune(action.keep)
        except CkptdError as error:
            self._untidy.add(action.store)
            self._complaints.append(f"older checkpoints could not be removed: {error}")

    def _tidy(self, uri: str) -> None:
        """Removes what interrupted flushes of this job have left, while none runs."""
        try:
            with self._recording:  # a record under way looks like a leftover
                store = self._opened[uri]
                store.clean(_foreign(store))
                self._untidy.discard(uri)
        except CkptdError as error:
            self._complaints.append(f"leftovers of interrupted flushes could not be removed: {error}")


def _foreign(store: Store) -> set[SnapshotId]:
    """Checkpoints without COMMIT that are not for this daemon to remove: somebody else may be writing them (this job's
    epochs have a record in its store, those of a synchronous save have none), or the store is in doubt about them."""
    own = {record.epoch for record in store.records()}
    found = {identity for name, _ in store.broken() if (identity := parse_checkpoint(name)) is not None}
    return {identity for identity in found if identity.epoch not in own or _in_doubt(store, identity)}


def _in_doubt(store: Store, identity: SnapshotId) -> bool:
    try:
        store.committed(identity)
    except CkptdError:
        return True
    return False


def yield_to_training() -> None:
    """Lowers CPU and I/O priority of the calling thread; the threads that it starts inherit both."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, NICE)
    ctypes.CDLL(None).syscall(_IOPRIO_SET, 1, thread, _IOPRIO_BEST_EFFORT_LOWEST)


def _workers() -> int:
    return max(1, min(4, (os.cpu_count() or 1) // 2))
