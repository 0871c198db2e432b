"""Parities that an encoder has made for others, row by row, until these have pulled them.

    ready/t   asking for byte r says: I hold parity t and want row r next, what comes before is safe with me. The answer
              is 1 once row r can be pulled, 0 where it is not encoded yet: ask again
    share/t   parity t of the encoder's stripe

Invariants
- At most STAGED_ROWS rows are kept. The encoder waits for holders that ask, so that one that is slow slows it down; one
  that has not asked for `patience_s` is not waited for.
- A row that is kept no longer is made again for who still asks: a holder may begin anew at any time.
- No cycle of waiting: who wants row r of one encoder has all rows below r of all its encoders, and an encoder waits at
  row r only for who wants less than r - 1.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from ckptd.core.errors import NotFoundError
from ckptd.core.native import address_of, copy_bytes, crc32c
from ckptd.tiers.peers import Cancellation
from ckptd.tiers.protection.work import ROW_BYTES, Buffers, Bytes, stop_if

STAGED_ROWS = 2
READY_WAIT_S = 0.5
"""What an answer may wait for: it has a thread and a buffer of the server's meanwhile."""

Again = Callable[[int, int], tuple[int, Bytes]]
"""(parity, offset in it) -> where the piece begins that has it, and its bytes."""


class Shares:
    """See the module docstring. `length`: bytes of each parity; `holders`: how many others hold one, 1 and up."""

    def __init__(self, length: int, holders: int, buffers: Buffers, again: Again, patience_s: float) -> None:
        self.rows = -(-length // ROW_BYTES)
        self.length = length
        self.holders = holders
        self._buffers = buffers
        self._again = again
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._wanted = [0] * holders
        self._heard_s = [time.monotonic()] * holders
        self._encoded: set[int] = set()
        self._kept: dict[int, list[Bytes]] = {}
        self._making_again = threading.Lock()
        self._made_again: dict[int, tuple[int, Bytes]] = {}
        self._closed = False

    # --- the encoder's side

    @contextlib.contextmanager
    def room(self, row: int, cancellation: Cancellation) -> Iterator[list[Bytes]]:
        """Buffers for the shares of a row, as soon as those of earlier rows have gone. Given when it ends well."""
        with cancellation.stopping(self._wake), self._changed:
            while self._awaited() <= row - STAGED_ROWS and not cancellation.cancelled:
                self._changed.wait(READY_WAIT_S)
            stop_if(cancellation, f"encoding row {row}")
            self._drop(row - STAGED_ROWS + 1)
        shares = [self._buffers.take() for _ in range(self.holders)]
        try:
            yield shares
        except BaseException:
            self._buffers.give(shares)
            raise
        with self._changed:
            self._encoded.add(row)
            self._kept[row] = shares
            self._drop(self.rows if self._closed else min(self._wanted, default=self.rows))
            self._changed.notify_all()

    def is_made(self) -> None:
        """Every row has been encoded before, and none is kept: each is made again for who asks."""
        with self._changed:
            self._encoded.update(range(self.rows))

    def close(self) -> None:
        """Answers nobody any more. Idempotent."""
        with self._changed:
            self._closed = True
            self._drop(self.rows)
            self._changed.notify_all()
        with self._making_again:
            self._made_again.clear()

    # --- the holders' side

    def is_ready(self, holder: int, row: int) -> bool:
        """What `ready` answers; waits a little for it."""
        until = time.monotonic() + READY_WAIT_S
        with self._changed:
            self._wanted[holder], self._heard_s[holder] = row, time.monotonic()
            self._drop(min(self._wanted))
            self._changed.notify_all()
            while row < self.rows and row not in self._encoded and not self._closed:
                if not self._changed.wait(until - time.monotonic()):
                    return False
            return not self._closed

    def read(self, holder: int, offset: int, into: memoryview) -> int:
        """Copies a part of one row of a holder's parity; its CRC-32C."""
        row, inside = divmod(offset, ROW_BYTES)
        with self._changed:
            self._heard_s[holder] = time.monotonic()
            kept = self._kept.get(row)
            if kept is not None:
                return copy_bytes(address_of(kept[holder]) + inside, into)
            if self._closed or row not in self._encoded:
                raise NotFoundError(f"row {row}: is not encoded yet")
        self._read_again(holder, offset, into)
        with self._changed:
            self._heard_s[holder] = time.monotonic()
        return crc32c(into)

    def sources(self) -> dict[str, ShareSource | ReadySource]:
        """Name -> what others read."""
        found: dict[str, ShareSource | ReadySource] = {}
        for holder in range(self.holders):
            found[f"share/{holder + 1}"] = ShareSource(self, holder)
            found[f"ready/{holder + 1}"] = ReadySource(self, holder)
        return found

    def _read_again(self, holder: int, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            with self._making_again:
                made = self._made_again.get(holder)
                if made is None or not made[0] <= offset + done < made[0] + len(made[1]):
                    made = self._made_again[holder] = self._again(holder + 1, offset + done)
                start, piece = made
                part = piece[offset + done - start : offset - start + len(into)]
                into[done : done + len(part)] = part.data
            done += len(part)

    def _awaited(self) -> int:
        """The first row that somebody who asks may still want."""
        now = time.monotonic()
        heard = zip(self._wanted, self._heard_s, strict=True)
        return min((row for row, then in heard if now - then < self._patience_s), default=self.rows)

    def _drop(self, row: int) -> None:
        """Keeps no row below this one."""
        for old in [kept for kept in self._kept if kept < row]:
            self._buffers.give(self._kept.pop(old))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class ShareSource:
    """A holder's parity, as a Source of tiers/peers."""

    def __init__(self, shares: Shares, holder: int) -> None:
        self.size = shares.length
        self._shares, self._holder = shares, holder

    def read(self, offset: int, into: memoryview) -> int:
        """Copies a part of one row."""
        return self._shares.read(self._holder, offset, into)

    def close(self) -> None:
        """Nothing is its own."""


class ReadySource:
    """What a holder asks; one byte for each row and one beyond, as a Source of tiers/peers."""

    def __init__(self, shares: Shares, holder: int) -> None:
        self.size = shares.rows + 1
        self._shares, self._holder = shares, holder

    def read(self, offset: int, into: memoryview) -> int:
        """One byte."""
        into[:] = bytes([self._shares.is_ready(self._holder, offset)]) * len(into)
        return crc32c(into)

    def close(self) -> None:
        """Nothing is its own."""
