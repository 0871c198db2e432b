"""Parity areas: memory for the parities that a node holds of one snapshot, which outlives the daemon.

    page 0      geometry: room for parities and for their checksums; written once
    page 1-16   two state records, written in turn: of which snapshot the parities are (none while they are made), in
                which group, of strings of which sizes, held by which member
    checksums   CRC-32C of each piece of each parity, parity by parity; covered by the state record
    parities    parity t at t L (docs/erasure.md, section 3)

Invariants: a state record names a snapshot only while all parities of it are there, checksums included, so whatever is
torn is nothing; it is sealed against shrinking and growing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.errors import CorruptionError, FormatError
from ckptd.core.native import crc32c
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES, Group, Striping
from ckptd.tiers.arena import PAGE, aligned, read_record, write_record
from ckptd.tiers.memory import is_sealed, sealed_memory
from ckptd.tiers.peers import DescriptorSource, Extent, Fragments
from ckptd.tiers.peers.wire import MOST_STRING_BYTES

_GEOMETRY, _STATE = b"CKPTPGE1", b"CKPTPST1"
_STATE_BYTES = 8 * PAGE
_HEADER_BYTES = PAGE + 2 * _STATE_BYTES

Checksums = npt.NDArray[np.uint32]


class AreaState(msgspec.Struct, frozen=True):
    """What an area holds; `snapshot` None: nothing whole. `members`: the group, ascending; `sizes`: of their strings;
    `member`: the one whose parities these are."""

    snapshot: SnapshotId | None = None
    members: tuple[int, ...] = ()
    parity_count: int = 0
    sizes: tuple[int, ...] = ()
    member: int = 0
    checksums_crc: int = 0

    @property
    def striping(self) -> Striping:
        """The stripes of the group. Raises FormatError for numbers that make none."""
        if self.member not in self.members or max(self.sizes, default=0) >= MOST_STRING_BYTES:
            raise FormatError(f"parity area: member {self.member} of {self.members}, strings of {self.sizes} bytes")
        try:
            return Striping(Group(self.members, self.parity_count), self.sizes)
        except ValueError as error:
            raise FormatError(f"parity area: {error}") from None


class _Geometry(msgspec.Struct, frozen=True):
    parity_bytes: int

    @property
    def checksum_bytes(self) -> int:
        return aligned(4 * -(-self.parity_bytes // PIECE_BYTES))

    @property
    def size(self) -> int:
        return _HEADER_BYTES + self.checksum_bytes + aligned(self.parity_bytes)


def parity_lengths(striping: Striping, member: int) -> list[int]:
    """Bytes of each parity that a member holds."""
    n, place = len(striping.group.nodes), striping.group.nodes.index(member)
    return [striping.length((place - parity) % n) for parity in range(striping.group.parity_count)]


def pieces_of(size: int) -> int:
    """How many checksums so many bytes of a parity have."""
    return -(-size // PIECE_BYTES)


class ParityArea:
    """One area. Owns its descriptor. `create`d by a daemon, `open`ed by its successor."""

    def __init__(self, descriptor: int, geometry: _Geometry) -> None:
        self.descriptor = descriptor
        self._geometry = geometry

    @classmethod
    def create(cls, parity_bytes: int) -> ParityArea:
        """An area with room for `parity_bytes` (Striping.parity_bytes), all its memory allocated. Raises ConfigError
        where memory is short."""
        geometry = _Geometry(parity_bytes)
        descriptor = sealed_memory("ckptd-parity", geometry.size)
        write_record(descriptor, 0, _GEOMETRY, 1, msgspec.msgpack.encode(geometry))
        return cls(descriptor, geometry)

    @classmethod
    def open(cls, descriptor: int) -> ParityArea:
        """An area from a descriptor that a predecessor left, which it takes over unless it raises FormatError."""
        try:
            sealed = is_sealed(descriptor)
        except OSError as error:
            raise FormatError(f"parity area: the descriptor is not a memfd ({error.strerror})") from None
        found = read_record(descriptor, 0, _GEOMETRY, PAGE)
        if found is None or not sealed:
            raise FormatError("parity area: no valid geometry, or not sealed against shrinking and growing")
        try:
            geometry = msgspec.msgpack.decode(found[1], type=_Geometry)
        except msgspec.MsgspecError as error:
            raise FormatError(f"parity area: geometry: {error}") from None
        if geometry.parity_bytes < 0 or os.fstat(descriptor).st_size != geometry.size:
            raise FormatError(f"parity area: {os.fstat(descriptor).st_size} bytes, its geometry says {geometry.size}")
        return cls(descriptor, geometry)

    @property
    def parity_bytes(self) -> int:
        """Room for parities; what needs more needs another area."""
        return self._geometry.parity_bytes

    @property
    def memory_bytes(self) -> int:
        """Of the whole area."""
        return self._geometry.size

    # --- writing

    def begin(self) -> None:
        """From here on the area holds nothing whole."""
        if self._state().snapshot is not None:
            self._write_state(AreaState())

    def write(self, offset: int, data: memoryview) -> None:
        """Puts a part of a parity into its place; `offset` is that of a Source of the plan."""
        if offset < 0 or offset + len(data) > self.parity_bytes:
            raise ValueError(f"parity area of {self.parity_bytes} bytes: no room for [{offset}, {offset + len(data)})")
        start = self._base + offset
        while len(data):
            count = os.pwrite(self.descriptor, data, start)
            start, data = start + count, data[count:]

    def commit(self, snapshot: SnapshotId, striping: Striping, member: int, checksums: Sequence[Checksums]) -> None:
        """All parities of a member are there: `checksums` has the CRC-32C of each piece, for each parity."""
        lengths = parity_lengths(striping, member)
        if [len(crc) for crc in checksums] != [pieces_of(length) for length in lengths]:
            raise ValueError("parity area: other checksums than the parities have pieces")
        raw = b"".join(crc.astype("<u4").tobytes() for crc in checksums)
        os.pwrite(self.descriptor, raw, _HEADER_BYTES)
        group = striping.group
        self._write_state(AreaState(snapshot, group.nodes, group.parity_count, striping.sizes, member, crc32c(raw)))

    # --- reading

    def state(self) -> AreaState:
        """What the area holds now. Nothing, if its checksums are damaged: without them nobody can use it."""
        state = self._state()
        return AreaState() if state.snapshot is None or self._checksums(state) is None else state

    def sources(self) -> list[DescriptorSource]:
        """Each parity as others may read it, with the checksums that it should have. Raises CorruptionError if the area
        holds nothing."""
        state = self._state()
        raw = None if state.snapshot is None else self._checksums(state)
        if raw is None:
            raise CorruptionError("parity area: holds no whole parity")
        striping, made, first = state.striping, [], 0
        for parity, length in enumerate(parity_lengths(striping, state.member)):
            crc = np.frombuffer(raw, "<u4", pieces_of(length), 4 * first)
            offsets = np.minimum(np.arange(len(crc) + 1, dtype=np.int64) * PIECE_BYTES, length)
            extent = Extent(self.descriptor, self._base + parity * striping.segment_bytes, length)
            made.append(DescriptorSource([extent], Fragments(offsets, crc)))
            first += len(crc)
        return made

    def check(self, turn: Callable[[], None] = lambda: None) -> None:
        """Raises CorruptionError where parities or checksums are damaged. `turn` is called often."""
        copy = bytearray(PIECE_BYTES)
        for parity, source in enumerate(self.sources()):
            try:
                for start in range(0, source.size, PIECE_BYTES):
                    turn()
                    source.read(start, memoryview(copy)[: min(PIECE_BYTES, source.size - start)])
            except CorruptionError as error:
                raise CorruptionError(f"parity {parity} of {self._state().snapshot}: {error}") from None
            finally:
                source.close()

    def close(self) -> None:
        """The memory lives as long as somebody else holds it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def _base(self) -> int:
        return _HEADER_BYTES + self._geometry.checksum_bytes

    def _checksums(self, state: AreaState) -> bytes | None:
        """Of all parities, if they are what the state says."""
        lengths = parity_lengths(state.striping, state.member)
        if state.striping.parity_bytes > self.parity_bytes:
            return None
        raw = os.pread(self.descriptor, 4 * sum(map(pieces_of, lengths)), _HEADER_BYTES)
        return raw if crc32c(raw) == state.checksums_crc else None

    def _state(self) -> AreaState:
        newest = self._newest()
        try:
            return AreaState() if newest is None else msgspec.msgpack.decode(newest[1], type=AreaState)
        except msgspec.MsgspecError as error:
            raise FormatError(f"parity area: state: {error}") from None

    def _newest(self) -> tuple[int, bytes] | None:
        places = (PAGE + half * _STATE_BYTES for half in (0, 1))
        records = [read_record(self.descriptor, place, _STATE, _STATE_BYTES) for place in places]
        return max((record for record in records if record is not None), default=None)

    def _write_state(self, state: AreaState) -> None:
        newest = self._newest()
        sequence = 1 if newest is None else newest[0] + 1
        place = PAGE + _STATE_BYTES * (sequence % 2)
        write_record(self.descriptor, place, _STATE, sequence, msgspec.msgpack.encode(state))
