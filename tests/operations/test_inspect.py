"""What `ls` and `show` say of stores and checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptd.core.catalog import Catalog
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.format.objects import encode
from ckptd.operations.inspect import inspect_checkpoint, summarize_store, total
from ckptd.tiers.store import Store, open_checkpoint
from tests.operations.stores import FIRST, SECOND, chunks, flip, newer, write

WEIGHTS = {"model/w": np.arange(12, dtype="f4").reshape(3, 4)}


def test_newest_first_and_the_dead_branch_told(tmp_path: Path) -> None:
    """Epoch 1 reached step 30, epoch 2 went on from its step 10: steps 20 and 30 of epoch 1 are dead."""
    for step in (10, 20, 30):
        write(tmp_path, step, WEIGHTS, epoch=FIRST)
    store = Store.open(tmp_path)
    store.write_record(EpochRecord(FIRST))
    store.write_record(EpochRecord(SECOND, SnapshotId(FIRST, 10)))
    write(tmp_path, 15, WEIGHTS, epoch=SECOND)
    summary = summarize_store(store)
    assert [(c.id.epoch.number, c.id.step, c.live) for c in summary.checkpoints] == [
        (2, 15, True),
        (1, 30, False),
        (1, 20, False),
        (1, 10, True),
    ]
    assert summary.broken == []
    first = summary.checkpoints[0]
    assert (first.job, first.writers, first.chunks) == ("job-1", 1, 1)
    files = [path for path in (tmp_path / first.name).rglob("*") if path.is_file() and path.name != "COMMIT"]
    assert first.bytes == sum(path.stat().st_size for path in files)
    assert first.created_s == (tmp_path / first.name / "COMMIT").stat().st_mtime


def test_uncommitted_is_not_broken(tmp_path: Path) -> None:
    """A directory without COMMIT may be in the writing; one with a bad COMMIT, or of a newer version, is broken."""
    places = [write(tmp_path, step, WEIGHTS) for step in (1, 2, 3, 4, 5)]
    (places[0] / "COMMIT").unlink()
    flip(places[1] / "COMMIT", 50)
    newer(places[2])
    (places[3] / "COMMIT").write_bytes(b"")
    summary = summarize_store(Store.open(tmp_path))
    assert [c.id.step for c in summary.checkpoints] == [5]
    assert summary.uncommitted == [places[0].name]
    assert [name for name, _ in summary.broken] == [place.name for place in places[1:4]]
    reasons = dict(summary.broken)
    assert "SHA-256" in reasons[places[1].name]
    assert "version" in reasons[places[2].name]
    assert "truncated or foreign" in reasons[places[3].name]


def test_a_damaged_epoch_record_hides_no_checkpoint(tmp_path: Path) -> None:
    """Which branch is alive cannot be told then; that is said, and the checkpoints are listed all the same."""
    write(tmp_path, 1, WEIGHTS)
    store = Store.open(tmp_path)
    store.write_record(EpochRecord(FIRST))
    flip(tmp_path / "epochs" / str(FIRST), 30)
    summary = summarize_store(store)
    assert [(c.id.step, c.live) for c in summary.checkpoints] == [(1, None)]
    assert [name for name, _ in summary.broken] == ["epochs"]


def test_contents(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    buffer = np.arange(6, dtype="i8")
    encoded = np.frombuffer(encode({"own": 1}), np.uint8)
    write(
        tmp_path,
        7,
        {
            "model/w": rng.normal(size=(64, 16)).astype("f4"),
            "model/seen": buffer,
            "model/none": np.zeros((0, 3), "f8"),
            "optimizer/state/w/step": np.array(7.0, "f4"),
            "objects/rng/torch@0": encoded,
            "objects/loader@1": encoded,
        },
        {"loader": {"own": 0}, "scheduler": (1, 2.5)},
        own={("model/seen", 1): buffer + 1, ("model/seen", 3): buffer + 3},
        chunk_bytes=1024,
    )
    with open_checkpoint(tmp_path) as checkpoint:
        everything = inspect_checkpoint(checkpoint, with_values=True)
        some = inspect_checkpoint(checkpoint, pattern="model/[sw]*")
    assert everything.summary.id == SnapshotId(FIRST, 7)
    tensors = {tensor.key: tensor for tensor in everything.tensors}
    assert list(tensors) == ["model/none", "model/seen", "model/w", "optimizer/state/w/step"]
    assert (tensors["model/w"].dtype, tensors["model/w"].shape, tensors["model/w"].chunks) == ("float32", (64, 16), 4)
    assert tensors["model/w"].bytes == 4096
    assert 0 < tensors["model/w"].stored <= 4096
    assert (tensors["model/seen"].ranks, tensors["model/seen"].bytes) == ([1, 3], 3 * 48)
    assert (tensors["model/none"].bytes, tensors["model/none"].chunks) == (0, 1)
    assert tensors["optimizer/state/w/step"].shape == ()
    assert everything.objects == {
        "loader": {"own": 0},
        "loader@1": {"own": 1},
        "rng/torch@0": {"own": 1},
        "scheduler": (1, 2.5),
    }
    totals = everything.totals
    assert (totals.tensors, totals.objects, totals.writers) == (4, 4, 1)
    assert totals.bytes == 4096 + 3 * 48 + 4 + 2 * len(encoded)
    assert totals.stored == sum(path.stat().st_size for path in tmp_path.rglob("*.ckd")) - padding(tmp_path)
    assert [tensor.key for tensor in some.tensors] == ["model/seen", "model/w"]
    assert some.totals == totals
    assert some.objects is None


def padding(store: Path) -> int:
    """Bytes between the chunks of the one data file of the one checkpoint."""
    with open_checkpoint(store) as checkpoint:
        catalog = checkpoint.catalog()
        return int(checkpoint.commit.data_bytes - catalog.stored.sum())


def test_tied_tensors_are_counted_once() -> None:
    """Two keys of one place: four kilobytes twice in the table, once in the sum."""
    catalog, _ = chunks({"a": np.zeros(1024, "f4"), "b": np.zeros(1024, "f4")}, {}, 2048)
    tied: Catalog = catalog.replaced(file_offset=[0, 4096, 0, 4096])
    totals = total(tied, 0)
    assert (totals.tensors, totals.chunks, totals.bytes, totals.stored) == (2, 4, 4096, 4096)


def test_an_empty_store(tmp_path: Path) -> None:
    summary = summarize_store(Store.open(tmp_path))
    assert (summary.checkpoints, summary.uncommitted, summary.broken) == ([], [], [])
    assert summary.uri == str(tmp_path)


@pytest.mark.parametrize("name", ["loader", "rng/torch"])
def test_objects_of_several_chunks_are_joined(tmp_path: Path, name: str) -> None:
    value = list(range(3000))
    encoded = np.frombuffer(encode(value), np.uint8)
    write(tmp_path, 1, {f"objects/{name}@0": encoded}, chunk_bytes=1000)
    with open_checkpoint(tmp_path) as checkpoint:
        contents = inspect_checkpoint(checkpoint, with_values=True)
    assert contents.totals.chunks > 1
    assert contents.objects == {f"{name}@0": value}
