"""What a store does for its users: write, find, read, prune, clean, and say what is wrong."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ckptd.core.catalog import BYTEPLANES_ZSTD, RAW, ZSTD, Catalog
from ckptd.core.errors import ConfigError, CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.core.lineage import EpochRecord
from ckptd.format import objects
from ckptd.tiers.store import Part, Store, not_shared, open_checkpoint, sees_token
from ckptd.tiers.store.names import checkpoint, parse_checkpoint, parse_record
from ckptd.tiers.store.store import TOKEN_S
from ckptd.tiers.store.writer import CheckpointWriter
from tests.store.samples import JOB, Memory, Tensors, equal, identity, read, shared_objects, tensors, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.mark.parametrize("writers", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_written_is_read(store: Store, writers: int, threads: int) -> None:
    held = tensors()
    write(store, identity(3), held, writers=writers, threads=threads)
    assert store.checkpoints() == [identity(3)]
    with store.reader(identity(3)) as stored:
        assert (stored.id, stored.job) == (identity(3), JOB)
        assert equal(read(stored), held)
        assert stored.objects() == shared_objects(3)
        assert objects.decode(stored.objects()["scheduler"]) == {"last_epoch": 3, "betas": (0.9, 0.95)}
        assert stored.verify() == []
        assert stored.committed_at > 1.7e9


def test_codecs_follow_the_dtype_and_the_gain(store: Store) -> None:
    held = tensors() | {"big": ("float32", np.zeros((200, 300), np.float32))}
    write(store, identity(1), held)
    catalog = store.reader(identity(1)).catalog()
    codecs = {info.key: {int(catalog.codec[row]) for row in catalog.rows(info.key)} for info in catalog.tensors}
    assert codecs == {
        "big": {BYTEPLANES_ZSTD},
        "model/empty": {RAW},
        "model/noise": {RAW},
        "model/step": {RAW},
        "model/tokens": {ZSTD},
        "model/weight": {BYTEPLANES_ZSTD},
    }


def test_tied_tensors_are_stored_once(store: Store) -> None:
    held: Tensors = {"embedding": ("uint8", np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8))}
    memory = Memory(held, tied={"head": "embedding"})
    attempt = store.writer(identity(1), JOB)
    part = attempt.part(0).write(memory.catalog, memory.read)
    attempt.commit([part], {})
    assert memory.reads == 3
    assert sum(part.data) == 3008
    with store.reader(identity(1)) as stored:
        assert equal(read(stored), held | {"head": held["embedding"]})
        assert stored.verify() == []


def test_equal_bytes_without_a_place_of_their_own_are_tied_only_if_all_agrees(store: Store) -> None:
    """Places may be missing from a catalog; rows are then one only where dtype, size and checksum are one."""
    memory = Memory({"x": ("int32", np.arange(3, dtype=np.int32)), "y": ("float32", np.arange(3, dtype=np.float32))})
    values = [memory.catalog.tensors[t].key for t in memory.catalog.tensor]
    places = memory.catalog.replaced(file_offset=np.zeros(2))
    data = {"x": np.arange(3, dtype=np.int32).tobytes(), "y": np.arange(3, dtype=np.float32).tobytes()}

    def fill(row: int, into: memoryview) -> None:
        into[:] = data[values[row]]

    attempt = store.writer(identity(1), JOB)
    attempt.commit([attempt.part(0).write(places, fill)], {})
    assert store.reader(identity(1)).verify() == []


def test_files_are_limited_and_chunks_aligned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd.tiers.store.writer.FILE_BYTES", 3 * 2**20)
    noise = np.random.default_rng(0).integers(0, 256, 5 * 2**20 + 77, np.uint8)
    memory = Memory({"small": ("uint8", noise[:33]), "x": ("uint8", noise)}, chunk_bytes=2**20 + 100)
    attempt = store.writer(identity(1), JOB)
    part = attempt.part(0).write(memory.catalog, memory.read, threads=2)
    attempt.commit([part], {})
    with store.reader(identity(1)) as stored:
        catalog = stored.catalog()
        assert len(part.data) >= 2
        assert max(part.data) <= 3 * 2**20
        large = catalog.stored >= 2**20
        assert large.any()
        assert not (catalog.file_offset[large] % 4096).any()
        assert not (catalog.file_offset % 64).any()
        assert stored.verify() == []
        assert equal(read(stored), {"small": ("uint8", noise[:33]), "x": ("uint8", noise)})


def test_a_writer_without_rows(store: Store) -> None:
    empty = Catalog.build([], [], np.zeros((0, 0)), np.zeros((0, 0)))
    only_empty = Memory({"e": ("float32", np.zeros((3, 0), np.float32))}, writer=1)
    attempt = store.writer(identity(1), JOB)
    parts = [
        attempt.part(0).write(empty, only_empty.read),
        attempt.part(1).write(only_empty.catalog, only_empty.read),
    ]
    attempt.commit(parts, {})
    with store.reader(identity(1)) as stored:
        assert stored.verify() == []
        assert stored.catalog().tensors == [("e", "float32", (3, 0))]
        stored.read(0, memoryview(bytearray()))


def test_parts_travel_between_nodes(store: Store) -> None:
    """A daemon on another node joins, and its answer is sent to the root."""
    first, second = Memory({"x": tensors()["model/weight"]}), Memory({"y": tensors()["model/noise"]}, writer=4)
    root = store.writer(identity(1), JOB)
    joined = Store.open(store.uri).writer(identity(1), JOB, joined=True)
    sent = msgspec.msgpack.encode(joined.part(4).write(second.catalog, second.read))
    mine = root.part(0).write(first.catalog, first.read)
    joined.abort()
    root.commit([msgspec.msgpack.decode(sent, type=Part), mine], {})
    assert [part.writer for part in store.reader(identity(1)).commit.parts] == [0, 4]
    assert store.reader(identity(1)).verify() == []


def test_a_tensor_written_in_two_shapes_is_refused(store: Store) -> None:
    attempt = store.writer(identity(1), JOB)
    parts = []
    for number, shape in enumerate([(4,), (5,)]):
        memory = Memory({"x": ("uint8", np.zeros(shape, np.uint8))}, writer=number)
        parts.append(attempt.part(number).write(memory.catalog, memory.read))
    attempt.commit(parts, {})
    with pytest.raises(FormatError, match="listed as"):
        store.reader(identity(1)).catalog()


def test_damage_in_memory_is_found_before_it_is_stored(store: Store) -> None:
    memory = Memory(tensors())

    def damaged(row: int, into: memoryview) -> None:
        memory.read(row, into)
        if into:
            into[0] ^= 1

    attempt = store.writer(identity(1), JOB)
    with pytest.raises(CorruptionError, match=r"model/noise.*snapshot in memory was damaged"):
        attempt.part(0).write(memory.catalog, damaged)
    with pytest.raises(StoreError, match="earlier step failed"):
        attempt.commit([], {})
    attempt.abort()
    assert (store.checkpoints(), store.broken()) == ([], [])


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_while_reading_ends_all_threads(store: Store, threads: int) -> None:
    memory = Memory({"x": ("uint8", np.zeros(2**20, np.uint8))}, chunk_bytes=512)

    def fail(row: int, into: memoryview) -> None:
        if row == 1500:
            raise OSError("gone")
        memory.read(row, into)

    with pytest.raises(OSError, match="gone"):
        store.writer(identity(1), JOB).part(0).write(memory.catalog, fail, threads=threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckptd-encode")]


def test_an_error_while_writing_ends_all_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: list[memoryview]) -> int:
        raise OSError(28, "No space left on device")

    memory = Memory({"x": ("uint8", np.random.default_rng(0).integers(0, 256, 2**25, np.uint8))}, chunk_bytes=2**20)
    attempt = store.writer(identity(1), JOB)
    with monkeypatch.context() as patch:
        patch.setattr("os.writev", full)
        try:
            attempt.part(0).write(memory.catalog, memory.read, threads=3)
        except StoreError as error:
            running = [thread for thread in threading.enumerate() if thread.name.startswith("ckptd-encode")]
            assert (running, "ENOSPC" in str(error)) == ([], True)  # noqa: PT017 - while the traceback is alive
        else:
            pytest.fail("a full disk was not noticed")


def test_cancelling(store: Store) -> None:
    memory = Memory({"x": ("uint8", np.zeros(2**20, np.uint8))}, chunk_bytes=2**18)
    attempt = store.writer(identity(1), JOB)
    with pytest.raises(StoreError, match="cancelled"):
        attempt.part(0).write(memory.catalog, memory.read, cancelled=lambda: memory.reads >= 2)
    assert memory.reads == 2
    attempt.abort()
    assert store.broken() == []


def test_committed_bytes_never_change(store: Store) -> None:
    write(store, identity(1), tensors())
    assert store.committed(identity(1))
    assert not store.committed(identity(2))
    with pytest.raises(StoreError, match="is committed"):
        store.writer(identity(1), JOB)


def test_a_leftover_is_replaced(store: Store) -> None:
    memory = Memory(tensors(1))
    store.writer(identity(1), JOB).part(0).write(memory.catalog, memory.read)
    assert store.broken() == [(checkpoint(identity(1)), "no COMMIT: unfinished, or being written or removed")]
    assert not store.committed(identity(1))
    write(store, identity(1), tensors(2))
    assert equal(read(store.reader(identity(1))), tensors(2))


def test_an_attempt_is_used_once(store: Store) -> None:
    attempt = store.writer(identity(1), JOB)
    attempt.commit([], {})
    with pytest.raises(StoreError, match="is committed"):
        attempt.commit([], {})
    attempt.abort()
    assert store.checkpoints() == [identity(1)]


def test_newest_follows_the_live_lineage(store: Store) -> None:
    first, dead, live = identity(10), identity(30, 1), identity(20, 2)
    for name in (first, dead):
        write(store, name, {})
    store.write_record(EpochRecord(first.epoch))
    assert store.newest() == dead
    store.write_record(EpochRecord(live.epoch, first))
    assert store.newest() == first
    assert store.newest(step=30) is None
    write(store, live, {})
    assert store.newest() == live
    assert store.newest(step=10) == first
    assert store.records() == [EpochRecord(first.epoch), EpochRecord(live.epoch, first)]
    assert open_checkpoint(store.uri).id == live


def test_prune_keeps_the_live_and_removes_the_dead_first(store: Store) -> None:
    names = [identity(1), identity(2), identity(9), identity(3, 2), identity(4, 2)]
    for name in names:
        write(store, name, {})
    store.write_record(EpochRecord(identity(0, 2).epoch, identity(2)))
    assert store.prune(keep=4) == [identity(9)]
    assert store.prune(keep=2) == [identity(1), identity(2)]
    assert store.checkpoints() == [identity(3, 2), identity(4, 2)]
    assert store.prune(keep=5) == []
    with pytest.raises(ConfigError, match="keep=0"):
        store.prune(keep=0)


def test_remove(store: Store, tmp_path: Path) -> None:
    write(store, identity(1), tensors())
    (tmp_path / "store" / checkpoint(identity(1)) / "notes.txt").write_text("by hand")
    store.remove(identity(1))
    store.remove(identity(1))
    assert list((tmp_path / "store").iterdir()) == []


def test_clean_takes_leftovers_alone(store: Store, tmp_path: Path) -> None:
    write(store, identity(1), tensors())
    for step in (2, 3):
        store.writer(identity(step), JOB)
    store.write_record(EpochRecord(identity(1).epoch))
    (tmp_path / "store" / "epochs" / f".{identity(1, 2).epoch}.tmp").write_bytes(b"torn")
    (tmp_path / "store" / "epochs" / "notes.tmp").write_bytes(b"by hand")
    (tmp_path / "store" / "other").mkdir()
    assert store.clean(keep=[identity(3)]) == [checkpoint(identity(2)), f"epochs/.{identity(1, 2).epoch}.tmp"]
    assert store.checkpoints() == [identity(1)]
    assert [name for name, _ in store.broken()] == [checkpoint(identity(3))]
    assert (tmp_path / "store" / "other").exists()


def test_a_damaged_record_is_an_error(store: Store, tmp_path: Path) -> None:
    record = EpochRecord(identity(1).epoch, identity(5, 0))
    store.write_record(record)
    path = tmp_path / "store" / "epochs" / str(record.epoch)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"5]", b"6]"))
    with pytest.raises(CorruptionError, match=path.name):
        store.records()
    path.write_bytes(sound)
    path.rename(path.with_name("9-00000000000000aa"))
    with pytest.raises(FormatError, match="is the record of epoch 1-"):
        store.records()


def test_a_copied_directory_is_a_whole_checkpoint(store: Store, tmp_path: Path) -> None:
    write(store, identity(1), tensors())
    (tmp_path / "store" / checkpoint(identity(1))).rename(tmp_path / "my favourite")
    with open_checkpoint(tmp_path / "my favourite") as stored:
        assert equal(read(stored), tensors())
    with pytest.raises(NotFoundError, match="no committed checkpoint"):
        open_checkpoint(tmp_path / "store")
    with pytest.raises(NotFoundError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_uris(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/with%20space/run", create=True)
    assert store.uri == str(tmp_path / "with space" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "with space")
    assert Store.open(tmp_path / "link" / "run").uri == store.uri
    with pytest.raises(NotFoundError):
        Store.open(tmp_path / "none")
    for wrong in ("nonsense://host/path", "file://host/path", ""):
        with pytest.raises(ConfigError):
            Store.open(wrong)


def test_probe_and_tokens(store: Store, tmp_path: Path) -> None:
    store.probe()
    other = Store.open(store.uri)
    store.leave_token("0123456789abcdef")
    assert other.has_token("0123456789abcdef")
    other.remove_token("0123456789abcdef")
    assert not store.has_token("0123456789abcdef")
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(ValueError, match="16 hex digits"):
        store.leave_token("../../evil")


def test_tokens_of_killed_probes_go_after_a_day(store: Store, tmp_path: Path) -> None:
    """One of now may be somebody's who waits for others to see it."""
    names = [f".token-{digit * 16}" for digit in "012"]
    for name in names:
        store.leave_token(name.removeprefix(".token-"))
    day_ago = time.time() - TOKEN_S - 60
    os.utime(tmp_path / "store" / names[1], (day_ago, day_ago))
    (tmp_path / "store" / ".token-notes").write_bytes(b"by hand")
    os.utime(tmp_path / "store" / ".token-notes", (day_ago, day_ago))
    assert store.clean() == [names[1]]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [names[0], names[2], ".token-notes"]


def test_every_node_says_whether_it_sees_the_token(store: Store, tmp_path: Path) -> None:
    """The root leaves one; a path that leads elsewhere, or nowhere, does not have it."""
    nonce = "0123456789abcdef"
    store.leave_token(nonce)
    (tmp_path / "local disk").mkdir()
    places = {"node-a": store.uri, "node-b": str(tmp_path / "local disk"), "node-c": str(tmp_path / "nothing")}
    seen = {node: sees_token(place, nonce) for node, place in places.items()}
    assert seen == {"node-a": True, "node-b": False, "node-c": False}
    error = not_shared(store.uri, [node for node, found in seen.items() if not found])
    assert isinstance(error, ConfigError)
    assert "on node-b, node-c this is not the store that rank 0 opened" in str(error)
    assert not (tmp_path / "nothing").exists()


def test_a_store_that_forgets_is_no_store(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "has_token", lambda self, nonce: False)
    with pytest.raises(StoreError, match="cannot be read back"):
        store.probe()
    assert list((tmp_path / "store").iterdir()) == []


def test_prune_relies_on_nothing_that_is_in_doubt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest one was committed by a process that may have failed to sync it: until that is made good, older ones
    stay."""
    for step in (1, 2):
        write(store, identity(step), {})
    other = Store.open(store.uri)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(StoreError, match="EIO"):
            other.prune(keep=1)
    assert other.checkpoints() == [identity(1), identity(2)]
    with pytest.raises(StoreError, match="failed in this process"):
        other.committed(identity(2))
    assert Store.open(store.uri).prune(keep=1) == [identity(1)]


@pytest.mark.parametrize(
    "name",
    [
        "step-00000001.1-00000000000000aa/",
        "step-1.1-00000000000000aa",
        "step-000000001.1-00000000000000aa",
        "step-00000001.01-00000000000000aa",
        "step-00000001.1-00000000000000AA",
        "step-00000001.1-00000000000000aa\n",
        "step-00000001.1-00000000000000a",
        "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661.1-00000000000000aa",
        "..",
    ],
)
def test_names_that_are_not_ours(name: str) -> None:
    assert parse_checkpoint(name) is None
    assert parse_record(name) is None


def test_names_round_trip() -> None:
    for name in (identity(0, 0), identity(99_999_999), identity(100_000_000), identity(10**17, 10**17)):
        assert parse_checkpoint(checkpoint(name)) == name
        assert parse_record(str(name.epoch)) == name.epoch


def test_many_threads_read_one_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is safe in threads, also where more files are listed than are kept open."""
    monkeypatch.setattr("ckptd.tiers.store.reader._OPEN_FILES", 1)
    held = {f"t{i}": ("int32", np.arange(i, 3000 + i, dtype=np.int32)) for i in range(12)}
    write(store, identity(1), held, writers=3)
    failures: list[BaseException] = []
    with store.reader(identity(1)) as stored:

        def run() -> None:
            try:
                assert equal(read(stored), held)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert failures == []


def test_verify_reports_progress_and_every_damaged_chunk(store: Store, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    write(store, identity(1), {"x": ("uint8", noise)})
    data = tmp_path / "store" / checkpoint(identity(1)) / "data" / "w00000-00000.ckd"
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    content[3000] ^= 1
    data.write_bytes(content)
    seen: list[tuple[int, int]] = []
    with store.reader(identity(1)) as stored:
        problems = stored.verify(lambda done, total: seen.append((done, total)))
    assert len(problems) == 2
    assert all("tensor 'x'" in problem for problem in problems)
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_verify_tells_everything_that_is_wrong(store: Store, tmp_path: Path) -> None:
    """One damaged file hides nothing about the others."""
    held = {f"t{i}": ("uint8", np.random.default_rng(i).integers(0, 256, 3000, np.uint8)) for i in range(4)}
    write(store, identity(1), held, writers=4)
    root = tmp_path / "store" / checkpoint(identity(1))
    (root / "objects.msgpack").write_bytes(b"")
    (root / "manifest.parquet" / "w00000.parquet").write_bytes(b"")
    (root / "data" / "w00001-00000.ckd").unlink()
    with (root / "data" / "w00002-00000.ckd").open("r+b") as file:
        file.truncate(100)
    with (root / "data" / "w00003-00000.ckd").open("r+b") as file:
        file.seek(2500)
        file.write(b"???")
    problems = store.reader(identity(1)).verify(threads=2)
    assert len(problems) == 5
    for name, problem in zip(["objects", "w00000.p", "w00001-", "w00002-", "w00003-"], problems, strict=True):
        assert name in problem


def test_verify_finds_tensors_with_gaps(store: Store) -> None:
    memory = Memory({"x": ("uint8", np.zeros(4096, np.uint8)), "y": ("uint8", np.ones(5, np.uint8))}, ranks={"y": 3})
    some = [0, 1, 3, 4]
    attempt = store.writer(identity(1), JOB)
    part = attempt.part(0).write(memory.catalog.select(some), lambda row, into: memory.read(some[row], into))
    attempt.commit([part], {})
    assert store.reader(identity(1)).verify() == ["tensor 'x': its chunks hold 3072 of 4096 bytes"]


def test_a_full_disk_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    attempt: CheckpointWriter = store.writer(identity(1), JOB)
    memory = Memory(tensors())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StoreError, match=r"w00000-00000.ckd: sync: No space left on device \(ENOSPC\)"):
            attempt.part(0).write(memory.catalog, memory.read)
    attempt.abort()
    write(store, identity(1), tensors())
    assert store.reader(identity(1)).verify() == []
