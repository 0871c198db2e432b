"""From outcomes of trials to rows, Markdown and JSON. Pure: no clocks, no files, no processes.

Every figure is the median over all saves (or trials) of all rounds, with the least and greatest beside it in the JSON.
Seconds of several ranks are those of the slowest; bytes are summed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from benchmarks.launch import Outcome


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest of a figure."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Row:
    """What one contender showed. Per GB means per 1e9 bytes of state."""

    name: str
    state_bytes: int
    saves: int
    loaded: bool
    stall_s: Spread
    sealed_s: Spread
    durable_s: Spread
    lost_s_per_gb: Spread
    cold_load_s: Spread
    load_s: Spread
    load_from_memory_s: Spread | None
    disk_bytes: Spread
    peak_multiple: Spread
    extra_multiple: Spread
    memcpy_s_per_gb: Spread
    calm_step_s: Spread


def row(name: str, outcomes: Sequence[Outcome]) -> Row:
    """The figures of one contender over its rounds."""
    state_bytes = sum(rank["local_bytes"] for rank in outcomes[0].ranks)
    gigabytes = state_bytes / 1e9

    def each_save(figure: str) -> list[float]:
        return [
            max(save[figure] for save in saves)
            for outcome in outcomes
            for saves in zip(*(rank["saves"] for rank in outcome.ranks), strict=True)
        ]

    def each_trial(figure: str) -> list[float]:
        return [max(rank[figure] for rank in outcome.ranks) for outcome in outcomes]

    return Row(
        name=name,
        state_bytes=state_bytes,
        saves=len(each_save("stall_s")),
        loaded=all(rank["loaded"] for outcome in outcomes for rank in outcome.ranks),
        stall_s=Spread.of(each_save("stall_s")),
        sealed_s=Spread.of(each_save("sealed_s")),
        durable_s=Spread.of(each_save("durable_s")),
        lost_s_per_gb=Spread.of([lost / gigabytes for lost in each_save("lost_s")]),
        cold_load_s=Spread.of(each_trial("cold_load_s")),
        load_s=Spread.of(each_trial("load_s")),
        load_from_memory_s=_from_memory(outcomes),
        disk_bytes=Spread.of(each_trial("disk_bytes")),
        peak_multiple=Spread.of([outcome.peak_bytes / state_bytes for outcome in outcomes]),
        extra_multiple=Spread.of([(o.peak_bytes - o.training_bytes) / state_bytes for o in outcomes]),
        memcpy_s_per_gb=Spread.of([seconds / gigabytes for seconds in each_trial("memcpy_s")]),
        calm_step_s=Spread.of(each_trial("calm_step_s")),
    )


def _from_memory(outcomes: Sequence[Outcome]) -> Spread | None:
    """The slowest rank of each trial, where the contender has a memory to load from."""
    found = [[rank["load_from_memory_s"] for rank in outcome.ranks] for outcome in outcomes]
    return None if None in found[0] else Spread.of([max(seconds) for seconds in found])


COLUMNS = (
    "",
    "stall s",
    "sealed s",
    "durable s",
    "training lost s/GB",
    "load s, cold",
    "load s, cached",
    "restart from memory s",
    "memory added x state",
    "memory in all x state",
    "disk GB",
)

LEGEND = """\
- stall: time the loop stood still for one save. sealed: until the state is safe from changes by training (for ckptd:
  from the death of every trainer). durable: until it is fsynced on disk (`memory only`: never). All from the boundary
  at which the save began.
- training lost: time of the steps around a save above that of as many calm steps, per 1e9 bytes of state; a slow-down
  by background work is in it.
- load: from disk into the live model and optimizer; first with none of the files in the page cache, in a process that
  has loaded nothing before, then with all of them. Restart from memory: a new start of the job until its state is back,
  the start of processes and imports not counted.
- memory: peak of all processes of the trial, helpers and daemons included, each page once; `added` is above the same
  training before its first save.
- Median over all saves of all rounds (least to greatest)."""


def markdown(title: str, machine: Sequence[str], rows: Sequence[Row]) -> str:
    """A report that can be read by itself."""
    memcpy = Spread.of([spread for one in rows for spread in dataclasses.astuple(one.memcpy_s_per_gb)])
    step = Spread.of([spread for one in rows for spread in dataclasses.astuple(one.calm_step_s)])
    lines = [f"# {title}", "", *(f"- {line}" for line in machine)]
    lines += [
        f"- all-core memcpy of the same tensors: {_spread(memcpy, 3)} s/GB; calm training step {_spread(step, 2)} s"
    ]
    lines += ["", _table_line(COLUMNS), _table_line(["---"] * len(COLUMNS))]
    lines += [_table_line(_cells(one)) for one in rows]
    lines += ["", LEGEND, ""]
    return "\n".join(lines)


def _cells(one: Row) -> list[str]:
    return [
        one.name if one.loaded else f"{one.name} (LOADED OTHER BYTES)",
        _spread(one.stall_s, 3),
        _spread(one.sealed_s, 2),
        _spread(one.durable_s, 2),
        _spread(one.lost_s_per_gb, 2),
        _spread(one.cold_load_s, 2),
        _spread(one.load_s, 2),
        "" if one.load_from_memory_s is None else _spread(one.load_from_memory_s, 2),
        f"{one.extra_multiple.median:.2f}",
        f"{one.peak_multiple.median:.2f}",
        f"{one.disk_bytes.median / 1e9:.3f}",
    ]


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} to {spread.greatest:.{digits}f})"


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
