"""Worlds of several sizes, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.world import World

SIZES = (2, 3, 4, 6)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    made = {size: World(size, tmp_path_factory.mktemp(f"world-{size}"), "tests.node_memory.ranks") for size in SIZES}
    yield made
    for world in made.values():
        world.close()
