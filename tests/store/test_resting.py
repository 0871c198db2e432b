"""What rests is not written again: it has files of its own, which later checkpoints have as well."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptd.core.errors import StoreError
from ckptd.core.types import SnapshotId
from ckptd.tiers.store import Store, joint, names, posix
from ckptd.tiers.store.joint import Contribution, NodeWriter, Rows
from ckptd.tiers.store.pipeline import copying
from ckptd.tiers.store.writer import Pace, Resting
from tests.store.samples import JOB, Memory, Tensors, equal, identity, read, shared_objects, tensors

FIRST, SECOND, THIRD = identity(1), identity(2), identity(3)
RESTING: Tensors = {
    "base/noise": ("uint8", np.random.default_rng(1).integers(0, 256, (40, 100), np.uint8)),
    "base/weight": ("float32", np.linspace(0, 1, 500, dtype=np.float32)),
}


def held(name: SnapshotId, resting: Tensors) -> Tensors:
    return {**tensors(name.step), **resting, "tied/weight": resting["base/weight"]}


def saved(
    store: Store, name: SnapshotId, earlier: Resting | None, resting: Tensors = RESTING
) -> tuple[Resting | None, int]:
    """Writes and commits a checkpoint; what rests in it, and how many chunks were read for it."""
    memory = Memory({**tensors(name.step), **resting}, tied={"tied/weight": "base/weight"})
    catalog = memory.catalog
    mask = np.array([info.key.startswith(("base/", "tied/")) for info in catalog.tensors])[catalog.tensor]
    given = Contribution([0], Rows(catalog, copying(memory.read), mask), None, {0: shared_objects(name.step)})
    kept = NodeWriter(store, name, JOB, "node", 0, 1).write(given, Pace(), earlier)
    joint.commit(store, name, JOB, 1)
    store.sweep(name)
    with store.reader(name) as checkpoint:
        assert checkpoint.verify() == []
        assert equal(read(checkpoint), held(name, resting))
    return kept, memory.reads


def test_it_is_read_and_written_once(every_store: Store) -> None:
    """However many checkpoints there are, and whichever of them are removed."""
    first, reads = saved(every_store, FIRST, None)
    assert first is not None
    second, fewer = saved(every_store, SECOND, first)
    assert second is not None
    assert second.lengths == first.lengths
    assert reads - fewer >= 5
    assert every_store.prune(keep=1) == [FIRST]
    third, as_few = saved(every_store, THIRD, second)
    assert as_few == fewer
    every_store.remove(SECOND)
    with every_store.reader(THIRD) as checkpoint:
        assert checkpoint.verify() == []
    assert (third is not None, every_store.broken(), every_store.clean()) == (True, [], [])


def test_what_is_gone_is_written_again(every_store: Store) -> None:
    first, reads = saved(every_store, FIRST, None)
    every_store.remove(FIRST)
    second, again = saved(every_store, SECOND, first)
    assert (second is not None, again) == (True, reads)


def test_what_has_changed_is_written_anew(every_store: Store) -> None:
    """Also where only one bit has."""
    first, reads = saved(every_store, FIRST, None)
    noise = RESTING["base/noise"][1].copy()
    noise[7, 7] ^= 1
    second, again = saved(every_store, SECOND, first, {**RESTING, "base/noise": ("uint8", noise)})
    assert (second is not None, again) == (True, reads)
    with every_store.reader(FIRST) as checkpoint:
        assert checkpoint.verify() == []


def test_a_file_that_was_cut_short_is_not_linked(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    first, reads = saved(store, FIRST, None)
    assert first is not None
    damaged = (tmp_path / "store").joinpath(*first.held[0])
    os.truncate(damaged, first.lengths[0] - 1)
    _, again = saved(store, SECOND, first)
    assert again == reads


def test_it_is_one_file_on_disk(tmp_path: Path) -> None:
    """With as many names as there are checkpoints."""
    store = Store.open(tmp_path / "store", create=True)
    first, _ = saved(store, FIRST, None)
    second, _ = saved(store, SECOND, first)
    assert first is not None
    assert second is not None
    files = [(tmp_path / "store").joinpath(*kept.held[0]) for kept in (first, second)]
    assert os.path.samefile(*files)
    assert files[1].stat().st_nlink == 2
    moving = [(tmp_path / "store").joinpath(*names.data_file(kept.directory, 0, 0)) for kept in (first, second)]
    assert [path.stat().st_nlink for path in moving] == [1, 1]


@pytest.mark.parametrize(
    "error", [OSError(18, "EXDEV"), OSError(1, "EPERM"), OSError(95, "EOPNOTSUPP"), OSError(31, "")]
)
def test_a_disk_without_links_writes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    store = Store.open(tmp_path / "store", create=True)
    first, reads = saved(store, FIRST, None)

    def refuse(*names: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(posix.os, "link", refuse)
    _, again = saved(store, SECOND, first)
    assert again == reads


@pytest.mark.parametrize("failing", ["link of the second file", "no file"])
def test_one_of_several_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Then none is, and nothing of it is left."""
    monkeypatch.setattr("ckptd.tiers.store.writer.FILE_BYTES", 2000)
    store = Store.open(tmp_path / "store", create=True)
    first, reads = saved(store, FIRST, None)
    assert first is not None
    assert len(first.lengths) > 2
    original: Callable[..., None] = os.link
    count = iter(range(100))

    def link(*arguments: object, **more: object) -> None:
        if failing != "no file" and next(count) == 1:
            raise OSError(5, "EIO")
        original(*arguments, **more)

    monkeypatch.setattr(posix.os, "link", link)
    second, again = saved(store, SECOND, first)
    assert second is not None
    assert (again == reads) == (failing != "no file")
    found = sorted((tmp_path / "store" / names.checkpoint(SECOND) / "data").iterdir())
    assert len(found) == second.first + len(second.lengths)


def test_a_cancelled_write_links_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    first, _ = saved(store, FIRST, None)
    memory = Memory(tensors(2))
    given = Contribution([0], Rows(memory.catalog, copying(memory.read)), None, {0: shared_objects(2)})
    with pytest.raises(StoreError, match="cancelled"):
        NodeWriter(store, SECOND, JOB, "node", 0, 1).write(given, Pace(cancelled=lambda: True), first)
    assert store.checkpoints() == [FIRST]
