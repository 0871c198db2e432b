"""Encoding of one snapshot at one member: its own stripe, and its shares of the others' (docs/erasure.md, section 5).

Invariants
- Every piece that goes into a parity is what the seal record of its owner says.
- The area names the snapshot only when all its parities are complete.
- Memory: WORKERS rows of sources and parity 0, STAGED_ROWS rows of shares, one share that is being pulled, and the
  pieces of one row that is made again; whatever the string's size.
- Everything may be begun again at any time, here and at the others.
"""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np

from ckptd.core.errors import CkptdError, DaemonError, DeadlineError, NotFoundError
from ckptd.plan.stripe import PIECE_BYTES, Row, Source
from ckptd.tiers.peers import Cancellation, Throttle
from ckptd.tiers.protection.area import Checksums, ParityArea, parity_lengths, pieces_of
from ckptd.tiers.protection.coding import encode
from ckptd.tiers.protection.group import Fetcher, SealedGroup, SourceError
from ckptd.tiers.protection.shares import Shares
from ckptd.tiers.protection.work import ROW_BYTES, WORKERS, Buffers, Bytes, pause, together

RETRY_S = 0.05
COURTESY_S = 5.0
"""For questions whose answer only saves work."""


class Encoding:
    """One attempt. `names`: member number -> node; `patience_s`: how long a member that does not answer is asked."""

    def __init__(
        self,
        sealed: SealedGroup,
        number: int,
        names: dict[int, str],
        fetcher: Fetcher,
        buffers: Buffers,
        throttle: Throttle,
        patience_s: float,
    ) -> None:
        self._sealed, self._number, self._names = sealed, number, names
        self._fetcher, self._buffers, self._throttle = fetcher, buffers, throttle
        self._patience_s = patience_s
        self._striping = sealed.striping
        self._lengths = parity_lengths(self._striping, number)
        self._checksums = [np.zeros(pieces_of(length), np.uint32) for length in self._lengths]
        self._stopped = Cancellation()
        self._next = threading.Lock()
        self.shares = Shares(self._lengths[0], len(self._lengths) - 1, buffers, self._make_again, patience_s)

    def run(self, area: ParityArea, cancellation: Cancellation | None) -> None:
        """Fills the area. Raises what went wrong first; the area then holds nothing."""
        area.begin()
        rows = enumerate(self._striping.encoding(self._number))

        def work(stop: Cancellation) -> None:
            while True:
                with self._next:
                    index, row = next(rows, (0, None))
                if row is None:
                    return
                self._encode(index, row, area, stop)

        calls = [work] * min(WORKERS, max(self.shares.rows, 1))
        if self.shares.holders:
            calls += [lambda stop: self._collect(area, stop), self._ask_holders]
        together(calls, cancellation)
        area.commit(self._sealed.snapshot, self._striping, self._number, self._checksums)

    def close(self) -> None:
        """Shares are given no longer."""
        self._stopped.cancel()
        self.shares.close()

    # --- the own stripe

    def _encode(self, index: int, row: Row, area: ParityArea, stop: Cancellation) -> None:
        with self._buffers.some(len(row.sources) + 1) as (first, *buffers):
            sources = self._fetch(row.sources, buffers, stop)
            with self.shares.room(index, stop) as shares:
                before = time.thread_time()
                crc = encode(sources, [first, *shares], row.length)
            area.write(row.start, first[: row.length].data)
            self._put(0, row.start, crc[0])
            self._throttle.spent(time.thread_time() - before)

    def _fetch(self, sources: tuple[Source, ...], buffers: list[Bytes], stop: Cancellation) -> list[Bytes]:
        wanted = [(self._names[source.node], source) for source in sources]
        try:
            return self._fetcher.fetch(self._sealed, wanted, buffers, stop)
        except SourceError as error:
            raise error.error from None

    def _put(self, parity: int, start: int, crc: Checksums) -> None:
        first = start // PIECE_BYTES
        self._checksums[parity][first : first + len(crc)] = crc

    def _make_again(self, parity: int, offset: int) -> tuple[int, Bytes]:
        """A piece of a share that has gone: pulled and encoded anew."""
        start = offset // PIECE_BYTES * PIECE_BYTES
        row = self._striping.encoding_of(self._number, start, start + PIECE_BYTES)
        buffers = [np.empty(PIECE_BYTES, np.uint8) for _ in range(len(row.sources) + parity + 1)]
        found = self._fetch(row.sources, buffers[: len(row.sources)], self._stopped)
        encode(found, buffers[len(row.sources) :], row.length)
        return start, buffers[-1][: row.length]

    def _ask_holders(self, stop: Cancellation) -> None:
        """Who gives a parity of this snapshot has all of it, from an attempt before this one: it will not ask again."""
        members, answer = self._striping.group.nodes, bytearray(1)
        for parity in range(1, len(self._lengths)):
            holder = members[(members.index(self._number) + parity) % len(members)]
            with contextlib.suppress(CkptdError):
                peer = self._fetcher.peers[self._names[holder]]
                what = f"parity/{parity}"
                peer.pull(self._sealed.snapshot, what, 0, memoryview(answer), deadline_s=COURTESY_S, cancellation=stop)
                self.shares.is_ready(parity - 1, self.shares.rows)

    # --- the others' stripes

    def _collect(self, area: ParityArea, stop: Cancellation) -> None:
        """Pulls the own shares, row by row."""
        k = self._striping.group.data_count
        members = self._striping.group.nodes
        encoders = {t: members[(members.index(self._number) - t) % len(members)] for t in range(1, len(self._lengths))}
        with self._buffers.some(1) as (buffer,):
            for row in self._striping.shares(self._number):
                target = self._striping.parity_of(row, self._number)
                self._pull_share(row, target.position - k, buffer, stop)
                area.write(target.offset, buffer[: row.length].data)
        for parity, encoder in encoders.items():
            with contextlib.suppress(CkptdError):  # so that it need not keep the last rows
                self._ready(self._names[encoder], parity, -(-self._lengths[parity] // ROW_BYTES), stop, COURTESY_S)

    def _pull_share(self, row: Row, parity: int, buffer: Bytes, stop: Cancellation) -> None:
        """Asks as long as the encoder answers, and for a while if it does not: it may begin later, or again."""
        encoder, index = self._names[row.encoder], row.start // ROW_BYTES
        crc = np.zeros(pieces_of(row.length), np.uint32)
        target = buffer[: row.length].data
        silent_since_s: float | None = None
        while True:
            try:
                if self._ready(encoder, parity, index, stop):
                    peer = self._fetcher.peers[encoder]
                    what = f"share/{parity}"
                    peer.pull(self._sealed.snapshot, what, row.start, target, crc=crc, cancellation=stop)
                    return self._put(parity, row.start, crc)
                silent_since_s = None
            except (NotFoundError, DaemonError, DeadlineError) as error:
                now = time.monotonic()
                silent_since_s = now if silent_since_s is None else silent_since_s
                if stop.cancelled:
                    raise
                if now - silent_since_s > self._patience_s:
                    raise DeadlineError(
                        f"{self._sealed.snapshot}: node {encoder} gave no row {index} of parity {parity} for "
                        f"{self._patience_s:g} s: {error}"
                    ) from None
                pause(stop, RETRY_S)

    def _ready(self, encoder: str, parity: int, row: int, stop: Cancellation, deadline_s: float | None = None) -> bool:
        answer = bytearray(1)
        peer, what = self._fetcher.peers[encoder], f"ready/{parity}"
        peer.pull(self._sealed.snapshot, what, row, memoryview(answer), deadline_s=deadline_s, cancellation=stop)
        return answer[0] == 1
