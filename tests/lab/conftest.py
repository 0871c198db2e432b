"""A cluster of simulated nodes, and what undisturbed training ends with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import expected, nursery
from tests.faults.lab import Nursery
from tests.lab.cluster import Cluster
from tests.lab.hosts import Hosts

__all__ = ["expected", "nursery"]


@pytest.fixture
def cluster(tmp_path: Path, nursery: Nursery) -> Iterator[Cluster]:
    """Nodes that have memory only."""
    with Cluster(tmp_path, nursery, store=False) as made:
        yield made


@pytest.fixture
def stored(tmp_path: Path, nursery: Nursery) -> Iterator[Cluster]:
    """Nodes with a store that all of them reach."""
    with Cluster(tmp_path, nursery, store=True) as made:
        yield made


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Nodes whose ranks are threads of the test."""
    with Hosts(tmp_path) as made:
        yield made
