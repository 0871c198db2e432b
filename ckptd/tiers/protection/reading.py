"""Reading strings that are lost here: copied from who has them whole, else decoded row by row from any k positions.

Invariants: what is delivered is what the seal record of the string's owner says, piece by piece; a source that fails is
not asked again, one that is corrupt is avoided where it is; only when fewer than k positions are left is there an
UnrecoverableError, which says who is missing and why - or a DaemonError, where some of them are on nodes that could not
be reached: they may be there another time. Memory: WORKERS rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ckptd.core.errors import CorruptionError, DaemonError, DeadlineError, UnrecoverableError
from ckptd.plan.stripe import PIECE_BYTES, Read, Source
from ckptd.tiers.peers import Cancellation, Throttle
from ckptd.tiers.protection.coding import decode
from ckptd.tiers.protection.group import Fetcher, Holders, SealedGroup, SourceError
from ckptd.tiers.protection.work import WORKERS, Buffers, stop_if, together

Deliver = Callable[[int, memoryview], None]
"""(offset in the string, bytes): called by several threads, never twice for the same place."""

Avoided = frozenset[tuple[str, tuple[int, bool]]]
"""Nodes, and what of whom they should not be asked for."""


class Reading:
    """One read of one member's string."""

    def __init__(
        self,
        sealed: SealedGroup,
        number: int,
        holders: Holders,
        fetcher: Fetcher,
        buffers: Buffers,
        throttle: Throttle,
    ) -> None:
        self._sealed, self._number, self._holders = sealed, number, holders
        self._fetcher, self._buffers, self._throttle = fetcher, buffers, throttle
        self._lock = threading.Lock()
        self._failed: Avoided = frozenset()
        self._why: dict[str, Exception] = {}

    def run(self, start: int, stop: int, deliver: Deliver, cancellation: Cancellation | None) -> None:
        """Delivers the whole pieces that [start, stop) touches."""
        whole = self._sealed.records[self._number].size
        first = start // PIECE_BYTES * PIECE_BYTES
        last = min(-(-stop // PIECE_BYTES) * PIECE_BYTES, whole)
        reads = deque(self._plan(first, last - first, self._failed))

        def work(stop: Cancellation) -> None:
            while True:
                with self._lock:
                    read = reads.popleft() if reads else None
                if read is None:
                    return
                self._read(read, deliver, stop)

        together([work] * min(WORKERS, max(len(reads), 1)), cancellation)

    def _plan(self, offset: int, size: int, avoided: Avoided) -> list[Read]:
        def lost(is_string: bool) -> set[int]:
            numbers = self._sealed.group.nodes
            return {number for number in numbers if self._node(number, is_string, avoided) is None}

        try:
            return self._sealed.striping.read(self._number, offset, size, lost(True), lost(False))
        except UnrecoverableError as error:
            why = "".join(f"; {reason}" for reason in self._why)
            unreached = any(isinstance(failure, DaemonError | DeadlineError) for failure in self._why.values())
            kind = DaemonError if unreached else UnrecoverableError
            raise kind(f"{self._sealed.snapshot}, string {self._number}: {error}{why}") from None

    def _node(self, number: int, is_string: bool, avoided: Avoided) -> str | None:
        """Who is asked for something of a member: this node if it can, else the first that has not failed."""
        held = (self._holders.strings if is_string else self._holders.parities).get(number, ())
        left = [node for node in held if (node, (number, is_string)) not in avoided]
        return min(left, key=lambda node: node != self._fetcher.own, default=None)

    def _read(self, read: Read, deliver: Deliver, stop: Cancellation) -> None:
        """One planned read; piece by piece once a piece of it was found to be corrupt."""
        avoided = self._failed
        while True:
            stop_if(stop, f"reading string {self._number} of {self._sealed.snapshot}")
            (read,) = self._plan(read.offset, read.size, avoided | self._failed)
            try:
                return self._attempt(read, avoided | self._failed, deliver, stop)
            except SourceError as failure:
                stop_if(stop, f"reading string {self._number} of {self._sealed.snapshot}")
                with self._lock:
                    self._why[str(failure)] = failure.error
                if not isinstance(failure.error, CorruptionError):
                    with self._lock:
                        self._failed |= {(failure.node, failure.place)}
                elif read.size <= PIECE_BYTES:
                    avoided |= {(failure.node, failure.place)}
                else:
                    for start in range(read.offset, read.offset + read.size, PIECE_BYTES):
                        size = min(PIECE_BYTES, read.offset + read.size - start)
                        for piece in self._plan(start, size, self._failed):
                            self._read(piece, deliver, stop)
                    return

    def _attempt(self, read: Read, avoided: Avoided, deliver: Deliver, stop: Cancellation) -> None:
        wanted = [(self._asked(source, avoided), source) for source in read.sources]
        with self._buffers.some(len(wanted) + 1) as (target, *buffers):
            sources = self._fetcher.fetch(self._sealed, wanted, buffers, stop)
            if [source.position for source in read.sources] == [read.position]:
                return deliver(read.offset, sources[0][: read.size].data)
            before = time.thread_time()
            found = target[: read.size]
            crc = decode([source.position for source in read.sources], read.position, sources, found)
            first = read.offset // PIECE_BYTES
            wrong = np.flatnonzero(crc != self._sealed.records[self._number].crc[first : first + len(crc)])
            if len(wrong):
                self._blame(wanted, first + int(wrong[0]))
            deliver(read.offset, found.data)
            self._throttle.spent(time.thread_time() - before)

    def _asked(self, source: Source, avoided: Avoided) -> str:
        """Padding is asked of nobody."""
        node = self._node(source.node, source.position < self._sealed.group.data_count, avoided)
        return node or self._fetcher.own

    def _blame(self, wanted: list[tuple[str, Source]], piece: int) -> None:
        """Strings were compared with their records: what is wrong is a parity, though it is what its holder made."""
        k = self._sealed.group.data_count
        node, source = next((node, source) for node, source in wanted if source.position >= k and source.size)
        error = CorruptionError(f"its parity does not give back piece {piece} of string {self._number}")
        raise SourceError(node, (source.node, False), error)
