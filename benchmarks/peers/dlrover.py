"""DLRover's Flash Checkpoint: a blocking copy into shared memory at every step, written to disk by its agent.

The agent's saver runs beside the ranks (dlrover_agent.py), as under `dlrover-run`, and outlives them. FSDP2 is none of
the frameworks it knows: each rank gives its plain local tensors to the checkpointer for sharded state.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender
from benchmarks.peers import dlrover_agent
from benchmarks.workload import Workload

os.environ["ROLE_NAME"] = "dlrover-trainer"
dlrover_agent.settle()

from dlrover.python.common.storage import KeepLatestStepStrategy  # noqa: E402 - reads the environment
from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType  # noqa: E402
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # noqa: E402

TRACKER = "dlrover_latest.txt"


class FlashCheckpoint(Contender):
    """Memory at every step; the steps that shall be durable are given to the agent as well."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._directory = directory / "dlrover"
        self._directory.mkdir(exist_ok=True)
        self._checkpointer = DdpCheckpointer(
            str(self._directory),
            local_shard_num=int(os.environ["LOCAL_WORLD_SIZE"]),
            global_shard_num=workload.ranks,
            deletion_strategy=KeepLatestStepStrategy(2, str(self._directory)),
        )
        self._kept = 0

    def resume(self) -> int:
        found = self._checkpointer.load_checkpoint()  # from disk if the ranks' memory is of different steps
        if not found:
            return 0
        self.workload.create_moments()
        return self._fill(found)

    def _fill(self, found: dict[str, Any]) -> int:
        for name, live in self.workload.local_state().items():
            live.copy_(found["state"][name])
        return int(found["step"])

    def boundary(self, step: int) -> None:
        self._save(step, StorageType.MEMORY if step % self.flush_every else StorageType.DISK)

    def _save(self, step: int, kind: StorageType) -> None:
        self._checkpointer.save_checkpoint(step, {"step": step, "state": self.workload.local_state()}, "", kind)
        self._kept += self._checkpointer._engine._cached_step == step

    def finish(self, step: int) -> None:
        self._checkpointer.wait_latest_checkpoint(60)  # it skips what comes while it writes
        self._save(step, StorageType.DISK)

    def kept(self) -> int:
        return self._kept

    def durable(self) -> int:
        tracker = self._directory / TRACKER
        return int(tracker.read_text().strip() or 0) if tracker.exists() else 0

    def load(self) -> None:
        self._fill(self._checkpointer._engine._load_from_storage())

    def load_from_memory(self) -> float:
        started = time.perf_counter()
        self._fill(self._checkpointer.load_checkpoint())
        return time.perf_counter() - started

    def saved(self) -> Path | None:
        return self._directory / str(self.durable()) if self.durable() else None
