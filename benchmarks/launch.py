"""Runs one trial: starts its ranks, reads memory when they rest, collects their results, leaves nothing running.

Every process carries a mark in its environment, so that daemons and helper processes are found and counted too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.memory import Sampler, marked
from benchmarks.worker import Trial

MARK = "CKPTD_BENCHMARK"


class TrialError(Exception):
    """A trial that failed or took too long; the message holds the end of what it printed."""


@dataclasses.dataclass
class Outcome:
    """What one trial gave: each rank's result, and bytes occupied by all of its processes."""

    ranks: list[dict[str, Any]]
    training_bytes: int
    peak_bytes: int


def run_trial(trial: Trial, ranks: int, timeout_s: float) -> Outcome:
    """Run it in `trial.directory` (made, and removed after); TrialError if any rank fails."""
    mark = secrets.token_hex(8)
    runtime = tempfile.mkdtemp(prefix="ckptd-bench-")  # short: a socket's path has at most 107 bytes
    Path(trial.directory).mkdir(parents=True)
    group = _Ranks(trial, ranks, mark, runtime, time.monotonic() + timeout_s)
    sampler = Sampler(MARK, mark)
    try:
        group.wait_for("trained")
        sampler.take()
        training_bytes = sampler.take()
        group.resume()
        group.wait_for("saved")
        peak_bytes = sampler.take()
        group.resume()
        return Outcome(group.wait_for("result"), training_bytes, peak_bytes)
    finally:
        sampler.close()
        _end(mark)
        group.close()
        shutil.rmtree(trial.directory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


class _Ranks:
    """The processes of a trial, and the lines they print."""

    def __init__(self, trial: Trial, ranks: int, mark: str, runtime: str, deadline: float) -> None:
        self._deadline = deadline
        self._lines: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._errors = Path(trial.directory) / "errors.txt"
        shared = {
            **os.environ,
            MARK: mark,
            "CKPTD_RUNTIME_DIR": runtime,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(trial))]
        with self._errors.open("w") as errors:
            for rank in range(ranks):
                process = subprocess.Popen(
                    command,
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                assert process.stdout is not None
                self._processes.append(process)
                threading.Thread(target=self._read, args=(rank, process.stdout), daemon=True).start()

    def _read(self, rank: int, output: IO[str]) -> None:
        for line in output:
            if line.startswith("{"):
                self._lines.put((rank, json.loads(line)))
        self._lines.put((rank, None))

    def wait_for(self, name: str) -> list[Any]:
        """What each rank says next: the phase or result of that name."""
        found: dict[int, Any] = {}
        while len(found) < len(self._processes):
            try:
                rank, line = self._lines.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                raise TrialError(f"no {name!r} in time\n{self._tail()}") from None
            if line is None and rank not in found:
                raise TrialError(f"rank {rank} ended before {name!r}\n{self._tail()}")
            if line is not None and ("result" in line or line.get("phase") == name):
                found[rank] = line.get("result")
        return [found[rank] for rank in sorted(found)]

    def resume(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def close(self) -> None:
        for process in self._processes:
            process.wait(10)

    def _tail(self) -> str:
        return self._errors.read_text(errors="replace")[-4000:]


def _end(mark: str) -> None:
    """Let a finished trial leave by itself, then end by process id what is left of it."""
    deadline = time.monotonic() + 5
    while marked(MARK, mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    while (left := marked(MARK, mark)) and time.monotonic() < deadline + 5:  # daemons start each other anew
        for pid in left:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
