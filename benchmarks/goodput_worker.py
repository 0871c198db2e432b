"""One rank of a job that is killed again and again: resume, train, save, until told to stop. Started by `goodput`.

Prints JSON lines: {"resumed": step} before the first step, {"step": n} when a step has ended on every rank (rank 0
only), {"stopped": step} at the end. Stops when the file `stop` is there, or after `until` if that is given, and leaves
weights and moments of the last step and of those in `write` as `weights-<step>-<rank>.pt` in `results`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.contender import make
from benchmarks.worker import Parent
from benchmarks.workload import Workload


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do. `until` 0 is for ever; `write` has the steps whose weights are wanted besides the last."""

    contender: str
    directory: str
    results: str
    state_bytes: int
    batch: int
    context: int
    flush_every: int
    until: int = 0
    write: tuple[int, ...] = ()


def run(job: Job, parent: Parent) -> None:
    """Train until the end; all ranks end with the same step."""
    workload = Workload(job.state_bytes, job.batch, job.context)
    contender = make(job.contender, workload, Path(job.directory), job.flush_every)
    step = contender.resume()
    parent.say(resumed=step)
    stop = Path(job.results) / "stop"
    while not job.until or step < job.until:
        workload.step(step + 1, contender.before_update)
        step += 1
        contender.boundary(step)
        stopping = torch.tensor(int(workload.rank == 0 and stop.exists()))
        dist.all_reduce(stopping)  # the step ends for all together
        if workload.rank == 0:
            parent.say(step=step)
        if step in job.write:
            write(job, workload, step)
        if int(stopping):
            break
    write(job, workload, step)
    dist.barrier()  # rank 0 speaks for all
    parent.say(stopped=step)
    sys.stdin.readline()  # to be killed here: leaving is not measured


def write(job: Job, workload: Workload, step: int) -> None:
    """The weights and moments of this rank."""
    part = Path(job.results) / f"part-{workload.rank}"
    torch.save(list(workload.tensors()), part)
    os.rename(part, Path(job.results) / f"weights-{step}-{workload.rank}.pt")


def main() -> None:
    arguments = json.loads(sys.argv[1])
    parent = Parent()
    dist.init_process_group("gloo")
    run(Job(**arguments | {"write": tuple(arguments["write"])}), parent)


if __name__ == "__main__":
    main()
