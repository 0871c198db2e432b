"""Second act of the demo: four simulated nodes that protect each other 2+2, two of them lost at one moment.

A node is here what carries its name on this machine: a rank, a daemon with its keeper, a runtime directory. There is no
store: whatever training goes on from was in the memory of nodes. Two nodes drawn from the seed lose all of that; the
other two keep their daemons, and two new nodes take the places of the lost.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from staging import DemoError, Finding, Run, Stage, follow

from ckptd.core.errors import CkptdError
from ckptd.core.types import Job
from ckptd.daemon.address import Address
from ckptd.daemon.client import Control

HERE = Path(__file__).resolve().parent
NODES = ("A", "B", "C", "D")
REPLACEMENTS = ("E", "F")
REDUNDANCY = "2+2"
JOB = "four nodes"
STEPS = 32
SIZES = ("--parameters", "1M", "--steps", str(STEPS))
TIMEOUT_S = 180.0
Show = Callable[[str, int, int], None]
"""Called with what runs, the last step, and the number of steps."""


class Cluster:
    """The nodes of one launch after another: their processes, and what their daemons say."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def launch(self, names: Sequence[str], name: str, progress: Path, *arguments: str) -> Launch:
        """One rank on each of these nodes; their output goes to `<name>.txt`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = []
        for rank, node in enumerate(names):
            place = {"RANK": rank, "WORLD_SIZE": len(names), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            variables = {key: str(value) for key, value in place.items()} | self._variables(node)
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, str(HERE / "train_gpt.py"), "--progress", str(progress), *SIZES, *arguments]
            with self._stage.output(name).open("ab") as output:
                processes.append(
                    subprocess.Popen(command, env=self._stage.environment | variables, stdout=output, stderr=output)
                )
        return Launch(processes)

    def lose(self, names: Sequence[str]) -> int:
        """SIGKILL to every process of these nodes, stopped first, so that none sees another's end; their runtime
        directories are gone as well. How many processes that were."""
        found = [p for p in self._stage.processes() if p.environ().get("CKPTD_NODE") in names]
        for process in found:
            process.suspend()
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=10)
        for name in names:
            shutil.rmtree(self._runtime(name), ignore_errors=True)
        return len(found)

    def status(self, node: str) -> dict[str, Any]:
        """What the daemon of a node says of itself; empty where none answers."""
        job = Job(JOB)
        try:
            with contextlib.closing(Control(Address(job, self._runtime(node) / job.digest))) as control:
                return control.status()
        except CkptdError:
            return {}

    def _runtime(self, node: str) -> Path:
        return self._stage.directory / "nodes" / node

    def _variables(self, node: str) -> dict[str, str]:
        return {
            "CKPTD_NODE": node,
            "CKPTD_RUNTIME_DIR": str(self._runtime(node)),
            "CKPTD_JOB": JOB,
            "CKPTD_REDUNDANCY": REDUNDANCY,
        }


class Launch:
    """The ranks of one launch. One that fails ends the others, as a launcher does."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status once all have ended: 0, or that of the first that failed."""
        if self.returncode is None:
            statuses = [process.poll() for process in self._processes]
            failed = next((status for status in statuses if status), None)
            if failed is not None:
                self.kill()
            self.returncode = failed if failed is not None else None if None in statuses else 0
        return self.returncode

    def kill(self) -> None:
        """Ends the ranks that are left."""
        for process in self._processes:
            process.kill()
            process.wait()


class Loss:
    """Loses two nodes once, when every node knows of a protected snapshot from this launch."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        generator = random.Random(seed)
        self.lost = tuple(sorted(generator.sample(NODES, 2)))
        self.after_step = generator.randrange(STEPS // 4, STEPS // 2)
        self.protected = self.trained = self.processes = 0
        self._cluster = cluster

    @property
    def replaced(self) -> list[str]:
        """The nodes of the next launch, in the order of their ranks."""
        new = dict(zip(self.lost, REPLACEMENTS, strict=True))
        return [new.get(name, name) for name in NODES]

    def watch(self, run: Run, launch: Launch) -> None:
        """Called whenever the log was read."""
        if run.last_step < self.after_step or self.processes:
            return
        known = [(self._cluster.status(name).get("newest") or {}).get("protected") or 0 for name in NODES]
        if min(known) > 0:
            self.processes = self._cluster.lose(self.lost)
            self.protected = min(known)
            launch.kill()
            run.read()
            self.trained = run.last_step


def judge(reference: Run, run: Run, loss: Loss, after: dict[str, dict[str, Any]]) -> list[Finding]:
    """Rows of the closing table. `after`: what each node's daemon says once training goes on."""
    restored = run.incarnations[-1].steps[0]["statistics"]["restored"]
    went_on = run.incarnations[-1].steps[0]["step"]
    expected = {end["weights"] for end in reference.ends.values()}
    found = {end["weights"] for end in run.ends.values()}
    losses, wanted = run.losses(), reference.losses()
    return [
        Finding(
            f"{len(NODES)} nodes, {REDUNDANCY}: SIGKILL",
            f"nodes {' and '.join(loss.lost)}, {loss.processes} processes, after step {loss.trained}; "
            f"step {loss.protected} was protected",
        ),
        *(_origin(node, rank, node in REPLACEMENTS, after[node]) for rank, node in enumerate(loss.replaced)),
        Finding(
            "nodes went on with step",
            f"{went_on}, restored from {restored['source']}; there is no store",
            restored["source"] == "memory" and loss.protected <= restored["step"] == went_on - 1,
        ),
        Finding(
            "nodes: weights (SHA-256)",
            f"{next(iter(found), 'none')[:16]}, {'equal' if found == expected else 'DIFFER'}; losses "
            f"{'equal at every step' if losses == wanted else 'DIFFER'}",
            len(expected) == 1 and found == expected and losses == wanted,
        ),
    ]


def _origin(node: str, rank: int, is_new: bool, status: dict[str, Any]) -> Finding:
    """Where the bytes of one rank came from, by what its daemon has done."""
    size = max((slot["bytes"] for slot in status.get("slots", []) if slot["rank"] == rank), default=0)
    rebuilt = status.get("counters", {}).get("rebuilt", 0)
    place = "rebuilt from data and parity in the others' memory" if rebuilt else "own memory"
    return Finding(
        f"rank {rank} on node {node}{' (new)' if is_new else ''}",
        f"{size / 1e6:.1f} MB: {place}",
        size > 0 and (rebuilt > 0) == is_new,
    )


def play(stage: Stage, seed: int, show: Show) -> list[Finding]:
    """The act; rows of the closing table."""
    cluster = Cluster(stage)
    loss = Loss(cluster, seed)
    reference = Run(stage.directory / "nodes-reference")
    launch = cluster.launch(NODES, "nodes-reference", reference.directory, "--no-ckptd")
    title = "four nodes, reference"
    follow(stage, "nodes-reference", launch, reference, lambda run: show(title, run.last_step, STEPS), TIMEOUT_S)

    run, name = Run(stage.directory / "nodes"), "nodes-before"
    launch = cluster.launch(NODES, name, run.directory)
    deadline = time.monotonic() + TIMEOUT_S
    while not loss.processes:
        if launch.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"{name}: nothing was protected by step {run.last_step}\n{stage.tail(name)}")
        run.read()
        show("four nodes, two killed", run.last_step, STEPS)
        loss.watch(run, launch)
        time.sleep(0.02)

    after: dict[str, dict[str, Any]] = {}

    def watch(run: Run) -> None:
        show("four nodes, two killed", run.last_step, STEPS)
        if len(run.incarnations) == 2 and run.incarnations[1].steps and not after:
            after.update({node: cluster.status(node) for node in loss.replaced})

    follow(stage, "nodes-after", cluster.launch(loss.replaced, "nodes-after", run.directory), run, watch, TIMEOUT_S)
    return judge(reference, run, loss, after)
