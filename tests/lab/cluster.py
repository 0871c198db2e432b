"""Several nodes on one machine: each with its own name, runtime directory, daemon and keeper, and ranks of one job.

A node is its processes and its runtime directory; losing it is SIGKILL of the first, at one moment, and the end of the
second. Nodes are given by name, in the order of their ranks: a name that is new is a new node, one that has been used
is that node again.
"""

from __future__ import annotations

import functools
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.inject import sitecustomize as inject
from tests.faults.lab import Fault, Laboratory, Node, Nursery, Run, until

ROLES = ("trainer", "keeper", "daemon")


class Cluster(Laboratory):
    """A job on several nodes."""

    def __init__(self, folder: Path, nursery: Nursery, *, store: bool) -> None:
        super().__init__(folder, nursery, store=store)
        self._nodes: dict[str, Node] = {}

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def node(self, name: str) -> Node:
        """By its name; made where it is new."""
        return self._nodes.setdefault(name, Node(self.job, self.folder / name))

    # --- launching

    def start(
        self,
        names: str,
        *arguments: str,
        steps: int = 40,
        pace: float = 0.03,
        ranks_here: int = 1,
        parallel: str = "fsdp",
        faults: dict[str, Fault] | None = None,
        variables: dict[str, dict[str, str]] | None = None,
        **options: Any,
    ) -> Run:
        """Launches the job on these nodes. `variables`: of a node, by its name. `options` of the Checkpointer."""
        self.plan(faults or {})
        chosen = names.split()
        launch = self._command(arguments, steps, pace, parallel, {"flush_every": None, **options})
        places = []
        for number, name in enumerate(chosen):
            here = {"MASTER_ADDR": "127.0.0.1", **self._identity(name), **(variables or {}).get(name, {})}
            ranks = range(number * ranks_here, (number + 1) * ranks_here)
            places += [here | self._place(rank, len(chosen) * ranks_here, ranks_here) for rank in ranks]
        return self._launch(launch, places)

    def start_agents(
        self, names: str, *arguments: str, nodes: str, steps: int, pace: float = 0.03, **options: Any
    ) -> Run:
        """Starts torchrun's agent, with one rank, on each of these nodes; `nodes`: how many take part, least:most. The
        first agent of the job holds the rendezvous: without it the others are lost."""
        self.plan({})
        launch = self._command(arguments, steps, pace, "fsdp", {"flush_every": None, **options})
        torchrun = (
            f"-m torch.distributed.run --nnodes={nodes} --nproc-per-node=1 --max-restarts=20 --monitor-interval=0.1 "
            f"--local-addr=127.0.0.1 --rdzv-id=job --rdzv-endpoint=127.0.0.1:{self._rendezvous_port} "
            "--rdzv-backend=c10d "
            "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
        )
        agents = []
        for name in names.split():
            is_host = len(self._runs) == len(agents) == 0
            with launch.output.open("ab") as file:
                command = [sys.executable, *f"{torchrun}{int(is_host)}".split(), *launch.command]
                variables = self.environment() | self._identity(name)
                agents.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.folder, env=variables
                    )
                )
        return self._run(launch, agents)

    @functools.cached_property
    def _rendezvous_port(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            return int(listening.getsockname()[1])

    def _identity(self, name: str) -> dict[str, str]:
        """What makes processes those of a node."""
        return {"CKPTD_NODE": name, "CKPTD_RUNTIME_DIR": str(self.node(name).runtime)}

    # --- breaking

    def lose(self, *names: str) -> None:
        """Nodes are gone, at one moment."""
        runtimes = [str(self.node(name).runtime) for name in names]
        inject.kill(runtimes, ROLES)
        until(lambda: not list(inject.processes(runtimes)), "the end of the processes of lost nodes")
        for runtime in runtimes:
            shutil.rmtree(runtime, ignore_errors=True)

    def stop(self, name: str, *roles: str) -> None:
        """Processes of a node stand still."""
        for pid in inject.kill([str(self.node(name).runtime)], roles or ROLES, signal.SIGSTOP):
            until(functools.partial(self.is_stopped, pid), f"process {pid} to stop")

    def proceed(self, name: str) -> None:
        """What stands still on a node goes on."""
        inject.kill([str(self.node(name).runtime)], ROLES, signal.SIGCONT)

    def lose_daemon(self, name: str) -> int:
        """The daemon of a node alone is killed, its keeper stays; its pid."""
        (pid,) = inject.kill([str(self.node(name).runtime)], ["daemon"])
        return pid

    # --- what they say

    def step_of(self, level: str, *names: str) -> int:
        """The newest step that has a level, by the word of the least of these nodes; 0 where one has none."""
        found = []
        for name in names:
            status = self.node(name).status()
            found.append(0 if status is None else status["newest"][level] or 0)
        return min(found)

    def reach(self, level: str, step: int, *names: str) -> int:
        """Waits until each of these nodes has a step not below this one at the level; the newest that all have."""
        until(
            lambda: self.step_of(level, *names) >= step,
            lambda: (
                f"step {step} to be {level} on {names}; {[self.node(name).status() for name in names]}; {self.said()}"
            ),
        )
        return self.step_of(level, *names)

    def refused(self, run: Run) -> list[str]:
        """The error that each rank of a launch has ended with, apart from where it says it comes from."""
        assert all(run.ends()), run.said()
        said = re.findall(
            r"^(?:\[rank\d+\]: )?ckptd\.core\.errors\.(\w+: )(?:rank \d+: )?(.*)", run.output.read_text(), re.M
        )
        return [kind + message for kind, message in said]
