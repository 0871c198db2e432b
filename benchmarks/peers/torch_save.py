"""torch.save of the state dicts, one file a rank, followed by fsync of file and directory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.contender import Blocking


class TorchSave(Blocking):
    """What most training scripts do, with the fsync and the rename that most leave out."""

    def write(self, step: int, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        workload = self.workload
        state = {"model": workload.model.state_dict(), "optimizer": workload.optimizer.state_dict()}
        file = self._file(directory)
        with file.with_suffix(".part").open("wb") as part:
            torch.save(state, part)
            part.flush()
            os.fsync(part.fileno())
        file.with_suffix(".part").rename(file)
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def read(self, directory: Path) -> None:
        state = torch.load(self._file(directory), weights_only=False)  # our own file, with DTensors in it
        self.workload.model.load_state_dict(state["model"])
        self.workload.optimizer.load_state_dict(state["optimizer"])

    def is_complete(self, directory: Path) -> bool:
        return len(list(directory.glob("rank-*.pt"))) == self.workload.ranks

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self.workload.rank}.pt"
