"""The back end of files: small whole files, names given late, and whole trees, in terms of a Disk.

Works the same on the real and the simulated disk. Decides no order beyond that of one file: the writer does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ckptd.core.errors import FormatError, NotFoundError, StoreError
from ckptd.tiers.store.backend import Entry, InputFile, OutputFile, Path, Readable
from ckptd.tiers.store.disk import Disk

_MAX_DEPTH = 8


class FileBackEnd:
    """See `BackEnd`. A file has its name at once, and is durable once it and its directory are synced."""

    parallel = 1

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def describe(self, path: Path) -> str:
        return self._disk.describe(path)

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        try:
            self._disk.make_directory(path)
        except StoreError:  # another node may have been faster
            if not exist_ok or Entry(path[-1], True) not in self._disk.list_directory(path[:-1]):
                raise

    def create(self, path: Path) -> OutputFile:
        return self._disk.create(path, large=True)

    def write(self, path: Path, data: bytes) -> None:
        write_file(self._disk, path, data)

    def prepare(self, path: Path, temporary: Path, data: bytes) -> Callable[[], None]:
        write_file(self._disk, temporary, data)
        return lambda: self._disk.rename(temporary, path)

    def confirm(self, path: Path, temporary: Path, data: bytes) -> None:
        self.discard(temporary)
        self.prepare(path, temporary, data)()
        self.settle(path[:-1])

    def link(self, source: Path, target: Path, length: int) -> bool:
        try:
            self._disk.link(source, target)
        except (StoreError, NotFoundError, FormatError):  # pruned; another file system; one without links
            return False
        with contextlib.suppress(StoreError, NotFoundError, FormatError):
            if size_of(self, target) == length:
                return True
        self.discard(target)
        return False

    def settle(self, path: Path) -> None:
        self._disk.sync_directory(path)

    def open(self, path: Path) -> InputFile:
        return self._disk.open(path)

    def list(self, path: Path) -> list[Entry]:
        return self._disk.list_directory(path)

    def discard(self, path: Path) -> None:
        discard_file(self._disk, path)

    def remove_tree(self, path: Path) -> None:
        remove_tree(self._disk, path)


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """A new file with synced contents. Its name is durable once its directory is synced."""
    with contextlib.closing(disk.create(path)) as file:
        file.write(data)
        file.sync()


def read_file(place: Readable, path: Path, limit: int) -> bytes:
    """The contents of a file of at most `limit` bytes; a longer one is a FormatError before anything is allocated."""
    with contextlib.closing(place.open(path)) as file:
        if file.size > limit:
            raise FormatError(f"{place.describe(path)}: {file.size} bytes; expected at most {limit}")
        data = bytearray(file.size)
        file.read_into(0, memoryview(data))
    return bytes(data)


def size_of(place: Readable, path: Path) -> int:
    """Bytes of a file."""
    with contextlib.closing(place.open(path)) as file:
        return file.size


def discard_file(disk: Disk, path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(NotFoundError):
        disk.unlink(path)


def remove_tree(disk: Disk, path: Path, depth: int = 0) -> None:
    """Removes a directory with all that is in it. What somebody else removes meanwhile is no error."""
    if depth > _MAX_DEPTH:
        raise FormatError(f"{disk.describe(path)}: directories nested more than {_MAX_DEPTH} deep; remove it by hand")
    with contextlib.suppress(NotFoundError):
        for name, is_directory in disk.list_directory(path):
            if is_directory:
                remove_tree(disk, (*path, name), depth + 1)
            else:
                discard_file(disk, (*path, name))
        disk.remove_directory(path)
