"""`make demo`: train, kill a rank with SIGKILL at a random moment, compare with training that was never interrupted.

1. The reference: `train_gpt.py --no-ckptd` under torchrun, two ranks.
2. The same training with ckptd. A rank drawn from the seed is killed at a moment drawn from the seed; torchrun restarts
   both ranks, ckptd restores, training finishes.
3. One plain process loads the checkpoint (`load_gpt.py`), and `ckptd verify` reads it whole.
4. Four simulated nodes, two of which are lost with all that is on them (`demo_nodes.py`).

The closing table says what was found; the exit status is 0 only if all of it is as promised. Everything it starts
carries a mark in its environment and is gone when it returns, on failure and on Ctrl-C too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_nodes
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from staging import RANKS, DemoError, Finding, Run, Stage, follow

HERE = Path(__file__).resolve().parent
FLUSH_EVERY = 25


# --- the kill ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill whom: `rank`, a `fraction` of a step after `after_step` was logged."""

    rank: int
    after_step: int
    fraction: float


def choose_moment(seed: int, steps: int) -> Moment:
    """A moment in the middle 60 % of the run; the same for the same seed."""
    generator = random.Random(seed)
    return Moment(generator.randrange(RANKS), generator.randrange(steps // 5, steps - steps // 5), generator.random())


class Killer:
    """Kills one rank once, when the log says that the moment has come; not before anything is sealed."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.at: float | None = None
        self.pid = 0

    def watch(self, run: Run) -> None:
        """Called whenever the log was read."""
        if self.at is not None or run.last_step < self.moment.after_step or run.sealed == 0:
            return
        time.sleep(self.moment.fraction * run.step_s())
        self.pid = run.pids[self.moment.rank]
        os.kill(self.pid, signal.SIGKILL)
        self.at = time.time()


# --- the verdict ------------------------------------------------------------------------------------------------------


def judge_recovery(run: Run, killer: Killer) -> list[Finding]:
    """What the kill cost."""
    if killer.at is None or len(run.incarnations) < 2 or not all(i.steps for i in run.incarnations[:2]):
        return [Finding("restarts", str(len(run.incarnations) - 1), False)]
    before, after = run.incarnations[:2]
    trained = before.steps[-1]["step"]
    restored = after.steps[0]["statistics"]["restored"]
    lost = trained - restored["step"]
    pause_s, start_s = after.steps[0]["time"] - killer.at, after.started - killer.at
    moment = killer.moment
    return [
        Finding("killed by SIGKILL", f"rank {moment.rank}, pid {killer.pid}, after step {trained}"),
        Finding("restarts by torchrun", str(len(run.incarnations) - 1), len(run.incarnations) == 2),
        Finding(
            "state restored from", f"{restored['source']}, step {restored['step']}", restored["source"] == "memory"
        ),
        Finding("went on with step", str(after.steps[0]["step"]), after.steps[0]["step"] == restored["step"] + 1),
        Finding("steps lost", str(lost), 0 <= lost < trained),
        Finding("kill to next trained step", f"{pause_s:.1f} s ({start_s:.1f} s of it torchrun and imports)"),
    ]


def judge_stall(run: Run) -> list[Finding]:
    """What ckptd cost while nothing went wrong."""
    last = [incarnation.steps[-1]["statistics"] for incarnation in run.incarnations if incarnation.steps]
    steps = sum(len(incarnation.steps) for incarnation in run.incarnations)
    stall_s = sum(statistics["stall_s_total"] for statistics in last) / steps
    sealed = sum(statistics["snapshots_sealed"] for statistics in last)
    skipped = sum(statistics["snapshots_skipped"] for statistics in last)
    share = stall_s / run.step_s() if run.step_s() else 0.0
    return [
        Finding("stall per step", f"{1000 * stall_s:.2f} ms, {100 * share:.2f} % of a {run.step_s():.2f} s step"),
        Finding("snapshots", f"{sealed} sealed, {skipped} skipped"),
    ]


def judge_result(reference: Run, run: Run, loaded: dict[str, Any], steps: int) -> list[Finding]:
    """Whether the numbers of training are those of the reference."""
    expected, found = reference.losses(), run.losses()
    differing = [step for step in expected if found.get(step) != expected[step]]
    loss = next(iter(expected.get(steps, {float("nan")})))
    weights = {end["weights"] for end in reference.ends.values()}
    mine = {end["weights"] for end in run.ends.values()}
    whole = len(expected) == steps and len(weights) == 1
    differences = (
        f"differs at step {differing[0]} and {len(differing) - 1} more" if differing else "equal at every step"
    )
    digest = next(iter(weights), "none")
    return [
        Finding("final loss", f"{loss:.6f}, {differences}", whole and not differing),
        Finding("weights (SHA-256)", f"{digest[:16]}, {'equal' if mine == weights else 'DIFFER'}", mine == weights),
        Finding(
            "loaded by one process",
            f"step {loaded['step']}, ckptd.load {_equal(loaded['loaded'] in weights)}, "
            f"ckptd.open {_equal(loaded['read'] in weights)}",
            loaded["step"] == steps and {loaded["loaded"], loaded["read"]} == weights,
        ),
    ]


def _equal(equal: bool) -> str:
    return "equal" if equal else "DIFFERS"


def table(findings: list[Finding], seed: int) -> Table:
    """The closing table."""
    drawn = Table(title=f"train_gpt.py, killed and restarted (seed {seed})", title_justify="left")
    drawn.add_column("")
    drawn.add_column("found")
    drawn.add_column("")
    marks = {True: "[green]as promised[/]", False: "[red]NOT as promised[/]", None: ""}
    for finding in findings:
        drawn.add_row(finding.name, escape(finding.value), marks[finding.good])
    return drawn


# --- the play ---------------------------------------------------------------------------------------------------------


def play(stage: Stage, options: argparse.Namespace, console: Console) -> list[Finding]:
    """All of it; the rows of the table."""
    sizes = ("--parameters", options.parameters, "--steps", str(options.steps))
    store = stage.directory / "store"
    killer = Killer(choose_moment(options.seed, options.steps))
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def act(name: str, title: str, on_read: Callable[[Run], None], *arguments: str) -> Run:
            bar = progress.add_task(title, total=options.steps)

            def show(run: Run) -> None:
                progress.update(bar, completed=run.last_step)
                on_read(run)

            process, run = stage.torchrun(name, *sizes, *arguments)
            follow(stage, name, process, run, show, options.timeout_s)
            return run

        def watch(run: Run) -> None:
            killed = killer.at is not None
            killer.watch(run)
            if killer.at is not None and not killed:
                console.print(f"SIGKILL to rank {killer.moment.rank} (pid {killer.pid}) after step {run.last_step}")

        reference = act("reference", "reference, without ckptd", lambda run: None, "--no-ckptd")
        store_arguments = ("--store", str(store), "--flush-every", str(FLUSH_EVERY))
        run = act("ckptd", "with ckptd, one rank killed", watch, *store_arguments)
        leftovers = stage.leftovers()
        bar = progress.add_task("load in one process, verify", total=2)
        load = ("--store", str(store), "--parameters", options.parameters)
        loaded = json.loads(stage.call("load", sys.executable, str(HERE / "load_gpt.py"), *load))
        progress.advance(bar)
        stage.call("verify", str(Path(sys.executable).parent / "ckptd"), "verify", str(store))
        progress.advance(bar)
        bars: dict[str, TaskID] = {}

        def show(title: str, step: int, steps: int) -> None:
            if title not in bars:
                bars[title] = progress.add_task(title, total=steps)
            progress.update(bars[title], completed=step)

        nodes = demo_nodes.play(stage, options.seed, show)
        leftovers += stage.leftovers()
    return [
        *judge_recovery(run, killer),
        *judge_stall(run),
        *judge_result(reference, run, loaded, options.steps),
        Finding("ckptd verify", "exit status 0", True),
        *nodes,
        Finding("left behind", ", ".join(leftovers) or "nothing", not leftovers),
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=None, help="which rank is killed, and when; drawn if not given")
    parser.add_argument("--parameters", default="10M", help="size of the model: 1M, 10M, 30M or 100M")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--timeout-s", type=float, default=240.0, help="for each of the two runs")
    parser.add_argument("--directory", type=Path, default=None, help="keep everything there (default: temporary)")
    options = parser.parse_args(arguments)
    if options.steps < 10:
        parser.error("--steps: at least 10, so that there is a middle to be killed in")
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    console.print(f"Seed {options.seed}; the same kill again with --seed {options.seed}.")
    directory = options.directory or Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        console.print(
            f"{directory} is not empty: choose an empty or new directory", style="red", markup=False, soft_wrap=True
        )
        return 2
    stage = Stage(directory)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the stage is cleared
    try:
        findings = play(stage, options, console)
    except DemoError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    finally:
        stage.clear()
        if options.directory is None:
            shutil.rmtree(directory)
    console.print(table(findings, options.seed))
    good = all(finding.good is not False for finding in findings)
    console.print(f"{'All as promised' if good else 'NOT all as promised'}, in {time.monotonic() - started:.0f} s.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
