"""A job under torchrun with a range of nodes: it shrinks and grows, and goes on from memory each time."""

from __future__ import annotations

import json
from typing import Any

from tests.faults.lab import until
from tests.lab.cluster import Cluster


def restored(cluster: Cluster, world: int) -> dict[str, Any]:
    """Waits until a step has been done by so many ranks, after the last restart; what they went on from."""

    def newest() -> list[dict[str, Any]]:
        return [event for event in events(cluster) if "step" in event][-1:]

    def there() -> bool:
        status = cluster.node("a").status()
        steps = newest()
        return bool(steps) and status is not None and status["nodes"] == world == steps[0]["world"]

    until(there, lambda: f"{world} nodes; {newest()}, {cluster.node('a').status()}; {cluster.said()}")
    found: dict[str, Any] = newest()[0]["restored"]
    return found


def events(cluster: Cluster) -> list[dict[str, Any]]:
    """What the ranks have reported, but for a line that is being written."""
    text = (cluster.folder / "result.jsonl").read_text() if (cluster.folder / "result.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_fewer_nodes_and_more(cluster: Cluster) -> None:
    """--nnodes 2:3: one of three nodes is lost with everything on it, and the other two go on; then a new one joins,
    and three go on. The agents of torchrun decide when, nobody starts anything anew by hand."""
    cluster.start_agents("a b c", nodes="2:3", steps=10**6)
    assert restored(cluster, 3)["source"] == "none"
    protected = cluster.reach("protected", 2, "a", "b", "c")
    cluster.lose("c")
    shrunk = restored(cluster, 2)
    assert shrunk["source"] == "memory"
    assert shrunk["step"] >= protected
    protected = cluster.reach("protected", shrunk["step"] + 1, "a", "b")
    cluster.start_agents("d", nodes="2:3", steps=10**6)
    grown = restored(cluster, 3)
    assert grown["source"] == "memory"
    assert grown["step"] >= protected
    cluster.reach("protected", grown["step"] + 1, "a", "b", "d")
