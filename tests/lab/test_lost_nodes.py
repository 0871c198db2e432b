"""Nodes that are lost: the job goes on from the memory of the others, and ends like one that lost nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.lab import Fault
from tests.lab.cluster import Cluster

HOLD = {"hold": Fault("step", "hold", call=15, process="rank0")}
"""All ranks stand at step 15, where rank 0 waits and the others wait for it."""


@pytest.mark.parametrize(
    ("names", "redundancy", "lost", "replaced"),
    [("a b", "1+1", "b", "a c"), ("a b", "1+1", "a", "c b"), ("a b c d", "2+2", "b d", "a e c f")],
)
def test_replaced(
    cluster: Cluster, expected: Callable[..., str], names: str, redundancy: str, lost: str, replaced: str
) -> None:
    """As many nodes as are tolerated are lost after something was protected, and replaced."""
    nodes = names.split()
    run = cluster.start(names, faults=HOLD, redundancy=redundancy)
    cluster.holds("hold")
    protected = cluster.reach("protected", 10, *nodes)
    cluster.lose(*lost.split())
    run.kill()
    run = cluster.start(replaced, redundancy=redundancy, faults={"again": HOLD["hold"]})
    cluster.holds("again")
    assert run.restored()["source"] == "memory"
    step = run.restored()["step"]
    assert step >= protected
    cluster.reach("protected", step + 1, *replaced.split())
    cluster.release("again")
    assert run.finishes()["hash"] == expected(ranks=len(nodes), parallel="fsdp")
    cluster.daemons_end()
