"""Every layout loads what every layout has saved: two ways through ckptd, looked at through torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.world import World, succeeded
from tests.layouts.conftest import Saved
from tests.layouts.ranks import EVERY, LAYOUTS, VARIANTS, load_all, resume

pytestmark = pytest.mark.xdist_group("layouts")  # one set of worlds for all


def sources(name: str) -> list[str]:
    """Whose checkpoints a layout loads; it takes steps from the last, which is another one for each."""
    if name == "one":
        return list(EVERY)
    if name in VARIANTS:
        return ["one"]
    names = list(LAYOUTS)
    at = names.index(name)
    return names[at + 1 :] + names[: at + 1] if at % 2 else names[at:] + names[:at]


@pytest.mark.parametrize("name", EVERY)
def test_what_one_process_saved(saved: Saved, name: str) -> None:
    """Parameters, moments, steps and hyperparameters, put together by torch, are the logical ones."""
    assert not any(saved.problems[name]), "\n".join(saved.problems[name])


@pytest.mark.parametrize("name", EVERY)
def test_what_every_layout_saved(worlds: dict[int, World], saved: Saved, name: str) -> None:
    """Each rank has the bits it had when torch was asked, and two steps from there have the losses of one process."""
    size, _ = EVERY[name]
    paths = {source: saved.paths[source] for source in sources(name)}
    problems = succeeded(worlds[size].run(load_all, name, paths, saved.losses))
    assert not any(problems), "\n".join(line for rank in problems for line in rank)


@pytest.mark.parametrize("name", EVERY)
def test_its_own_to_the_bit(worlds: dict[int, World], saved: Saved, name: str, tmp_path: Path) -> None:
    """Steps after a load are those after the save."""
    size, _ = EVERY[name]
    assert all(succeeded(worlds[size].run(resume, name, tmp_path)))
