"""Processes that are stopped (SIGSTOP) and go on later, and launches that meet: training is not held by a daemon that
does not answer, and a trainer that comes back after its place was taken changes nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from ckptd.core.lineage import newest
from ckptd.tiers.store import Store
from tests.faults.lab import Fault, Lab, until

COPY = "ckptd.trainer.copying:CopyJobs.copy"
FILL = "ckptd.trainer.restoring:fill_alone"
CHOOSE = "ckptd.trainer.start:_choose"


def test_daemon_stopped(lab: Lab, expected: Callable[..., str]) -> None:
    """Steps go on without snapshots; once the daemon goes on, so do they."""
    faults = {"stop": Fault("backward", "stop daemon", call=10), "hold": Fault("step", "hold", call=30)}
    run = lab.start(faults=faults, flush_every=100)
    lab.holds("hold")
    assert run.step == 29
    (daemon,) = lab.pids("daemon")
    os.kill(daemon, signal.SIGCONT)
    before = lab.reaches(lambda s: s["newest"]["sealed"] is not None, "an answer")
    assert before["newest"]["sealed"] < 20
    assert before["pid"] == daemon
    lab.release("hold")
    ended = run.finishes()
    assert ended["hash"] == expected()
    assert ended["statistics"]["daemon_connections_lost"] == 0
    assert lab.checkpoints() == [40]
    lab.ends_clean()


STOPPED = {
    "in a step": Fault("backward", "stop", call=12),
    "in the copy": Fault(COPY, "stop", call=4),
    "in the restore": Fault(FILL, "stop"),
}


def test_daemon_terminated(lab: Lab, expected: Callable[..., str]) -> None:
    """SIGTERM ends the daemon and its keeper, the newest sealed snapshot durable; the trainer starts others."""
    run = lab.start(faults={"hold": Fault("step", "hold", call=15)}, flush_every=1000)
    lab.holds("hold")
    before = lab.reaches(lambda s: s["newest"]["sealed"] is not None, "a sealed snapshot")
    lab.kill("daemon", number=signal.SIGTERM)
    until(lambda: before["pid"] not in lab.pids("daemon"), "the end of the daemon")
    assert before["newest"]["sealed"] <= max(lab.checkpoints()) < 15
    lab.release("hold")
    assert run.finishes()["hash"] == expected()
    assert 40 in lab.checkpoints()
    lab.ends_clean()


@pytest.mark.parametrize("where", STOPPED)
def test_zombie(where: str, lab: Lab, expected: Callable[..., str]) -> None:
    """A trainer is stopped, its job launched anew and finished; then it goes on: it is told that its epoch is over,
    and neither memory nor store of the new one changes. What it may still write to is not given to anybody."""
    if STOPPED[where].point == FILL:
        lab.start(steps=10).finishes()
        lab.daemons_end()
    zombie = lab.start(faults={"stop": STOPPED[where]}, max_stall_s=60.0)
    lab.fires("stop")
    until(lambda: lab.is_stopped(zombie.pid), "the zombie to stop")
    held = lab.start(faults={"hold": Fault("step", "hold", call=15)})
    lab.holds("hold")
    before = lab.reaches(lambda s: s["newest"]["sealed"] is not None, "a snapshot of the new launch")
    os.kill(zombie.pid, signal.SIGCONT)
    assert zombie.ends() == [1]
    assert "ckptd.core.errors.DaemonError: " in zombie.said(), zombie.said()
    after = lab.reaches(lambda s: True, "an answer")
    assert after["epoch"] == before["epoch"] == held.restored()["epoch"]
    assert after["newest"]["sealed"] >= before["newest"]["sealed"]
    lab.release("hold")
    assert held.finishes()["hash"] == expected()
    lab.ends_clean()


def test_two_launches(lab: Lab, expected: Callable[..., str]) -> None:
    """Launched twice at once: each step of the race ends with one that trains, and the other ends with a named error;
    the store is of one of them."""
    faults = {"hold": Fault(CHOOSE, "hold", when="after")}
    first = lab.start(faults=faults)
    lab.holds("hold")
    second = lab.start(faults={})
    second.at(5)
    lab.release_all()
    statuses = [*first.ends(), *second.ends()]
    assert sorted(statuses) == [0, 1], first.said() + second.said()
    winner, loser = (first, second) if statuses[0] == 0 else (second, first)
    assert winner.finishes()["hash"] == expected()
    assert "ckptd.core.errors.DaemonError" in loser.said()
    assert lab.store is not None
    store = Store.open(lab.store)
    newest_one = newest(store.checkpoints(), store.records())
    assert newest_one is not None
    assert newest_one.step == 40
    assert str(newest_one.epoch) == winner.restored()["epoch"]
    lab.ends_clean()


def test_everybody_at_once(lab: Lab, expected: Callable[..., str]) -> None:
    """Three launches of the same job with nothing running: one daemon comes up, at most one trainer ends well, and the
    next launch goes on from what is there."""
    runs = [lab.start(linger_s=60.0) for _ in range(3)]
    statuses = [run.ends()[0] for run in runs]
    assert set(statuses) <= {0, 1}
    assert len(lab.pids("daemon")) <= 1
    assert lab.start().finishes()["hash"] == expected()
    lab.ends_clean()
