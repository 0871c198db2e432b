"""The laboratory of the fault tests: one training job with its own runtime directory and store, whose processes can be
killed, stopped and broken at named points, and what must hold of it afterwards.

Waiting is always for a condition with a deadline; what came instead is in the failure.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import pytest

from ckptd.core.config import Options
from ckptd.core.errors import CkptdError, FormatError
from ckptd.core.types import Job
from ckptd.daemon.address import Address
from ckptd.daemon.client import Control
from ckptd.tiers.arena import Ledger
from ckptd.tiers.store import Store, open_checkpoint
from tests.faults.inject import sitecustomize as inject

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_S = 60.0
"""Every wait ends here: a test that fails must not hang."""

POLL_S = 0.01
T = TypeVar("T")


def until(condition: Callable[[], T], what: str | Callable[[], str], limit_s: float = LIMIT_S) -> T:
    """The first true value of `condition`; fails the test, saying `what` was waited for, when it does not come."""
    end = time.monotonic() + limit_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            pytest.fail(f"waited {limit_s:.0f} s in vain for: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_S)


@dataclasses.dataclass(frozen=True)
class Fault:
    """`action` at the `call`-th passing (counted per process) of `point`, `before` or `after` it, in `process`.

    `point`: module:function, or a moment that train.py names ("step", "backward"). `match`: only where this pattern
    is found in the arguments or the file's path. `action`: "kill" or "stop" (itself, or the roles named after it),
    "hold" (until released), "EIO", "ENOSPC" (raised), "note" (the arguments go into a file). A `lasting` one repeats
    from the `call`-th passing on, until disarmed. "set VALUE": the module's name `point` has this value (JSON) instead,
    from the start of a process on. "alter MODULE:FUNCTION": what this makes of the result of `point` comes out instead.
    """

    point: str
    action: str = "kill"
    when: str = "before"
    call: int = 1
    match: str = ""
    process: str = "any"
    lasting: bool = False


class Process(Protocol):
    """A launched process: subprocess.Popen, or a child of the nursery."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...


class Nursery:
    """This side of nursery.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )
        self._born: queue.Queue[int] = queue.Queue()
        self._ended: dict[int, int] = {}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def launch(
        self, arguments: list[str], variables: dict[str, str], directory: Path, output: Path, group: Path | None
    ) -> Born:
        """A trainer with these arguments; `group`: the cgroup it moves to."""
        assert self._process.stdin is not None
        order = {
            "arguments": arguments,
            "environment": variables,
            "directory": str(directory),
            "output": str(output),
            "group": None if group is None else str(group),
        }
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return Born(self._born.get(timeout=LIMIT_S), self._ended)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_S)
        self._thread.join(LIMIT_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if "started" in event:
                self._born.put(event["started"])
            else:
                self._ended[event["ended"]] = event["status"]


class Born:
    """A child of the nursery."""

    def __init__(self, pid: int, ended: dict[int, int]) -> None:
        self.pid, self._ended = pid, ended
        ended.pop(pid, None)

    def poll(self) -> int | None:
        return self._ended.get(self.pid)


def environment() -> dict[str, str]:
    """Of every Python process of these tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPTD_")}
    return {**kept, "PYTHONPATH": f"{HERE / 'inject'}:{ROOT}"}


class Node:
    """A node of a job, seen from outside: where its daemon is, and what it says."""

    def __init__(self, job: str, runtime: Path) -> None:
        self.runtime = runtime
        self.address = Address(Job(job), runtime / Job(job).digest)

    def status(self) -> dict[str, Any] | None:
        """What the daemon says of itself; None where none answers."""
        try:
            with contextlib.closing(Control(self.address)) as control:
                return control.status()
        except CkptdError:
            return None

    def reaches(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Waits until the daemon's status is as wanted."""

        def asked() -> dict[str, Any] | None:
            status = self.status()
            return status if status is not None and condition(status) else None

        found = until(asked, lambda: f"{what}; the status is {self.status()}; {self.said()}")
        assert found is not None
        return found

    def said(self) -> str:
        """The end of the daemon's log, for messages."""
        with contextlib.suppress(OSError):
            return f"\n--- {self.address.log}:\n" + self.address.log.read_text(errors="replace")[-3000:]
        return ""


class Launch(NamedTuple):
    """What is launched: its arguments, where its output goes, where it says how far it is."""

    command: list[str]
    output: Path
    result: Path


class Run:
    """One launch of the job: a trainer, several ranks, or torchrun with two."""

    def __init__(self, processes: Sequence[Process], output: Path, result: Path, nodes: Sequence[Node]) -> None:
        self._processes, self.output, self._result, self._nodes = processes, output, result, nodes
        self._seen = len(self.events())

    @property
    def pid(self) -> int:
        return self._processes[0].pid

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def events(self) -> list[dict[str, Any]]:
        """What the trainers of this job have said."""
        return [json.loads(line) for line in self._result.read_text().splitlines()] if self._result.exists() else []

    def own_events(self) -> list[dict[str, Any]]:
        """What those of this launch have said."""
        pids = [process.pid for process in self._processes]
        said = self.events()[self._seen :]
        return [event for event in said if event["pid"] in pids or event["parent"] in pids]

    @property
    def step(self) -> int:
        """The last step done."""
        return max((event["step"] for event in self.own_events() if "step" in event), default=0)

    def at(self, step: int) -> None:
        """Waits until a step is done."""
        until(lambda: self.step >= step or not self.running, lambda: f"step {step} of\n{self.said()}")
        assert self.step >= step, self.said()

    def restored(self) -> dict[str, Any]:
        """From where this launch went on: step, epoch, source."""
        found: dict[str, Any] = next(event["restored"] for event in self.own_events() if "step" in event)
        return found

    def said(self) -> str:
        """Standard output and error, and the daemons' logs, for messages."""
        text = self.output.read_text(errors="replace")[-6000:]
        return text + "".join(node.said() for node in self._nodes)

    def ends(self) -> list[int]:
        """Waits for its end; the exit status of each process."""
        until(lambda: not self.running, lambda: f"the end of\n{self.said()}")
        return [status for process in self._processes if (status := process.poll()) is not None]

    def dies(self) -> None:
        """Waits until one of its processes is ended by SIGKILL; the others are then told to end, as torchrun does."""
        until(lambda: not all(p.poll() is None for p in self._processes), lambda: f"a death in\n{self.said()}")
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        assert -signal.SIGKILL in self.ends(), self.said()

    def finishes(self) -> dict[str, Any]:
        """Waits for its clean end; rank 0's last event."""
        assert not any(self.ends()), self.said()
        return next(event for event in self.own_events() if event.get("finished") and event["rank"] == 0)

    def kill(self) -> None:
        """SIGKILL, now."""
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
        self.ends()


class Planned(abc.ABC):
    """Faults that are armed for the processes of one job; they find the plan by CKPTD_TEST_FAULTS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._plan = folder / "faults.json"
        self._faults: dict[str, Path] = {}

    @abc.abstractmethod
    def said(self) -> str:
        """The ends of outputs and logs, for messages."""

    def plan(self, faults: dict[str, Fault]) -> None:
        """Arms faults for the processes that start from now on, which those planned earlier do not concern."""
        plans = []
        for name, fault in faults.items():
            armed = self.folder / f"armed-{name}"
            armed.touch()
            Path(f"{armed}.held").unlink(missing_ok=True)
            self._faults[name] = armed
            plans.append({**dataclasses.asdict(fault), "armed": str(armed)})
        self._plan.write_text(json.dumps(plans))

    def fired(self, name: str) -> bool:
        """Whether a fault that fires once has."""
        return not self._faults[name].exists()

    def fires(self, name: str) -> None:
        """Waits until it has."""
        until(lambda: self.fired(name), lambda: f"the fault {name!r}; {self.said()}")

    def holds(self, name: str) -> None:
        """Waits until a process is held there."""
        held = Path(f"{self._faults[name]}.held")
        until(held.exists, lambda: f"the hold {name!r}; {self.said()}")

    def release(self, name: str) -> None:
        """Ends a hold, or a lasting fault."""
        self._faults[name].unlink()

    def arm(self, name: str) -> None:
        """Once more, what was released."""
        self._faults[name].touch()

    def notes(self, name: str) -> list[str]:
        """What a "note" has noted."""
        path = Path(f"{self._faults[name]}.notes")
        return path.read_text().splitlines() if path.exists() else []

    def release_all(self) -> None:
        """Ends everything that is planned."""
        for armed in self.folder.glob("armed-*"):
            if armed.suffix != ".held":
                armed.unlink()


class Laboratory(Planned):
    """A training job that can be broken. Use as a context manager: whatever happens, nothing of it lives on."""

    def __init__(self, folder: Path, nursery: Nursery, *, store: bool) -> None:
        super().__init__(folder)
        self._nursery = nursery
        self.store = folder / "store" if store else None
        self.job = str(self.store) if store else "a job"
        self._runs: list[Run] = []
        self.variables: dict[str, str] = {}
        self.group: Path | None = None
        """A cgroup for the trainers, and so for the daemons that they start."""

    @property
    @abc.abstractmethod
    def nodes(self) -> list[Node]:
        """Where daemons of this job are, or have been."""

    @property
    def runtimes(self) -> list[str]:
        """The runtime directories of this job."""
        return [str(node.runtime) for node in self.nodes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes."""
        for run in self._runs:
            if run.running:
                run.kill()
        until(lambda: not inject.kill(self.runtimes, ["trainer", "keeper", "daemon"]), "the end of all processes")

    # --- launching

    def _command(
        self, arguments: Sequence[str], steps: int, pace: float, parallel: str, chosen: dict[str, Any]
    ) -> Launch:
        """What trains, and where it reports. `chosen`: options of the Checkpointer."""
        options = {"snapshot_every": 1, "flush_every": 10, "linger_s": 60, "keep": 2, **chosen}
        if self.store is None:
            options["job"] = self.job
        Options.resolve(options, {})
        result, output = self.folder / "result.jsonl", self.folder / f"output-{len(self._runs)}"
        command = [str(HERE / "train.py"), str(result), "--steps", str(steps), "--pace", str(pace), *arguments]
        command += ["--parallel", parallel, "--options", json.dumps(options)]
        command += ["--store", str(self.store)] if self.store is not None else []
        output.touch()
        return Launch(command, output, result)

    def _launch(self, launch: Launch, places: Sequence[dict[str, str]]) -> Run:
        """One process for each of `places`: variables beside those of all."""
        return self._run(
            launch,
            [
                self._nursery.launch(launch.command, self.environment() | place, self.folder, launch.output, self.group)
                for place in places
            ],
        )

    def _run(self, launch: Launch, processes: Sequence[Process]) -> Run:
        run = Run(processes, launch.output, launch.result, self.nodes)
        self._runs.append(run)
        return run

    def _place(self, rank: int, ranks: int, ranks_here: int) -> dict[str, str]:
        """What a launcher tells a rank."""
        numbers = {"RANK": rank, "LOCAL_RANK": rank % ranks_here, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks_here}
        place = {name: str(number) for name, number in numbers.items()}
        return {**place, "TEST_RENDEZVOUS": str(self.folder / f"rendezvous-{len(self._runs)}")}

    def environment(self) -> dict[str, str]:
        """Of every process of this job."""
        return {
            **environment(),
            "CKPTD_TEST_FAULTS": str(self._plan),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the shared one keeps stale keys over restarts
            "OMP_NUM_THREADS": "1",
            **self.variables,
        }

    def is_stopped(self, pid: int) -> bool:
        """Whether a process is stopped by a signal."""
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def said(self) -> str:
        return self._runs[-1].said() if self._runs else ""

    # --- processes

    def pids(self, *roles: str) -> list[int]:
        """Processes of this job: "keeper", "daemon", "trainer"."""
        return [pid for pid, role in inject.processes(self.runtimes) if role in roles]

    def kill(self, *roles: str, number: int = signal.SIGKILL) -> list[int]:
        """A signal to all processes of these roles, at one moment."""
        return inject.kill(self.runtimes, roles, number)

    # --- afterwards

    def ends_clean(self) -> None:
        """Waits until nothing of the job runs, then looks for what it may have left behind."""
        self.daemons_end()
        self.store_is_clean()

    def daemons_end(self) -> None:
        """Waits until nothing of the job runs; its files are gone, and with its processes its memory."""
        until(
            lambda: not self.pids("keeper", "daemon", "trainer"),
            lambda: f"the end of {[*inject.processes(self.runtimes)]}; {self.said()}",
        )
        for runtime in map(Path, self.runtimes):
            assert not runtime.exists(), sorted(runtime.rglob("*"))

    def checkpoints(self) -> list[int]:
        """Steps of the committed checkpoints; each is whole."""
        if self.store is None or not self.store.exists():
            return []
        store = Store.open(self.store)
        found = store.checkpoints()
        for snapshot in found:
            with store.reader(snapshot) as reader:
                problems = reader.verify()
                assert not problems, problems
        return sorted(snapshot.step for snapshot in found)

    def directories(self) -> list[Path]:
        """Of the checkpoints, committed or not."""
        assert self.store is not None
        return [path for path in self.store.iterdir() if path.name.startswith("step-")]

    def verdict(self, directory: Path) -> list[str]:
        """What `verify` finds wrong in a checkpoint."""
        try:
            with open_checkpoint(directory) as opened:
                return opened.verify()
        except FormatError as error:
            return [str(error)]

    def store_is_clean(self) -> None:
        """Only committed checkpoints that are whole, and epoch records."""
        if self.store is None:
            return
        assert self.checkpoints()
        assert Store.open(self.store).broken() == []
        names = sorted(path.name for path in self.store.iterdir())
        assert [name for name in names if not name.startswith("step-") and name != "epochs"] == []
        assert [path.name for path in (self.store / "epochs").iterdir() if path.name.startswith(".")] == []
        stray = [p for p in self.store.rglob("*") if p.suffix == ".tmp"]
        assert stray == []


class Lab(Laboratory):
    """A job on one node."""

    def __init__(self, folder: Path, nursery: Nursery, *, store: bool = True) -> None:
        super().__init__(folder, nursery, store=store)
        self.node = Node(self.job, folder / "runtime")
        self.runtime, self.address = self.node.runtime, self.node.address
        self.status, self.reaches = self.node.status, self.node.reaches

    @property
    def nodes(self) -> list[Node]:
        return [self.node]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "CKPTD_RUNTIME_DIR": str(self.runtime)}

    def start(
        self,
        *arguments: str,
        steps: int = 40,
        pace: float = 0.01,
        ranks: int = 1,
        parallel: str = "none",
        torchrun: bool = False,
        faults: dict[str, Fault] | None = None,
        **options: Any,
    ) -> Run:
        """Launches the job. `options` of the Checkpointer; `faults` by name, armed anew unless they are known."""
        self.plan(faults or {})
        launch = self._command(arguments, steps, pace, parallel, options)
        if torchrun:
            return self._run(launch, [self._torchrun(launch)])
        places = [self._place(rank, ranks, ranks) for rank in range(ranks)] if ranks > 1 else [{}]
        return self._launch(launch, places)

    def _torchrun(self, launch: Launch) -> subprocess.Popen[bytes]:
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=6 --monitor-interval=0.05"
        with launch.output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *torchrun.split(), *launch.command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.folder,
                env=self.environment(),
            )

    def spoil_ledger(self, payload: bytes) -> None:
        """Puts a newer, sound record with another content into the ledger of a stopped daemon."""
        (daemon,) = self.pids("daemon")
        for link in Path(f"/proc/{daemon}/fd").iterdir():
            if os.readlink(link).startswith("/memfd:ckptd-ledger"):
                ledger = Ledger(os.open(link, os.O_RDWR))
                ledger.read()
                ledger.write(payload)
                os.close(ledger.descriptor)

    def kept(self) -> list[str]:
        """Names of the memfds that the keeper holds."""
        found = []
        for pid in self.pids("keeper"):
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        found.append(os.readlink(link))
        return [name for name in found if name.startswith("/memfd:ckptd")]


def digest(path: Path) -> str:
    """Of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
