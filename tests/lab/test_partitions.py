"""Nodes that cannot talk to each other for a while: what one of them announces is true on all of them, `status` says
who is not reached, and when they can talk again everything goes on by itself.

Each node is in a network namespace of its own (lan.py); the ranks are threads of the test (ranks.py), which need no
network: a launch comes through where the daemons do not reach each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ckptd.cli.status import find_problems
from ckptd.core.types import Level
from tests.faults.lab import Fault
from tests.lab.hosts import Hosts
from tests.lab.lan import Lan, UnavailableError
from tests.lab.ranks import Crew, Host

SOON = {
    name: Fault(f"ckptd.daemon.network:{name}", f"set {seconds}")
    for name, seconds in {"MESSAGE_S": 1, "GREET_S": 1, "MEET_S": 3, "PULL_S": 2}.items()
}
"""So that it is soon noticed that a node is silent."""

ENCODES = Fault("ckptd.daemon.protecting:_Task._encode", "hold", process="daemon", call=2)


@pytest.fixture
def lan() -> Iterator[Lan]:
    try:
        made = Lan()
    except (UnavailableError, FileNotFoundError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    with made:
        yield made


@pytest.fixture
def hosts(tmp_path: Path, lan: Lan) -> Iterator[Hosts]:
    """Their daemons end before the network does."""
    with Hosts(tmp_path, lan=lan) as made:
        made.plan(SOON)
        yield made


def misses(host: Host, *others: Host) -> None:
    """Waits until a node's status says that it does not reach some others, and only these; and so do its problems."""
    names = [other.name for other in others]
    status = host.reaches(
        lambda status: [found["node"] for found in status["not_reached"]] == names,
        f"{host.name} to miss {names}",
    )
    problems = find_problems(status)
    for name in names:
        assert any(f"node {name} is not reached for" in problem for problem in problems), problems
    assert status["counters"].get("not_reached", 0) >= len(names)


def all_is_well(here: Sequence[Host], step: int) -> None:
    """Waits until every node says so, with the same step protected."""
    for host in here:
        host.reaches(
            lambda status: not find_problems(status) and status["newest"]["protected"] == step,
            f"{host.name} to be well at step {step}",
        )


@pytest.mark.parametrize("number", [0, 2], ids=["root", "other"])
def test_cut_off_before_it_is_protected(hosts: Hosts, lan: Lan, number: int) -> None:
    """A snapshot is sealed, and a node is cut off while it makes its parities. Nobody announces it as protected until
    the node is back; then it is, and the next one as well."""
    here = hosts.make(3)
    crew = Crew.enter(here, redundancy="2+1")
    crew.snapshot(1)
    hosts.plan({**SOON, "encodes": ENCODES})
    alone, rest = here[number], [host for host in here if host is not here[number]]
    with lan.cut(alone.lan_address):
        crew.request(2)
        for host in rest:
            misses(host, alone)
        assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {1}
    for rank in crew.ranks:
        rank.reaches(Level.PROTECTED, 2)
    crew.snapshot(3)
    all_is_well(here, 3)
    crew.close()
    hosts.end()
