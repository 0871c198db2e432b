"""One rank of the loading benchmark: build a state in one layout, save it both ways, or load it both ways and measure.

Started by `loading` with a JSON argument; the last line of its output is its result as JSON. What is timed: for ckptd
the whole of `ckptd.load`; for torch.distributed.checkpoint its `load` alone, on a state dict that was made before and
is put into the model after, neither of which is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ckptd
from benchmarks.workload import BYTES_PER_PARAMETER

SINGLE, DDP, FSDP2 = "one process", "DDP", "FSDP2"
CKPTD, DCP = "ckptd.load", "dcp.load"
WARM, COLD = "warm", "cold"
WIDTH = 1024


@dataclasses.dataclass(frozen=True)
class Job:
    """What one world of ranks does: `rounds` 0 is to save."""

    layout: str
    directory: str
    state_bytes: int
    rounds: int


class Block(nn.Module):
    """Two square layers and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.outer(torch.nn.functional.gelu(self.inner(x)))
        return x + residual


class State:
    """A model and its optimizer in one layout, with the values that some training leaves, or zeros."""

    def __init__(self, layout: str, state_bytes: int, *, trained: bool) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
        torch.manual_seed(1)
        blocks = max(1, round(state_bytes / BYTES_PER_PARAMETER / (2 * WIDTH * WIDTH)))
        model: nn.Module = nn.Sequential(*(Block(WIDTH) for _ in range(blocks)))
        if layout == FSDP2:
            for block in model.children():
                fully_shard(block)
            fully_shard(model)
        elif layout == DDP:
            model = DistributedDataParallel(model)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3 if trained else 1):
            x = torch.randn(32 if trained else 1, WIDTH, generator=generator)
            self.optimizer.zero_grad()
            model(x).square().mean().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> Iterator[torch.Tensor]:
        """The local part of all that is large."""
        for parameter in self.model.parameters():
            moments = self.optimizer.state[parameter]
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()

    def wipe(self) -> None:
        """Zeros everywhere, so that a load that does nothing is seen."""
        for tensor in self.tensors():
            tensor.zero_()

    def fingerprint(self, layout: str) -> list[int]:
        """A number for each whole tensor that changes with nearly every change of its bits; the same in any layout."""
        sums = torch.stack([tensor.view(torch.int32).sum(dtype=torch.int64) for tensor in self.tensors()])
        if layout == FSDP2:
            dist.all_reduce(sums)
        found: list[int] = sums.tolist()
        return found

    def save(self, directory: Path) -> None:
        """The same state both ways."""
        ckptd.save({"model": self.model, "optimizer": self.optimizer}, directory / CKPTD, step=3)
        dcp_save(self._state_dict(), checkpoint_id=directory / DCP)

    def loader(self, name: str, directory: Path) -> tuple[Callable[[], Any], Callable[[], None]]:
        """(what is timed, what is done after) of one way of loading."""
        if name == CKPTD:
            state = {"model": self.model, "optimizer": self.optimizer}
            return lambda: ckptd.load(state, directory / CKPTD), lambda: None
        found = self._state_dict()

        def put() -> None:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=found["model"],
                optim_state_dict=found["optimizer"],
            )

        return lambda: dcp_load(found, checkpoint_id=directory / DCP), put

    def _state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def drop_cache(directory: Path) -> None:
    """Has the kernel forget the files, which must be on disk already."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            with contextlib.closing(os.fdopen(descriptor)):
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(directory: Path) -> None:
    """Has the kernel hold the files."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def read_so_far() -> tuple[int, int]:
    """(bytes asked of files, bytes that came from a disk) by this process."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    counters = {name: int(value) for name, value in lines}
    return counters["rchar"], counters["read_bytes"]


def measure(state: State, job: Job, name: str, cache: str) -> dict[str, Any]:
    """One load on this rank, timed from when all begin to when all are done."""
    directory = Path(job.directory)
    load, put = state.loader(name, directory)
    state.wipe()
    if dist.get_rank() == 0:
        (drop_cache if cache == COLD else warm_cache)(directory / name)
    dist.barrier()
    before, started = read_so_far(), time.perf_counter()
    load()
    dist.barrier()
    seconds, after = time.perf_counter() - started, read_so_far()
    put()
    return {
        "name": name,
        "cache": cache,
        "seconds": seconds,
        "read": after[0] - before[0],
        "disk": after[1] - before[1],
        "fingerprint": state.fingerprint(job.layout),
    }


def run(job: Job) -> dict[str, Any]:
    """Saves, or loads in every way and round; the order of the ways changes with each round."""
    state = State(job.layout, job.state_bytes, trained=not job.rounds)
    if not job.rounds:
        state.save(Path(job.directory))
        return {"fingerprint": state.fingerprint(job.layout)}
    measure(state, job, CKPTD, WARM)  # the first of each imports and connects
    measure(state, job, DCP, WARM)
    loads = []
    for number in range(job.rounds):
        names = [CKPTD, DCP] if number % 2 == 0 else [DCP, CKPTD]
        loads += [measure(state, job, name, cache) for cache in (WARM, COLD) for name in names]
    return {"loads": loads}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    dist.init_process_group("gloo")
    result = run(job)
    print(json.dumps({"result": result}), flush=True)
    dist.barrier()
    os._exit(0)  # a thread of gloo that drops a tensor while the interpreter ends would abort the process


if __name__ == "__main__":
    main()
