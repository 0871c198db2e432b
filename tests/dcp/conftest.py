"""A world of two ranks, shared by all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.world import World


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(2, tmp_path_factory.mktemp("world"))
    yield world
    world.close()
