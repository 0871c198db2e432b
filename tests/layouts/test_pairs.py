"""Every layout loads what every layout has saved: two ways through ckptd, looked at through torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.world import World, succeeded
from tests.layouts.conftest import Saved
from tests.layouts.ranks import LAYOUTS, load_all, resume


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_one_process_saved(saved: Saved, name: str) -> None:
    """Parameters, moments, steps and hyperparameters, put together by torch, are the logical ones."""
    assert not any(saved.problems[name]), "\n".join(saved.problems[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_every_layout_saved(worlds: dict[int, World], saved: Saved, name: str) -> None:
    """Each rank has the bits it had when torch was asked, and two steps from there have the losses of one process."""
    size, _ = LAYOUTS[name]
    problems = succeeded(worlds[size].run(load_all, name, saved.paths, saved.losses))
    assert not any(problems), "\n".join(line for rank in problems for line in rank)


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_own_to_the_bit(worlds: dict[int, World], saved: Saved, name: str, tmp_path: Path) -> None:
    """Steps after a load are those after the save."""
    size, _ = LAYOUTS[name]
    assert all(succeeded(worlds[size].run(resume, name, tmp_path)))
