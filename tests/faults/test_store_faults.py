"""A store that fails: memory goes on, the error is counted and shown, and the next checkpoint works once the store
does. A failed fsync is final."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.daemon.client import Control
from ckptd.tiers.store import Store
from tests.faults.lab import Fault, Lab

BROKEN = {
    "write of chunks": ("os:writev", ".ckd"),
    "write of the manifest": ("os:writev", ".parquet"),
    "fsync of chunks": ("os:fsync", ".ckd"),
    "fsync of the manifest": ("os:fsync", ".parquet"),
    "fsync of COMMIT": ("os:fsync", "COMMIT.tmp"),
    "rename of COMMIT": ("os:rename", "COMMIT"),
    "fsync of the data directory": ("os:fsync", "/data inode"),
}


def failed(lab: Lab) -> None:
    """Waits until a failed flush is counted and shown."""
    status = lab.reaches(lambda s: s["counters"].get("flush_errors", 0) > 0, "a failed flush")
    assert "EIO" in status["last_error"] or "ENOSPC" in status["last_error"], status


@pytest.mark.parametrize("name", BROKEN)
def test_broken_for_a_while(name: str, lab: Lab, expected: Callable[..., str]) -> None:
    """The disk gives EIO at one operation until it is mended: snapshots go on, then checkpoints do."""
    point, match = BROKEN[name]
    faults = {
        "hold": Fault("step", "hold", call=25),
        "broken": Fault(point, "EIO", match=match, process="daemon", lasting=True),
        "fsync": Fault("os:fsync", "note", match="/store/", process="daemon", lasting=True),
    }
    run = lab.start(faults=faults, flush_every=5)
    lab.holds("hold")
    failed(lab)
    status = lab.reaches(lambda s: s["newest"]["sealed"] > 15, "snapshots that go on")
    assert status["newest"]["durable"] is None
    lab.checkpoints()
    lab.release("broken")
    lab.release("hold")
    assert run.finishes()["hash"] == expected()
    assert 40 in lab.checkpoints()
    if point == "os:fsync":
        files = [note for note in lab.notes("fsync") if ".ckd" in note or ".parquet" in note or "COMMIT" in note]
        assert len(files) == len(set(files)), "a file was synced twice"
    if point == "os:rename":  # commits in doubt are left as they are until the next start
        lab.start(steps=41).finishes()
    lab.ends_clean()


def test_never_durable(lab: Lab, expected: Callable[..., str]) -> None:
    """No commit ever succeeds: training ends with a StoreError, daemon and memory stay, a rescue to another store
    works, and so does the next start."""
    fault = Fault("os:rename", "EIO", match="COMMIT.tmp COMMIT /.*/store/", process="daemon", lasting=True)
    run = lab.start(faults={"broken": fault})
    assert run.ends() == [1]
    assert "StoreError" in run.said()
    assert "EIO" in run.said()
    assert lab.checkpoints() == []
    status = lab.reaches(lambda s: not s["ranks"][0]["connected"], "the end of the trainer")
    assert status["newest"]["sealed"] == 40
    with contextlib.closing(Control(lab.address)) as control:
        control.flush(str(lab.folder / "rescue"))
    rescued = Store.open(lab.folder / "rescue")
    (snapshot,) = rescued.checkpoints()
    assert snapshot.step == 40
    with rescued.reader(snapshot) as reader:
        assert reader.verify() == []
    lab.release("broken")
    run = lab.start(steps=41)
    assert run.finishes()["hash"] == expected(steps=41)
    assert run.restored()["step"] == 40
    assert run.restored()["source"] == "memory"
    assert 41 in lab.checkpoints()
    lab.daemons_end()


def test_commit_in_doubt(lab: Lab, expected: Callable[..., str]) -> None:
    """The fsync that makes COMMIT's name durable fails: this daemon never says that the step is durable, nor writes
    it again; later steps are."""
    point = "ckptd.tiers.store.posix:PosixDisk.sync_directory"
    doubtful = Fault(point, "EIO", match=r"\('step-[^']*',\)", call=3, process="daemon")
    run = lab.start(faults={"doubt": doubtful, "hold": Fault("step", "hold", call=18)})
    lab.fires("doubt")
    lab.holds("hold")
    status = lab.reaches(lambda s: s["counters"].get("flush_errors", 0) > 0, "a failed flush")
    assert status["newest"]["durable"] is None
    (doubted,) = lab.directories()
    before = sorted((path, path.stat().st_mtime_ns) for path in doubted.rglob("*"))
    assert doubted / "COMMIT" in dict(before)
    lab.release("hold")
    assert run.finishes()["hash"] == expected()
    assert 40 in lab.checkpoints()
    assert sorted((path, path.stat().st_mtime_ns) for path in doubted.rglob("*")) == before
    lab.daemons_end()


def test_prune_that_fails(lab: Lab, expected: Callable[..., str]) -> None:
    """Old checkpoints that cannot be removed make no new one fail; they go once they can."""
    broken = Fault("os:unlink", "EIO", match="COMMIT", process="daemon", lasting=True)
    run = lab.start(faults={"broken": broken, "hold": Fault("step", "hold", call=35)}, keep=1, flush_every=5)
    lab.holds("hold")
    status = lab.reaches(lambda s: s["counters"].get("store_errors", 0) > 0, "a failed prune")
    assert status["newest"]["durable"] is not None
    assert "flush_errors" not in status["counters"]
    assert len(lab.checkpoints()) > 1
    lab.release("broken")
    lab.release("hold")
    assert run.finishes()["hash"] == expected()
    assert lab.checkpoints() == [40]
    lab.ends_clean()


def test_unwritable_at_the_start(lab: Lab) -> None:
    """A named error before anything is trained, and nothing stays behind."""
    fault = Fault("os:writev", "EIO", match="/epochs/", process="daemon", lasting=True)
    run = lab.start(faults={"broken": fault}, linger_s=2.0)
    assert run.ends() == [1]
    assert run.step == 0
    assert "StoreError" in run.said()
    lab.daemons_end()


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """The store is a file system of 4 MiB."""
    assert lab.store is not None
    lab.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "ckptd-test", lab.store], check=True)
    yield lab.store
    lab.close()
    subprocess.run(["umount", lab.store], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_disk_full(small_disk: Path, lab: Lab, expected: Callable[..., str]) -> None:
    """The disk fills up and is freed again."""
    filler = small_disk / "filler"
    run = lab.start("--ballast", "1000000", faults={"hold": Fault("step", "hold", call=25)}, flush_every=5, keep=1)
    run.at(2)
    filler.write_bytes(bytes(3_800_000))
    lab.holds("hold")
    failed(lab)
    assert lab.reaches(lambda s: s["newest"]["sealed"] > 15, "snapshots that go on")
    lab.checkpoints()
    filler.unlink()
    lab.release("hold")
    ended = run.finishes()
    assert ended["hash"] == expected()
    assert lab.checkpoints() == [40]
    lab.ends_clean()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_disk_full_at_the_start(small_disk: Path, lab: Lab) -> None:
    """A full disk is told before anything is trained."""
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
        file.write(bytes(8_000_000))
    run = lab.start(linger_s=2.0)
    assert run.ends() == [1]
    assert "StoreError" in run.said()
    assert "ENOSPC" in run.said()
    assert run.step == 0
    lab.daemons_end()
