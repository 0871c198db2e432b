"""From outcomes of trials to rows, Markdown and JSON. Pure: no clocks, no files, no processes.

Every figure is the median over all trials (or saves), with the least and greatest beside it in the JSON. Seconds of
several ranks are those of the slowest; bytes and CPU seconds are of all processes together.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.launch import Outcome

MEMCPY = "memcpy"


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
    """What one contender showed. None where it has no such figure."""

    name: str
    ranks: int
    state_bytes: int
    trials: int
    loaded: bool
    calm_step_s: Spread
    step_s: Spread
    throughput: Spread
    overhead_s: Spread
    saves: int
    kept_share: Spread
    stall_s: Spread
    worst_stall_s: Spread
    cpu_s_per_save: Spread
    durable_s: Spread | None
    cold_load_s: Spread | None
    load_s: Spread | None
    load_from_memory_s: Spread | None
    disk_bytes: Spread
    peak_multiple: Spread
    extra_multiple: Spread


def row(name: str, outcomes: Sequence[Outcome], steps: int, calm_steps: int) -> Row:
    """The figures of one contender over its rounds: `steps` with it, `calm_steps` before and after."""
    first = outcomes[0].ranks
    state_bytes = sum(rank["local_bytes"] for rank in first)
    saves = first[0]["saves"]

    def slowest(figure: str) -> list[float]:
        return [max(rank[figure] for rank in outcome.ranks) for outcome in outcomes]

    def optional(figure: str) -> Spread | None:
        return None if first[0][figure] is None else Spread.of(slowest(figure))

    pairs = list(zip(slowest("calm_step_s"), slowest("step_s"), strict=True))
    durable = [
        max(times)
        for outcome in outcomes
        for times in zip(*(rank["durable_s"] for rank in outcome.ranks), strict=False)
    ]
    kept = [min(rank["kept"] for rank in outcome.ranks) / steps for outcome in outcomes]
    return Row(
        name=name,
        ranks=len(first),
        state_bytes=state_bytes,
        trials=len(outcomes),
        loaded=all(rank["loaded"] for outcome in outcomes for rank in outcome.ranks),
        calm_step_s=Spread.of([calm for calm, _ in pairs]),
        step_s=Spread.of([step for _, step in pairs]),
        throughput=Spread.of([calm / step for calm, step in pairs]),
        overhead_s=Spread.of([step - calm for calm, step in pairs]),
        saves=saves,
        kept_share=Spread.of(kept),
        stall_s=Spread.of(slowest("stall_s")),
        worst_stall_s=Spread.of(slowest("worst_stall_s")),
        cpu_s_per_save=Spread.of([_cpu_s(outcome, steps, calm_steps) / max(1, saves) for outcome in outcomes]),
        durable_s=Spread.of(durable) if durable else None,
        cold_load_s=optional("cold_load_s"),
        load_s=optional("load_s"),
        load_from_memory_s=optional("load_from_memory_s"),
        disk_bytes=Spread.of(slowest("disk_bytes")),
        peak_multiple=Spread.of([_peak(outcome) / state_bytes for outcome in outcomes]),
        extra_multiple=Spread.of([(_peak(outcome) - outcome.bytes["calm"]) / state_bytes for outcome in outcomes]),
    )


def _peak(outcome: Outcome) -> int:
    """The greatest memory while there was something to save."""
    return max(outcome.bytes["ready"], outcome.bytes["trained"])


def _cpu_s(outcome: Outcome, steps: int, calm_steps: int) -> float:
    """CPU seconds that the steps with the contender took above as many without, those before and after alike."""
    used = outcome.cpu_s
    calm = used["calm"] - used["warm"] + used["calm again"] - used["closed"]
    return used["trained"] - used["ready"] - calm / (2 * calm_steps) * steps


COLUMNS = (
    "",
    "throughput",
    "overhead s a step",
    "overhead, of memcpy's",
    "steps that survive",
    "stall s",
    "worst stall s",
    "CPU s a save",
    "durable s",
    "load s, cold",
    "load s, cached",
    "from memory s",
    "memory added x state",
    "disk GB",
)

LEGEND = """\
- throughput: seconds of a step without, before and after in the same process, over seconds of a step with. *overhead*:
  the difference; beside it as a multiple of that of `memcpy`, a plain copy of the same bytes with all cores at every
  step. The row `none` shows the noise.
- steps that survive: share of the steps whose state would have outlived the death of every rank (sealed in a memory
  that is not theirs, or on disk). Who saves to disk alone does so at every {flush_every}th step.
- stall: what one save keeps the loop waiting, before the next update of the weights too. *worst*: of one step.
- CPU s a save: of all processes of the trial, helpers and daemons included, above that of as many steps without.
- durable: until the state is on disk and synced (as far as the contender syncs), from the end of its step.
- load: into the live model and optimizer; none of the files in the page cache, then all. *from memory*: a new start of
  the job until its state is back, the start of processes and imports not counted.
- memory added: peak of all processes, each page once, above the same training before its first save.
- Median of all trials (least to greatest); trials are interleaved."""


def markdown(
    title: str, machine: Sequence[str], rows: Sequence[Row], failures: Mapping[str, str], flush_every: int
) -> str:
    """A report that can be read by itself."""
    lines = [f"# {title}", "", *(f"- {line}" for line in machine)]
    for ranks in sorted({one.ranks for one in rows}):
        found = [one for one in rows if one.ranks == ranks]
        step = Spread.of([one.calm_step_s.median for one in found])
        lines += ["", f"## {ranks} rank{'s, FSDP2' if ranks > 1 else ''}", ""]
        lines += [f"{found[0].state_bytes / 1e9:.2f} GB of state, a step without saving {_spread(step, 2)} s.", ""]
        memcpy = next((one.overhead_s.median for one in found if one.name == MEMCPY), None)
        lines += [_table_line(COLUMNS), _table_line(["---"] * len(COLUMNS))]
        lines += [_table_line(_cells(one, memcpy)) for one in found]
    lines += ["", LEGEND.format(flush_every=flush_every), ""]
    if failures:
        lines += ["Could not run:", "", *(f"- {name}: {why}" for name, why in failures.items()), ""]
    return "\n".join(lines)


def _cells(one: Row, memcpy: float | None) -> list[str]:
    saves = one.saves > 0
    return [
        one.name if one.loaded else f"{one.name} (LOADED OTHER BYTES)",
        _spread(one.throughput, 3),
        _spread(one.overhead_s, 3),
        f"{one.overhead_s.median / memcpy:.1f}" if saves and memcpy is not None and memcpy > 0 else "",
        f"{one.kept_share.median:.0%}",
        f"{one.stall_s.median:.3f}" if saves else "",
        f"{one.worst_stall_s.median:.3f}" if saves else "",
        f"{one.cpu_s_per_save.median:.2f}" if saves else "",
        _optional(one.durable_s),
        _optional(one.cold_load_s),
        _optional(one.load_s),
        _optional(one.load_from_memory_s),
        f"{one.extra_multiple.median:.2f}",
        f"{one.disk_bytes.median / 1e9:.3f}" if one.disk_bytes.median else "",
    ]


def _optional(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}"


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} to {spread.greatest:.{digits}f})"


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
