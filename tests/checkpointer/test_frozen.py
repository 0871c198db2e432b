"""Parameters that need no gradient: in memory once, whatever the number of snapshots, and never trusted blindly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptd
from ckptd.daemon.client import Control
from ckptd.tiers.arena import Slot
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training

FROZEN = 512 * 1024
"""Elements of the frozen part: 2 MiB beside which all else is small."""


class Adapted(Training):
    """A training with a part that is not trained; its tied name is another key of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(1024, 512, bias=False).requires_grad_(False)
        self.base.register_module("again", nn.Linear(1, 1, bias=False))
        self.base.again.weight = self.base.weight
        self.state["base"] = self.base


def memory_bytes() -> int:
    """What the only daemon holds."""
    control = Control.connect()
    try:
        return int(control.status()["memory_bytes"])
    finally:
        control.close()


def fail(home: Home, training: Training, at: int) -> None:
    """Trains to step `at`, flushes it, and ends with an error, so that the daemon stays."""

    def run() -> None:
        with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
            for step in checkpointer.steps(at + 1):
                if step == at + 1:
                    checkpointer.flush()
                    raise RuntimeError("enough")
                training.step()

    with pytest.raises(RuntimeError, match="enough"):
        run()


def regions(home: Home) -> list[Slot]:
    """The frozen regions that the daemon holds, each once."""
    found = {}
    for link in Path(f"/proc/{home.daemon().pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:ckptd-slot"):
            slot = Slot(os.open(link, os.O_RDWR), Slot._described(os.open(link, os.O_RDONLY)))
            if slot.geometry.data_bytes >= 4 * FROZEN:
                found[os.fstat(slot.descriptor).st_ino] = slot
    return list(found.values())


def test_in_memory_once(home: Home) -> None:
    """Three slots and one region; what is flushed and restored is whole, under both of its keys."""
    training = Adapted()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for step in checkpointer.steps(5):
            if step == 5:
                checkpointer.snapshot()
                assert 4 * FROZEN < memory_bytes() < 2 * 4 * FROZEN
            training.step()
    stored = ckptd.open(home.store())
    assert stored.step == 5
    stored.verify()
    for key in ("base/weight", "base/again.weight"):
        assert torch.equal(stored.read(key), training.base.weight)
    other = Adapted()
    other.base.weight.data.zero_()
    assert ckptd.load(other.state, home.store()) == 5
    assert torch.equal(other.base.weight, training.base.weight)


def test_a_restart_uses_the_region_again(home: Home) -> None:
    """The same memory, since it holds the same. A bit that was flipped in it meanwhile sends the restart to the store,
    and is mended."""
    training = Adapted()
    fail(home, training, 3)
    (before,) = regions(home)
    os.pwrite(before.descriptor, b"\xff" * 8, before.geometry.data_offset + 4096)
    other = Adapted()
    with ckptd.Checkpointer(other.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 3
        for step in checkpointer.steps(6):
            if step == 6:
                checkpointer.snapshot()
                (after,) = regions(home)
                assert os.path.sameopenfile(before.descriptor, after.descriptor)
            other.step()
    stored = ckptd.open(home.store())
    assert stored.step == 6
    assert torch.equal(stored.read("base/weight"), training.base.weight)


@pytest.mark.parametrize("how", ["in place", "replaced", "unfrozen"])
def test_what_changes_after_all_is_captured(home: Home, how: str) -> None:
    """An average of weights, say: needs no gradient and moves. Every snapshot has the value of its step."""
    training = Adapted()
    with ckptd.Checkpointer(training.state, home.store(), flush_every=None) as checkpointer:
        for step in checkpointer.steps(8):
            if step == 4:
                checkpointer.snapshot()
            training.step()
            if step > 3:
                with torch.no_grad():
                    match how:
                        case "in place":
                            training.base.weight.fill_(step)
                        case "replaced":
                            training.base.weight.data = torch.full_like(training.base.weight, step)
                        case "unfrozen":
                            training.base.weight.requires_grad_(True)
                            training.base.weight.fill_(step)
    assert checkpointer.statistics()["snapshots_sealed"] >= 2
    assert torch.equal(ckptd.open(home.store()).read("base/weight"), torch.full((512, 1024), 8.0))


def test_written_to_the_store_once(home: Home) -> None:
    """Each checkpoint is whole by itself; the frozen part of all of them is one file with several names."""
    training = Adapted()
    with ckptd.Checkpointer(training.state, home.store(), flush_every=None, keep=2) as checkpointer:
        for step in checkpointer.steps(4):
            if step > 1:
                checkpointer.flush()
            training.step()
    assert home.checkpoints() == [3, 4]
    large = [path for path in Path(home.store()).glob("step-*/data/*.ckd") if path.stat().st_size > FROZEN]
    assert len(large) == 2
    assert os.path.samefile(*large)
    assert large[0].stat().st_nlink == 2
    stored = ckptd.open(home.store())
    stored.verify()
    assert torch.equal(stored.read("base/again.weight"), training.base.weight)
