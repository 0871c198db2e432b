"""Flipped bits: in a slot of the restore point, in every file of a checkpoint. Found, never restored; the next tier or
an older checkpoint takes its place, and the run ends the same. What nothing can replace is refused by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.core.errors import FormatError
from ckptd.tiers.arena import PAGE, Slot
from tests.faults.lab import Fault, Lab

SLOT = {
    "data": lambda slot: slot.geometry.data_offset + int(slot.catalog().file_offset[slot.catalog().raw > 0][0]) + 1,
    "last byte of data": lambda slot: slot.geometry.data_offset + slot.geometry.data_bytes - 1,
    "checksums": lambda slot: slot.geometry.crc_offset + 1,
    "objects": lambda slot: slot.geometry.objects_offset + 5,
    "table": lambda slot: slot.geometry.table_offset + 20,
    "geometry": lambda slot: 40,
    "states": lambda slot: PAGE + 40,
}


def flip(path: Path, offset: int) -> None:
    """One bit, in place."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([byte ^ 0x10]), offset)
    finally:
        os.close(descriptor)


def damage_slot(lab: Lab, step: int, where: Callable[[Slot], int]) -> None:
    """Flips a bit of the slot that holds a step, through the daemon's descriptor; of both state records if of one."""
    (daemon,) = lab.pids("daemon")
    for link in Path(f"/proc/{daemon}/fd").iterdir():
        with contextlib.suppress(OSError, FormatError):
            if not os.readlink(link).startswith("/memfd:ckptd-slot"):
                continue
            slot = Slot.open(os.open(link, os.O_RDWR))
            snapshot = slot.state().snapshot
            if snapshot is not None and snapshot.step == step:
                offset = where(slot)
                flip(link, offset)
                if PAGE <= offset < 2 * PAGE:
                    flip(link, offset + PAGE)
                slot.close()
                return
            slot.close()
    pytest.fail(f"no slot holds step {step}")


@pytest.mark.parametrize("where", SLOT)
def test_slot(where: str, lab: Lab, expected: Callable[..., str]) -> None:
    """The newest snapshot is damaged in memory while no trainer lives: the restart falls back to the store, but for
    the geometry, which the daemon knows."""
    run = lab.start(faults={"kill": Fault("backward", call=15)}, flush_every=5, linger_s=600.0)
    run.dies()
    newest = lambda s: s["newest"]["sealed"] is not None and s["newest"]["durable"] == s["newest"]["sealed"]  # noqa: E731
    status = lab.reaches(newest, "the newest snapshot to be durable, and what is too old to be removed")
    durable = max(lab.checkpoints())
    restorable = status["newest"]["sealed"]
    damage_slot(lab, restorable, SLOT[where])
    run = lab.start()
    assert run.finishes()["hash"] == expected()
    if where == "geometry":
        assert (run.restored()["source"], run.restored()["step"]) == ("memory", restorable)
    else:
        assert run.restored()["source"] == "store"
        assert durable <= run.restored()["step"]
        assert f"step {restorable}" in run.said()
    lab.ends_clean()


FILES = {
    "chunks": ("data/*.ckd", 100),
    "manifest": ("manifest.parquet/*.parquet", 100),
    "manifest footer": ("manifest.parquet/*.parquet", -20),
    "objects": ("objects.msgpack", 100),
    "COMMIT": ("COMMIT", 30),
}


@pytest.mark.parametrize("name", FILES)
def test_checkpoint(name: str, lab: Lab, expected: Callable[..., str]) -> None:
    """The newest checkpoint is damaged on disk: `verify` says so, a restart takes the one before; where there is none,
    it is an error and not a new beginning."""
    lab.start(steps=20, flush_every=5).finishes()
    lab.daemons_end()
    older, newer = sorted(lab.directories())
    pattern, offset = FILES[name]
    (path,) = newer.glob(pattern)
    flip(path, offset % path.stat().st_size)
    assert lab.verdict(newer) != []
    run = lab.start()
    assert run.finishes()["hash"] == expected()
    assert run.restored()["source"] == "store"
    assert older.name.startswith(f"step-{run.restored()['step']:08d}.")
    assert newer.name in run.said() or "step 20" in run.said()
    lab.daemons_end()

    for directory in sorted(lab.directories()):
        (path,) = directory.glob(pattern)
        if lab.verdict(directory) == []:
            flip(path, offset % path.stat().st_size)
    run = lab.start(steps=50)
    assert run.ends() == [1]
    assert "UnrecoverableError" in run.said(), run.said()
    assert run.step == 0
