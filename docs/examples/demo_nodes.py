"""Second act of the demo: four simulated nodes that protect each other 2+2, two of them lost at one moment, twice.

A node is here what carries its name on this machine: a rank, a daemon with its keeper, a runtime directory. There is no
store: whatever training goes on from was in the memory of nodes. Two nodes drawn from the seed lose all of that; the
other two keep their daemons, and two new nodes take the places of the lost. Then two are lost again, and the two that
are left go on alone, their ranks with twice as much of the state.
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
SIZES = ("--parameters", "1M", "--steps", str(STEPS), "--weights")
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
            variables = {key: str(value) for key, value in place.items()} | self._variables(node, len(names))
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

    def _variables(self, node: str, nodes: int) -> dict[str, str]:
        return {
            "CKPTD_NODE": node,
            "CKPTD_RUNTIME_DIR": str(self._runtime(node)),
            "CKPTD_JOB": JOB,
            "CKPTD_REDUNDANCY": REDUNDANCY if nodes == len(NODES) else "auto",
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
    """Loses two of some nodes once, when every node knows of a protected snapshot from this launch."""

    def __init__(self, cluster: Cluster, nodes: Sequence[str], generator: random.Random, after_step: int) -> None:
        self.nodes = tuple(nodes)
        self.lost = tuple(sorted(generator.sample(self.nodes, 2)))
        self.after_step = after_step
        self.protected = self.trained = self.processes = 0
        self._cluster = cluster

    @property
    def replaced(self) -> list[str]:
        """The nodes of a launch with replacements, in the order of their ranks."""
        new = dict(zip(self.lost, REPLACEMENTS, strict=True))
        return [new.get(name, name) for name in self.nodes]

    @property
    def left(self) -> list[str]:
        """The nodes of a launch without."""
        return [name for name in self.nodes if name not in self.lost]

    def watch(self, run: Run, launch: Launch) -> None:
        """Called whenever the log was read."""
        if run.last_step < self.after_step or self.processes:
            return
        known = [(self._cluster.status(name).get("newest") or {}).get("protected") or 0 for name in self.nodes]
        if min(known) > 0:
            self.processes = self._cluster.lose(self.lost)
            self.protected = min(known)
            launch.kill()
            run.read()
            self.trained = run.last_step


def judge(
    reference: Run, run: Run, first: Loss, second: Loss, after: Sequence[dict[str, dict[str, Any]]]
) -> list[Finding]:
    """Rows of the closing table. `after`: what each node's daemon says once training goes on, after each loss."""
    expected = {line["step"]: line["weights"] for line in reference.incarnations[-1].steps}
    four, two = after
    return [
        _lost(first, f"{len(NODES)} nodes, {REDUNDANCY}: SIGKILL"),
        *(_origin(node, rank, node in REPLACEMENTS, four.get(node, {})) for rank, node in enumerate(first.replaced)),
        _went_on("four nodes went on with step", run, 1, first, expected),
        _lost(second, "again: SIGKILL"),
        *(_shared(node, rank, two.get(node, {})) for rank, node in enumerate(second.left)),
        _went_on("two nodes went on with step", run, 2, second, expected),
        _losses(reference, run),
    ]


def _lost(loss: Loss, name: str) -> Finding:
    return Finding(
        name,
        f"nodes {' and '.join(loss.lost)}, {loss.processes} processes, after step {loss.trained}; "
        f"step {loss.protected} was protected",
    )


def _went_on(name: str, run: Run, number: int, loss: Loss, expected: dict[int, str]) -> Finding:
    """From where a launch went on, and whether the weights it was given are those of the run without losses."""
    incarnation = run.incarnations[number]
    step, weights = incarnation.restored["step"], incarnation.restored["weights"]
    how = incarnation.steps[0]["statistics"]["restored"]
    source, took_s, memory_s = how["source"], how["took_s"], how["memory_s"]
    equal = weights == expected.get(step)
    return Finding(
        name,
        f"{step + 1}, restored from {source} in {took_s:.2f} s, of it {memory_s:.2f} s for making anew what was lost; "
        f"there is no store. Weights (SHA-256) {weights[:16]}, "
        f"{'equal' if equal else 'DIFFER'}",
        source == "memory" and loss.protected <= step == incarnation.steps[0]["step"] - 1 and equal,
    )


def _losses(reference: Run, run: Run) -> Finding:
    """On four nodes every step is what it would have been; two nodes have half as many samples in a step."""
    wanted, steps = reference.losses(), 0
    equal = True
    for incarnation in run.incarnations[:2]:
        for line in incarnation.steps:
            steps += 1
            equal = equal and wanted[line["step"]] == {line["loss"]}
    last = run.last_step == reference.last_step and len(run.ends) > 0
    return Finding(
        "nodes: losses",
        f"{'equal' if equal else 'DIFFER'} at {steps} steps on four nodes; two nodes ended with step {run.last_step}",
        equal and last,
    )


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


def _shared(node: str, rank: int, status: dict[str, Any]) -> Finding:
    """Where the bytes of a rank came from that has more than it had."""
    lent = status.get("counters", {}).get("lent", 0)
    decoded = ", what was lost decoded from data and parity" if lent else ""
    return Finding(f"then rank {rank} on node {node}", f"own memory and the other node's{decoded}", lent > 0)


def play(stage: Stage, seed: int, show: Show) -> list[Finding]:
    """The act; rows of the closing table."""
    cluster, generator = Cluster(stage), random.Random(seed)
    first = Loss(cluster, NODES, generator, generator.randrange(STEPS // 8, STEPS // 4))
    second = Loss(cluster, first.replaced, generator, generator.randrange(STEPS // 2, 3 * STEPS // 4))
    reference = Run(stage.directory / "nodes-reference")
    launch = cluster.launch(NODES, "nodes-reference", reference.directory, "--no-ckptd")
    title = "four nodes, reference"
    follow(stage, "nodes-reference", launch, reference, lambda run: show(title, run.last_step, STEPS), TIMEOUT_S)

    run, after = Run(stage.directory / "nodes"), ({}, {})
    places = ((NODES, "four nodes, two killed"), (first.replaced, "four nodes, two killed again"))
    for number, (loss, (names, title)) in enumerate(zip((first, second), places, strict=True)):
        name = f"nodes-{number}"
        launch = cluster.launch(names, name, run.directory)
        deadline = time.monotonic() + TIMEOUT_S
        while not loss.processes:
            if launch.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"{name}: nothing was protected by step {run.last_step}\n{stage.tail(name)}")
            run.read()
            show(title, run.last_step, STEPS)
            _look(cluster, run, number, names, after[0])
            if number == 0 or after[0]:
                loss.watch(run, launch)
            time.sleep(0.02)

    def watch(run: Run) -> None:
        show("two nodes", run.last_step, STEPS)
        _look(cluster, run, 2, second.left, after[1])

    follow(stage, "nodes-2", cluster.launch(second.left, "nodes-2", run.directory), run, watch, TIMEOUT_S)
    return judge(reference, run, first, second, after)


def _look(cluster: Cluster, run: Run, number: int, names: Sequence[str], found: dict[str, dict[str, Any]]) -> None:
    """What the daemons say once a launch that has restored trains."""
    if number and len(run.incarnations) == number + 1 and run.incarnations[number].steps and not found:
        said = {node: cluster.status(node) for node in names}
        if all(said.values()):  # a daemon that is busy is asked again
            found.update(said)
