"""One rank of one trial: train, save, load with one contender, and measure. Started by `launch` with a JSON argument.

Each save is measured between training steps of the same process: `calm` steps without saving, then a save and the steps
until it is durable (at least as many), then calm steps again. What saving cost the training is the time of the steps in
between above that of as many calm ones; it holds the stall and the slow-down by background work alike.

Prints a JSON line {"phase": name} when a phase ends and waits for a line of input, so that memory can be read at rest;
the last line is {"result": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contender import Contender, make
from benchmarks.workload import Workload

LIMIT_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to do. `calm_steps` is the least number of steps in each measured stretch."""

    contender: str
    directory: str
    state_bytes: int
    batch: int
    saves: int
    calm_steps: int


@dataclasses.dataclass
class Save:
    """One measured save, in seconds."""

    stall_s: float
    sealed_s: float
    durable_s: float
    lost_s: float
    steps: int


class Loop:
    """Training steps with their times; the loop that a user would write."""

    def __init__(self, workload: Workload, contender: Contender) -> None:
        self._workload, self._contender = workload, contender
        self.number = 0
        self.fingerprint: list[int] = []

    def step(self, *, save: bool = False) -> tuple[float, float, float]:
        """(seconds of the whole step, seconds of its boundary, when the boundary began)."""
        started = time.perf_counter()
        self._workload.step()
        self.number += 1
        trained_s = time.perf_counter() - started
        if save:
            self.fingerprint = self._workload.fingerprint()
        boundary = time.perf_counter()
        self._contender.boundary(self.number, save=save)
        stall_s = time.perf_counter() - boundary
        return trained_s + stall_s, stall_s, boundary

    def calm(self, steps: int) -> float:
        """Mean seconds of a step while nothing is saved."""
        return sum(self.step()[0] for _ in range(steps)) / steps

    def save(self, least_steps: int) -> tuple[Save, float]:
        """A save, its `lost_s` still to be filled, and the seconds of the steps until it is durable on every rank."""
        spent, stall, began = self.step(save=True)
        steps = 1
        while not self._everywhere_durable() or steps < least_steps:
            if steps >= LIMIT_STEPS:
                raise RuntimeError(f"save not durable after {steps} steps")
            seconds, more, _ = self.step()
            spent, stall, steps = spent + seconds, stall + more, steps + 1
        contender = self._contender
        if contender.sealed_at is None or contender.durable_at is None:
            raise RuntimeError("a durable save without its times")
        return Save(stall, contender.sealed_at - began, contender.durable_at - began, 0.0, steps), spent

    def _everywhere_durable(self) -> bool:
        self._contender.poll()
        pending = torch.tensor(0 if self._contender.durable_at is not None else 1)
        dist.all_reduce(pending)
        return int(pending) == 0


def phase(name: str) -> None:
    """Tell the parent that a phase has ended, and wait for its leave to go on."""
    print(json.dumps({"phase": name}), flush=True)
    sys.stdin.readline()


def measure_memcpy(workload: Workload) -> float:
    """Least seconds of three copies of all local state into memory already touched, with all threads of torch."""
    sources = list(workload.tensors())
    targets = [torch.zeros_like(source) for source in sources]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def timed_load(workload: Workload, contender: Contender, *, cached: bool) -> float:
    """Seconds until every rank has its state back from disk, all of the files in the page cache or none of them."""
    workload.wipe()
    if dist.get_rank() == 0:
        for path in contender.saved().rglob("*"):
            if path.is_file():
                _cache(path, cached)
    dist.barrier()
    started = time.perf_counter()
    contender.load()
    dist.barrier()
    return time.perf_counter() - started


def _cache(path: Path, cached: bool) -> None:
    with path.open("rb", buffering=0) as file:
        if cached:
            while file.read(2**24):
                pass
        else:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(trial: Trial) -> dict[str, Any]:
    """The whole trial on this rank."""
    workload = Workload(trial.state_bytes, trial.batch)
    for _ in range(3):
        workload.step()
    phase("trained")
    contender = make(trial.contender, workload, Path(trial.directory))
    loop = Loop(workload, contender)
    loop.save(least_steps=1)  # the first one allocates
    saves = []
    before = loop.calm(trial.calm_steps)
    for _ in range(trial.saves):
        previous = contender.saved()
        save, spent = loop.save(trial.calm_steps)
        after = loop.calm(trial.calm_steps)
        save.lost_s = spent - save.steps * (before + after) / 2
        saves.append(dataclasses.asdict(save))
        before = after
        dist.barrier()
        if dist.get_rank() == 0:
            contender.discard(previous)
    phase("saved")
    cold_load_s = timed_load(workload, contender, cached=False)
    loaded = workload.fingerprint() == loop.fingerprint
    load_s = timed_load(workload, contender, cached=True)
    loaded = loaded and workload.fingerprint() == loop.fingerprint
    workload.wipe()
    dist.barrier()
    memory_s = contender.load_from_memory()
    if memory_s is not None:
        loaded = loaded and workload.fingerprint() == loop.fingerprint
    disk_bytes = sum(path.stat().st_size for path in contender.saved().rglob("*") if path.is_file())
    contender.close()
    return {
        "saves": saves,
        "calm_step_s": before,
        "cold_load_s": cold_load_s,
        "load_s": load_s,
        "load_from_memory_s": memory_s,
        "loaded": loaded,
        "disk_bytes": disk_bytes,
        "local_bytes": workload.local_bytes(),
        "memcpy_s": measure_memcpy(workload),
    }


def main() -> None:
    trial = Trial(**json.loads(sys.argv[1]))
    dist.init_process_group("gloo")
    result = run(trial)
    print(json.dumps({"result": result}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
