"""torch.save of the state dicts, one file a rank, followed by fsync of file and directory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.contender import Blocking


class TorchSave(Blocking):
    """What most training scripts do, with the fsync that most leave out."""

    def write(self, step: int) -> None:
        self._directory = self.directory / f"step-{step}"
        self._directory.mkdir(exist_ok=True)
        workload = self.workload
        state = {"model": workload.model.state_dict(), "optimizer": workload.optimizer.state_dict()}
        torch.save(state, self._file())
        for path in (self._file(), self._directory):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(self) -> None:
        state = torch.load(self._file(), weights_only=False)  # our own file of a moment ago, with DTensors in it
        self.workload.model.load_state_dict(state["model"])
        self.workload.optimizer.load_state_dict(state["optimizer"])

    def saved(self) -> Path:
        return self._directory

    def _file(self) -> Path:
        return self._directory / f"rank-{os.environ['RANK']}.pt"
