"""ckptd as a contender: a snapshot on request at the boundary, flushed by the daemon while training goes on.

`Checkpointer.snapshot` returns when the snapshot is sealed: its stall is an upper bound of what a loop pays that lets
the daemon choose the steps: there no rank waits for the seal.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ckptd
from benchmarks.contender import Contender
from benchmarks.workload import Workload

NEVER = 10**9


class Ckptd(Contender):
    """One Checkpointer for the whole trial; `load` reads the store, `load_from_memory` restarts the job."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        super().__init__(workload, directory)
        self._store: Path | None = self.store_in(directory)
        self._state: dict[str, Any] = {"model": workload.model, "optimizer": workload.optimizer}
        self._saved_step = 0
        self._failure: BaseException | None = None
        self._checkpointer = self._enter("never")

    def store_in(self, directory: Path) -> Path | None:
        """Where checkpoints go."""
        return directory / "store"

    def _enter(self, resume: str) -> ckptd.Checkpointer:
        checkpointer = ckptd.Checkpointer(
            self._state,
            self._store,
            job=str(self.directory),
            snapshot_every=NEVER,
            flush_every=NEVER,
            keep=1,
            resume=resume,
        )
        checkpointer.__enter__()
        return checkpointer

    def boundary(self, step: int, *, save: bool) -> None:
        self._checkpointer.step(step)
        if save:
            self.sealed_at = self.durable_at = None
            if self._checkpointer.snapshot() != step:
                raise RuntimeError(f"step {step} was not captured")
            self.sealed_at = time.perf_counter()
            self.make_durable(step)

    def make_durable(self, step: int) -> None:
        """Begins to make a sealed step durable."""
        threading.Thread(target=self._flush, args=(step,), daemon=True).start()

    def _flush(self, step: int) -> None:
        try:
            self._checkpointer.wait("durable", step)
        except ckptd.CkptdError as error:
            self._failure = error
            return
        self._saved_step = step
        self.durable_at = time.perf_counter()

    def poll(self) -> None:
        if self._failure is not None:
            raise self._failure

    def load(self) -> None:
        ckptd.load(self._state, str(self._store))

    def load_from_memory(self) -> float:
        """Seconds that a restart takes to have its state again: the job is left as by an exception and begun anew."""
        error = RuntimeError("the loop ended")
        self._checkpointer.__exit__(RuntimeError, error, None)
        started = time.perf_counter()
        self._checkpointer = self._enter("must")
        self._checkpointer.restore()
        seconds = time.perf_counter() - started
        source = self._checkpointer.statistics()["restored"]["source"]
        if source != "memory":
            raise RuntimeError(f"restored from {source}, expected memory")
        return seconds

    def saved(self) -> Path:
        (directory,) = Path(str(self._store)).glob(f"step-{self._saved_step:08d}.*")
        return directory

    def discard(self, saved: Path) -> None:
        """Nothing to do: the daemon keeps one checkpoint."""

    def close(self) -> None:
        self._checkpointer.__exit__(None, None, None)


class CkptdMemory(Ckptd):
    """Snapshots alone, without a store: what capture costs when nothing is written."""

    def store_in(self, directory: Path) -> None:
        return None

    def make_durable(self, step: int) -> None:
        """As durable as it gets: sealed."""
        self.durable_at = self.sealed_at

    def load(self) -> None:
        self.load_from_memory()

    def saved(self) -> Path:
        return self.directory
