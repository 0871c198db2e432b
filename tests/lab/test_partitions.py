"""Nodes that cannot talk to each other for a while: what one of them announces is true on all of them, `status` says
who is not reached, and when they can talk again everything goes on by itself.

Each node is in a network namespace of its own (lan.py); the ranks are threads of the test (ranks.py), which need no
network: a launch comes through where the daemons do not reach each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.core.errors import ConfigError, DaemonError
from ckptd.core.types import Level
from tests.faults.lab import LIMIT_S, Fault
from tests.lab.hosts import SOON, Hosts, all_is_well, misses
from tests.lab.lan import Lan, UnavailableError
from tests.lab.ranks import LONG, MET, Crew, Launch, enter

ENCODES = Fault("ckptd.daemon.protecting:_Task._encode", "hold", process="daemon", call=2)
IMPATIENT = Fault("ckptd.daemon.protecting:PATIENCE_S", "set 1")
REBUILDS = Fault("ckptd.daemon.protecting:_Task._rebuild", "hold", process="daemon")


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


def test_cut_off_before_it_is_protected(hosts: Hosts, lan: Lan) -> None:
    """A node is cut off, the root or another, and ranks want a snapshot. Nobody announces it as protected until the
    node is back; then it is, and the next one as well."""
    here = hosts.make(3)
    crew = Crew.enter(here, redundancy="2+1")
    crew.snapshot(1)
    for step, alone in ((2, here[2]), (4, here[0])):
        with lan.cut(alone.lan_address):
            crew.request(step)
            for host in here:
                if host is not alone:
                    misses(host, alone)
            assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {step - 1}
        for rank in crew.ranks:
            rank.reaches(Level.PROTECTED, step)
        crew.snapshot(step + 1)
        all_is_well(here, step + 1)
    crew.close()
    hosts.end()


def test_sealed_and_not_protected(hosts: Hosts, lan: Lan) -> None:
    """A snapshot is sealed, and a node is cut off before it has the bytes for its parities: the snapshot is protected
    when the node is back. Then two members of the group have the root in common and not each other: everything is
    sealed and nothing protected, and both of them know why."""
    here = hosts.make(2)
    hosts.plan({**SOON, "encodes": ENCODES})
    here += hosts.make(1)
    crew = Crew.enter(here, redundancy="2+1")
    crew.snapshot(1)
    crew.snapshot(2, Level.SEALED)
    hosts.holds("encodes")
    with lan.cut(here[2].lan_address):
        hosts.release("encodes")
        here[2].reaches(lambda status: status["failing"], "an encoding to fail")
        misses(here[0], here[2])
        assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {1}
    crew.snapshot(3)
    all_is_well(here, 3)
    with lan.swallow(here[1].lan_address, here[2].lan_address):
        crew.snapshot(4, Level.SEALED)
        misses(here[1], here[2])
        misses(here[2], here[1])
        assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {3}
    crew.snapshot(5)
    all_is_well(here, 5)
    crew.close()
    hosts.end()


def test_cut_off_and_replaced(hosts: Hosts, lan: Lan) -> None:
    """Another node takes its place meanwhile: when it is back, it belongs to an older epoch and changes nothing."""
    here = hosts.make(3)
    crew = Crew.enter(here, redundancy="2+1")
    crew.snapshot(1)
    gone, zombie = here[2], crew.ranks.pop()
    with lan.cut(gone.lan_address):
        crew.vanish()
        here[2:] = hosts.make(1)
        crew = Crew.enter(here, redundancy="2+1", resume="must")
        crew.check_restored()
        crew.snapshot(2)
    zombie.request(7)
    crew.snapshot(3)
    all_is_well(here, 3)
    old = gone.status() or {}
    assert (old["newest"]["sealed"], old["epoch"]) == (1, str(zombie.choice.epoch))
    zombie.vanish()
    crew.close()
    hosts.lose(gone)
    hosts.end()


@pytest.mark.parametrize("heals", [True, False])
def test_cut_off_during_a_rebuild(hosts: Hosts, lan: Lan, heals: bool) -> None:
    """One node is replaced, and another is cut off while the first one's string is made anew: what cannot be reached
    is not lost. The launch goes on when the node is back; where it stays away for too long, every rank is told, and the
    next launch finds everything."""
    here = hosts.make(3)
    crew = Crew.enter(here, redundancy="2+1", string_bytes=LONG)
    crew.snapshot(1)
    hosts.lose(here[2])
    crew.vanish()
    hosts.plan({**SOON, "rebuilds": REBUILDS, **({} if heals else {"patience": IMPATIENT})})
    here[2:] = hosts.make(1)
    met = threading.Event()
    past = lambda exchange: met.set() if exchange == MET else None  # noqa: E731
    launch = Launch(here, redundancy="2+1", resume="must", string_bytes=LONG, exchange=past)
    hosts.holds("rebuilds")
    assert met.wait(LIMIT_S)
    with lan.cut(here[1].lan_address):
        hosts.release("rebuilds")
        here[2].reaches(lambda status: status["failing"], "a rebuild to fail")
        misses(here[2], here[1])
        if not heals:
            refused = launch.ends()
            assert {type(error) for error in refused} == {DaemonError}
            assert all("node n1 at" in str(error) for error in refused), refused
    crew = Crew.of(launch.ends() if heals else enter(here, redundancy="2+1", resume="must", string_bytes=LONG))
    assert crew.step == 1
    crew.check_restored()
    crew.snapshot(2)
    all_is_well(here, 2)
    crew.close()
    hosts.end()


def test_not_reached_at_start(hosts: Hosts, lan: Lan) -> None:
    """Nothing comes to the address of a node: every rank is told which one it is, within a deadline."""
    here = hosts.make(3)
    with lan.cut(here[2].lan_address):
        refused = enter(here)
    assert {type(error) for error in refused} == {ConfigError}
    assert all("node 'n0' cannot work with node 'n2': node n2 at" in str(error) for error in refused), refused
    crew = Crew.enter(here)
    crew.snapshot(1)
    crew.close()
    hosts.end()
