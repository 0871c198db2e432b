"""What failures cost, from what a job has said. Pure: no clocks, no files, no processes.

A step is useful if it is among those that the job has when it ends, counted once, however often it was trained.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Kill:
    """`at_s` seconds after the start of the job: one rank, or all that is on its node."""

    at_s: float
    rank: int
    node: bool = False


def schedule(seed: int, seconds: float, kills: int, ranks: int, node_losses: int = 0) -> list[Kill]:
    """Kills in order, one in the middle half of each of as many equal parts of the time; a function of its arguments.

    In wall time, since that is what machines fail in: who is slow, or takes long to come back, does fewer steps before
    the next failure and is not spared any.
    """
    generator = random.Random(seed)
    part = seconds / kills if kills else 0.0
    losses = set(generator.sample(range(kills), min(node_losses, kills)))
    return [
        Kill((number + generator.uniform(0.25, 0.75)) * part, generator.randrange(ranks), number in losses)
        for number in range(kills)
    ]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something a job has said, or that was done to it: "resumed", "step", "killed" or "stopped"; `step` where it has
    one. `at_s`: since the start of the job."""

    at_s: float
    kind: str
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Failure:
    """What one kill cost. `lost` steps had been done and were not there any more; None where nothing came after it."""

    at_s: float
    lost: int | None
    next_step_s: float | None


def failures(events: Sequence[Event]) -> list[Failure]:
    """One for each kill. Where a job is killed again before it has done a step, its steps are lost once."""
    found: list[Failure] = []
    done, pending = 0, False
    for number, event in enumerate(events):
        if event.kind == "step":
            done, pending = event.step, False
        if event.kind != "killed":
            continue
        after = events[number + 1 :]
        until = next((i for i, later in enumerate(after) if later.kind == "killed"), len(after))
        resumed = next((later.step for later in after if later.kind == "resumed"), None)
        step_at = next((later.at_s for later in after if later.kind == "step"), None)
        lost = None if resumed is None else 0 if pending else max(0, done - resumed)
        found.append(Failure(event.at_s, lost, None if step_at is None else step_at - event.at_s))
        pending = not any(later.kind == "step" for later in after[:until])
    return found


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What one contender got done."""

    name: str
    seconds: float
    useful_steps: int
    trained_steps: int
    kills: int
    steps_per_hour: float
    useful_share: float
    lost_per_failure: float
    next_step_s: float
    wrong_bytes: int | None


def goodput(name: str, events: Sequence[Event], calm_step_s: float, wrong_bytes: int | None) -> Goodput:
    """From the events of a job that has stopped; `calm_step_s` is a step of the same training that nobody disturbs."""
    stopped = events[-1]
    costs = failures(events)
    lost = [failure.lost for failure in costs if failure.lost is not None]
    pauses = [failure.next_step_s for failure in costs if failure.next_step_s is not None]
    return Goodput(
        name=name,
        seconds=stopped.at_s,
        useful_steps=stopped.step,
        trained_steps=sum(event.kind == "step" for event in events),
        kills=len(costs),
        steps_per_hour=stopped.step / stopped.at_s * 3600,
        useful_share=stopped.step * calm_step_s / stopped.at_s,
        lost_per_failure=statistics.fmean(lost) if lost else 0.0,
        next_step_s=statistics.median(pauses) if pauses else 0.0,
        wrong_bytes=wrong_bytes,
    )


COLUMNS = (
    "",
    "useful steps an hour",
    "share of useful time",
    "useful steps",
    "trained steps",
    "steps lost a failure",
    "s from kill to next step",
    "wrong bytes",
)

LEGEND = """\
- useful steps: the number of the last step, reached from nothing; a step that was trained twice counts once. *Share*:
  their time in training that nobody disturbs and nothing saves, of all the time.
- from kill to next step: median; start of processes, imports and the step itself are in it. All ranks are started anew
  when one has died, for every contender by the same loop.
- wrong bytes: of weights and moments after the last step, compared with a run of the same seed without any kill."""


def markdown(machine: Sequence[str], rows: Sequence[Goodput], not_run: Mapping[str, str]) -> str:
    """A report that can be read by itself."""
    lines = ["# Goodput under SIGKILL", "", *(f"- {line}" for line in machine), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    for row in rows:
        wrong = "" if row.wrong_bytes is None else f"{row.wrong_bytes:,}"
        cells = [row.name, f"{row.steps_per_hour:.0f}", f"{row.useful_share:.0%}", str(row.useful_steps)]
        cells += [str(row.trained_steps), f"{row.lost_per_failure:.1f}", f"{row.next_step_s:.1f}", wrong]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", LEGEND, ""]
    if not_run:
        lines += ["Could not run:", "", *(f"- {name}: {why}" for name, why in not_run.items()), ""]
    return "\n".join(lines)
