"""ByteCheckpoint: asynchronous saves (`fast_saving`) by threads of its own.

It unpickles its metadata, which torch forbids unless told otherwise. A tracker file names the last step that is whole.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
os.environ["BYTECHECKPOINT_ENABLE_PINNED_MEM_D2H"] = "0"

import bytecheckpoint

from benchmarks.contender import OnDisk
from benchmarks.workload import Workload

TRACKER = "latest_checkpointed_iteration.txt"


class ByteCheckpoint(OnDisk):
    """Its save and load of a model and an optimizer, which it knows under FSDP2 and, as `ddp`, in one process."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._framework = "fsdp2" if workload.ranks > 1 else "ddp"
        self._state = {"model": workload.model, "optimizer": workload.optimizer}

    def place(self, step: int) -> Path:
        return self.directory / f"global_step_{step}"

    def resume(self) -> int:
        step = self.durable()
        if step:
            self.workload.create_moments()
            self.read(self.place(step))
        return step

    def write(self, step: int, directory: Path) -> None:
        bytecheckpoint.save(
            str(self.directory), self._state, framework=self._framework, fast_saving=True, global_steps=step
        )

    def durable(self) -> int:
        tracker = self.directory / TRACKER
        return int(tracker.read_text().strip() or 0) if tracker.exists() else 0

    def read(self, directory: Path) -> None:
        bytecheckpoint.load(str(directory), self._state, framework=self._framework)

    def is_complete(self, directory: Path) -> bool:
        return directory == self.place(self.durable())
