"""One capture under way, and the window in which its lazy part is copied.

The window is open from the boundary to the next write to what is copied: only parameters and optimizer state, which
optimizer steps alone may write (PROTOCOL section 6, docs/architecture.md). Addresses, versions, the first bytes and, in
audited windows, checksums of the sources are compared before the capture counts; only the audit is proof.
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
    """The lazy part of a capture: a thread copies while the next forward and backward run."""

    SLICE_BYTES = 64 * 1024 * 1024

    def __init__(self, capture: Running, rows: npt.NDArray[np.int64], audit: bool, threads: int) -> None:
        self.capture = capture
        self._rows, self._threads = rows, threads
        self._expected: npt.NDArray[np.uint32] | None = None
        if audit:
            self._expected = np.zeros_like(capture.crcs)
            capture.jobs.checksum(rows, self._expected, threads)
        self._witness = capture.jobs.witness(rows)
        self._given_up = threading.Event()
        self.written: list[str] = []
        """Once finished: keys of the tensors that changed while they were copied."""
        self._thread = threading.Thread(target=self._copy, name="ckptd-window", daemon=True)
        self._thread.start()

    def finish(self, max_stall_s: float) -> None:
        """Waits for the copy, at most `max_stall_s`; then it is given up and the snapshot skipped."""
        self._thread.join(max_stall_s)
        if self._thread.is_alive():
            self._given_up.set()
            self._thread.join()

    def _copy(self) -> None:
        capture, jobs = self.capture, self.capture.jobs
        try:
            for rows in jobs.slices(self._rows, self.SLICE_BYTES):
                if self._given_up.is_set():
                    capture.missed("stall")
                    return
                jobs.copy(rows, capture.slot.map(), capture.crcs, self._threads)
            self.written = jobs.written(self._rows, self._witness, self._expected, capture.crcs)
            if self.written:
                log.error(
                    "step %d is not captured: %s changed while being copied; call before_update() before such writes. "
                    "From now on copied before the next step begins",
                    capture.snapshot.step,
                    ", ".join(self.written[:NAMED])
                    + (f" and {len(self.written) - NAMED} more" * (len(self.written) > NAMED)),
                )
                capture.missed("mutated")
                return
            capture.complete()
        except Exception:
            log.exception("step %d is not captured", capture.snapshot.step)
            capture.missed("failed")
