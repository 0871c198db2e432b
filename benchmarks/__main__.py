"""`python -m benchmarks`: every contender in turn, several rounds, so that a noisy minute hits all of them alike.

Writes `<output>/save.md` and `<output>/save.json` and prints the table.
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
from benchmarks.launch import Outcome, TrialError, run_trial
from benchmarks.report import Row, markdown, row
from benchmarks.worker import Trial
from ckptd.core.config import parse_size


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare ways of saving training state.")
    parser.add_argument("--state", type=parse_size, default=10**9, metavar="SIZE", help="bytes of state (default 1e9)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train and save together (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="trials of each contender (default 3)")
    parser.add_argument("--saves", type=int, default=2, help="measured saves in a trial (default 2)")
    parser.add_argument("--calm-steps", type=int, default=6, help="least steps in each stretch (default 6)")
    parser.add_argument("--batch", type=int, default=128, help="rows per rank and step (default 128)")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="this contender; can be repeated")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for each trial (default 600)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where to save, and for the tables")
    return parser.parse_args(arguments)


def describe(options: argparse.Namespace) -> list[str]:
    """The machine and the command, as the report states them."""
    model = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    memory = psutil.virtual_memory().total / 2**30
    words = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return [
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB memory, Linux {platform.release()}",
        f"Python {platform.python_version()}, torch {torch.__version__}, float32 AdamW state, {options.ranks} rank(s)",
        f"`{words}`: {options.rounds} interleaved rounds of {options.saves} measured saves each",
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@dataclasses.dataclass
class Results:
    """What has been measured: outcomes and errors by name of the contender."""

    outcomes: dict[str, list[Outcome]]
    failures: dict[str, str]

    def rows(self) -> list[Row]:
        """A line of the table for each contender that ran."""
        return [row(name, found) for name, found in self.outcomes.items() if found]


def run_all(options: argparse.Namespace, names: Sequence[str], scratch: Path, console: Console) -> Results:
    """Every round of every contender; the tables are written after each round."""
    results = Results({name: [] for name in names}, {})
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.rounds * len(names))
        for number in range(options.rounds):
            for name in names:
                progress.update(bar, description=name)
                trial = Trial(
                    contender=name,
                    directory=str(scratch / f"{number}-{re.sub('[^a-z.]+', '-', name)}"),
                    state_bytes=options.state,
                    batch=options.batch,
                    saves=options.saves,
                    calm_steps=options.calm_steps,
                )
                try:
                    results.outcomes[name].append(run_trial(trial, options.ranks, options.timeout_s))
                except TrialError as error:
                    results.failures[name] = str(error)
                    console.print(f"{name}, round {number}: {error}", style="red", markup=False, soft_wrap=True)
                progress.advance(bar)
            write(options, results)
    return results


def write(options: argparse.Namespace, results: Results) -> str:
    """Writes the tables of what has been measured so far; the Markdown."""
    rows = results.rows()
    machine = describe(options)
    size = max((one.state_bytes for one in rows), default=0)
    text = markdown(f"Saving {size / 1e9:.2f} GB of training state", machine, rows)
    (options.output / "save.md").write_text(text)
    record = {"machine": machine, "rows": [dataclasses.asdict(one) for one in rows], "failures": results.failures}
    (options.output / "save.json").write_text(json.dumps(record, indent=1) + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.output))  # the disk that is measured
    try:
        results = run_all(options, options.only or list(CONTENDERS), scratch, Console())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = results.rows()
    print(write(options, results))
    return 0 if rows and not results.failures and all(one.loaded for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
