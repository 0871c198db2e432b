"""Nodes that have left the job, with daemons that live on: what they hold is copied from their memory."""

from __future__ import annotations

import pytest

from tests.faults.lab import until
from tests.lab.cluster import Cluster
from tests.lab.test_lost_nodes import AGAIN, CAPTURES, HOLD


@pytest.mark.parametrize(
    ("names", "redundancy", "lost", "stopped", "left"),
    [
        ("a b c", "2+1", "", "", "b"),  # two strings are copied from nodes that the job has left
        ("a b c d", "2+2", "d", "", "a e"),  # one string is copied, one decoded, on two nodes; one of them is new
        ("a b c", "2+1", "", "c", "a"),  # one that does not answer counts as lost
    ],
)
def test_more_nodes_leave_than_may_be_lost(
    cluster: Cluster, names: str, redundancy: str, lost: str, stopped: str, left: str
) -> None:
    """Guests give what they hold, and end once something newer is protected."""
    nodes = names.split()
    run = cluster.start(names, *CAPTURES, faults=HOLD, redundancy=redundancy)
    cluster.holds("hold")
    protected = cluster.reach("protected", 2, *nodes)
    if lost:
        cluster.lose(lost)
    if stopped:
        cluster.stop(stopped, "daemon")
    run.kill()
    run = cluster.start(left, *CAPTURES, faults=AGAIN, steps=20)
    cluster.holds("again")
    assert run.restored()["source"] == "memory", run.said()
    step = run.restored()["step"]
    assert step >= protected
    cluster.reach("protected" if len(left.split()) > 1 else "sealed", step + 1, *left.split())
    if stopped:
        cluster.lose(stopped)
    for name in set(nodes) - {*left.split(), lost, stopped}:
        until(lambda name=name: cluster.node(name).status() is None, f"the daemon of {name}, a guest, to leave")
    cluster.release("again")
    run.finishes()
    cluster.daemons_end()
