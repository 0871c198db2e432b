"""`python -m benchmarks`: every contender in turn, several rounds, so that a noisy minute hits all of them alike.

Writes `<output>/save.md`, `save.json` and `save.svg` and prints the tables. A contender that cannot run is named with
its reason and left out of later rounds; it does not stop the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.contender import CONTENDERS
from benchmarks.launch import Outcome, TrialError, reason, run_trial
from benchmarks.peers import environments
from benchmarks.plot import bars
from benchmarks.report import Row, markdown, row
from benchmarks.worker import Trial
from ckptd.core.config import parse_size


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare ways of saving training state.")
    parser.add_argument("--state", type=parse_size, default=1_200_000_000, metavar="SIZE", help="bytes (default 1.2e9)")
    parser.add_argument("--ranks", type=int, action="append", help="ranks of a job; can be repeated (default 1 and 2)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step (default 8)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="trials of each contender (default 3)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a trial (default 20)")
    parser.add_argument("--flush-every", type=int, default=10, help="steps between durable ones (default 10)")
    parser.add_argument("--calm-steps", type=int, default=4, help="steps without, before and after each (default 4)")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="this contender; can be repeated")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each trial (default 900)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where to save, and for the tables")
    options = parser.parse_args(arguments)
    options.ranks = options.ranks or [1, 2]
    if options.flush_every < 3 or options.steps % options.flush_every:
        parser.error("--steps must be a multiple of --flush-every, which must be at least 3")
    return options


def describe(module: str) -> list[str]:
    """The machine and the command, as reports state them."""
    model = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    memory = psutil.virtual_memory().total / 2**30
    return [
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB memory, Linux {platform.release()}",
        f"Python {platform.python_version()}, torch {torch.__version__}, gloo",
        f"`{shlex.join(['python', '-m', module, *sys.argv[1:]])}`",
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@dataclasses.dataclass
class Results:
    """What has been measured: outcomes by name of the contender and number of ranks, and why others could not run."""

    options: argparse.Namespace
    outcomes: dict[tuple[str, int], list[Outcome]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[Row]:
        """A line of the table for each contender that ran."""
        steps, calm_steps = self.options.steps, self.options.calm_steps
        return [row(name, found, steps, calm_steps) for (name, _), found in self.outcomes.items()]


def run_all(results: Results, names: Sequence[str], scratch: Path, console: Console) -> None:
    """Every round of every contender; the tables are written after each round."""
    options = results.options
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.rounds * len(names) * len(options.ranks))
        for number in range(options.rounds):
            for ranks in options.ranks:
                for name in names:
                    title = name if ranks == 1 else f"{name}, {ranks} ranks"
                    progress.update(bar, description=title)
                    if title not in results.failures:
                        directory = scratch / f"{number}-{ranks}-{re.sub('[^A-Za-z.]+', '-', name)}"
                        run_one(results, name, ranks, directory, title, console)
                    progress.advance(bar)
            write(results)


def run_one(results: Results, name: str, ranks: int, directory: Path, title: str, console: Console) -> None:
    """One trial; its failure is noted, and shown whole."""
    options = results.options
    trial = Trial(
        contender=name,
        directory=str(directory),
        state_bytes=options.state,
        batch=options.batch,
        context=options.context,
        steps=options.steps,
        calm_steps=options.calm_steps,
        flush_every=options.flush_every,
    )
    try:
        outcome = run_trial(trial, ranks, options.timeout_s, environments.ROOT)
        results.outcomes.setdefault((name, ranks), []).append(outcome)
    except TrialError as error:
        results.failures[title] = reason(str(error))
        console.print(f"{title}: {error}", style="red", markup=False, soft_wrap=True)


def write(results: Results) -> str:
    """Writes the tables of what has been measured so far; the Markdown."""
    options, rows, machine = results.options, results.rows(), describe("benchmarks")
    machine.append(
        f"GPT with AdamW, float32, {options.batch} x {options.context} tokens per rank and step; a snapshot at every "
        f"step where there are snapshots, durable at every {options.flush_every}th; {options.rounds} interleaved "
        f"rounds of {options.steps} steps with and {2 * options.calm_steps} without"
    )
    text = markdown("Training with and without saving", machine, rows, results.failures, options.flush_every)
    (options.output / "save.md").write_text(text)
    record = {"machine": machine, "rows": [dataclasses.asdict(one) for one in rows], "failures": results.failures}
    (options.output / "save.json").write_text(json.dumps(record, indent=1) + "\n")
    shares = {f"{one.name}, {one.ranks}": dataclasses.astuple(one.throughput) for one in rows}
    if shares:
        (options.output / "save.svg").write_text(bars("Throughput, of the same loop without saving", shares))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.output)).absolute()  # the disk that is measured
    results = Results(options)
    try:
        run_all(results, options.only or list(CONTENDERS), scratch, Console())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = results.rows()
    print(write(results))
    ours = [title for title in results.failures if title.startswith("ckptd")]
    return 0 if rows and not ours and all(one.loaded for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
