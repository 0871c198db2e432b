"""The daemon's side of stores: epoch records, and flushing: a sealed snapshot in memory becomes a committed checkpoint,
in threads that yield to training.

Flushing has two halves: each node of a job writes what its ranks captured (`write`), then one of them, the root,
commits what all have written (`commit`). A job on one node does both. Either can be repeated at any time, by this
process or the next one, and costs little once it has succeeded.

Reads slots by descriptor and verifies each chunk's checksum on the way, so that what is stored is what was captured.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.config import node_name
from ckptd.core.errors import CkptdError, CorruptionError, NotFoundError, StoreError
from ckptd.core.types import Epoch, SnapshotId
from ckptd.daemon.priority import FLUSHING, give_way
from ckptd.observe.trace import Trace
from ckptd.plan.share import View, known_alone, object_rows, tie_equal
from ckptd.protocol.actions import WriteRecord
from ckptd.tiers.arena import FROZEN_FILE, Slot, SnapshotReader
from ckptd.tiers.store import Store, joint
from ckptd.tiers.store.names import parse_checkpoint
from ckptd.tiers.store.writer import Pace, Resting
from ckptd.tiers.throttle import Throttle


class Progress:
    """Bytes begun so far of the flush of `snapshot`, for `ckptd status`."""

    def __init__(self, snapshot: SnapshotId) -> None:
        self.snapshot, self.total_bytes, self.done_bytes = snapshot, 0, 0
        self._lock = threading.Lock()

    def report(self) -> dict[str, int]:
        """JSON-able."""
        return {"step": self.snapshot.step, "done_bytes": self.done_bytes, "total_bytes": self.total_bytes}

    def counting(self, view: View) -> View:
        """`view`, counted."""

        def counted(row: int, buffer: memoryview) -> memoryview:
            with self._lock:
                self.done_bytes += len(buffer)
            return view(row, buffer)

        return counted


class Stores:
    """The stores of one daemon, each opened once: a Store remembers what is in doubt after a failed fsync. Methods that
    write run on worker threads."""

    def __init__(self, job: str, node: str | None = None, trace: Trace | None = None) -> None:
        self.progress: Progress | None = None
        self._trace = trace or Trace(job)
        self._job = job
        self._node = node or node_name()
        self._opened: dict[str, Store] = {}
        self._untidy: set[str] = set()
        self._complaints: list[str] = []
        self._leaving = threading.Event()
        self._cancelled: set[SnapshotId] = set()
        self._recording = threading.Lock()
        self._throttle = Throttle()
        self._resting: dict[str, Resting | None] = {}
        """Of each store, what the newest checkpoint has that will be in the next one as well."""

    def limit(self, bandwidth: int | None) -> None:
        """All flushes together write at most so many bytes a second, from now on."""
        self._throttle.limit(bandwidth)

    def cancel(self, snapshot: SnapshotId | None = None) -> None:
        """The writing of `snapshot` that runs is given up; without one, all that runs and all that will."""
        if snapshot is None:
            self._leaving.set()
        else:
            self._cancelled.add(snapshot)
        self._throttle.wake()

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

    def write(
        self,
        snapshot: SnapshotId,
        store: str,
        slots: Sequence[Slot],
        part: int,
        parts: int,
        epoch: Epoch | None = None,
    ) -> None:
        """Writes what the ranks of this node, number `part` of `parts`, have captured, from their slots, which it takes
        over; what is there already is left as it is.

        StoreError, also where a newer epoch than `epoch`, this node's, has begun; CorruptionError. What was begun is
        then removed.
        """
        self._cancelled.discard(snapshot)
        self.progress = progress = Progress(snapshot)
        with contextlib.ExitStack() as held:
            held.callback(self._no_progress)
            for slot in slots:
                held.callback(slot.close)
            opened = self._open(store, create=part == 0)
            if part == 0 and store in self._untidy:
                self._tidy(store, snapshot)
            writer = joint.NodeWriter(opened, snapshot, self._job, self._node, part, parts)
            if writer.is_done():
                return
            _refuse_newer(opened, epoch)
            given = _contribution(SnapshotReader(snapshot, slots), progress.counting, alone=parts == 1)
            progress.total_bytes = sum(_stored_bytes(rows.catalog) for rows in (given.rows, given.own) if rows)
            spanning = self._trace.spanning("write", step=snapshot.step, bytes=progress.total_bytes)
            with self._attempt(store, snapshot, alone=parts == 1), spanning:
                pace = Pace(_workers(), lambda: self._is_cancelled(snapshot), self._throttle)
                try:
                    self._resting[store] = writer.write(given, pace, self._resting.get(store))
                except CorruptionError as error:
                    raise CorruptionError(f"{snapshot}: {error}") from None

    def commit(
        self, snapshot: SnapshotId, store: str, parts: int, keep: int | None = None, epoch: Epoch | None = None
    ) -> bool:
        """On the root, once all have written: puts COMMIT, then prunes to `keep`. False where it was there already.

        StoreError, with nothing committed, where what was written is not a whole checkpoint, or a newer epoch than
        `epoch`, this root's, has begun. A failure to prune is a complaint, for the checkpoint exists.
        """
        opened = self._open(store)
        fresh = not opened.committed(snapshot)
        if fresh:
            with self._attempt(store, snapshot, alone=parts == 1), self._trace.spanning("commit", step=snapshot.step):
                joint.commit(opened, snapshot, self._job, parts, lambda: _refuse_newer(opened, epoch))
        self._tolerate(store, "what was written in vain could not be removed", lambda: opened.sweep(snapshot))
        if keep is not None:
            with self._trace.spanning("prune", keep=keep):
                self._tolerate(store, "older checkpoints could not be removed", lambda: opened.prune(keep))
        if store in self._untidy:  # the daemon that wrote this flush was killed in the middle of removing something
            self._tidy(store, snapshot)
        return fresh

    def _no_progress(self) -> None:
        self.progress = None

    def _is_cancelled(self, snapshot: SnapshotId) -> bool:
        return self._leaving.is_set() or snapshot in self._cancelled

    def _open(self, uri: str, create: bool = True) -> Store:
        """`create`: the root's alone; on another node a store that is not there is not the job's."""
        if uri not in self._opened:
            try:
                self._opened[uri] = Store.open(uri, create=create)
            except NotFoundError as error:
                raise StoreError(f"{error}, on node {self._node}") from None
            self._untidy.add(uri)
        return self._opened[uri]

    @contextlib.contextmanager
    def _attempt(self, uri: str, snapshot: SnapshotId, *, alone: bool) -> Iterator[None]:
        """A failure leaves something to be tidied up. Of a node that is `alone` it goes at once: nobody else writes."""
        try:
            yield
        except BaseException:
            self._untidy.add(uri)
            if alone:
                with contextlib.suppress(CkptdError):  # what is in doubt is refused, and stays
                    self._opened[uri].abandon(snapshot)
            raise

    def _tolerate(self, uri: str, problem: str, work: Callable[[], object]) -> None:
        """Nothing is lost if this fails; it is told, and tried again."""
        try:
            work()
        except CkptdError as error:
            self._untidy.add(uri)
            self._complaints.append(f"{problem}: {error}")

    def _tidy(self, uri: str, writing: SnapshotId) -> None:
        """Removes what interrupted flushes of this job have left, while none but `writing` runs."""

        def clean() -> None:
            with self._recording:  # a record under way looks like a leftover
                store = self._opened[uri]
                self._untidy.discard(uri)
                store.clean(_foreign(store) | {writing})

        self._tolerate(uri, "leftovers of interrupted flushes could not be removed", clean)


def _contribution(reader: SnapshotReader, counted: Callable[[View], View], *, alone: bool) -> joint.Contribution:
    """What is stored of the ranks of one node. If it is `alone`, there is nothing to be compared with other nodes."""
    ranks = reader.ranks
    if alone:
        catalog = reader.catalog()
        rows = joint.Rows(catalog, counted(reader.view), catalog.file == FROZEN_FILE)
        return joint.Contribution(ranks, rows, None, {ranks[0]: reader.objects()})
    every = reader.rows_of_ranks()
    generators, objects = known_alone(reader.objects_of_ranks())
    generator_rows, content = object_rows(generators, writer=ranks[-1] + 1)
    shared = Catalog.merge([every.select(every.rank == ALL_RANKS), generator_rows])
    rows = joint.Rows(shared, counted(reader.viewing(shared, content)), shared.file == FROZEN_FILE)
    own = tie_equal(every.select(every.rank != ALL_RANKS))
    own_rows = joint.Rows(own, counted(reader.viewing(own, b""))) if len(own) else None
    return joint.Contribution(ranks, rows, own_rows, objects)


def _stored_bytes(catalog: Catalog) -> int:
    """Bytes of chunks, those of one place once."""
    _, first = np.unique([catalog.writer, catalog.file, catalog.file_offset], axis=1, return_index=True)
    return int(catalog.raw[first].sum())


def _refuse_newer(store: Store, epoch: Epoch | None) -> None:
    """A node that does not know of a newer epoch must not touch what that one may be writing."""
    newest = None if epoch is None else max((record.epoch for record in store.records()), default=None)
    if epoch is not None and newest is not None and newest > epoch:
        raise StoreError(f"{store.uri}: epoch {newest} has begun; {epoch} writes nothing any more")


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


def workers() -> ThreadPoolExecutor:
    """Where flushes run, one at a time: what an older epoch has begun ends first. All they start yields to training."""
    return ThreadPoolExecutor(1, "ckptd-flush", give_way, (FLUSHING,))


def _workers() -> int:
    return max(1, min(4, (os.cpu_count() or 1) // 2))
