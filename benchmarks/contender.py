"""What a way of saving has to be able to do to be measured, and the table of all of them.

A contender is made once per process, saves several times, loads once, and is closed. `boundary` is called after every
training step; everything it does there counts as stall.
"""

from __future__ import annotations

import abc
import importlib
import shutil
import time
from pathlib import Path

from benchmarks.workload import Workload


class Contender(abc.ABC):
    """One way of saving; times are `time.perf_counter()`."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        self.workload = workload
        self.directory = directory
        self.sealed_at: float | None = None
        self.durable_at: float | None = None

    @abc.abstractmethod
    def boundary(self, step: int, *, save: bool) -> None:
        """The end of a training step; begins a save if asked to. Blocks as long as this way of saving does."""

    @abc.abstractmethod
    def poll(self) -> None:
        """Set `sealed_at` and `durable_at` of the last save if they have come; does not block."""

    @abc.abstractmethod
    def load(self) -> None:
        """Bring the workload back to its last durable save."""

    def load_from_memory(self) -> float | None:
        """Seconds to bring the workload back to its last save without reading a disk; None if there is no such way."""
        return None

    @abc.abstractmethod
    def saved(self) -> Path:
        """Directory of the last durable save."""

    def discard(self, saved: Path) -> None:
        """Remove an older save; only rank 0 is asked to."""
        shutil.rmtree(saved)

    def close(self) -> None:
        """Free whatever saving held."""
        return None


class Blocking(Contender):
    """A save that is over, and durable, when the call returns."""

    def boundary(self, step: int, *, save: bool) -> None:
        if save:
            self.sealed_at = self.durable_at = None
            self.write(step)
            self.sealed_at = self.durable_at = time.perf_counter()

    @abc.abstractmethod
    def write(self, step: int) -> None:
        """Write the checkpoint of `step` and make it durable."""

    def poll(self) -> None:
        return None


# name in the tables -> (module, class)
CONTENDERS = {
    "ckptd": ("benchmarks.ours", "Ckptd"),
    "ckptd, memory only": ("benchmarks.ours", "CkptdMemory"),
    "torch.save": ("benchmarks.peers.torch_save", "TorchSave"),
    "dcp.save": ("benchmarks.peers.dcp", "DcpSave"),
    "dcp.async_save": ("benchmarks.peers.dcp", "DcpAsyncSave"),
    "dcp.async_save cached": ("benchmarks.peers.dcp", "DcpAsyncSaveCached"),
    "dcp.async_save process": ("benchmarks.peers.dcp", "DcpAsyncSaveProcess"),
}


def make(name: str, workload: Workload, directory: Path) -> Contender:
    """The contender of that name; imports only what it needs."""
    module, attribute = CONTENDERS[name]
    contender: Contender = getattr(importlib.import_module(module), attribute)(workload, directory)
    return contender
