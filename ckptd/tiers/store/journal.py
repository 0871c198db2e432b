"""Small files that say what is finished, each written when that is durable, for another process to go on from.

Used for a checkpoint that is written in several sittings (`resumable`), and for one that is written by several nodes
(`joint`). An entry is there whole or not at all: it ends in the SHA-256 of what it says. Entries are removed before
what they speak of is changed.
"""

from __future__ import annotations

import hashlib
import re

from ckptd.core.errors import FormatError, NotFoundError, StoreError
from ckptd.tiers.store.backend import BackEnd, Entry, Path
from ckptd.tiers.store.files import read_file

MAX_ENTRY_BYTES = 2**29

_SEAL_BYTES = 32
_NAME = re.compile(r"w[0-9]{5,6}")


class Journal:
    """A directory of entries, by number."""

    def __init__(self, back_end: BackEnd, path: Path) -> None:
        self._back_end = back_end
        self.path = path

    def create(self) -> None:
        """Makes the directory, if it is missing."""
        self._back_end.make_directory(self.path, exist_ok=True)

    def put(self, number: int, payload: bytes) -> None:
        """Writes an entry, durably, instead of one that may be there."""
        if len(payload) > MAX_ENTRY_BYTES - _SEAL_BYTES:
            described = self._back_end.describe(self._entry(number))
            raise StoreError(
                f"{described}: {len(payload)} bytes; at most {MAX_ENTRY_BYTES - _SEAL_BYTES}. Keep large objects of "
                "ranks in tensors"
            )
        self.discard(number)
        self._back_end.write(self._entry(number), payload + hashlib.sha256(payload).digest())
        self._back_end.settle(self.path)

    def get(self, number: int) -> bytes | None:
        """What an entry says; None where there is none that is whole."""
        try:
            data = read_file(self._back_end, self._entry(number), MAX_ENTRY_BYTES)
        except (NotFoundError, FormatError):
            return None
        payload, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        return payload if hashlib.sha256(payload).digest() == seal else None

    def discard(self, number: int) -> None:
        """Removes an entry, durably, if it is there."""
        if any(entry.name == self._entry(number)[-1] for entry in self._listed()):
            self._back_end.discard(self._entry(number))
            self._back_end.settle(self.path)

    def remove(self) -> None:
        """Removes everything, if it is there."""
        self._back_end.remove_tree(self.path)

    def numbers(self) -> list[int]:
        """Of the entries there are, whole or not."""
        return sorted(int(entry.name[1:]) for entry in self._listed() if _NAME.fullmatch(entry.name))

    def _listed(self) -> list[Entry]:
        try:
            return self._back_end.list(self.path)
        except NotFoundError:  # where directories are parts of names, there is none without files
            return []

    def _entry(self, number: int) -> Path:
        return (*self.path, f"w{number:05d}")
