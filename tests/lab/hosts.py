"""The nodes of one job that ranks.py plays the ranks of: made, lost, and gone at the end."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from ckptd.cli.status import find_problems
from tests.faults.inject import sitecustomize as inject
from tests.faults.lab import Fault, Planned, until
from tests.lab.lan import Lan
from tests.lab.ranks import Host

ROLES = ("keeper", "daemon")

SOON = {
    name: Fault(f"ckptd.daemon.network:{name}", f"set {seconds}")
    for name, seconds in {"MESSAGE_S": 1, "GREET_S": 1, "AWAY_S": 0, "MEET_S": 3, "PULL_S": 2}.items()
}
"""So that it is soon noticed that a node is silent."""


class Hosts(Planned):
    """Use as a context manager: whatever happens, none of their processes lives on."""

    def __init__(self, folder: Path, job: str = "a job", lan: Lan | None = None) -> None:
        """`lan`: where the nodes are, each in a network namespace of its own."""
        super().__init__(folder)
        self._job, self._lan = job, lan
        self._numbers = itertools.count()
        self._made: list[Host] = []
        self.plan({})

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *failure: object) -> None:
        """Ranks of a test that has failed live on and would start daemons: there is no place for these any more."""
        for host in self._made:
            if host.runtime.is_dir():
                host.runtime.rename(f"{host.runtime}.ended")
                host.runtime.touch()
        until(lambda: not inject.kill(self._runtimes(self._made), ROLES), "the end of all daemons")

    def make(self, count: int, **variables: str) -> list[Host]:
        """New nodes, whose daemons listen."""
        made = []
        for number in itertools.islice(self._numbers, count):
            name = f"n{number}"
            host = self._host(name, {"CKPTD_TEST_FAULTS": str(self._plan), **variables})
            self._made.append(host)
            made.append(host)
            host.start()
        for host in made:
            host.wait()
        return made

    def _host(self, name: str, variables: dict[str, str]) -> Host:
        if self._lan is None:
            return Host(self._job, name, self.folder / name, variables)
        address = self._lan.join()
        own = {"CKPTD_ADDRESS": address, **variables}
        return Host(self._job, name, self.folder / name, own, self._lan.prefix(address))

    def lose(self, *hosts: Host) -> None:
        """SIGKILL to all processes of these nodes, at one moment; their runtime directories are gone with them."""
        runtimes = self._runtimes(hosts)
        inject.kill(runtimes, ROLES)
        until(lambda: not list(inject.processes(runtimes)), "the end of the processes of lost nodes")
        for runtime in runtimes:
            shutil.rmtree(runtime, ignore_errors=True)
            Path(runtime).touch()  # no rank that has not heard of it starts a daemon here

    def kill_daemons(self, *hosts: Host) -> None:
        """SIGKILL to the daemons alone; each keeper starts another."""
        killed = inject.kill(self._runtimes(hosts), ["daemon"])
        for host in hosts:
            host.reaches(lambda status: status["pid"] not in killed, "another daemon")

    def stop(self, *hosts: Host) -> None:
        """Their processes stand still."""
        inject.kill(self._runtimes(hosts), ROLES, signal.SIGSTOP)

    def proceed(self, *hosts: Host) -> None:
        """They go on."""
        inject.kill(self._runtimes(hosts), ROLES, signal.SIGCONT)

    def end(self) -> None:
        """Waits until no daemon runs; their files are gone."""
        until(
            lambda: not list(inject.processes(self._runtimes(self._made))),
            lambda: f"the end of {[*inject.processes(self._runtimes(self._made))]}",
        )
        assert [path for host in self._made for path in host.runtime.rglob("*")] == []

    def said(self) -> str:
        return "".join(host.said() for host in self._made)

    @staticmethod
    def _runtimes(hosts: list[Host] | tuple[Host, ...]) -> list[str]:
        return [str(host.runtime) for host in hosts]


def misses(host: Host, *others: Host, why: str = "") -> None:
    """Waits until a node's status says that it does not reach some others, and only these, and `why`; and so do its
    problems."""
    names = [other.name for other in others]
    status = host.reaches(
        lambda status: (
            [found["node"] for found in status["not_reached"]] == names
            and all(why in found["why"] for found in status["not_reached"])
        ),
        f"{host.name} to miss {names}",
    )
    problems = find_problems(status)
    for name in names:
        (problem,) = [problem for problem in problems if problem.startswith(f"node {name} is not reached for ")]
        assert why in problem
    assert status["counters"].get("not_reached", 0) >= len(names)


def all_is_well(here: Sequence[Host], step: int) -> None:
    """Waits until every node says so, with the same step protected."""
    for host in here:
        host.reaches(
            lambda status: not find_problems(status) and status["newest"]["protected"] == step,
            f"{host.name} to be well at step {step}",
        )
