"""`python -m benchmarks.goodput`: how much training gets done under one seeded schedule of SIGKILLs, by contender.

Every contender trains the same model for the same time and meets the same kills at the same seconds. When a rank dies
the others are ended and all are started anew, at once and by the same loop. Then the training is done once more without
kills, to compare the bytes of the last steps and to know what a step takes. With `--nodes 2` the ranks are on two nodes
with a daemon each, and `--node-losses` of the kills take all that is on one; a new node takes its place.

Writes `<output>/goodput.md`, `goodput.json` and `goodput.svg`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from benchmarks.__main__ import describe
from benchmarks.contender import CONTENDERS
from benchmarks.goodput_report import Event, Goodput, Kill, goodput, markdown, schedule
from benchmarks.goodput_worker import Job
from benchmarks.launch import Place, TrialError, end_tree, free_port, reason
from benchmarks.peers import environments
from benchmarks.plot import bars
from ckptd.core.config import parse_size

DEFAULT = ("ckptd", "torch.save", "dcp.async_save, fastest", *(n for n, e in CONTENDERS.items() if e.environment))
READ_S = 10.0
STOP_S = 120.0
"""How long the last step may take, and the start that leads to it."""

Printed = tuple[int, int, dict[str, Any] | None]
"""(incarnation, rank, what it said); None when it has ended."""


class Run:
    """One contender's job from its first start to its end, over every kill."""

    def __init__(self, place: Place, job: Job, ranks: int, nodes: int, kills: Sequence[Kill]) -> None:
        self._place, self._job, self._ranks, self._nodes = place, job, ranks, nodes
        self._kills = list(kills)
        self._printed: queue.Queue[Printed] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._incarnation = 0
        self._generations = [0] * nodes
        self._started = time.monotonic()
        self.events: list[Event] = []

    def follow(self, seconds: float) -> None:
        """Until the job has stopped by itself; told to after `seconds`. TrialError where it fails without a kill."""
        for node in range(self._nodes):
            self._place.start_companion(**self._node(node))
        self._started = time.monotonic()
        self._start()
        told = False
        while True:
            now = self._now()
            if not told and now >= seconds:
                (Path(self._job.results) / "stop").touch()
                told = True
            if told and now > seconds + STOP_S:
                raise TrialError(f"did not stop within {STOP_S:.0f} s\n{self._place.tail()}")
            due = self._kills[0].at_s if self._kills else seconds if not told else seconds + STOP_S
            try:
                incarnation, rank, line = self._printed.get(timeout=min(1.0, max(0.0, due - now)))
            except queue.Empty:
                if self._kills and self._now() >= self._kills[0].at_s:
                    self._kill(self._kills.pop(0))
                continue
            if incarnation == self._incarnation and self._take(rank, line):
                return

    def _take(self, rank: int, line: dict[str, Any] | None) -> bool:
        """One line of a living rank; whether the job has stopped."""
        if line is None:
            raise TrialError(f"rank {rank} ended by itself\n{self._place.tail()}")
        if rank != 0:
            return False
        ((kind, step),) = line.items()
        self.events.append(Event(self._now(), kind, step))
        return kind == "stopped"

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _start(self) -> None:
        """All ranks, on a new port."""
        port, argument = free_port(), json.dumps(dataclasses.asdict(self._job))
        self._incarnation += 1
        self._processes = []
        for rank in range(self._ranks):
            local = self._ranks // self._nodes
            variables: dict[str, object] = {"RANK": rank, "WORLD_SIZE": self._ranks, "MASTER_PORT": port}
            variables |= {"LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
            variables |= {"GROUP_RANK": self._node_of(rank), "GROUP_WORLD_SIZE": self._nodes}
            variables |= self._node(self._node_of(rank))
            process = self._place.start("benchmarks.goodput_worker", argument, **variables)
            self._processes.append(process)
            assert process.stdout is not None
            threading.Thread(target=self._read, args=(self._incarnation, rank, process.stdout), daemon=True).start()

    def _node_of(self, rank: int) -> int:
        return rank * self._nodes // self._ranks

    def _node(self, node: int) -> dict[str, object]:
        """What makes the processes of one simulated node one: a name, a runtime directory, protection by the others."""
        if self._nodes == 1:
            return {}
        name = f"node-{node}-{self._generations[node]}"
        return {"CKPTD_NODE": name, "CKPTD_RUNTIME_DIR": f"{self._place.runtime}/{name}", "CKPTD_REDUNDANCY": "1+1"}

    def _read(self, incarnation: int, rank: int, output: IO[str]) -> None:
        for line in output:
            self._printed.put((incarnation, rank, json.loads(line)))
        self._printed.put((incarnation, rank, None))

    def _kill(self, kill: Kill) -> None:
        """As scheduled; what is left of the job's ranks is ended and all are started anew."""
        killed = Event(self._now(), "killed")
        if kill.node:
            node = self._node_of(kill.rank)
            lost = self._node(node)
            self._place.kill(CKPTD_NODE=str(lost["CKPTD_NODE"]))
            shutil.rmtree(str(lost["CKPTD_RUNTIME_DIR"]), ignore_errors=True)
            self._generations[node] += 1
        self.end(first=kill.rank)
        self._take_the_rest()
        self.events.append(killed)
        self._place.announce_restart()
        if kill.node:
            self._place.start_companion(**self._node(self._node_of(kill.rank)))
        self._start()

    def _take_the_rest(self) -> None:
        """What ranks that have been ended said before."""
        ended = 0
        while ended < self._ranks:
            incarnation, rank, line = self._printed.get(timeout=READ_S)
            if incarnation == self._incarnation:
                ended += line is None
                if line is not None:
                    self._take(rank, line)

    def end(self, first: int = 0) -> None:
        """SIGKILL to every rank and what it has started, that rank first."""
        for rank in sorted(range(len(self._processes)), key=lambda rank: rank != first):
            end_tree(self._processes[rank])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description="Training done under SIGKILL.")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule of kills (default 1)")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each contender (default 3)")
    parser.add_argument("--kills", type=int, default=4, help="in that time (default 4)")
    parser.add_argument("--state", type=parse_size, default=300_000_000, metavar="SIZE", help="bytes (default 300M)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step (default 4)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the job (default 2)")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2), help="simulated nodes (default 1)")
    parser.add_argument("--node-losses", type=int, default=0, help="kills that take a whole node; with --nodes 2")
    parser.add_argument("--flush-every", type=int, default=10, help="steps between durable ones (default 10)")
    parser.add_argument(
        "--period", action="append", default=[], metavar="NAME=STEPS", help="another one for one of them"
    )
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="this contender; can be repeated")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where to save, and for the tables")
    options = parser.parse_args(arguments)
    if options.node_losses and options.nodes < 2:
        parser.error("--node-losses needs --nodes 2")
    if options.ranks % options.nodes:
        parser.error("--ranks must be a multiple of --nodes")
    periods = [text.rpartition("=") for text in options.period]
    if any(name not in CONTENDERS or not steps.isdigit() for name, _, steps in periods):
        parser.error("--period: expected the name of a contender, `=` and a number of steps")
    options.periods = {name: int(steps) for name, _, steps in periods}
    return options


@dataclasses.dataclass
class Measured:
    """One contender's run: what it said, and where its last tensors are."""

    events: list[Event]
    results: Path

    @property
    def last(self) -> int:
        return self.events[-1].step


def run_one(
    options: argparse.Namespace, name: str, scratch: Path, seconds: float, kills: Sequence[Kill], **job: Any
) -> Measured:
    """One job of that contender, ended and cleared away; TrialError if it cannot run."""
    directory = scratch / re.sub("[^A-Za-z.]+", "-", name)
    results = scratch / f"{directory.name}-results"
    results.mkdir()
    place = Place(name, directory, environments.ROOT)
    flush_every = options.periods.get(name, options.flush_every)
    sizes = (options.state, options.batch, options.context, flush_every)
    run = Run(place, Job(name, str(directory), str(results), *sizes, **job), options.ranks, options.nodes, kills)
    try:
        run.follow(seconds)
        return Measured(run.events, results)
    finally:
        run.end()
        place.clear()


def wrong_bytes(found: Path, wanted: Path, step: int, ranks: int) -> int:
    """Bytes of weights and moments that differ after that step, over all ranks."""
    count = 0
    for rank in range(ranks):
        ours, theirs = (torch.load(path / f"weights-{step}-{rank}.pt", mmap=True) for path in (found, wanted))
        for one, other in zip(ours, theirs, strict=True):
            count += int((one.view(torch.uint8) != other.view(torch.uint8)).sum())
    return count


def run_all(options: argparse.Namespace, scratch: Path, console: Console) -> tuple[list[Goodput], dict[str, str]]:
    """Every contender, then the same training undisturbed up to the last step that any of them reached."""
    kills, seconds = planned(options), options.minutes * 60
    measured: dict[str, Measured] = {}
    not_run: dict[str, str] = {}
    for name in options.only or DEFAULT:
        console.print(f"{name}: {options.minutes:g} minutes, {len(kills)} kills", markup=False)
        try:
            measured[name] = run_one(options, name, scratch, seconds, kills)
        except TrialError as error:
            not_run[name] = reason(str(error))
            console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
    if not measured:
        return [], not_run
    wanted = tuple(sorted({one.last for one in measured.values()}))
    console.print(f"undisturbed, {wanted[-1]} steps", markup=False)
    reference = run_one(options, "none", scratch, 2 * seconds + STOP_S, [], until=wanted[-1], write=wanted)
    calm_step_s = step_seconds(reference.events)
    rows = [
        goodput(name, one.events, calm_step_s, wrong_bytes(one.results, reference.results, one.last, options.ranks))
        for name, one in measured.items()
    ]
    return rows, not_run


def step_seconds(events: Sequence[Event]) -> float:
    """The median between one step's end and the next one's; of all the time where there is only one."""
    ends = [event.at_s for event in events if event.kind == "step"]
    gaps = sorted(later - earlier for earlier, later in zip(ends, ends[1:], strict=False))
    return gaps[len(gaps) // 2] if gaps else events[-1].at_s


def planned(options: argparse.Namespace) -> list[Kill]:
    """The kills, the same for every contender."""
    return schedule(options.seed, options.minutes * 60, options.kills, options.ranks, options.node_losses)


def write(options: argparse.Namespace, rows: Sequence[Goodput], not_run: dict[str, str]) -> str:
    """The tables and the chart; the Markdown."""
    kills = planned(options)
    moments = ", ".join(f"{kill.at_s:.0f} s ({'the node of ' if kill.node else ''}rank {kill.rank})" for kill in kills)
    periods = "".join(f", {name} {steps}" for name, steps in options.periods.items())
    machine = [
        *describe("benchmarks.goodput"),
        f"GPT with AdamW, {options.state / 1e9:.2f} GB of state, {options.ranks} ranks on {options.nodes} node(s), "
        f"{options.batch} x {options.context} tokens per rank and step",
        f"a snapshot at every step where there are snapshots, durable at every {options.flush_every}th{periods}",
        f"killed after {moments}",
    ]
    text = markdown(machine, rows, not_run)
    (options.output / "goodput.md").write_text(text)
    record = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows], "failures": not_run}
    (options.output / "goodput.json").write_text(json.dumps(record, indent=1) + "\n")
    if rows:
        shares = {row.name: (row.steps_per_hour,) * 3 for row in rows}
        (options.output / "goodput.svg").write_text(bars("Useful steps an hour", shares))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.output)).absolute()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.ranks))
    try:
        rows, not_run = run_all(options, scratch, Console())
        print(write(options, rows, not_run))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    ours = [row for row in rows if row.name.startswith("ckptd")]
    failed = any(name.startswith("ckptd") for name in not_run) or any(row.wrong_bytes for row in ours)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
