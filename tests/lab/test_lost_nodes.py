"""Nodes that are lost: the job goes on from the memory of the others, and ends like one that lost nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import ckptd
from tests.faults.lab import Fault
from tests.lab.cluster import Cluster

CAPTURES = ("--insist", "3")
"""The second step of a launch is captured, however long the grant for it takes."""

HOLD = {"hold": Fault("step", "hold", call=6, process="rank0")}
AGAIN = {"again": HOLD["hold"]}
"""All ranks stand in the sixth step of a launch, where rank 0 waits and the others wait for it."""

REBUILT = Fault("ckptd.daemon.protecting:_Task._rebuild", "note", process="daemon", lasting=True)


@pytest.mark.parametrize(
    ("names", "redundancy", "lost", "replaced"),
    [("a b", "1+1", "b", "a c"), ("a b", "1+1", "a", "c b"), ("a b c d", "2+2", "b d", "a e c f")],
)
def test_replaced(
    cluster: Cluster, expected: Callable[..., str], names: str, redundancy: str, lost: str, replaced: str
) -> None:
    """As many nodes as are tolerated are lost after something was protected, and replaced."""
    nodes = names.split()
    run = cluster.start(names, *CAPTURES, faults=HOLD, redundancy=redundancy)
    cluster.holds("hold")
    protected = cluster.reach("protected", 2, *nodes)
    cluster.lose(*lost.split())
    run.kill()
    run = cluster.start(replaced, *CAPTURES, steps=20, redundancy=redundancy, faults={**AGAIN, "rebuilt": REBUILT})
    cluster.holds("again")
    assert cluster.notes("rebuilt")
    assert run.restored()["source"] == "memory"
    step = run.restored()["step"]
    assert step >= protected
    cluster.reach("protected", step + 1, *replaced.split())
    cluster.release("again")
    assert run.finishes()["hash"] == expected(steps=20, ranks=len(nodes), parallel="fsdp")
    cluster.daemons_end()


def test_lost_before_anything_is_protected(cluster: Cluster, expected: Callable[..., str]) -> None:
    """There is nothing to go on from, and who insists is told."""
    run = cluster.start("a b", faults={"hold": Fault("step", "hold", call=1, process="rank0")})
    cluster.holds("hold")
    cluster.lose("b")
    run.kill()
    run = cluster.start("a c", resume="must")
    assert (
        cluster.refused(run)
        == ["NotFoundError: resume='must': any snapshot is neither in memory (0 there) nor in the store (0 there)"] * 2
    )
    run = cluster.start("a c", steps=20)
    assert run.finishes()["hash"] == expected(steps=20, ranks=2, parallel="fsdp")
    assert (run.restored()["step"], run.restored()["source"]) == (0, "none")
    cluster.daemons_end()


def test_more_lost_than_tolerated(stored: Cluster, expected: Callable[..., str]) -> None:
    """The newest checkpoint is left; all nodes have written it, and anyone can read it."""
    run = stored.start("a b", *CAPTURES, faults=HOLD, flush_every=2, keep=None)
    stored.holds("hold")
    durable = stored.reach("durable", 2, "a")
    stored.lose("a", "b")
    run.kill()
    durable = max(stored.checkpoints())
    run = stored.start("c d", steps=20, keep=None)
    assert run.finishes()["hash"] == expected(steps=20, ranks=2, parallel="fsdp")
    assert (run.restored()["step"], run.restored()["source"]) == (durable, "store")
    stored.ends_clean()
    assert max(stored.checkpoints()) == 20
    counts = {"drawn": 0}
    assert ckptd.load({"counts": counts}, stored.store) == 20
    assert counts == {"drawn": 160}


def test_trainers_lost(cluster: Cluster, expected: Callable[..., str]) -> None:
    """All trainers are killed and every daemon lives: nothing is rebuilt. Then a daemon is killed: its keeper starts
    another, which goes on with the snapshots and the parities of the first."""
    run = cluster.start("a b", *CAPTURES, faults={**HOLD, "rebuilt": REBUILT})
    cluster.holds("hold")
    protected = cluster.reach("protected", 2, "a", "b")
    run.kill()
    later = Fault("step", "hold", call=12, process="rank0")
    run = cluster.start("a b", *CAPTURES, "10", steps=20, faults={**AGAIN, "later": later, "rebuilt": REBUILT})
    cluster.holds("again")
    assert run.restored()["source"] == "memory"
    assert run.restored()["step"] >= protected
    assert cluster.notes("rebuilt") == []
    protected = cluster.reach("protected", run.restored()["step"] + 1, "a", "b")
    killed = [cluster.lose_daemon(name) for name in ("a", "b")]
    for name, pid in zip("ab", killed, strict=True):
        found = cluster.node(name).reaches(lambda status, pid=pid: status["pid"] != pid, "another daemon")
        assert found["newest"]["protected"] >= protected
    cluster.release("again")
    cluster.holds("later")
    cluster.reach("protected", protected + 1, "a", "b")
    cluster.release("later")
    assert run.finishes()["hash"] == expected(steps=20, ranks=2, parallel="fsdp")
    cluster.daemons_end()


def test_a_daemon_stands_still(cluster: Cluster, expected: Callable[..., str]) -> None:
    """Training goes on, nothing more is protected and nothing that was is lost; then all is as before."""
    later, last = (Fault("step", "hold", call=call, process="rank0") for call in (30, 36))
    run = cluster.start("a b", *CAPTURES, "33", steps=40, faults={**HOLD, "later": later, "last": last})
    cluster.holds("hold")
    cluster.reach("protected", 2, "a", "b")
    cluster.stop("b", "daemon", "keeper")
    before = cluster.step_of("protected", "a")
    cluster.release("hold")
    cluster.holds("later")
    assert cluster.step_of("protected", "a") == before
    cluster.proceed("b")
    cluster.release("later")
    cluster.holds("last")
    cluster.reach("protected", 32, "a", "b")
    cluster.release("last")
    assert run.finishes()["hash"] == expected(ranks=2, parallel="fsdp")
    cluster.daemons_end()
