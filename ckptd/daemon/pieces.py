"""What the ranks of a job have said that their states consist of, as bytes that only they read.

Owns what this node's ranks have said, and the one descriptor in which every rank gets what all have: made once, however
many ranks ask for it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping

import msgspec

from ckptd.tiers.memory import SEALS


class Pieces:
    """See the module docstring."""

    def __init__(self) -> None:
        self._said: dict[int, bytes] = {}
        self._book: tuple[int, int] | None = None

    def take(self, rank: int, descriptor: int) -> None:
        """What a rank has said; closes the descriptor."""
        try:
            self._said[rank] = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        finally:
            os.close(descriptor)
        self._forget()

    def of(self, ranks: Iterable[int]) -> dict[int, bytes]:
        """What these ranks have said, as far as they have."""
        return {rank: self._said[rank] for rank in ranks if rank in self._said}

    def book(self, generation: int, said: Mapping[int, bytes]) -> int:
        """A descriptor with what all have said, in rank order, for this generation. Stays this object's."""
        if self._book is None or self._book[0] != generation:
            self._forget()
            content = msgspec.msgpack.encode([said[rank] for rank in sorted(said)])
            descriptor = os.memfd_create("ckptd-plan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.write(descriptor, content)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_WRITE)
            self._book = generation, descriptor
        return self._book[1]

    def _forget(self) -> None:
        if self._book is not None:
            os.close(self._book[1])
            self._book = None
