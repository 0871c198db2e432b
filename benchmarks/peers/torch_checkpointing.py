"""torch_checkpointing of Meta: staged into shared memory by a thread, written by a process of its own.

Its settings for a CPU: no pinned memory. What it is given are the plain local tensors of each rank.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch_checkpointing.checkpoint_manager import CheckpointManager
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.contender import OnDisk
from benchmarks.workload import Workload


class TorchCheckpointing(OnDisk):
    """An asynchronous save every so many steps; the update of the weights takes its lock."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        saver = AsyncCheckpointSaverConfig(staging_config=staging)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)  # which fails where torch.save writes 64 bytes
        self._manager = CheckpointManager(CheckpointManager.Config(save=saver, storage_config=storage))
        self._write: Future[Any] | None = None
        self._durable = 0

    def write(self, step: int, directory: Path) -> None:
        if self._write is not None:
            self._write.result()
        self._write = self._manager.save(str(directory), {"state": self.workload.local_state()})
        assert self._write is not None
        self._write.add_done_callback(lambda write: self._written(step, write))

    def before_update(self) -> None:
        with self._manager.lock():
            return None

    def _written(self, step: int, write: Future[Any]) -> None:
        if write.exception() is None:
            self._durable = step

    def durable(self) -> int:
        write = self._write
        if write is not None and write.done():
            write.result()
        return self._durable

    def read(self, directory: Path) -> None:
        live = self.workload.local_state()
        loaded = self._manager.load(str(directory), into={"state": live})["state"]
        for name, tensor in live.items():
            if loaded[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(loaded[name])

    def is_complete(self, directory: Path) -> bool:
        return True  # it renames what is complete to this name

    def close(self) -> None:
        self._manager.close()
