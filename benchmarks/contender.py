"""What a way of saving has to be able to do to be measured, and the table of all of them.

A contender is made once per process, resumes once, is told of every step's end, and is closed. What it does in
`boundary` and `before_update` stalls the loop. It may keep the state of every step (`snapshots`), or only of those that
shall be durable.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import shutil
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.workload import Workload


class Contender(abc.ABC):
    """One way of saving, on one rank. Steps divisible by `flush_every` shall be durable."""

    snapshots = True
    """Whether each step's state is kept, and not only those that become durable."""
    flushes = True
    """Whether anything ever becomes durable."""

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        self.workload = workload
        self.directory = directory
        self.flush_every = flush_every

    def resume(self) -> int:
        """Bring the workload to the newest state that is left of this job; the step it is of, 0 if there is none."""
        return 0

    @abc.abstractmethod
    def boundary(self, step: int) -> None:
        """The end of a training step. Blocks as long as this way of saving does."""

    def before_update(self) -> None:
        """Called before the weights change."""
        return None

    def finish(self, step: int) -> None:
        """Begin to make this last step durable, whatever its number."""
        return None

    def kept(self) -> int:
        """Of one that takes snapshots: how many so far would have outlived the death of every rank."""
        return 0

    def durable(self) -> int:
        """The newest step that is on disk; 0 if none. Called from another thread; raises what saving failed with."""
        return 0

    def load(self) -> None:
        """Bring the workload back to its last durable step, from disk."""
        raise NotImplementedError

    def load_from_memory(self) -> float | None:
        """Seconds to bring the workload back to its last step without reading a disk; None if there is no such way."""
        return None

    def saved(self) -> Path | None:
        """Directory of the last durable step; None for what never writes."""
        return None

    def close(self) -> None:
        """Free whatever saving held."""
        return None


class Nothing(Contender):
    """The loop alone."""

    snapshots = flushes = False

    def boundary(self, step: int) -> None:
        return None


class Memcpy(Contender):
    """A plain copy of the state at every step, with all cores: what is compared with. It would outlive nothing."""

    flushes = False

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._targets = [torch.zeros_like(tensor) for tensor in workload.tensors()]

    def boundary(self, step: int) -> None:
        for source, target in zip(self.workload.tensors(), self._targets, strict=True):
            target.copy_(source)


class OnDisk(Contender):
    """Saves that are a directory each, `step-<n>`, and nothing but that. Keeps the newest and the one before it."""

    snapshots = False

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._begun: list[int] = []

    @abc.abstractmethod
    def write(self, step: int, directory: Path) -> None:
        """Begin to save; blocks if this way of saving does."""

    @abc.abstractmethod
    def read(self, directory: Path) -> None:
        """Fill the workload, whose state exists, from a save."""

    @abc.abstractmethod
    def is_complete(self, directory: Path) -> bool:
        """Whether a save that a killed job left can be read."""

    def place(self, step: int) -> Path:
        """The directory of a save."""
        return self.directory / f"step-{step}"

    def boundary(self, step: int) -> None:
        if step % self.flush_every == 0:
            self._save(step)

    def finish(self, step: int) -> None:
        if step not in self._begun:
            self._save(step)

    def _save(self, step: int) -> None:
        self._begun.append(step)
        if len(self._begun) > 2 and self.workload.rank == 0:
            old = self.place(self._begun.pop(0))
            threading.Thread(target=shutil.rmtree, args=(old, True), daemon=True).start()
        self.write(step, self.place(step))

    def resume(self) -> int:
        found = {int(path.name.removeprefix("step-")): path for path in self.directory.glob("step-*")}
        complete = sorted(step for step, path in found.items() if self.is_complete(path))
        newest = complete[-1] if complete else 0
        dist.barrier()  # everybody has looked
        if self.workload.rank == 0:
            for step in found.keys() - complete[-2:]:
                shutil.rmtree(found[step])
        dist.barrier()
        self._begun = complete[-2:]
        if newest:
            self.workload.create_moments()
            self.read(found[newest])
        return newest

    def load(self) -> None:
        self.read(self.place(self.durable()))

    def saved(self) -> Path | None:
        return self.place(self.durable()) if self.durable() else None


class Blocking(OnDisk):
    """A save that is over, and durable, when the call returns."""

    _durable = 0

    def _save(self, step: int) -> None:
        super()._save(step)
        self._durable = step

    def durable(self) -> int:
        return self._durable


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a contender is: its class, the environment it needs (None: ours), and a module to run beside the ranks.
    `apart`: each rank is on a node of its own, of which it needs several."""

    module: str
    attribute: str
    environment: str | None = None
    companion: str | None = None
    apart: bool = False


CONTENDERS = {
    "none": Entry("benchmarks.contender", "Nothing"),
    "memcpy": Entry("benchmarks.contender", "Memcpy"),
    "ckptd": Entry("benchmarks.ours", "Ckptd"),
    "ckptd, memory only": Entry("benchmarks.ours", "CkptdMemory"),
    "ckptd, on disk only": Entry("benchmarks.ours", "CkptdDisk"),
    "ckptd, protected": Entry("benchmarks.ours", "CkptdProtected", apart=True),
    "torch.save": Entry("benchmarks.peers.torch_save", "TorchSave"),
    "dcp.save": Entry("benchmarks.peers.dcp", "DcpSave"),
    "dcp.async_save": Entry("benchmarks.peers.dcp", "DcpAsyncSave"),
    "dcp.async_save, fastest": Entry("benchmarks.peers.dcp", "DcpAsyncSaveFastest"),
    "DLRover": Entry("benchmarks.peers.dlrover", "FlashCheckpoint", "dlrover", "benchmarks.peers.dlrover_agent"),
    "LM-Resiliency": Entry("benchmarks.peers.lm_resiliency", "LmResiliency", "lm-resiliency"),
    "ByteCheckpoint": Entry("benchmarks.peers.bytecheckpoint", "ByteCheckpoint", "bytecheckpoint"),
    "torch_checkpointing": Entry("benchmarks.peers.torch_checkpointing", "TorchCheckpointing", "torch-checkpointing"),
}


def make(name: str, workload: Workload, directory: Path, flush_every: int) -> Contender:
    """The contender of that name; imports only what it needs."""
    entry = CONTENDERS[name]
    module = importlib.import_module(entry.module)
    contender: Contender = getattr(module, entry.attribute)(workload, directory, flush_every)
    return contender
