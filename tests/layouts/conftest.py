"""Worlds of one, two and four ranks, each started once, and a checkpoint of every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.api.world import World, succeeded
from tests.layouts.ranks import EVERY, load_and_save, save_the_first


class Saved(NamedTuple):
    """Where each layout has saved the logical state, and the losses of two steps from there."""

    paths: dict[str, Path]
    losses: list[float]
    problems: dict[str, list[str]]


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    made = {size: World(size, tmp_path_factory.mktemp(f"world-{size}"), "tests.layouts.ranks") for size in (1, 2, 4)}
    yield made
    for world in made.values():
        world.close()


@pytest.fixture(scope="session")
def saved(worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("stores")
    paths = {name: root / name for name in EVERY}
    losses = succeeded(worlds[1].run(save_the_first, paths["one"]))[0]
    problems = {}
    for name, (size, _) in EVERY.items():
        answers = worlds[size].run(load_and_save, name, paths["one"], paths[name])
        problems[name] = [str(a) if isinstance(a, BaseException) else "\n".join(a) for a in answers]
    return Saved(paths, losses, problems)
