"""Runs one trial: starts its ranks, reads memory and CPU time when they rest, collects their results, leaves nothing.

Every process carries a mark in its environment, so that daemons and helper processes are found and counted too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.contender import CONTENDERS
from benchmarks.memory import Sampler, marked
from benchmarks.peers import environments
from benchmarks.worker import PHASES, Trial

MARK = "CKPTD_BENCHMARK"
ROOT = Path(__file__).resolve().parent.parent
COMPANION_S = 60.0
SHARED_MEMORY = Path("/dev/shm")
CLEANERS = ("resource_tracker", "torch_shm_manager")


class TrialError(Exception):
    """A trial that failed or took too long; the message holds the end of what it printed."""


@dataclasses.dataclass
class Outcome:
    """What one trial gave: each rank's result, and of all of its processes at each phase's end the greatest memory
    since the last one and the CPU seconds since the beginning."""

    ranks: list[dict[str, Any]]
    bytes: dict[str, int]
    cpu_s: dict[str, float]


class Place:
    """Where processes of one contender run: a mark, an environment, an interpreter; all that is left is ended."""

    def __init__(self, contender: str, directory: Path, environment_root: Path) -> None:
        if contender not in CONTENDERS:
            raise TrialError(f"no such contender: {contender!r}; there are {', '.join(CONTENDERS)}")
        self.entry, self.directory = CONTENDERS[contender], directory
        self.mark = secrets.token_hex(8)
        self.interpreter = sys.executable
        if self.entry.environment is not None:
            try:
                self.interpreter = str(environments.python(self.entry.environment, environment_root))
            except environments.EnvironmentSetupError as error:
                raise TrialError(f"its environment could not be made: {error}") from None
        directory.mkdir(parents=True)
        self.runtime = tempfile.mkdtemp(prefix="ckptd-bench-")  # short: a socket's path has at most 107 bytes
        self._companions: list[subprocess.Popen[str]] = []
        self._shared = set(os.listdir(SHARED_MEMORY))
        self.variables = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "CKPTD_RUNTIME_DIR": self.runtime,
            "MASTER_ADDR": "127.0.0.1",
        }

    @property
    def errors(self) -> Path:
        """The file that takes what its processes write to standard error."""
        return self.directory / "errors.txt"

    def tail(self, characters: int = 4000) -> str:
        """The end of what they wrote there."""
        return self.errors.read_text(errors="replace")[-characters:] if self.errors.exists() else ""

    def start(self, module: str, *arguments: str, **variables: object) -> subprocess.Popen[str]:
        """A process that speaks JSON lines on its standard output."""
        environment = self.variables | {name: str(value) for name, value in variables.items()}
        with self.errors.open("a") as errors:
            return subprocess.Popen(
                [self.interpreter, "-m", module, *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def seat(self, rank: int, ranks: int) -> dict[str, object]:
        """The variables that say where a rank runs: all on one node, or each on one of its own."""
        if not self.entry.apart:
            return {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        node = f"node{rank}"
        own = {"CKPTD_NODE": node, "CKPTD_RUNTIME_DIR": f"{self.runtime}/{node}"}
        return {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, **own}

    def start_companion(self, **variables: object) -> None:
        """What has to run beside the ranks of a node and outlive them; TrialError unless it says that it is there."""
        if self.entry.companion is None:
            return
        self._companions.append(self.start(self.entry.companion, **variables))
        self._await_answer(self._companions[-1])

    def announce_restart(self) -> None:
        """Tell those that still run that the ranks have ended and will be started anew."""
        self._companions = [process for process in self._companions if process.poll() is None]
        for process in self._companions:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            self._await_answer(process)

    def _await_answer(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        answer = threading.Thread(target=process.stdout.readline, daemon=True)
        answer.start()
        answer.join(COMPANION_S)
        if answer.is_alive() or process.poll() is not None:
            raise TrialError(f"{self.entry.companion} does not answer\n{self.tail()}")

    def clear(self) -> None:
        """Let what has finished leave by itself, then end by process id what is left; files and shared memory go."""
        deadline = time.monotonic() + (0 if self.entry.companion else 5)
        while marked(MARK, self.mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        for name in set(os.listdir(SHARED_MEMORY)) - self._shared:
            if self.mark in name or _is_orphan(name):
                with contextlib.suppress(OSError):
                    (SHARED_MEMORY / name).unlink()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.runtime, ignore_errors=True)

    def kill(self, **variables: str) -> int:
        """SIGKILL to every process of this place with these variables in its environment; how many there were. Stopped
        first, and again until none is left, since daemons start each other anew."""
        ended: set[int] = set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = list(self._processes(variables))
            if not found:
                break
            for action in (psutil.Process.suspend, psutil.Process.kill):
                for process in found:
                    with contextlib.suppress(psutil.Error):
                        action(process)
            ended |= {process.pid for process in found}
            psutil.wait_procs(found, timeout=1)
        return len(ended)

    def _processes(self, variables: dict[str, str]) -> Iterator[psutil.Process]:
        for pid in marked(MARK, self.mark):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                environment = process.environ()
                if process.status() != psutil.STATUS_ZOMBIE and variables.items() <= environment.items():
                    yield process


def end_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a rank and to its helpers, but not to those that clean up behind them, nor to daemons, which have left
    it. What a launcher does when a job has failed."""
    with contextlib.suppress(psutil.Error):
        for helper in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not any(name in " ".join(helper.cmdline()) for name in CLEANERS):
                    helper.kill()
    process.kill()
    process.wait()


def _is_orphan(name: str) -> bool:
    """Whether it is a file by which torch shares memory, of a process that is gone: torch_<process id>_..."""
    kind, _, rest = name.partition("_")
    pid = rest.partition("_")[0]
    return kind == "torch" and pid.isdigit() and not psutil.pid_exists(int(pid))


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_trial(trial: Trial, ranks: int, timeout_s: float, environment_root: Path) -> Outcome:
    """Run it in `trial.directory` (made, and removed after); TrialError if it cannot run, with the reason."""
    place = Place(trial.contender, Path(trial.directory), environment_root)
    sampler = Sampler(MARK, place.mark)
    try:
        place.start_companion()
        group = _Ranks(place, trial, ranks, time.monotonic() + timeout_s)
        peaks, cpu_s = {}, {}
        for name in PHASES:
            group.wait_for(name)
            peaks[name], cpu_s[name] = sampler.take()
            group.resume()
        return Outcome(group.wait_for("result"), peaks, cpu_s)
    finally:
        sampler.close()
        place.clear()


class _Ranks:
    """The ranks of a trial, and the lines they print."""

    def __init__(self, place: Place, trial: Trial, ranks: int, deadline: float) -> None:
        self._place, self._deadline = place, deadline
        self._lines: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        port, argument = free_port(), json.dumps(dataclasses.asdict(trial))
        if place.entry.apart and ranks == 1:
            raise TrialError("it needs several ranks, each on a node of its own")
        self._processes: list[subprocess.Popen[str]] = [
            place.start(
                "benchmarks.worker",
                argument,
                RANK=rank,
                WORLD_SIZE=ranks,
                MASTER_PORT=port,
                **place.seat(rank, ranks),
            )
            for rank in range(ranks)
        ]
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            threading.Thread(target=self._read, args=(rank, process.stdout), daemon=True).start()

    def _read(self, rank: int, output: IO[str]) -> None:
        for line in output:
            self._lines.put((rank, json.loads(line)))
        self._lines.put((rank, None))

    def wait_for(self, name: str) -> list[Any]:
        """What each rank says next: the phase or result of that name."""
        found: dict[int, Any] = {}
        while len(found) < len(self._processes):
            try:
                rank, line = self._lines.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                raise TrialError(f"no {name!r} in time\n{self._place.tail()}") from None
            if line is None and rank not in found:
                raise TrialError(f"rank {rank} ended before {name!r}\n{self._place.tail()}")
            if line is not None and (name in line or line.get("phase") == name):
                found[rank] = line.get("result")
        return [found[rank] for rank in sorted(found)]

    def resume(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()


def reason(error: str) -> str:
    """The line of a failure's message that says most: the last one of a traceback, else the first."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line).strip() for line in error.splitlines() if line.strip()]
    said: Sequence[str] = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Exit"))]
    return f"{lines[0]}: {said[-1]}" if said and said[-1] != lines[0] else lines[0]
