"""Uploads that fail, are cut short, or die with their process: what is visible afterwards is old or new, and whole.

The story: a stream that is dropped half-way publishes a short object under the final name, so a tool that trusts names
loads half a tensor. Here every single change that saving and pruning make goes wrong in every way; then a real process
is killed in the middle of an upload to a real server, and a real server in the middle of a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptd.core.errors import CorruptionError, StoreError
from ckptd.core.types import SnapshotId
from ckptd.tiers.store import Store
from ckptd.tiers.store.names import checkpoint, data_file, lists
from ckptd.tiers.store.object_store import ObjectBackEnd, ObjectOutput
from tests.s3_server import CREDENTIALS, S3Server
from tests.store.flaky_system import ANSWER_LOST, CUT_SHORT, KILLED_HALF, WAYS, GoneError, flaky_back_end
from tests.store.samples import JOB, Memory, equal, identity, jointly, read, tensors, write, write_jointly

OLD, NEW = identity(1), identity(2)


def _store(root: Path, failing: int = -1, way: str = "") -> Store:
    return Store(flaky_back_end(str(root), failing, way)[0], "flaky")


def _save_old(store: Store) -> None:
    write(store, OLD, tensors(1))


def _save_new(store: Store) -> None:
    write(store, NEW, tensors(2), writers=2)


def _save_jointly(store: Store) -> None:
    write_jointly([store] * 2, NEW, tensors(2))


def _prune(store: Store) -> None:
    store.prune(keep=1)


class Attempts:
    """`act` on a store as `prepared`, once for every change it makes, each time with that change going wrong."""

    def __init__(self, folder: Path, prepare: list[Callable[[Store], None]], act: Callable[[Store], None]) -> None:
        self._folder = folder
        self._act = act
        for step in prepare:
            step(_store(folder / "prepared"))
        back_end, system = flaky_back_end(str(self._copy("prepared", "counted")))
        act(Store(back_end, "counted"))
        self.changes = system.changes
        assert self.changes >= 2

    def _copy(self, source: str, target: str) -> Path:
        return Path(shutil.copytree(self._folder / source, self._folder / target))

    def run(self, way: str) -> Iterator[tuple[bool, Path, Path]]:
        """(whether `act` said that it was done, what is left, the same again)."""
        for failing in range(self.changes):
            root = self._copy("prepared", f"{failing}")
            back_end, system = flaky_back_end(str(root), failing, way)
            done = False
            with contextlib.suppress(StoreError, GoneError):
                self._act(Store(back_end, "flaky"))
                done = True
            assert system.failed
            yield done, root, self._copy(f"{failing}", f"{failing}-again")


def _check(root: Path, must: set[SnapshotId]) -> Store:
    """As another process sees it: what must be there is, and what is there is whole."""
    store = _store(root)
    found = set(store.checkpoints())
    assert must <= found <= {OLD, NEW}
    for name in found:
        assert store.reader(name).verify() == []
        found_in = read(store.reader(name))
        assert equal(found_in, tensors(name.step)) or equal(found_in, jointly(tensors(name.step), 2))
    return store


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("save", [_save_new, _save_jointly])
def test_a_save_that_goes_wrong_anywhere_leaves_old_or_new(
    tmp_path: Path, way: str, save: Callable[[Store], None]
) -> None:
    for done, root, again in Attempts(tmp_path, [_save_old], save).run(way):
        store = _check(root, {OLD, NEW} if done else {OLD})
        if NEW not in store.checkpoints():
            save(store)
        store.sweep(NEW)
        assert store.clean() == []
        _check(root, {OLD, NEW})
        _check_clean(_store(again))


def _check_clean(store: Store) -> None:
    """`clean` takes the leftover. Half a COMMIT might be one of a newer version: it is left to the next flush."""
    left = {name for name, reason in store.broken() if "no COMMIT" in reason}
    damaged = [name for name, reason in store.broken() if "no COMMIT" not in reason]
    assert set(store.clean()) - {"/".join(lists(checkpoint(NEW)))} == left
    assert [name for name, _ in store.broken()] == damaged


@pytest.mark.parametrize("way", WAYS)
def test_a_prune_that_goes_wrong_anywhere_keeps_the_newest(tmp_path: Path, way: str) -> None:
    for _, root, again in Attempts(tmp_path, [_save_old, _save_new], _prune).run(way):
        store = _check(root, {NEW})
        _prune(store)
        store.clean()
        assert (store.checkpoints(), store.broken()) == ([NEW], [])
        _check_clean(_store(again))


def test_a_commit_whose_answer_was_lost_is_in_doubt(tmp_path: Path) -> None:
    last = Attempts(tmp_path, [_save_old], _save_new).changes - 1
    root = tmp_path / "store"
    _save_old(_store(root))
    store = _store(root, last, ANSWER_LOST)
    with pytest.raises(StoreError, match="COMMIT: complete the upload: InternalError"):
        _save_new(store)
    for use in (store.committed, store.remove, lambda name: store.writer(name, JOB)):
        with pytest.raises(StoreError, match="failed in this process"):
            use(NEW)
    assert _check(root, {OLD, NEW}).committed(NEW)


def test_believing_an_upload_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the enumeration proves nothing."""
    monkeypatch.setattr(ObjectOutput, "sync", lambda self: self._stream.close())
    with pytest.raises((AssertionError, CorruptionError)):
        test_a_save_that_goes_wrong_anywhere_leaves_old_or_new(tmp_path, CUT_SHORT, _save_new)


def test_a_prune_that_leaves_commit_for_last_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectBackEnd, "discard", lambda self, path: None)
    with pytest.raises((AssertionError, CorruptionError)):
        test_a_prune_that_goes_wrong_anywhere_keeps_the_newest(tmp_path, KILLED_HALF)


UPLOAD = """
import sys
from ckptd.tiers.store import Store
from tests.store.samples import JOB, Memory, identity, tensors
from tests.store.test_interrupted_uploads import large
from ckptd.tiers.store import pipeline, writer

writer.FILE_BYTES = 3 * 2**20
pipeline.CHUNK_BYTES = 4 * 2**20
store = Store.open(sys.argv[1], create=True)
memory = Memory(tensors(2))
store.writer(identity(2), JOB).part(0).write(memory.catalog, memory.read)
memory = large()

def read(row, into):
    if memory.reads == 12:
        print("uploading", flush=True)
        sys.stdin.read()
    memory.read(row, into)

store.writer(identity(1), JOB).part(0).write(memory.catalog, read)
"""


def large() -> Memory:
    """16 chunks of 1 MiB that do not compress."""
    noise = np.random.default_rng(0).integers(0, 256, 16 * 2**20, np.uint8)
    return Memory({"noise": ("uint8", noise)}, chunk_bytes=2**20)


def test_a_process_killed_while_it_uploads(s3: S3Server) -> None:
    uri = s3.uri()
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | CREDENTIALS
    )
    assert process.stdout.readline() == b"uploading\n"
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    store = Store.open(uri)
    assert store.checkpoints() == []
    assert [name for name, _ in store.broken()] == [checkpoint(identity(1)), checkpoint(identity(2))]
    assert store.back_end.open(data_file(checkpoint(identity(1)), 0, 0)).size == 3 * 2**20
    memory = large()
    attempt = store.writer(identity(1), JOB)
    attempt.commit([attempt.part(0).write(memory.catalog, memory.read)], {})
    assert store.clean() == [checkpoint(identity(2))]
    assert (store.checkpoints(), store.broken()) == ([identity(1)], [])
    assert store.reader(identity(1)).verify() == []


def test_a_stream_given_up_half_way_publishes_a_short_object_that_nobody_sees(s3: S3Server) -> None:
    store = Store.open(s3.uri(), create=True)
    memory = large()
    attempt = store.writer(identity(1), JOB)
    with pytest.raises(StoreError, match="cancelled"):
        attempt.part(0).write(memory.catalog, memory.read, cancelled=lambda: memory.reads >= 9)
    assert 0 < store.back_end.open(data_file(checkpoint(identity(1)), 0, 0)).size < 16 * 2**20
    assert store.checkpoints() == []
    attempt.abort()
    assert store.back_end.list(()) == []


def test_a_server_that_dies_is_named_and_waited_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3Server()
    try:
        store = Store.open(server.uri("run"), create=True)
        memory = Memory(tensors())
        attempt = store.writer(identity(1), JOB)
        part = attempt.part(0).write(memory.catalog, memory.read)
    finally:
        server.stop()
    with pytest.raises(StoreError, match=r"s3://checkpoints/run/step-.*/objects.msgpack: look up: .*connect"):
        attempt.commit([part], {})
