"""LM-Resiliency's in-memory checkpoints (GEMINI): a copy at every step, sent to a peer rank, flushed to disk.

Its memory is the trainers' own: a job of which all ranks die goes on from the disk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lm_resiliency import InMemoryCkptConfig
from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager

from benchmarks.contender import Contender
from benchmarks.workload import Workload


class LmResiliency(Contender):
    """Its manager as its adapters use it, with the plain local tensors of each rank."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._folder = directory / "node"
        self._manager = InMemoryCheckpointManager(
            InMemoryCkptConfig(
                interval=1,
                replication_jump=1,
                disk_flush_interval=flush_every,
                disk_folder=str(self._folder),
                run_id="benchmark",
                pin_memory=False,
            )
        )
        self._seen: set[int] = set()

    def resume(self) -> int:
        step = max(0, int(self._manager.find_latest()))
        if step:
            self.workload.create_moments()
            tensors, step, _ = self._manager.load_tensors()
            self._fill(tensors)
        return step

    def _fill(self, tensors: list[torch.Tensor]) -> None:
        for live, tensor in zip(self.workload.local_state().values(), tensors, strict=True):
            live.copy_(tensor)

    def boundary(self, step: int) -> None:
        self._manager.save_tensors(list(self.workload.local_state().values()), step)

    def finish(self, step: int) -> None:
        self._manager.maybe_wait()
        self._manager.flush_to_disk(step)

    def kept(self) -> int:
        return len(self._seen)

    def durable(self) -> int:
        step = max(0, int(self._manager._disk.find_latest_on_disk()))
        if step:
            self._seen.add(step)
        return step

    def load(self) -> None:
        _, tensors = self._manager._disk.load(self.durable())
        self._fill(tensors)

    def saved(self) -> Path | None:
        return next(self._folder.rglob(f"step-{self.durable()}"), None)

    def close(self) -> None:
        self._manager.close()
