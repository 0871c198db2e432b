"""A job that goes on from memory on another number of nodes than it was captured on."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster
from tests.lab.test_lost_nodes import AGAIN, CAPTURES, HOLD


@pytest.mark.parametrize(
    ("names", "redundancy", "lost", "left"),
    [
        ("a b c d", "2+2", "b d", "a c"),  # both strings that are lost are decoded, one on each node
        ("a b", "1+1", "b", "a"),  # a node alone decodes from its own memory
        ("a b", "1+1", "a", "b c d"),  # one lost, two new
    ],
)
def test_another_number_of_nodes(cluster: Cluster, names: str, redundancy: str, lost: str, left: str) -> None:
    """What no node holds whole is made anew; training goes on, and is protected again where there are others."""
    nodes = names.split()
    run = cluster.start(names, *CAPTURES, faults=HOLD, redundancy=redundancy)
    cluster.holds("hold")
    protected = cluster.reach("protected", 2, *nodes)
    if lost:
        cluster.lose(*lost.split())
    run.kill()
    run = cluster.start(left, *CAPTURES, faults=AGAIN, steps=20)
    cluster.holds("again")
    assert run.restored()["source"] == "memory"
    step = run.restored()["step"]
    assert step >= protected
    cluster.reach("protected" if len(left.split()) > 1 else "sealed", step + 1, *left.split())
    cluster.release("again")
    run.finishes()
    cluster.daemons_end()
