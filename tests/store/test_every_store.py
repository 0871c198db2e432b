"""What every kind of store does for its users, on files and on objects alike."""

from __future__ import annotations

import msgspec
import pytest

from ckptd.core.errors import CorruptionError, NotFoundError, StoreError
from ckptd.core.lineage import EpochRecord
from ckptd.tiers.store import Part, Store
from ckptd.tiers.store.names import checkpoint, data_file
from tests.store.samples import JOB, Memory, equal, identity, read, shared_objects, tensors, write


@pytest.fixture
def store(every_store: Store) -> Store:
    return every_store


def test_a_checkpoint_is_written_found_and_read(store: Store) -> None:
    assert (store.checkpoints(), store.records(), store.newest()) == ([], [], None)
    store.probe()
    write(store, identity(3), tensors(), writers=3, threads=2)
    assert store.newest() == identity(3)
    assert store.committed(identity(3))
    with store.reader(identity(3)) as stored:
        assert (stored.id, stored.job, stored.name) == (identity(3), JOB, checkpoint(identity(3)))
        assert stored.location == store.back_end.describe((stored.name,))
        assert equal(read(stored), tensors())
        assert stored.objects() == shared_objects(3)
        assert stored.verify(threads=2) == []
        assert stored.committed_at >= 0.0


def test_committed_bytes_never_change(store: Store) -> None:
    write(store, identity(1), tensors())
    with pytest.raises(StoreError, match="is committed"):
        store.writer(identity(1), JOB)
    assert equal(read(store.reader(identity(1))), tensors())


def test_nothing_is_visible_before_commit_and_a_leftover_is_replaced(store: Store) -> None:
    memory = Memory(tensors(1))
    attempt = store.writer(identity(1), JOB)
    attempt.part(0).write(memory.catalog, memory.read)
    assert store.checkpoints() == []
    assert not store.committed(identity(1))
    with pytest.raises(NotFoundError):
        store.reader(identity(1))
    assert store.broken() == [(checkpoint(identity(1)), "no COMMIT: unfinished, or being written or removed")]
    write(store, identity(1), tensors(2))
    assert store.broken() == []
    assert equal(read(store.reader(identity(1))), tensors(2))


def test_aborted_and_cancelled_attempts_leave_nothing(store: Store) -> None:
    memory = Memory(tensors())
    attempt = store.writer(identity(1), JOB)
    with pytest.raises(StoreError, match="cancelled"):
        attempt.part(0).write(memory.catalog, memory.read, cancelled=lambda: memory.reads >= 2)
    with pytest.raises(StoreError, match="earlier step failed"):
        attempt.commit([], {})
    attempt.abort()
    assert (store.checkpoints(), store.broken()) == ([], [])


def test_parts_of_other_nodes(store: Store) -> None:
    first, second = Memory({"x": tensors()["model/weight"]}), Memory({"y": tensors()["model/noise"]}, writer=4)
    root = store.writer(identity(1), JOB)
    joined = Store(store.back_end, store.uri).writer(identity(1), JOB, joined=True)
    sent = msgspec.msgpack.encode(joined.part(4).write(second.catalog, second.read))
    joined.abort()
    root.commit([msgspec.msgpack.decode(sent, type=Part), root.part(0).write(first.catalog, first.read)], {})
    assert store.reader(identity(1)).verify() == []


def test_records_lineage_and_pruning(store: Store) -> None:
    names = [identity(1), identity(2), identity(9), identity(3, 2), identity(4, 2)]
    for name in names:
        write(store, name, {})
    record = EpochRecord(identity(0, 2).epoch, identity(2))
    for _ in range(2):
        store.write_record(record)
    assert store.records() == [record]
    assert store.newest() == identity(4, 2)
    assert store.newest(step=9) is None
    assert store.prune(keep=4) == [identity(9)]
    assert store.prune(keep=2) == [identity(1), identity(2)]
    store.remove(identity(3, 2))
    store.remove(identity(3, 2))
    assert store.checkpoints() == [identity(4, 2)]
    assert {entry.name for entry in store.back_end.list(())} == {"epochs", checkpoint(identity(4, 2))}


def test_clean_takes_leftovers_alone(store: Store) -> None:
    write(store, identity(1), tensors())
    for step in (2, 3):
        memory = Memory(tensors(step))
        store.writer(identity(step), JOB).part(0).write(memory.catalog, memory.read)
    assert store.clean(keep=[identity(3)]) == [checkpoint(identity(2))]
    assert store.checkpoints() == [identity(1)]
    assert [name for name, _ in store.broken()] == [checkpoint(identity(3))]


def test_tokens_show_that_two_nodes_see_one_store(store: Store) -> None:
    nonce = "0123456789abcdef"
    other = Store(store.back_end, store.uri)
    assert not other.has_token(nonce)
    store.leave_token(nonce)
    assert other.has_token(nonce)
    for _ in range(2):
        other.remove_token(nonce)
    assert not store.has_token(nonce)


def test_a_checkpoint_of_another_process_is_made_sure_of(store: Store) -> None:
    """It may have failed to sync COMMIT, and nobody is left who knows."""
    write(store, identity(1), tensors())
    write(store, identity(2), tensors())
    other = Store(store.back_end, store.uri)
    assert other.exists(identity(1))
    assert not other.exists(identity(3))
    assert other.committed(identity(1))
    assert other.prune(keep=1) == [identity(1)]
    assert other.checkpoints() == [identity(2)]
    assert {entry.name for entry in store.back_end.list((checkpoint(identity(2)),))} == {
        "COMMIT",
        "data",
        "manifest.parquet",
        "objects.msgpack",
    }
    assert equal(read(other.reader(identity(2))), tensors())


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_what_commit_lists_and_is_not_there_is_corruption(store: Store, damage: str) -> None:
    write(store, identity(1), tensors())
    path = data_file(checkpoint(identity(1)), 0, 0)
    store.back_end.discard(path)
    if damage == "shortened":
        store.back_end.write(path, b"short")
    with pytest.raises(CorruptionError, match="w00000-00000"):
        store.reader(identity(1)).catalog()
    assert any("w00000-00000" in problem for problem in store.reader(identity(1)).verify())
