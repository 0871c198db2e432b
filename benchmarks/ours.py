"""ckptd as a contender: a snapshot at every step, flushed by the daemon while training goes on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import ckptd
from benchmarks.contender import Contender
from benchmarks.workload import Workload

WAIT_S = 300.0


class Ckptd(Contender):
    """A Checkpointer as a training script has it; `load` reads the store, `load_from_memory` restarts the job."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._store: Path | None = self.store_in(directory)
        self._state: dict[str, Any] = {"model": workload.model, "optimizer": workload.optimizer}
        self._checkpointer = self._enter("auto")

    def store_in(self, directory: Path) -> Path | None:
        """Where checkpoints go."""
        return directory / "store"

    def _enter(self, resume: str) -> ckptd.Checkpointer:
        checkpointer = ckptd.Checkpointer(
            self._state,
            self._store,
            job=str(self.directory),
            snapshot_every=1 if self.snapshots else self.flush_every,
            flush_every=self.flush_every,
            keep=1,
            resume=resume,
        )
        checkpointer.__enter__()
        return checkpointer

    def resume(self) -> int:
        return self._checkpointer.restore()

    def boundary(self, step: int) -> None:
        self._checkpointer.step(step)

    def finish(self, step: int) -> None:
        self._checkpointer.wait("sealed", step, WAIT_S)
        if self.flushes:
            self._checkpointer.wait("durable", step, WAIT_S)

    def kept(self) -> int:
        return int(self._checkpointer.statistics()["snapshots_sealed"])

    def durable(self) -> int:
        committed = [int(path.parent.name[5:13]) for path in self.directory.glob("store/step-*/COMMIT")]
        return max(committed, default=0)

    def load(self) -> None:
        ckptd.load(self._state, str(self._store))

    def load_from_memory(self) -> float:
        """Seconds that a restart takes to have its state again: the job is left as by an exception and begun anew."""
        self._checkpointer.__exit__(RuntimeError, RuntimeError("the loop ended"), None)
        started = time.perf_counter()
        self._checkpointer = self._enter("must")
        self._checkpointer.restore()
        seconds = time.perf_counter() - started
        source = self._checkpointer.statistics()["restored"]["source"]
        if source != "memory":
            raise RuntimeError(f"restored from {source}, expected memory")
        return seconds

    def saved(self) -> Path | None:
        with contextlib.suppress(ValueError):
            return max(path.parent for path in self.directory.glob("store/step-*/COMMIT"))
        return None

    def close(self) -> None:
        self._checkpointer.__exit__(None, None, None)


class CkptdDisk(Ckptd):
    """Of those steps alone that become durable: what ways of saving to disk are asked for."""

    snapshots = False


class CkptdProtected(Ckptd):
    """Snapshots in the memory of several nodes, erasure-coded, without a store; those that are protected count."""

    flushes = False

    def store_in(self, directory: Path) -> None:
        return None

    def kept(self) -> int:
        return int(self._checkpointer.statistics()["snapshots_protected"])


class CkptdMemory(Ckptd):
    """Snapshots alone, without a store: what capture costs when nothing is written."""

    flushes = False

    def store_in(self, directory: Path) -> None:
        return None
