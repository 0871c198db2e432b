"""Losses, stops and second launches at each moment of a job's life, on real daemons whose ranks are threads (ranks.py).

Whatever happens at whatever moment: the newest snapshot that was protected comes back byte by byte, and what belongs to
an older epoch has no say any more.
"""

from __future__ import annotations

import functools

import pytest

from ckptd.core.types import Level
from tests.faults.lab import Fault
from tests.lab.hosts import Hosts
from tests.lab.ranks import BEGUN, DECIDED, JOINED, LONG, MET, PROMISED, Crew, Launch, Rank, dies_at

ENCODES = Fault("ckptd.daemon.protecting:_Task._encode", "hold", process="daemon", call=2)
REBUILDS = Fault("ckptd.daemon.protecting:_Task._rebuild", "hold", process="daemon")


def test_lost_before_it_is_protected(hosts: Hosts) -> None:
    """A second snapshot is sealed, and one node has not made its parities of it: with m nodes the first one is left."""
    here = hosts.make(3)
    hosts.plan({"encodes": ENCODES})
    here += hosts.make(1)
    crew = Crew.enter(here, redundancy="2+2")
    crew.snapshot(1)
    crew.snapshot(2, Level.SEALED)
    hosts.holds("encodes")
    hosts.lose(*here[1:3])
    crew.vanish()
    assert [rank.level(Level.PROTECTED) for rank in crew.ranks] == [1] * 4
    hosts.release("encodes")
    here[1:3] = hosts.make(2)
    crew = Crew.enter(here, redundancy="2+2", resume="must")
    assert crew.step == 1
    crew.check_restored()
    crew.snapshot(3)
    crew.close()
    hosts.end()


def test_another_lost_while_one_is_rebuilt(hosts: Hosts) -> None:
    """The launch that rebuilds is given up, and the next one rebuilds two."""
    here = hosts.make(4)
    crew = Crew.enter(here, redundancy="2+2")
    crew.snapshot(1)
    hosts.lose(here[3])
    crew.vanish()
    hosts.plan({"rebuilds": REBUILDS})
    here[3:] = hosts.make(1)
    launch = Launch(here, redundancy="2+2")
    hosts.holds("rebuilds")
    hosts.lose(here[0])
    here[0:1] = hosts.make(1)
    hosts.release("rebuilds")
    crew = Crew.enter(here, redundancy="2+2", resume="must")
    assert crew.step == 1
    crew.check_restored()
    crew.snapshot(2)
    launch.fails()
    crew.close()
    hosts.end()


def test_rebuilt_before_another_gives(hosts: Hosts) -> None:
    """A new node makes its string anew, and asks one that serves the epoch already and does not give what it holds yet.
    The failure comes when the new node's rank waits for the string: it is no reason to go without it."""
    here = hosts.make(1)
    hosts.plan({"gives": Fault("ckptd.daemon.others:Others.begun", "hold", process="daemon", call=2)})
    here += hosts.make(1)
    hosts.plan({})
    here += hosts.make(1)
    crew = Crew.enter(here, redundancy="2+1", string_bytes=LONG)
    crew.snapshot(1)
    hosts.lose(here[2])
    crew.vanish()
    hosts.plan({"fails": Fault("ckptd.tiers.protection.group:SourceError.__init__", "hold", process="daemon")})
    here[2:] = hosts.make(1)
    launch = Launch(here, redundancy="2+1", resume="must", string_bytes=LONG)
    hosts.holds("gives")
    hosts.holds("fails")
    hosts.release("gives")
    here[2].reaches(lambda status: status["ranks"], "its rank")
    hosts.release("fails")
    crew = Crew.of(launch.ends())
    assert crew.step == 1
    crew.check_restored()
    assert (here[2].status() or {})["counters"]["protection_errors"] >= 1
    crew.snapshot(2)
    crew.close()
    hosts.end()


@pytest.mark.parametrize("happens", ["lost", "stopped"])
def test_between_inventory_and_begin(hosts: Hosts, happens: str) -> None:
    """A node that has promised is lost, or stands still: the start is repeated, and what had been chosen is there. One
    that goes on later belongs to an epoch that never began elsewhere."""
    here = hosts.make(4)
    crew = Crew.enter(here, redundancy="2+2")
    crew.snapshot(1)
    crew.vanish()
    gone = here[2]
    does = functools.partial(hosts.lose if happens == "lost" else hosts.stop, gone)
    launch = Launch(here, redundancy="2+2", exchange=dies_at(DECIDED, does))
    launch.fails()
    here[2:3] = hosts.make(1)
    crew = Crew.enter(here, redundancy="2+2", resume="must")
    assert crew.step == 1
    crew.check_restored()
    hosts.proceed(gone)
    crew.snapshot(2)
    assert happens == "lost" or (gone.status() or {})["newest"]["sealed"] == 1
    crew.close()
    hosts.lose(gone)
    hosts.end()


def test_stopped_and_replaced(hosts: Hosts) -> None:
    """A node stands still, its place is taken, it goes on: its daemon and its rank are of an older epoch, and what they
    do reaches nobody. When it comes back in the place of another, what it holds is not taken for what is newer."""
    here = hosts.make(3)
    first = Crew.enter(here, redundancy="2+1")
    first.snapshot(1)
    stopped, zombie = here[1], first.ranks.pop(1)
    hosts.stop(stopped)
    first.vanish()
    here[1:2] = hosts.make(1)
    second = Crew.enter(here, redundancy="2+1", resume="must")
    second.check_restored()
    hosts.proceed(stopped)
    zombie.request(9)
    second.snapshot(2)
    second.snapshot(3)
    assert (stopped.status() or {})["epoch"] == str(zombie.choice.epoch)
    assert zombie.level(Level.SEALED) == 1
    hosts.lose(here[2])
    second.vanish()
    here[2] = stopped
    third = Crew.enter(here, redundancy="2+1", resume="must")
    assert third.step == 3
    third.check_restored()
    third.snapshot(4)
    assert zombie.level(Level.SEALED) == 1
    zombie.vanish()
    third.close()
    hosts.end()


def test_zombies(hosts: Hosts) -> None:
    """The ranks of an older launch live on, one of them with a grant that it has not used: they are told nothing and
    seal nothing, and the slots that they may write to are left to them."""
    here = hosts.make(3)
    zombies = Crew.enter(here)
    zombies.snapshot(1)
    zombies.ranks[0].hesitates = True
    zombies.request(2)
    zombies.ranks[0].is_granted(2)
    crew = Crew.enter(here)
    crew.check_restored()
    zombies.ranks[0].hesitates = False
    zombies.request(7)
    for step in range(2, 6):
        crew.snapshot(step)
    assert {rank.level(Level.SEALED) for rank in zombies.ranks} == {1}
    assert all(rank.reconnected for rank in zombies.ranks)
    zombies.vanish()
    crew.close()
    hosts.end()


def test_two_launches_at_once(hosts: Hosts) -> None:
    """One of them gets in, or both one after the other, or neither while they keep each other out; the last one works,
    and has what was protected."""
    here = hosts.make(3)
    first = Crew.enter(here)
    first.snapshot(1)
    first.vanish()
    ended = [launch.ends() for launch in [Launch(here), Launch(here)]]
    crews = [Crew([rank for rank in found if isinstance(rank, Rank)]) for found in ended]
    crews = sorted((crew for crew in crews if len(crew.ranks) == 3), key=lambda crew: crew.ranks[0].choice.epoch)
    *older, newest = crews or [Crew.enter(here)]
    newest.check_restored()
    assert newest.step == 1
    for crew in older:
        crew.request(7)
    newest.snapshot(2)
    for crew in older:
        assert {rank.level(Level.SEALED) for rank in crew.ranks} <= {-1, 1}
        crew.vanish()
    newest.close()
    hosts.end()


def test_restart_storm(hosts: Hosts) -> None:
    """The ranks are killed at each exchange of a start, one start after the other, the daemons beside them once, and a
    node is lost on the way."""
    here = hosts.make(4)
    crew = Crew.enter(here, redundancy="2+2")
    crew.snapshot(1)
    crew.vanish()
    for exchange in (PROMISED, DECIDED, BEGUN, MET, JOINED):
        Launch(here, redundancy="2+2", exchange=dies_at(exchange)).fails()
    Launch(here, redundancy="2+2", exchange=dies_at(DECIDED, lambda: hosts.kill_daemons(*here))).fails()
    hosts.lose(here[0])
    here[0:1] = hosts.make(1)
    for exchange in (DECIDED, BEGUN, JOINED):
        Launch(here, redundancy="2+2", exchange=dies_at(exchange)).fails()
    crew = Crew.enter(here, redundancy="2+2", resume="must")
    assert crew.step == 1
    crew.check_restored()
    crew.snapshot(2)
    crew.close()
    hosts.end()


def test_two_ranks_on_each_node(hosts: Hosts) -> None:
    """A node that is lost takes the strings of two ranks with it."""
    here = hosts.make(3)
    crew = Crew.enter(here, ranks_here=2)
    crew.snapshot(1)
    for number in range(3):
        hosts.lose(here[number])
        crew.vanish()
        here[number : number + 1] = hosts.make(1)
        crew = Crew.enter(here, ranks_here=2, resume="must")
        assert crew.step == number + 1
        crew.check_restored()
        crew.snapshot(number + 2)
    crew.close()
    hosts.end()
