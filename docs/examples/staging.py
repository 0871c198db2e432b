"""What every act of the demo needs: the stage, the logs of a run, and rows of the closing table.

Everything that is started carries a mark in its environment, by which it is found again and ended. Which promises are
judged, and how, is the business of the acts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil

HERE = Path(__file__).resolve().parent
RANKS = 2
MARK = "CKPTD_DEMO"


class DemoError(Exception):
    """Something the demo started did not do its work; the message says what and shows the end of its output."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the closing table. `good` is None where nothing is promised."""

    name: str
    value: str
    good: bool | None = None


# --- what a run wrote -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Incarnation:
    """One start of the ranks: what rank 0 logged between it and the next one."""

    started: float
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    restored: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """The progress logs of a run, read as they grow."""

    directory: Path
    pids: dict[int, int] = dataclasses.field(default_factory=dict)
    incarnations: list[Incarnation] = dataclasses.field(default_factory=list)
    ends: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _offsets: dict[int, int] = dataclasses.field(default_factory=dict)

    def read(self) -> None:
        """Take in what the ranks have written since the last call."""
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            rank = int(path.stem.removeprefix("rank-"))
            for line in self._new_lines(rank, path):
                self._take(rank, json.loads(line))

    def _new_lines(self, rank: int, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(rank, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offsets[rank] = self._offsets.get(rank, 0) + len(line)
                yield line

    def _take(self, rank: int, line: dict[str, Any]) -> None:
        if line["event"] == "start":
            self.pids[rank] = line["pid"]
            if rank == 0:
                self.incarnations.append(Incarnation(line["time"]))
        elif line["event"] == "restored" and rank == 0:
            self.incarnations[-1].restored = line
        elif line["event"] == "step":
            self.incarnations[-1].steps.append(line)
        elif line["event"] == "end":
            self.ends[rank] = line

    @property
    def last_step(self) -> int:
        """The newest step in the log, 0 if there is none."""
        steps = [line["step"] for incarnation in self.incarnations for line in incarnation.steps]
        return steps[-1] if steps else 0

    @property
    def sealed(self) -> int:
        """Snapshots that the newest incarnation has sealed, as far as the log knows."""
        if not self.incarnations or not self.incarnations[-1].steps:
            return 0
        return int(self.incarnations[-1].steps[-1]["statistics"]["snapshots_sealed"])

    def losses(self) -> dict[int, set[float]]:
        """Every loss that was logged for a step; a step trained twice has one value if both were equal."""
        found: dict[int, set[float]] = {}
        for incarnation in self.incarnations:
            for line in incarnation.steps:
                found.setdefault(line["step"], set()).add(line["loss"])
        return found

    def step_s(self) -> float:
        """Median seconds between two logged steps."""
        gaps = [
            later["time"] - earlier["time"]
            for incarnation in self.incarnations
            for earlier, later in zip(incarnation.steps, incarnation.steps[1:], strict=False)
        ]
        return sorted(gaps)[len(gaps) // 2] if gaps else 0.0


# --- processes --------------------------------------------------------------------------------------------------------


class Stage:
    """Where the demo plays: a directory, an environment with a mark, and every process that carries it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = secrets.token_hex(8)
        self.runtime = directory / "runtime"
        self.environment = {
            **os.environ,
            MARK: self.mark,
            "CKPTD_RUNTIME_DIR": str(self.runtime),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            # Otherwise restarted ranks may meet addresses of dead ones in a store that outlived them (pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def torchrun(self, name: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Run]:
        """Start `train_gpt.py` on two ranks; its output goes to `<name>.txt`."""
        progress = self.directory / name
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=3"]
        script = [str(HERE / "train_gpt.py"), "--progress", str(progress), *arguments]
        with self.output(name).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *launcher, *script], env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        return process, Run(progress)

    def call(self, name: str, *command: str, timeout_s: float = 120.0) -> str:
        """Run a command to its end and return what it printed; DemoError if it fails."""
        with self.output(name).open("wb") as errors:
            try:
                done = subprocess.run(
                    command, env=self.environment, stdout=subprocess.PIPE, stderr=errors, timeout=timeout_s, check=False
                )
            except subprocess.TimeoutExpired:
                raise DemoError(f"{name}: not done after {timeout_s:.0f} s") from None
        if done.returncode != 0:
            raise DemoError(f"{name}: exit status {done.returncode}\n{done.stdout.decode()}\n{self.tail(name)}")
        return done.stdout.decode()

    def output(self, name: str) -> Path:
        return self.directory / f"{name}.txt"

    def tail(self, name: str, characters: int = 4000) -> str:
        return self.output(name).read_text(errors="replace")[-characters:]

    def processes(self) -> list[psutil.Process]:
        """Everything alive that carries the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # gone, or another user's
        return found

    def leftovers(self, patience_s: float = 20.0) -> list[str]:
        """Processes and sockets that outlive a closed job; a process that is about to leave gets a little time."""
        deadline = time.monotonic() + patience_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        found = [f"process {process.pid}" for process in self.processes()]
        for root, _, names in os.walk(self.directory):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # about to leave too
                    if stat.S_ISSOCK(os.lstat(os.path.join(root, name)).st_mode):
                        found.append(f"socket {name}")
        return found

    def clear(self) -> None:
        """End what is still running, by process id; again until nothing is, since daemons start each other anew."""
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.1)


class Ending(Protocol):
    """What can be waited for: a process, or several."""

    returncode: int | None

    def poll(self) -> int | None: ...


def follow(
    stage: Stage,
    name: str,
    process: Ending,
    run: Run,
    on_read: Callable[[Run], None],
    timeout_s: float,
) -> None:
    """Read the log until the run ends; DemoError if it fails or takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise DemoError(f"{name}: not done after {timeout_s:.0f} s, at step {run.last_step}\n{stage.tail(name)}")
        run.read()
        on_read(run)
        time.sleep(0.02)
    run.read()
    on_read(run)
    if process.returncode != 0:
        raise DemoError(f"{name}: ended with status {process.returncode}\n{stage.tail(name)}")
