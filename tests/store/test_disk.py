"""One contract for every Disk: the real one and its simulated twin pass the same tests."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path as LocalPath

import pytest

from ckptd.core.errors import CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.tiers.store.backend import Entry, OutputFile
from ckptd.tiers.store.disk import Disk
from ckptd.tiers.store.files import FileBackEnd, discard_file, read_file, remove_tree, write_file
from ckptd.tiers.store.posix import STAGING_BYTES, PosixDisk, open_root
from tests.simulated_disk import SimulatedDisk


@pytest.fixture(params=["posix", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: LocalPath) -> Disk:
    return PosixDisk(str(tmp_path)) if request.param == "posix" else SimulatedDisk()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [4096], [4095, 2], [100, 8192, 5], [STAGING_BYTES, 3], [70000] * 3, [STAGING_BYTES - 1, 2]]
)
def test_what_is_written_is_read(disk: Disk, large: bool, sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    file = disk.create(("file",), large=large)
    for piece in pieces:
        file.write(memoryview(piece))
    file.sync()
    file.close()
    file.close()
    assert read_file(disk, ("file",), 2**30) == b"".join(pieces)


def test_a_file_is_created_once(disk: Disk) -> None:
    write_file(disk, ("file",), b"one")
    with pytest.raises(StoreError, match="exists"):
        disk.create(("file",))
    assert read_file(disk, ("file",), 3) == b"one"


def test_directories(disk: Disk) -> None:
    disk.make_directory(("directory",))
    with pytest.raises(StoreError, match="exists"):
        disk.make_directory(("directory",))
    write_file(disk, ("directory", "file"), b"")
    assert disk.list_directory(()) == [Entry("directory", True)]
    assert disk.list_directory(("directory",)) == [Entry("file", False)]
    disk.sync_directory(("directory",))
    with pytest.raises(StoreError, match="not empty"):
        disk.remove_directory(("directory",))
    disk.unlink(("directory", "file"))
    disk.remove_directory(("directory",))
    assert disk.list_directory(()) == []


def test_a_file_is_no_directory_that_exists(disk: Disk) -> None:
    write_file(disk, ("name",), b"")
    with pytest.raises(StoreError, match=r"name.*exists"):
        FileBackEnd(disk).make_directory(("name",), exist_ok=True)


@pytest.mark.parametrize(
    "act",
    [
        lambda disk: disk.open(("missing",)),
        lambda disk: disk.create(("missing", "file")),
        lambda disk: disk.rename(("missing",), ("other",)),
        lambda disk: disk.list_directory(("missing",)),
        lambda disk: disk.sync_directory(("missing",)),
        lambda disk: disk.unlink(("missing",)),
        lambda disk: disk.remove_directory(("missing",)),
    ],
)
def test_what_is_missing_is_named(disk: Disk, act: Callable[[Disk], object]) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        act(disk)


def test_a_directory_is_not_a_file_nor_the_other_way(disk: Disk) -> None:
    disk.make_directory(("directory",))
    write_file(disk, ("file",), b"")
    with pytest.raises(FormatError, match="regular file"):
        disk.open(("directory",))
    with pytest.raises(FormatError, match="ENOTDIR"):
        disk.open(("file", "inner"))


def test_reading_past_the_end_is_corruption(disk: Disk) -> None:
    write_file(disk, ("file",), b"12345")
    file = disk.open(("file",))
    into = bytearray(4)
    file.read_into(1, memoryview(into))
    assert (file.size, into) == (5, b"2345")
    with pytest.raises(CorruptionError, match="truncated"):
        file.read_into(2, memoryview(into))
    file.close()
    with pytest.raises(FormatError, match="expected at most 4"):
        read_file(disk, ("file",), 4)


def test_renaming_replaces_and_removing_takes_everything(disk: Disk) -> None:
    disk.make_directory(("tree",))
    for content in (b"one", b"two"):
        write_file(disk, ("tree", "new"), content)
        disk.rename(("tree", "new"), ("tree", "file"))
        assert read_file(disk, ("tree", "file"), 3) == content
    assert disk.list_directory(("tree",)) == [Entry("file", False)]
    discard_file(disk, ("tree", "missing"))
    remove_tree(disk, ("tree",))
    remove_tree(disk, ("tree",))
    assert disk.list_directory(()) == []


def test_modes_links_and_devices(tmp_path: LocalPath) -> None:
    disk = open_root(str(tmp_path / "parent" / "root"), create=True)
    disk.make_directory(("directory",))
    write_file(disk, ("directory", "file"), b"secret")
    root = tmp_path / "parent" / "root"
    assert (root.stat().st_mode & 0o777, (root / "directory").stat().st_mode & 0o777) == (0o700, 0o700)
    assert (root / "directory" / "file").stat().st_mode & 0o777 == 0o600
    (root / "link").symlink_to(root / "directory" / "file")
    (root / "way").symlink_to(root / "directory")
    os.mkfifo(root / "pipe")
    for path in [("link",), ("way", "file"), ("pipe",)]:
        with pytest.raises(FormatError, match=path[0]):
            disk.open(path)
    with pytest.raises(FormatError):
        disk.list_directory(("way",))
    disk.make_directory(("tree",))
    (root / "tree" / "way").symlink_to(root / "directory")
    remove_tree(disk, ("tree",))
    assert (root / "directory" / "file").read_bytes() == b"secret"


def test_a_missing_root_is_not_made_by_reading(tmp_path: LocalPath) -> None:
    with pytest.raises(NotFoundError, match="expected a store"):
        open_root(str(tmp_path / "none"), create=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotFoundError):
        open_root(str(tmp_path / "file"), create=True)


@pytest.mark.parametrize("call", ["writev", "fsync", "ftruncate"])
def test_a_failure_is_final(tmp_path: LocalPath, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Linux forgets what a failed fsync was to write: repeating it succeeds and lies."""

    def fail(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    file: OutputFile = PosixDisk(str(tmp_path)).create(("file",), large=True)
    file.write(bytes(5000))
    monkeypatch.setattr(os, call, fail)
    if call == "ftruncate" and not getattr(file, "_direct", False):
        pytest.skip("no O_DIRECT here")
    with pytest.raises(StoreError, match=r"file: sync: No space left on device \(ENOSPC\)"):
        file.sync()
    monkeypatch.undo()
    for again in (file.sync, lambda: file.write(b"x")):
        with pytest.raises(StoreError, match="given up"):
            again()
    file.close()


def test_a_refused_direct_write_goes_through_the_cache(tmp_path: LocalPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems accept O_DIRECT and then refuse writes with EINVAL."""
    genuine = os.writev
    refused = []

    def refuse_once(descriptor: int, data: list[memoryview]) -> int:
        if not refused:
            refused.append(sum(map(len, data)))
            raise OSError(22, "Invalid argument")
        return genuine(descriptor, data)

    file = PosixDisk(str(tmp_path)).create(("file",), large=True)
    if not file._direct:
        pytest.skip("no O_DIRECT here")
    monkeypatch.setattr(os, "writev", refuse_once)
    content = os.urandom(5001)
    file.write(content)
    file.sync()
    file.close()
    assert refused == [8192]
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("most", [None, 4096, 5000, 300_000])
def test_large_pieces_are_written_from_where_they_are(
    tmp_path: LocalPath, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    """Between small ones, at the start of a page or not; also where each call writes less than it was given."""
    genuine = os.writev
    staged: list[int] = []

    def short(descriptor: int, data: list[memoryview]) -> int:
        staged.append(len(data[0]))
        given = b"".join(data)
        return genuine(descriptor, data if most is None else [given[:most]])

    memory = memoryview(mmap.mmap(-1, 2**20))
    memory[:] = os.urandom(len(memory))
    page, odd = memory[:600_000], memory[100:500_100]
    pieces = [page, bytes(-len(page) % 4096), page, b"small", odd, bytes(4096), page[:300_000], b"x"]
    file = PosixDisk(str(tmp_path)).create(("file",), large=True)
    monkeypatch.setattr(os, "writev", short)
    for piece in pieces:
        file.write(piece)
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    if most is None:
        assert staged[:2] == [0, 4096], "what was staged goes out before, in the same call"
