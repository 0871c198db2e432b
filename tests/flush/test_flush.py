"""A snapshot on several nodes becomes one checkpoint: as if one daemon had written it, whoever is killed in between."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.core.errors import CorruptionError, StoreError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch
from ckptd.daemon.flush import Stores
from ckptd.operations.diff import diff
from ckptd.protocol.actions import WriteRecord
from ckptd.tiers.arena import Slot
from ckptd.tiers.store import Store, joint
from ckptd.tiers.store.names import checkpoint
from tests.flush.snapshots import EPOCH, JOB, SNAPSHOT, captured, check_ranks, files, on_nodes
from tests.independent_reader import read_checkpoint

WORLD = 4


@pytest.fixture(scope="module")
def slots() -> Iterator[list[Slot]]:
    with captured(WORLD) as found:
        yield found


@pytest.fixture
def place(tmp_path: Path) -> str:
    uri = str(tmp_path / "store")
    Store.open(uri, create=True).write_record(EpochRecord(EPOCH))
    return uri


def daemons(nodes: int) -> list[Stores]:
    return [Stores(JOB, f"node-{number}") for number in range(nodes)]


def write_all(stores: list[Stores], slots: list[Slot], uri: str) -> None:
    held = on_nodes(slots, len(stores))
    for number, (daemon, mine) in enumerate(zip(stores, held, strict=True)):
        daemon.write(SNAPSHOT, uri, mine, number, len(stores))


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("kind", ["file", "file+object"])
def test_every_rank_finds_its_own(slots: list[Slot], tmp_path: Path, nodes: int, kind: str) -> None:
    uri = f"{kind}://{tmp_path}/store"
    stores = daemons(nodes)
    stores[0].write_record(WriteRecord(0, uri, EpochRecord(EPOCH)))
    write_all(stores, slots, uri)
    assert Store.open(uri).checkpoints() == []
    assert stores[0].commit(SNAPSHOT, uri, nodes, keep=2, epoch=EPOCH)
    assert not stores[0].commit(SNAPSHOT, uri, nodes, keep=2, epoch=EPOCH)
    store = Store.open(uri)
    assert (store.newest(), store.broken(), store.clean()) == (SNAPSHOT, [], [])
    with store.reader(SNAPSHOT) as stored:
        check_ranks(stored, WORLD)
        assert stored.verify() == []
    directory = tmp_path / "store" / checkpoint(SNAPSHOT)
    assert not (directory / "written").exists()
    commit, tensors, shared = read_checkpoint(directory)
    assert sum(len(part["data"]) for part in commit["parts"]) == len(list((directory / "data").iterdir()))
    assert len(commit["parts"]) == len(list((directory / "manifest.parquet").iterdir()))
    assert {rank for key, rank in tensors if key == "buffers/mean"} == {None, 1, 2, 3}
    assert shared["loader"] == {"position": [0, 40]}
    assert [daemon.complaints() for daemon in stores] == [[]] * nodes


def test_one_daemon_or_several_makes_no_difference(slots: list[Slot], tmp_path: Path) -> None:
    for nodes in (1, 4):
        stores = daemons(nodes)
        write_all(stores, slots, str(tmp_path / f"{nodes}"))
        stores[0].commit(SNAPSHOT, str(tmp_path / f"{nodes}"), nodes)
    one, several = (Store.open(tmp_path / f"{nodes}").reader(SNAPSHOT) for nodes in (1, 4))
    with one, several:
        assert one.objects() == several.objects()
        keys = [{info.key for info in stored.catalog().tensors} for stored in (one, several)]
        assert keys[0] == keys[1]
        assert diff(one, several).equal


def test_again_is_cheap_and_changes_nothing(slots: list[Slot], place: str) -> None:
    directory = Path(place) / checkpoint(SNAPSHOT)
    write_all(daemons(2), slots, place)
    before = files(directory)
    again = daemons(2)
    write_all(again, slots, place)
    assert files(directory) == before
    again[0].commit(SNAPSHOT, place, 2)
    committed = files(directory)
    assert {name: committed[name] for name in before if name in committed}.items() <= before.items()
    write_all(daemons(2), slots, place)
    again[0].commit(SNAPSHOT, place, 2)
    assert files(directory) == committed


def test_the_root_waits_for_all(slots: list[Slot], place: str) -> None:
    stores = daemons(4)
    for number, mine in enumerate(on_nodes(slots, 4)):
        with pytest.raises(StoreError, match=f"node number {number} of 4 has left no list"):
            stores[0].commit(SNAPSHOT, place, 4)
        stores[number].write(SNAPSHOT, place, mine, number, 4)
    assert stores[0].commit(SNAPSHOT, place, 4)


def test_slots_of_the_wrong_ranks_are_refused(slots: list[Slot], place: str) -> None:
    stores = daemons(2)
    stores[0].write(SNAPSHOT, place, on_nodes(slots, 2)[0], 0, 2)
    stores[1].write(SNAPSHOT, place, on_nodes(slots, 2)[0], 1, 2)
    with pytest.raises(StoreError, match="nodes node-0, node-1: rank 0 is listed 2 times"):
        stores[0].commit(SNAPSHOT, place, 2)
    assert Store.open(place).checkpoints() == []


def test_a_damaged_slot_leaves_nothing_and_the_others_wait(place: str) -> None:
    with captured(WORLD) as slots:
        stores = daemons(2)
        with open(f"/proc/self/fd/{slots[3].descriptor}", "r+b", buffering=0) as file:
            file.seek(slots[3].geometry.data_offset)
            file.write(b"?" * slots[3].geometry.data_bytes)
        held = on_nodes(slots, 2)
        stores[0].write(SNAPSHOT, place, held[0], 0, 2)
        with pytest.raises(CorruptionError, match=r"step 40 of epoch .*model/sharded.* of rank 3"):
            stores[1].write(SNAPSHOT, place, held[1], 1, 2)
        assert all(slot.descriptor < 0 for slot in held[1]), "they were taken over"
    directory = Path(place) / checkpoint(SNAPSHOT)
    assert {name for name in files(directory) if "w00001" in name or "w00003" in name} == set()
    with pytest.raises(StoreError, match="number 1 of 2"):
        stores[0].commit(SNAPSHOT, place, 2)


def test_cancelling_one_and_going_on(slots: list[Slot], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flush has ended elsewhere, so this node stops writing; later ones are not touched by that."""
    stores, held = daemons(2), on_nodes(slots, 2)
    reading, go_on = threading.Event(), threading.Event()
    genuine = Slot.view

    def waiting(slot: Slot, *arguments: Any) -> memoryview:
        reading.set()
        assert go_on.wait(30)
        return genuine(slot, *arguments)

    errors: list[BaseException] = []

    def write() -> None:
        try:
            stores[1].write(SNAPSHOT, place, held[1], 1, 2)
        except StoreError as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "view", waiting)
        thread = threading.Thread(target=write)
        thread.start()
        assert reading.wait(30)
        assert stores[1].progress is not None
        report = stores[1].progress.report()
        assert (report["step"], report["done_bytes"] < report["total_bytes"]) == (40, True)
        stores[1].cancel(SNAPSHOT)
        go_on.set()
        thread.join(30)
    assert ["cancelled" in str(error) for error in errors] == [True]
    assert stores[1].progress is None
    write_all(stores, slots, place)
    assert stores[0].commit(SNAPSHOT, place, 2)
    stores[1].cancel()
    with pytest.raises(StoreError, match="cancelled"):
        stores[1].write(SNAPSHOT, place + "-2", on_nodes(slots, 2)[0], 0, 2)


def test_a_newer_epoch_fences_the_root_off(slots: list[Slot], place: str) -> None:
    stores = daemons(2)
    write_all(stores, slots, place)
    newer = Epoch(EPOCH.number + 1, "00000000000000cc")
    stores[0].write_record(WriteRecord(0, place, EpochRecord(newer, SNAPSHOT)))
    with pytest.raises(StoreError, match="has begun"):
        stores[0].commit(SNAPSHOT, place, 2, epoch=EPOCH)
    assert Store.open(place).checkpoints() == []
    with pytest.raises(StoreError, match="has begun"):
        Stores(JOB, "a node that was replaced").write(SNAPSHOT, place, on_nodes(slots, 2)[1], 1, 2, EPOCH)
    assert daemons(2)[0].commit(SNAPSHOT, place, 2, epoch=newer), "the next epoch starts from it, and flushes it"


def test_the_root_tidies_but_not_what_is_being_written(slots: list[Slot], place: str) -> None:
    stores, held = daemons(2), on_nodes(slots, 2)
    left = type(SNAPSHOT)(EPOCH, 30)
    Store.open(place).writer(left, JOB)
    stores[1].write(SNAPSHOT, place, held[1], 1, 2)
    assert {name for name, _ in Store.open(place).broken()} == {checkpoint(left), checkpoint(SNAPSHOT)}
    stores[0].write(SNAPSHOT, place, held[0], 0, 2)
    assert {name for name, _ in Store.open(place).broken()} == {checkpoint(SNAPSHOT)}
    assert stores[0].commit(SNAPSHOT, place, 2)


def test_a_store_that_is_not_there_is_named(slots: list[Slot], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such directory.*on node node-1"):
        daemons(2)[1].write(SNAPSHOT, str(tmp_path / "not mounted"), on_nodes(slots, 2)[1], 1, 2)
    assert not (tmp_path / "not mounted").exists()


def test_the_flush_of_one_node_removes_what_it_cannot_finish(
    slots: list[Slot], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = daemons(1)[0]

    def flush() -> bool:
        daemon.write(SNAPSHOT, place, [slot.duplicate() for slot in slots], 0, 1)
        return daemon.commit(SNAPSHOT, place, 1, keep=1)

    def broken(*arguments: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(joint, "commit", broken)
        with pytest.raises(StoreError, match="full"):
            flush()
    assert not (Path(place) / checkpoint(SNAPSHOT)).exists()
    assert flush()
    assert not flush()
    with Store.open(place).reader(SNAPSHOT) as stored:
        check_ranks(stored, WORLD)
        assert [part.writer for part in stored.commit.parts] == [0]


KILLED = """
import os, signal, sys
from ckptd.daemon.flush import Stores
from ckptd.tiers.store import posix
from tests.flush.snapshots import JOB, SNAPSHOT, on_nodes, slots_of

place, what, match = sys.argv[1:]
stores = [Stores(JOB, f"node-{number}") for number in range(2)]
genuine = getattr(posix.PosixDisk, what)

def deadly(disk, path, *arguments, **options):
    if match in "/".join(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(disk, path, *arguments, **options)

setattr(posix.PosixDisk, what, deadly)
for number, held in enumerate(on_nodes(slots_of(4), 2)):
    stores[number].write(SNAPSHOT, place, held, number, 2)
stores[0].commit(SNAPSHOT, place, 2)
"""

MOMENTS = {
    "creating data": ("create", "data/w00001"),
    "creating data of its own": ("create", "data/w00003"),
    "writing its manifest": ("create", "manifest.parquet/w00001"),
    "listing": ("create", "written/w00001"),
    "after the list": ("sync_directory", "written"),
    "root: manifests": ("create", "manifest.parquet/w00002"),
    "root: objects": ("create", "objects.msgpack"),
    "root: about to commit": ("create", "COMMIT.tmp"),
    "root: commit": ("rename", "COMMIT"),
    "root: sweeping": ("remove_directory", "written"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment: str, place: str, slots: list[Slot]) -> None:
    """A process dies anywhere; others, who know nothing of it, do the same again, and a whole checkpoint comes out."""
    command = [sys.executable, "-c", KILLED, place, *MOMENTS[moment]]
    done = subprocess.run(command, timeout=60, cwd=Path(__file__).parents[2], env=os.environ, check=False)
    assert done.returncode == -9
    committed = Store.open(place).checkpoints()
    assert committed == ([SNAPSHOT] if "sweeping" in moment else [])
    stores = daemons(2)
    write_all(stores, slots, place)
    assert stores[0].commit(SNAPSHOT, place, 2) == (not committed)
    with Store.open(place).reader(SNAPSHOT) as stored:
        check_ranks(stored, WORLD)
        assert stored.verify() == []
    assert not (Path(place) / checkpoint(SNAPSHOT) / "written").exists()
    assert Store.open(place).clean() == []
