"""`python -m benchmarks.planning`: how planning scales, and the same question put to torch.distributed.checkpoint.

Two parts, either of which can be left out:

- scaling: 10^4 to 10^7 chunks, saved by 10^4 ranks and wanted by 10^4 ranks in another layout. One process plans for
  all ranks together, then who reads what for whom, then for single ranks. Each size has a process of its own, whose
  greatest resident set is its memory: interpreter, catalog, wants, plans and all.
- peer: the plans of a job of 256 ranks that loads what 192 ranks saved (FSDP2, rows), and of the save itself, beside
  those of torch.distributed.checkpoint's default planner for the same chunks. Both plan in one process, in turn.

Writes `planning.md`, `planning.svg` and `planning.json` into the output directory and prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.plot import log_log
from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.plan.exchange import plan_exchange
from ckptd.plan.load import Want, plan_boxes, plan_load

Ints = npt.NDArray[np.int64]

COLUMNS = 4096
RANKS_OF_A_NODE = 8
SINGLE_RANKS = 5
GIBIBYTE = 2**30


class Question(NamedTuple):
    """Chunks, and what all ranks want of them: `rank` ascending; `tensor`, `offsets`, `sizes` of each wanted box."""

    catalog: Catalog
    rank: Ints
    tensor: Ints
    offsets: Ints
    sizes: Ints


@dataclasses.dataclass(frozen=True)
class Trial:
    """What planning took for one layout and size."""

    layout: str
    chunks: int
    tensors: int
    ranks: int
    wants: int
    parts: int
    plan_s: float
    plan_cpu_s: float
    exchange_s: float
    exchange_cpu_s: float
    one_rank_s: float
    unevenness: float
    peak_bytes: int
    baseline_bytes: int


def mesh(chunks: int, ranks: int) -> Question:
    """Tensors saved in rows by all ranks (FSDP2), wanted in two columns (tensor parallel) of rows by half the ranks."""
    tensors = max(chunks // ranks, 1)
    shards = chunks // tensors
    rows = shards * 7
    bounds = np.arange(ranks // 2 + 1) * rows // (ranks // 2)
    rank, tensor = (column.reshape(-1) for column in np.mgrid[:ranks, :tensors])
    row, column = np.divmod(rank, 2)
    half = COLUMNS // 2
    offsets = np.stack([bounds[row], column * half], axis=1)
    sizes = np.stack([bounds[row + 1] - bounds[row], np.full(len(rank), half)], axis=1)
    return Question(_slabs(tensors, rows, np.arange(shards + 1) * 7), rank, tensor, offsets, sizes)


def many(chunks: int, ranks: int) -> Question:
    """Small tensors of 100 chunks each, in 100 pipeline stages; wanted by 90 ranks of each stage."""
    tensors = max(chunks // 100, 1)
    bounds = np.arange(91) * 700 // 90
    tensor, shard = (column.reshape(-1) for column in np.mgrid[:tensors, :90])
    rank = (tensor % (ranks // 90)) * 90 + shard
    order = np.argsort(rank, kind="stable")
    rank, tensor, shard = rank[order], tensor[order], shard[order]
    offsets = np.stack([bounds[shard], np.zeros_like(shard)], axis=1)
    sizes = np.stack([bounds[shard + 1] - bounds[shard], np.full(len(shard), COLUMNS)], axis=1)
    return Question(_slabs(tensors, 700, np.arange(101) * 7), rank, tensor, offsets, sizes)


def one(chunks: int, ranks: int) -> Question:
    """One tensor in rows and columns, wanted in about as many others that lie across them."""
    side = math.isqrt(chunks)
    low = np.stack(np.divmod(np.arange(side * side), side), axis=1) * 6
    catalog = Catalog.build([("weight", "uint8", (side * 6,) * 2)], np.zeros(len(low)), low, np.full(low.shape, 6))
    starts = np.minimum(low // 6 * 6 + 3, side * 6 - 3)
    sizes = np.where(starts == side * 6 - 3, 3, 6)
    rank = np.arange(len(low)) * ranks // len(low)
    return Question(catalog, rank, np.zeros(len(low), np.int64), starts, sizes)


def flat(chunks: int, ranks: int) -> Question:
    """Tensors flattened and cut anywhere (ZeRO, FSDP1): three chunks a shard; wanted in rows by half as many ranks."""
    tensors = max(chunks // (3 * ranks), 1)
    shards = max(chunks // (3 * tensors), 1)
    rows = shards * 7
    random = np.random.default_rng(0)
    at = np.arange(1, shards) * 7 * COLUMNS + random.integers(1, 3 * COLUMNS, shards - 1)
    row, column = np.divmod(at, COLUMNS)
    # Of each bound: the end of one shard in a row, and the beginning of the next; between bounds, whole rows.
    whole_low = np.concatenate([[0], row + 1])
    whole_high = np.append(row, rows)
    zeros = np.zeros_like(row)
    low = np.concatenate(
        [np.stack([row, zeros], 1), np.stack([row, column], 1), np.stack([whole_low, np.zeros_like(whole_low)], 1)]
    )
    high = np.concatenate(
        [
            np.stack([row + 1, column], 1),
            np.stack([row + 1, np.full_like(row, COLUMNS)], 1),
            np.stack([whole_high, np.full_like(whole_high, COLUMNS)], 1),
        ]
    )
    held = (low < high).all(axis=1)
    low, high = low[held], high[held]
    order = np.lexsort(low.T[::-1])
    low, sizes = low[order], (high - low)[order]
    names = [(f"layers.{number:05d}.weight", "bfloat16", (rows, COLUMNS)) for number in range(tensors)]
    number = np.repeat(np.arange(tensors), len(low))
    catalog = Catalog.build(names, number, np.tile(low, (tensors, 1)), np.tile(sizes, (tensors, 1)))
    half = max(ranks // 2, 1)
    bounds = np.arange(half + 1) * rows // half
    rank, tensor = (column.reshape(-1) for column in np.mgrid[:half, :tensors])
    offsets = np.stack([bounds[rank], np.zeros_like(rank)], axis=1)
    sizes = np.stack([bounds[rank + 1] - bounds[rank], np.full(len(rank), COLUMNS)], axis=1)
    return Question(catalog, rank, tensor, offsets, sizes)


LAYOUTS: dict[str, Callable[[int, int], Question]] = {"mesh": mesh, "many": many, "one": one, "flat": flat}


def _slabs(tensors: int, rows: int, bounds: Ints) -> Catalog:
    """`tensors` tensors of `rows` rows, saved in runs of rows."""
    names = [(f"layers.{number:06d}.weight", "bfloat16", (rows, COLUMNS)) for number in range(tensors)]
    shards = len(bounds) - 1
    offsets = np.zeros((tensors * shards, 2), np.int64)
    offsets[:, 0] = np.tile(bounds[:-1], tensors)
    sizes = np.full((tensors * shards, 2), COLUMNS, np.int64)
    sizes[:, 0] = np.tile(np.diff(bounds), tensors)
    return Catalog.build(names, np.repeat(np.arange(tensors), shards), offsets, sizes)


def resident_bytes() -> int:
    """The greatest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds that passed, and seconds of processor time."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def measure(layout: str, chunks: int, ranks: int) -> Trial:
    """Plans one question in this process."""
    baseline = resident_bytes()
    catalog, rank, tensor, offsets, sizes = LAYOUTS[layout](chunks, ranks)
    clock = Clock()
    plan = plan_boxes(catalog, tensor, offsets, sizes)
    plan_s, plan_cpu_s = clock.read()
    world = int(rank[-1]) + 1
    first = np.searchsorted(rank[plan.want], np.arange(world + 1)).tolist()
    clock = Clock()
    wanted = [_distinct(plan.row[first[number] : first[number + 1]]) for number in range(world)]
    exchange = plan_exchange(catalog.raw, wanted, np.arange(world) // RANKS_OF_A_NODE)
    exchange_s, exchange_cpu_s = clock.read()
    loads = np.bincount(exchange.reader, catalog.raw, world)
    parts = len(plan)
    del plan, wanted, exchange
    single = []
    for number in np.linspace(0, world - 1, SINGLE_RANKS).astype(int).tolist():
        mine = np.flatnonzero(rank == number)
        wants = [
            Want(info.key, info.dtype, info.shape, Box(tuple(offsets[index].tolist()), tuple(sizes[index].tolist())))
            for index in mine.tolist()
            for info in (catalog.tensors[int(tensor[index])],)
        ]
        clock = Clock()
        plan_load(catalog, wants, rank=ALL_RANKS)
        single.append(clock.read()[0])
    return Trial(
        layout=layout,
        chunks=len(catalog),
        tensors=len(catalog.tensors),
        ranks=world,
        wants=len(tensor),
        parts=parts,
        plan_s=plan_s,
        plan_cpu_s=plan_cpu_s,
        exchange_s=exchange_s,
        exchange_cpu_s=exchange_cpu_s,
        one_rank_s=statistics.median(single),
        unevenness=float(loads.max() / loads.mean()),
        peak_bytes=resident_bytes(),
        baseline_bytes=baseline,
    )


def _distinct(rows: Ints) -> Ints:
    rows = np.sort(rows)
    return np.asarray(rows[np.diff(rows, prepend=-1) != 0])


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of growth: of a straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def in_process(layout: str, chunks: int, ranks: int, timeout_s: float) -> Trial:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planning", "--trial", layout, str(chunks), str(ranks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True)
    return Trial(**json.loads(done.stdout.splitlines()[-1]))


def scaling_table(trials: Sequence[Trial]) -> str:
    """A line for each trial, and the exponents."""
    lines = [
        "| layout | chunks | tensors | ranks | wants | parts | all ranks s (CPU s) | µs a chunk | exchange s (CPU s) "
        "| one rank s | most read / mean | peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for t in trials:
        lines.append(
            f"| {t.layout} | {t.chunks:,} | {t.tensors:,} | {t.ranks:,} | {t.wants:,} | {t.parts:,} "
            f"| {t.plan_s:.2f} ({t.plan_cpu_s:.2f}) | {t.plan_s / t.chunks * 1e6:.2f} "
            f"| {t.exchange_s:.2f} ({t.exchange_cpu_s:.2f}) | {t.one_rank_s:.4f} | {t.unevenness:.3f} "
            f"| {t.peak_bytes / GIBIBYTE:.2f} |"
        )
    lines.append("")
    for layout, found in exponents(trials).items():
        lines.append(f"Log-log slope, {layout}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return "\n".join(lines) + "\n"


def exponents(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """Of each layout that has several sizes."""
    made = {}
    for layout in dict.fromkeys(trial.layout for trial in trials):
        some = [trial for trial in trials if trial.layout == layout]
        if len({trial.chunks for trial in some}) < 2:
            continue
        sizes = [float(trial.chunks) for trial in some]
        figures = {
            "plan of all ranks": [trial.plan_s for trial in some],
            "in CPU time": [trial.plan_cpu_s for trial in some],
            "with exchange": [trial.plan_s + trial.exchange_s for trial in some],
            "memory above the interpreter's": [max(trial.peak_bytes - trial.baseline_bytes, 1.0) for trial in some],
        }
        made[layout] = {name: slope(sizes, values) for name, values in figures.items()}
    return made


def chart(trials: Sequence[Trial]) -> str:
    """Seconds over chunks; dashes have slope 1."""
    series: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        series.setdefault(f"{trial.layout}, all ranks", []).append((trial.chunks, trial.plan_s))
        series.setdefault(f"{trial.layout}, who reads", []).append((trial.chunks, trial.exchange_s))
    return log_log("Planning a load", "chunks", "seconds", series)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description="How planning scales.")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for the tables")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7], help="chunks (default 1e4..1e7)"
    )
    parser.add_argument(
        "--layouts", nargs="*", choices=LAYOUTS, default=["mesh"], help="default: mesh; none: no scaling"
    )
    parser.add_argument("--ranks", type=int, default=10_000, help="ranks that save and want (default 10000)")
    parser.add_argument("--rounds", type=int, default=1, help="trials of each size; the fastest counts (default 1)")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="compare with DCP's planner"
    )
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="for each trial (default 1200)")
    parser.add_argument("--trial", nargs=3, metavar=("LAYOUT", "CHUNKS", "RANKS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_scaling(options: argparse.Namespace) -> list[Trial]:
    """The fastest trial of every layout and size."""
    best: dict[tuple[str, int], Trial] = {}
    for _ in range(options.rounds):
        for layout in options.layouts:
            for size in map(int, options.sizes):
                print(f"planning: {layout}, {size:,} chunks ...", file=sys.stderr, flush=True)
                trial = in_process(layout, size, options.ranks, options.timeout_s)
                other = best.setdefault((layout, size), trial)
                if trial.plan_cpu_s < other.plan_cpu_s:
                    best[layout, size] = trial
    return list(best.values())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.trial:
        layout, chunks, ranks = options.trial
        print(json.dumps(dataclasses.asdict(measure(layout, int(chunks), int(ranks)))))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "trials": [], "peer": []}
    text = "# Planning\n\n"
    trials = run_scaling(options)
    if trials:
        text += scaling_table(trials) + "\n"
        record["trials"] = [dataclasses.asdict(trial) for trial in trials]
        record["slopes"] = exponents(trials)
        (options.output / "planning.svg").write_text(chart(trials))
    if options.peer:
        from benchmarks.peers.dcp_planner import compare, peer_table

        results = compare()
        text += peer_table(results)
        record["peer"] = [dataclasses.asdict(result) for result in results]
    (options.output / "planning.md").write_text(text)
    (options.output / "planning.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
