"""What nodes cannot do together is said at start, by every rank, in the same words."""

from __future__ import annotations

import pytest

from tests.lab.cluster import Cluster

MISTAKES = {
    "redundancy": ({"redundancy": "2+2"}, {}, "redundancy='2+2' needs groups of 4 nodes, found 2"),
    "name": ({}, {"b": {"CKPTD_NODE": "a", "LOCAL_RANK": "0"}}, "several nodes are called 'a'"),
    "directory": ({}, {"b": {"CKPTD_RUNTIME_DIR": "a"}}, "nodes 'a' and 'b' have one runtime directory"),
    "address": ({}, {"b": {"CKPTD_ADDRESS": "203.0.113.9"}}, "203.0.113.9:0: cannot be listened at"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(cluster: Cluster, mistake: str) -> None:
    """One wrong thing at a time, on one of two nodes."""
    options, variables, words = MISTAKES[mistake]
    if "CKPTD_RUNTIME_DIR" in variables.get("b", {}):
        variables = {"b": {"CKPTD_RUNTIME_DIR": str(cluster.node("a").runtime)}}
    run = cluster.start("a b", variables=variables, **options)
    first, second = cluster.refused(run)
    assert first == second
    assert first.startswith(f"ConfigError: {words}")
