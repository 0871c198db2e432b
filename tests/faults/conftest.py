"""The laboratory, and what an undisturbed run ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.lab import Lab, Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def lab(tmp_path: Path, nursery: Nursery) -> Iterator[Lab]:
    """A job with a store."""
    with Lab(tmp_path, nursery) as made:
        yield made


@pytest.fixture
def storeless(tmp_path: Path, nursery: Nursery) -> Iterator[Lab]:
    """A job in memory only."""
    with Lab(tmp_path, nursery, store=False) as made:
        yield made


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Callable[..., str]:
    """The hash that the same training ends with when it runs without ckptd and is not interrupted."""
    found: dict[tuple[int, int, str], str] = {}

    def run(steps: int = 40, ranks: int = 1, parallel: str = "none") -> str:
        key = (steps, ranks, parallel)
        if key not in found:
            with Lab(tmp_path_factory.mktemp("plain"), nursery, store=False) as plain:
                ended = plain.start("--plain", steps=steps, pace=0, ranks=ranks, parallel=parallel).finishes()
            found[key] = ended["hash"]
        return found[key]

    return run
