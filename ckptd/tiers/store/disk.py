"""The seam between files and a file system: the few operations that commit and prune are built from.

`PosixDisk` is the real one; the tests have a simulated twin that loses what was not synced, and both pass one contract
suite (tests/store/test_disk.py). Errors are those of `backend`.
"""

from __future__ import annotations

from typing import Protocol

from ckptd.tiers.store.backend import Entry, OutputFile, Path, Readable


class Disk(Readable, Protocol):
    """A directory tree that may lose power."""

    def create(self, path: Path, *, large: bool = False) -> OutputFile:
        """A new file, 0600; one that exists is a StoreError. `large`: will be written in large pieces."""

    def rename(self, source: Path, target: Path) -> None:
        """Renames a file within one directory, replacing `target`."""

    def link(self, source: Path, target: Path) -> None:
        """Gives a file a second name; one that exists is a StoreError, as is a disk that has no second names."""

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
