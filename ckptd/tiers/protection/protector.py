"""What a daemon does to protect snapshots in one epoch, when it is told to: describe, encode, rebuild, read, verify.

Owns what this node gives to others of each snapshot. Decides nothing: what is to be protected, when to try again and
what is freed are decided by the state machine (docs/protocol.md, section 11).

Invariants: methods block, may be called by several threads, and end soon after their cancellation (DaemonError); all
may be repeated. Before memory is freed or written again, what works on it is cancelled and has returned, and `withdraw`
was called.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from ckptd.core.errors import CorruptionError
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.protocol.cluster.facts import Part
from ckptd.tiers.arena import Slot
from ckptd.tiers.peers import Cancellation, DescriptorSource, Peers, Source, Sources, Throttle, string_of
from ckptd.tiers.protection.area import ParityArea
from ckptd.tiers.protection.encoding import Encoding
from ckptd.tiers.protection.group import Fetcher, Holders, SealedGroup
from ckptd.tiers.protection.reading import Reading
from ckptd.tiers.protection.record import SealRecord, damaged_pieces, describe
from ckptd.tiers.protection.work import Buffers, turns

PATIENCE_S = 30.0
"""How long a member that does not answer is asked for its shares, and one that does not ask is waited for."""


class Protector:
    """One node's part. `own`: its name; `members`: number -> name of the epoch's members, for encoding."""

    def __init__(
        self,
        own: str,
        members: Mapping[int, str],
        peers: Peers,
        sources: Sources,
        throttle: Throttle,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.buffers = Buffers()
        self._members = dict(members)
        self._sources, self._throttle = sources, throttle
        self._fetcher = Fetcher(own, peers, sources)
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._given: dict[tuple[SnapshotId, Part], list[str]] = {}
        self._encodings: dict[SnapshotId, Encoding] = {}

    # --- what others may read

    def give_string(self, snapshot: SnapshotId, slots: Sequence[Slot], record: SealRecord) -> None:
        """Others may pull this node's string."""
        self._give(snapshot, "data", {"string": DescriptorSource(string_of(slots), record.fragments)})

    def give_parity(self, area: ParityArea) -> None:
        """Others may pull the parities of the snapshot that an area holds. `encode` does it by itself. Raises
        CorruptionError where it holds none."""
        sources = area.sources()
        snapshot = area.state().snapshot
        assert snapshot is not None
        self._give(snapshot, "parity", {f"parity/{parity}": source for parity, source in enumerate(sources)})

    def give_shares(self, sealed: SealedGroup, number: int) -> None:
        """Others may pull the parities that this node, member `number`, has to make for them, though its own are made
        long since: somebody new holds them now."""
        encoding = self._encoding(sealed, number)
        encoding.shares.is_made()
        with self._lock:
            self._encodings[sealed.snapshot] = encoding
        self._give(sealed.snapshot, "parity", encoding.shares.sources())

    def withdraw(self, snapshot: SnapshotId, part: Part) -> None:
        """Others get it no longer; returns when nobody reads it. Idempotent."""
        with self._lock:
            names = self._given.pop((snapshot, part), [])
            encoding = self._encodings.pop(snapshot, None) if part == "parity" else None
        if encoding is not None:
            encoding.close()
        for name in names:
            self._sources.withdraw(snapshot, name)

    def close(self) -> None:
        """Withdraws everything."""
        with self._lock:
            given = list(self._given)
        for snapshot, part in given:
            self.withdraw(snapshot, part)
        self.buffers.trim()

    # --- actions

    def describe(
        self, snapshot: SnapshotId, slots: Sequence[Slot], cancellation: Cancellation | None = None
    ) -> SealRecord:
        """The seal record of this node's string, all checksums of capture verified. Raises CorruptionError."""
        return describe(snapshot, slots, cancellation)

    def encode(
        self, sealed: SealedGroup, number: int, area: ParityArea, cancellation: Cancellation | None = None
    ) -> None:
        """Fills the area (of at least `sealed.striping.parity_bytes`) with the parities of member `number`, this node,
        and gives them; returns when they are complete. Shares for others are given from the beginning until `withdraw`.
        """
        self.withdraw(sealed.snapshot, "parity")
        encoding = self._encoding(sealed, number)
        with self._lock:
            self._encodings[sealed.snapshot] = encoding
        try:
            self._give(sealed.snapshot, "parity", encoding.shares.sources())
            encoding.run(area, cancellation)
            self.give_parity(area)
        except BaseException:
            self.withdraw(sealed.snapshot, "parity")
            raise

    def rebuild(
        self, sealed: SealedGroup, number: int, holders: Holders, cancellation: Cancellation | None = None
    ) -> list[Slot]:
        """The string of a member in new memory, as slots. Raises UnrecoverableError; DaemonError if too many nodes
        cannot be reached; ConfigError if memory is short."""
        memory = sealed.records[number].make_slots()
        try:
            reading = self._reading(sealed, number, holders)
            reading.run(0, sealed.records[number].size, memory.extents.write, cancellation)
            return memory.open(sealed.snapshot)
        finally:
            memory.close()

    def read(
        self,
        sealed: SealedGroup,
        number: int,
        holders: Holders,
        offset: int,
        into: memoryview,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Fills `into` from an offset of a member's string, copying or decoding only the pieces that it touches. Raises
        UnrecoverableError; DaemonError if too many nodes cannot be reached."""
        if not len(into):
            return

        def deliver(start: int, piece: memoryview) -> None:
            first, last = max(start, offset), min(start + len(piece), offset + len(into))
            into[first - offset : last - offset] = piece[first - start : last - start]

        self._reading(sealed, number, holders).run(offset, offset + len(into), deliver, cancellation)

    def verify_string(
        self, snapshot: SnapshotId, slots: Sequence[Slot], record: SealRecord, cancellation: Cancellation | None = None
    ) -> None:
        """Raises CorruptionError where a string is not what its seal record says."""
        turn = turns(self._throttle, cancellation, f"verifying the string of {snapshot}")
        wrong = damaged_pieces(slots, record, turn)
        if wrong:
            raise CorruptionError(
                f"{snapshot}: {len(wrong)} of {len(record.crc)} pieces of {PIECE_BYTES} bytes differ from the seal "
                f"record, the first is number {wrong[0]}"
            )

    def verify_parity(self, area: ParityArea, cancellation: Cancellation | None = None) -> None:
        """Raises CorruptionError where an area is not what its checksums say."""
        area.check(turns(self._throttle, cancellation, "verifying a parity"))

    def _encoding(self, sealed: SealedGroup, number: int) -> Encoding:
        names = {member: self._members[member] for member in sealed.group.nodes}
        return Encoding(sealed, number, names, self._fetcher, self.buffers, self._throttle, self._patience_s)

    def _reading(self, sealed: SealedGroup, number: int, holders: Holders) -> Reading:
        return Reading(sealed, number, holders, self._fetcher, self.buffers, self._throttle)

    def _give(self, snapshot: SnapshotId, part: Part, sources: Mapping[str, Source]) -> None:
        for name, source in sources.items():
            self._sources.register(snapshot, name, source)
            with self._lock:
                self._given.setdefault((snapshot, part), []).append(name)
