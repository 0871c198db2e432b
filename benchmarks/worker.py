"""One rank of one trial: a training loop with one contender, measured. Started by `launch` with a JSON argument.

The same process trains without the contender before and after, so that a machine that is slow for a minute is slow for
both. Measured steps begin halfway between two that become durable and are a multiple of that interval: what is written
in the background is paid for by steps that are counted.

Prints {"phase": name} when a phase ends and waits for a line of input, so that the parent can read memory and CPU time
while all ranks rest; the last line is {"result": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contender import Contender, make
from benchmarks.workload import Workload

PHASES = ("warm", "calm", "ready", "trained", "closed", "calm again")
"""In this order: moments exist; trained without; saving has been tried; trained with; closed; trained without."""

DURABLE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to do. `steps` is a multiple of `flush_every`; `calm_steps` are before and after."""

    contender: str
    directory: str
    state_bytes: int
    batch: int
    context: int
    steps: int
    calm_steps: int
    flush_every: int


class Watcher:
    """Notes when steps become durable, in a thread; what saving failed with is raised by the next question."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._times: dict[int, float] = {}
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                self._times.setdefault(self._contender.durable(), time.perf_counter())
            except BaseException as error:  # whatever a contender raises is for the loop
                self._error = error
                return

    def times(self) -> dict[int, float]:
        """Durable step -> when it was first seen to be."""
        if self._error is not None:
            raise self._error
        return dict(self._times)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class Loop:
    """Training steps with their times; the loop that a user would write."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.number = 0
        self.began: dict[int, float] = {}
        self.stalls: dict[int, float] = {}

    def calm(self, steps: int) -> list[float]:
        """Seconds of each step while nothing is saved."""
        return [self._timed(lambda: self._workload.step(self._next())) for _ in range(steps)]

    def train(self, contender: Contender, steps: int) -> list[float]:
        """Seconds of each step with the contender; how long it stalled each is in `stalls`."""
        return [self._timed(lambda: self._step(contender)) for _ in range(steps)]

    def _step(self, contender: Contender) -> None:
        waited: list[float] = []
        self._workload.step(self._next(), lambda: waited.append(self._seconds(contender.before_update)))
        self.began[self.number] = time.perf_counter()
        self.stalls[self.number] = sum(waited) + self._seconds(lambda: contender.boundary(self.number))

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _timed(self, step: Any) -> float:
        """A step ends for all ranks together, as it does where a loss is averaged."""
        return self._seconds(lambda: (step(), dist.barrier()))

    @staticmethod
    def _seconds(action: Any) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started


class Parent:
    """The lines to the process that has started this one. What else prints goes to standard error from now on: peers
    do, and from several processes."""

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, **line: Any) -> None:
        """One JSON line."""
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def phase(self, name: str) -> None:
        """Tell it that a phase has ended, and wait for its leave to go on."""
        self.say(phase=name)
        sys.stdin.readline()


def everywhere_durable(watcher: Watcher, step: int, deadline: float) -> bool:
    """Whether every rank sees this step, or a later one, as durable; RuntimeError if not by the deadline."""
    pending = torch.tensor(0 if max(watcher.times(), default=0) >= step else 1)
    dist.all_reduce(pending)
    if int(pending) and time.monotonic() > deadline:
        raise RuntimeError(f"step {step} is not durable after {DURABLE_S:.0f} s")
    return int(pending) == 0


def timed_load(workload: Workload, contender: Contender, *, cached: bool) -> float:
    """Seconds until every rank has its state back from disk, all of the files in the page cache or none of them."""
    workload.wipe()
    saved = contender.saved()
    if dist.get_rank() == 0 and saved is not None:
        for path in saved.rglob("*"):
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


def measure(trial: Trial, parent: Parent, loop: Loop, workload: Workload, contender: Contender) -> dict[str, Any]:
    """Everything between the two calm stretches."""
    watcher = Watcher(contender)
    try:
        loop.number = trial.flush_every - 2
        loop.train(contender, 4)  # the first saves allocate
        deadline = time.monotonic() + DURABLE_S
        while contender.flushes and not everywhere_durable(watcher, trial.flush_every, deadline):
            loop.train(contender, 1)
        loop.number += trial.flush_every - loop.number % trial.flush_every + trial.flush_every // 2 - 1
        loop.train(contender, 1)
        parent.phase("ready")
        first, kept = loop.number + 1, contender.kept()
        step_s = loop.train(contender, trial.steps)
        parent.phase("trained")
        kept = contender.kept() - kept
        contender.finish(loop.number)
        deadline = time.monotonic() + DURABLE_S
        while contender.flushes and not everywhere_durable(watcher, loop.number, deadline):
            time.sleep(0.02)
        durable = {step: at for step, at in watcher.times().items() if first <= step < loop.number}
    finally:
        watcher.close()
    saves = trial.steps if contender.snapshots else trial.steps // trial.flush_every if contender.flushes else 0
    stalls = [stall for step, stall in loop.stalls.items() if first <= step]
    return {
        "step_s": statistics.fmean(step_s),
        "stall_s": sum(stalls) / saves if saves else 0.0,
        "worst_stall_s": max(stalls),
        "saves": saves,
        "kept": kept if contender.snapshots else len(durable),
        "durable_s": [at - loop.began[step] for step, at in durable.items()],
        **measure_loads(workload, contender),
    }


def measure_loads(workload: Workload, contender: Contender) -> dict[str, Any]:
    """From disk, uncached and cached, and from memory, as far as the contender can; whether the bytes came back."""
    wanted = workload.fingerprint()
    dist.barrier()
    found: dict[str, Any] = {"cold_load_s": None, "load_s": None, "loaded": True, "disk_bytes": 0}
    if contender.flushes:
        found["cold_load_s"] = timed_load(workload, contender, cached=False)
        found["loaded"] = workload.fingerprint() == wanted
        found["load_s"] = timed_load(workload, contender, cached=True)
        found["loaded"] = found["loaded"] and workload.fingerprint() == wanted
        saved = contender.saved()
        found["disk_bytes"] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) if saved else 0
        workload.wipe()
        dist.barrier()
    found["load_from_memory_s"] = contender.load_from_memory()
    if found["load_from_memory_s"] is not None:
        found["loaded"] = found["loaded"] and workload.fingerprint() == wanted
    return found


def run(trial: Trial, parent: Parent) -> dict[str, Any]:
    """The whole trial on this rank."""
    workload = Workload(trial.state_bytes, trial.batch, trial.context)
    loop = Loop(workload)
    loop.calm(2)
    parent.phase("warm")
    calm_s = loop.calm(trial.calm_steps)
    parent.phase("calm")
    contender = make(trial.contender, workload, Path(trial.directory), trial.flush_every)
    contender.resume()
    found = measure(trial, parent, loop, workload, contender)
    contender.close()
    loop.calm(1)
    parent.phase("closed")
    calm_s += loop.calm(trial.calm_steps)
    parent.phase("calm again")
    return {**found, "calm_step_s": statistics.fmean(calm_s), "local_bytes": workload.local_bytes()}


def main() -> None:
    trial = Trial(**json.loads(sys.argv[1]))
    parent = Parent()
    dist.init_process_group("gloo")
    parent.say(result=run(trial, parent))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
