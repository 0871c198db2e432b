"""Small whole files and whole trees, in terms of a Disk: write durably, publish by renaming, read with a limit, remove.

Works the same on the real and the simulated disk; decides no order beyond that of one file.
"""

from __future__ import annotations

import contextlib

from ckptd.core.errors import FormatError, NotFoundError
from ckptd.tiers.store.disk import Disk, Path

_MAX_DEPTH = 8


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """A new file with synced contents. Its name is durable once its directory is synced."""
    with contextlib.closing(disk.create(path)) as file:
        file.write(data)
        file.sync()


def publish_file(disk: Disk, temporary: Path, path: Path, data: bytes) -> None:
    """A new file that has its whole contents from the moment it has its name. A leftover `temporary` is replaced."""
    discard_file(disk, temporary)
    write_file(disk, temporary, data)
    disk.rename(temporary, path)


def read_file(disk: Disk, path: Path, limit: int) -> bytes:
    """The contents of a file of at most `limit` bytes; a longer one is a FormatError before anything is allocated."""
    with contextlib.closing(disk.open(path)) as file:
        if file.size > limit:
            raise FormatError(f"{disk.describe(path)}: {file.size} bytes; expected at most {limit}")
        data = bytearray(file.size)
        file.read_into(0, memoryview(data))
    return bytes(data)


def discard_file(disk: Disk, path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(NotFoundError):
        disk.unlink(path)


def make_directory(disk: Disk, path: Path) -> None:
    """Creates a directory, unless it is there."""
    if not any(entry.name == path[-1] and entry.is_directory for entry in disk.list_directory(path[:-1])):
        disk.make_directory(path)


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
