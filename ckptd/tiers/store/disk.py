"""The seam between the store and a file system: the few operations that commit and prune are built from.

Paths are tuples of names below the store's root, made from integers by `names`; () is the root. All operations raise
NotFoundError for what does not exist, FormatError for what is of another kind (a link, a device), and StoreError,
naming path and reason, for everything else. `PosixDisk` is the real one; the tests have a simulated twin that loses
what was not synced, and both pass one contract suite (tests/store/test_disk.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

Path = tuple[str, ...]


class Entry(NamedTuple):
    """A name in a directory, and whether it is a directory itself (a link to one is not)."""

    name: str
    is_directory: bool


class OutputFile(Protocol):
    """A file being written, once, from its beginning."""

    def write(self, data: bytes | memoryview) -> None:
        """Appends."""

    def sync(self) -> None:
        """Makes contents and length durable; nothing may be written after. If it fails it has failed for good: every
        later call raises too."""

    def close(self) -> None:
        """Gives up the descriptor; idempotent, never raises. Promises nothing about the contents."""


class InputFile(Protocol):
    """A file being read; safe in threads."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def modified(self) -> float:
        """When it was last written, in seconds since 1970: for people, never for decisions."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`; a file that ends before is a CorruptionError."""

    def close(self) -> None:
        """Gives up the descriptor; idempotent."""


class Disk(Protocol):
    """A directory tree that may lose power."""

    def describe(self, path: Path) -> str:
        """The path as a person would write it, for messages."""

    def create(self, path: Path, *, large: bool = False) -> OutputFile:
        """A new file, 0600; one that exists is a StoreError. `large`: will be written in large pieces."""

    def open(self, path: Path) -> InputFile:
        """A regular file, for reading."""

    def rename(self, source: Path, target: Path) -> None:
        """Renames a file within one directory, replacing `target`."""

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable. A failure is final, as for files."""

    def list_directory(self, path: Path) -> list[Entry]:
        """Everything in a directory, in no order."""

    def make_directory(self, path: Path) -> None:
        """A new directory, 0700; one that exists is a StoreError."""

    def unlink(self, path: Path) -> None:
        """Removes a file or link."""

    def remove_directory(self, path: Path) -> None:
        """Removes an empty directory."""
