"""`python -m benchmarks.loading`: loading a checkpoint in another layout, beside torch.distributed.checkpoint.load.

For each change of layout one world of processes saves the same state both ways, and another loads it both ways in turn,
several rounds, with the page cache warm and cold. Bytes read are those of all processes together (/proc/PID/io: rchar,
what was asked of files; read_bytes, what came from a disk), as a multiple of the checkpoint's files. Writes
`<output>/loading.md` and `<output>/loading.json` and prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading_worker import CKPTD, COLD, DCP, DDP, FSDP2, SINGLE, WARM, Job
from benchmarks.report import Spread
from ckptd.core.config import parse_size

MOST_READ = 1.05
LEAST_SPEEDUP = 2.0


@dataclasses.dataclass(frozen=True)
class Change:
    """Saved in one layout on some ranks, loaded in another on others. `goal`: whether it must read and be as fast as
    MOST_READ and LEAST_SPEEDUP say."""

    source: str
    source_ranks: int
    target: str
    target_ranks: int
    goal: bool = True

    def __str__(self) -> str:
        return f"{_layout(self.source, self.source_ranks)} -> {_layout(self.target, self.target_ranks)}"


def _layout(name: str, ranks: int) -> str:
    return name if name == SINGLE else f"{name} on {ranks}"


CHANGES = (
    Change(FSDP2, 2, FSDP2, 4),
    Change(FSDP2, 4, FSDP2, 2),
    Change(SINGLE, 1, SINGLE, 1),
    Change(SINGLE, 1, DDP, 2, goal=False),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of loading after one change of layout. Multiples are of the bytes of the checkpoint's files."""

    change: str
    name: str
    cache: str
    right: bool
    checkpoint_bytes: int
    seconds: Spread
    read_multiple: Spread
    disk_multiple: Spread
    speedup: float
    reached: bool | None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--state", type=parse_size, default=10**9, metavar="SIZE", help="bytes of state (default 1e9)")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each kind (default 5)")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each world of processes (default 900)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where checkpoints and tables go")
    return parser.parse_args(arguments)


def run_world(job: Job, ranks: int, timeout_s: float) -> list[dict[str, Any]]:
    """Runs `job` on so many processes; the result of each. RuntimeError with their output where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "benchmarks.loading_worker", json.dumps(dataclasses.asdict(job))]
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.kill)
            processes.append((process, output))
        results = []
        for rank, (process, output) in enumerate(processes):
            status = process.wait(max(0.0, deadline - time.monotonic()))
            output.seek(0)
            text = output.read()
            if status:
                raise RuntimeError(f"rank {rank} of {job} ended with status {status}:\n{text[-4000:]}")
            results.append(json.loads(text.splitlines()[-1])["result"])
    return results


def measure(change: Change, options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Saves, loads, and what came of it."""
    directory = scratch / "".join(c if c.isalnum() else "-" for c in str(change))
    directory.mkdir()
    save = Job(change.source, str(directory), options.state, 0)
    saved = run_world(save, change.source_ranks, options.timeout_s)[0]["fingerprint"]
    load = Job(change.target, str(directory), options.state, options.rounds)
    ranks = run_world(load, change.target_ranks, options.timeout_s)
    loads = [_together(each) for each in zip(*(rank["loads"] for rank in ranks), strict=True)]
    sizes = {name: sum(p.stat().st_size for p in (directory / name).rglob("*") if p.is_file()) for name in (CKPTD, DCP)}
    shutil.rmtree(directory)
    return [
        _row(change, name, cache, [one for one in loads if one["cache"] == cache], sizes[name], saved)
        for cache in (WARM, COLD)
        for name in (CKPTD, DCP)
    ]


def _together(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One load of the whole job: the slowest rank's time, everybody's bytes."""
    return {
        **ranks[0],
        "seconds": max(rank["seconds"] for rank in ranks),
        "read": sum(rank["read"] for rank in ranks),
        "disk": sum(rank["disk"] for rank in ranks),
        "fingerprints": [rank["fingerprint"] for rank in ranks],
    }


def _row(
    change: Change, name: str, cache: str, loads: Sequence[dict[str, Any]], size: int, saved: Sequence[int]
) -> Row:
    mine = [one for one in loads if one["name"] == name]
    seconds = {which: Spread.of([one["seconds"] for one in loads if one["name"] == which]) for which in (CKPTD, DCP)}
    read = Spread.of([one["read"] / size for one in mine])
    speedup = seconds[DCP].median / seconds[name].median
    reached = read.median <= MOST_READ and speedup >= LEAST_SPEEDUP if change.goal and name == CKPTD else None
    return Row(
        change=str(change),
        name=name,
        cache=cache,
        right=all(found == list(saved) for one in mine for found in one["fingerprints"]),
        checkpoint_bytes=size,
        seconds=seconds[name],
        read_multiple=read,
        disk_multiple=Spread.of([one["disk"] / size for one in mine]),
        speedup=speedup,
        reached=reached,
    )


def markdown(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The table, and how it came about."""
    lines = [
        "# Loading in another layout",
        "",
        f"- {os.cpu_count()} cores, torch {torch.__version__}, gloo; {options.state / 1e9:.2f} GB of AdamW state in "
        f"float32; {options.rounds} interleaved rounds; median (least to greatest)",
        "- read: bytes that all ranks together asked of files (rchar), and that came from a disk (read_bytes), as a",
        f"  multiple of the checkpoint. Goal: at most {MOST_READ} x, at least {LEAST_SPEEDUP} x as fast as dcp.load",
        "- timed: the whole of ckptd.load; dcp.load without making the state dict before and setting it after",
        "",
        "| change | cache | | seconds | read x | from disk x | speed-up | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        goal = "" if row.reached is None else "reached" if row.reached else "MISSED"
        name = row.name if row.right else f"{row.name} (LOADED OTHER BYTES)"
        spread = f"{row.seconds.median:.2f} ({row.seconds.least:.2f} to {row.seconds.greatest:.2f})"
        lines.append(
            f"| {row.change} | {row.cache} | {name} | {spread} | {row.read_multiple.median:.3f} | "
            f"{row.disk_multiple.median:.3f} | {row.speedup:.2f} | {goal} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=options.output))  # the disk that is measured
    rows: list[Row] = []
    try:
        for change in CHANGES:
            rows += measure(change, options, scratch)
            (options.output / "loading.md").write_text(markdown(rows, options))
            record = {"rows": [dataclasses.asdict(row) for row in rows]}
            (options.output / "loading.json").write_text(json.dumps(record, indent=1) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(markdown(rows, options))
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
