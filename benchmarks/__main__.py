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
from benchmarks.report import markdown, row
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


def run_all(
    options: argparse.Namespace, names: Sequence[str], scratch: Path, console: Console
) -> tuple[dict[str, list[Outcome]], dict[str, str]]:
    """Every round of every contender: (outcomes by name, errors by name)."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    failures: dict[str, str] = {}
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
                    outcomes[name].append(run_trial(trial, options.ranks, options.timeout_s))
                except TrialError as error:
                    failures[name] = str(error)
                    console.print(f"{name}, round {number}: {error}", style="red", markup=False, soft_wrap=True)
                progress.advance(bar)
    return outcomes, failures


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.output))  # the disk that is measured
    try:
        outcomes, failures = run_all(options, options.only or list(CONTENDERS), scratch, Console())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [row(name, found) for name, found in outcomes.items() if found]
    if not rows:
        return 1
    machine = describe(options)
    text = markdown(f"Saving {rows[0].state_bytes / 1e9:.2f} GB of training state", machine, rows)
    (options.output / "save.md").write_text(text)
    record = {"machine": machine, "rows": [dataclasses.asdict(one) for one in rows], "failures": failures}
    (options.output / "save.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)
    return 0 if not failures and all(one.loaded for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
