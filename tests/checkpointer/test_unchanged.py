"""Training is unchanged: with ckptd, killed in the middle and restarted from memory, every bit is as without it."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.checkpointer.cases import STEPS, Trained, plain, train
from tests.checkpointer.child import run
from tests.checkpointer.home import Home


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainings without ckptd, by the name of their group."""
    folder: Path = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda name: run({}, folder / "log", plain, name).value)


def compare(found: Trained, expected: Trained) -> None:
    """Equal in every loss and every bit; a difference is named."""
    for step, losses in found.losses.items():
        assert losses == expected.losses[step], f"losses of step {step}"
    keys = found.digest.keys() | expected.digest.keys()
    assert [key for key in sorted(keys) if found.digest.get(key) != expected.digest.get(key)] == []


@pytest.mark.parametrize("capture", ["eager", "lazy"])
@pytest.mark.parametrize("name", ["optimizers", "others", "accumulation"])
def test_killed_and_restarted_is_bit_equal(home: Home, undisturbed: Any, name: str, capture: str) -> None:
    """Uninterrupted without ckptd, and killed with it: the same losses, weights, optimizer state and generators.

    Eager runs die at the end of a step's body; lazy ones at its start, while the window is open.
    """
    log, options = home.folder / "log", {"capture": capture, "audit": True, "job": "job", "snapshot_every": 1}
    killed = run(home.environment, log, train, name, "end" if capture == "eager" else "start", options)
    assert killed.status == -signal.SIGKILL, killed.stderr
    resumed = run(home.environment, log, train, name, None, options)
    assert resumed.status == 0, resumed.stderr
    restored = resumed.value.statistics["restored"]
    assert restored["source"] == "memory", resumed.stderr
    assert 1 <= restored["step"] < STEPS
    assert list(resumed.value.losses) == list(range(restored["step"] + 1, STEPS + 1))
    compare(resumed.value, undisturbed(name))
    assert "mutated" not in resumed.value.statistics["skip_reasons"], resumed.stderr


def test_workers_draw_as_without_ckptd(home: Home, undisturbed: Any) -> None:
    """Reading the state of a data loader moves nothing in it, not even the random numbers that its workers draw."""
    options = {"store": home.store(), "snapshot_every": 1, "flush_every": 5}
    found = run(home.environment, home.folder / "log", train, "never resumed", None, options)
    compare(found.value, undisturbed("never resumed"))
    assert home.checkpoints()[-1] == STEPS
