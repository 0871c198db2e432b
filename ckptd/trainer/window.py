"""One capture under way, and the window in which its lazy part is copied.

The window is open from the boundary to the next write to what is copied: only parameters and optimizer state, which
optimizer steps alone may write (PROTOCOL section 6, docs/architecture.md). Addresses, versions, the first bytes of what
is in main memory, and in audited windows all bytes of the sources are compared before the capture counts; only the
audit is proof. Sources on devices are audited by copying them twice: at the boundary, and when the window closes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ckptd.core.types import SnapshotId
from ckptd.protocol import messages as m
from ckptd.tiers.arena import Slot
from ckptd.trainer.copying import CopyJobs
from ckptd.trainer.device import Streams, Writers
from ckptd.trainer.transfer import Transfer

log = logging.getLogger("ckptd.capture")

NAMED = 5
"""Tensors that a message names."""


class Running:
    """One capture under way."""

    def __init__(
        self,
        settle: Callable[[m.Captured | m.Missed], None],
        snapshot: SnapshotId,
        slot: Slot,
        jobs: CopyJobs,
        grant: m.Grant,
        objects: bytes,
        replicas: dict[int, int],
    ) -> None:
        self._settle, self.snapshot = settle, snapshot
        self.slot, self.jobs, self.grant = slot, jobs, grant
        self.objects, self.replicas = objects, replicas
        self.crcs: npt.NDArray[np.uint32] = np.zeros(len(jobs.catalog), np.uint32)

    def complete(self) -> None:
        """Everything is copied: the slot holds the step."""
        self.jobs.spread(self.crcs)
        self.slot.commit(self.snapshot, self.crcs, self.objects)
        self._settle(m.Captured(self.grant.grant, self.snapshot.step, self.grant.slot, self.replicas))

    def missed(self, reason: m.Reason) -> None:
        """The slot holds nothing whole."""
        self._settle(m.Missed(self.grant.grant, reason))


class Window:
    """What of a capture is not in the slot yet when the boundary ends, and the thread that sees to it.

    Rows in main memory are copied by the thread: the next write waits for it. Rows on devices are copied by these:
    their streams wait, this process does not, and the window may be closed long before the bytes are there.
    """

    SLICE_BYTES = 64 * 1024 * 1024

    def __init__(
        self, capture: Running, lazy: npt.NDArray[np.int64], audit: bool, threads: int, before: Window | None
    ) -> None:
        """`lazy`: the rows to copy after the boundary. `before`: the window before, if its outcome is not said."""
        self.capture = capture
        self._threads, self._audit, self._before = threads, audit, before
        on_cuda = capture.jobs.on_cuda(lazy)
        self._far = np.concatenate([lazy[:0], *on_cuda.values()])
        self._near = np.setdiff1d(lazy, self._far, assume_unique=True)
        self._transfer: Transfer | None = None
        self._expected: npt.NDArray[np.uint32] | None = None
        self._failed = False
        self._given_up = threading.Event()
        self._near_done, self._far_once = threading.Event(), threading.Event()
        self._closed, self._lock, self._compared = threading.Event(), threading.Lock(), False
        self.written: list[str] = []
        """Once finished: keys of the tensors that changed while they were copied."""
        self._thread: threading.Thread | None = None

    # --- the training thread

    def begin(self, writers: Writers) -> bool:
        """Copies at the boundary what is not lazy, and begins with the rest. Whether there is a rest; else the capture
        is complete. Raises what a copy raises, if nothing is under way."""
        capture, jobs = self.capture, self.capture.jobs
        rows = np.concatenate([jobs.eager, jobs.windowed])
        eager = np.setdiff1d(rows, np.concatenate([self._far, self._near]), assume_unique=True)
        far = np.concatenate([eager[:0], *jobs.on_cuda(eager).values()])
        try:
            self._queue(far, writers)
            here = np.setdiff1d(eager, far, assume_unique=True)
            jobs.copy(here, capture.slot.map(), capture.crcs, self._threads)
            if self._audit and len(self._near):
                self._expected = np.zeros_like(capture.crcs)
                jobs.checksum(self._near, self._expected, self._threads)
            self._witness = jobs.witness(self._near)
        except Exception:
            if self._transfer is None:
                raise
            log.exception("step %d is not captured", capture.snapshot.step)
            self._failed = True
        if self._transfer is None and not len(self._near):
            capture.complete()
            return False
        self._thread = threading.Thread(target=self._run, name="ckptd-window", daemon=True)
        self._thread.start()
        return True

    def _queue(self, eager: npt.NDArray[np.int64], writers: Writers) -> None:
        """Eager rows, and lazy ones of an audited window, are there before the training goes on."""
        if not len(eager) + len(self._far):
            return
        capture = self.capture
        self._far_witness = capture.jobs.witness(self._far)
        streams = writers.since_boundary()
        self._transfer = transfer = Transfer(capture.jobs, capture.slot.map())
        at_once = np.concatenate([eager, self._far]) if self._audit else eager
        transfer.queue(at_once, streams)
        transfer.hold(streams)
        if not self._audit:
            transfer.queue(self._far, streams)

    def finish(self, max_stall_s: float, streams: Streams) -> None:
        """Before a write, as often as there is one: it comes after the copy, if it is queued on one of the streams.

        This process waits for its own copies, at most `max_stall_s`; then they are given up and the snapshot skipped.
        For devices it does not wait, but for the first copy of an audited window, as long; then there is no audit.
        """
        transfer = self._transfer
        if transfer is not None:
            if self._audit and not self._closed.is_set() and self._far_once.wait(max_stall_s):
                transfer.queue(self._far, streams)
            transfer.hold(streams)
            self._compare_versions()
            self._closed.set()
        if not self._near_done.wait(max_stall_s):
            self._given_up.set()
            self._near_done.wait()
        if transfer is None:
            self.ended(None)

    def ended(self, timeout_s: float | None = 0.0) -> bool:
        """Whether the outcome has been said; waits for that so long."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # --- the window's thread

    def _run(self) -> None:
        capture = self.capture
        try:
            reason = self._copy_near()
        except Exception:
            log.exception("step %d is not captured", capture.snapshot.step)
            reason = "failed"
        finally:
            self._near_done.set()
        try:
            reason = self._await_devices() or reason
            if self._before is not None:  # outcomes are said in the order of the steps
                self._before.ended(None)
                self._before = None
            if reason is None:
                capture.complete()
        except Exception:
            log.exception("step %d is not captured", capture.snapshot.step)
            reason = "failed"
        if reason is not None:
            capture.missed(reason)

    def _copy_near(self) -> m.Reason | None:
        """Why the capture is missed, if so."""
        capture, jobs = self.capture, self.capture.jobs
        if self._failed:
            return "failed"
        for rows in jobs.slices(self._near, self.SLICE_BYTES) if len(self._near) else ():
            if self._given_up.is_set():
                return "stall"
            jobs.copy(rows, capture.slot.map(), capture.crcs, self._threads)
        return self._judge(jobs.written(self._near, self._witness, self._expected, capture.crcs))

    def _await_devices(self) -> m.Reason | None:
        capture, transfer = self.capture, self._transfer
        if transfer is None:
            return None
        transfer.finish(capture.crcs)
        differing: list[str] = []
        if self._audit and len(self._far):
            expected = capture.crcs.copy()
            self._far_once.set()
            self._closed.wait()
            transfer.finish(capture.crcs)
            if not transfer.failed:
                differing = capture.jobs.written(self._far, None, expected, capture.crcs)
        self._compare_versions()
        transfer.release()
        if transfer.failed:
            log.error("step %d is not captured: %s", capture.snapshot.step, transfer.failed)
            return "failed"
        return self._judge(sorted({*differing, *self._rewritten}))

    # --- both

    def _compare_versions(self) -> None:
        """Once: at the first write that was announced, or when the copies are there, whichever comes first."""
        with self._lock:
            if not self._compared:
                self._compared = True
                self._rewritten = self.capture.jobs.written(self._far, self._far_witness, None, self.capture.crcs)

    def _judge(self, written: list[str]) -> m.Reason | None:
        if not written:
            return None
        self.written += written
        log.error(
            "step %d is not captured: %s changed while being copied; call before_update() before such writes. "
            "From now on copied before the next step begins",
            self.capture.snapshot.step,
            ", ".join(written[:NAMED]) + (f" and {len(written) - NAMED} more" * (len(written) > NAMED)),
        )
        return "mutated"
