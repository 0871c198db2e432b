"""The daemon and the store: records and flushes that the node machine wants, run in threads, and what it hears of them.

Owns what is being made durable. Bytes are flush.py's to move, and when is decided by the machine.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol

from ckptd.core.types import Epoch, SnapshotId
from ckptd.daemon.flush import Stores, workers
from ckptd.protocol import messages as m
from ckptd.protocol.actions import WriteRecord
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.node import NodeMachine
from ckptd.tiers.arena import Slot

log = logging.getLogger("ckptd.daemon")


class InThread(Protocol):
    """Runs work in a thread; `done` then hears, on the loop, of the error, if there is one. `threads`: others than the
    usual ones."""

    def __call__(
        self, work: Callable[[], Any], done: Callable[[str | None], None], threads: Executor | None = None
    ) -> None: ...


class Writing:
    """See the module docstring. `slots`: those of this node, by number."""

    def __init__(self, machine: NodeMachine, stores: Stores, slots: Mapping[int, Slot], in_thread: InThread) -> None:
        self._machine, self._stores, self._slots, self._in_thread = machine, stores, slots, in_thread
        self._names: dict[SnapshotId, SnapshotId] = {}
        """Grant -> name of what is being made durable, or was."""
        self._threads = workers()

    def record(self, action: WriteRecord) -> None:
        """Makes the beginning of an epoch durable."""

        def done(error: str | None) -> None:
            self._machine.recorded(action.peer, error, time.monotonic())
            self._complain()

        self._in_thread(functools.partial(self._stores.write_record, action), done)

    def flush(self, action: cluster.Write | cluster.Commit) -> None:
        """Writes this node's part of a checkpoint, or commits all parts."""
        flush, state = action.flush, self._machine.state
        name = SnapshotId(flush.snapshot.epoch, flush.step)
        membership, number = state.cluster.membership, state.cluster.number
        assert membership is not None
        assert number is not None
        parts = len(membership.arenas)
        work: Callable[[], object]
        if isinstance(action, cluster.Commit):
            work = functools.partial(self._stores.commit, name, flush.store, parts, flush.keep, membership.epoch)
        else:
            sealed = state.table.holding(flush.snapshot)
            slots = [] if sealed is None else [self._slots[n].duplicate() for _, n in sorted(sealed.slots.items())]
            log.info("writing %s to %s", name, flush.store)
            self._names[flush.snapshot] = name
            work = functools.partial(self._stores.write, name, flush.store, slots, number, parts, membership.epoch)
        self._in_thread(work, functools.partial(self._flushed, action, membership.epoch), self._threads)

    def freed(self, action: cluster.Free) -> None:
        """Nothing reads it any more; what still writes it is given up."""
        name = self._names.pop(action.snapshot, None)
        if name is not None:
            self._stores.cancel(name)

    def _flushed(self, action: cluster.Write | cluster.Commit, epoch: Epoch, error: str | None) -> None:
        flush, job = action.flush, self._machine.job
        name = SnapshotId(flush.snapshot.epoch, flush.step)
        self._complain()
        if self._machine.state.epoch != epoch:
            return
        if error is not None:
            log.error("flush of %s failed: %s", name, error)
            job.flush_failed(flush.number, error)
        elif isinstance(action, cluster.Write):
            job.written(flush.number)
        else:
            log.info("%s is durable in %s", name, flush.store)
            job.committed(flush.number)

    def _complain(self) -> None:
        """What the store would not do, although nothing is lost by it, is counted and shown."""
        state = self._machine.state
        for complaint in self._stores.complaints():
            log.error("%s", complaint)
            state.count("store_errors")
            state.last_error = complaint[: m.MAX_TEXT]
