"""Seal records: what a node's string of one snapshot consists of, with a checksum of each piece.

Owns their bytes, the one pass over the memory that makes them, and the check of a string against one. A record is
enough to make memory of the right sizes and to cut a string into slots again; it names no other node and is made before
anybody's size is known.

Invariants: memory is copied out block by block and only the copies are looked at; a record is made only of a string in
which each chunk has the checksum that it was captured with; decoding is strict, and allocates no more than it is given.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.errors import CorruptionError, FormatError
from ckptd.core.native import crc32c, crc32c_combine
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.arena import FROZEN_FILE, MAX_SLOT_BYTES, PAGE, Slot
from ckptd.tiers.memory import sealed_memory
from ckptd.tiers.peers import Cancellation, Extent, Extents, Fragments, memories_of, string_of
from ckptd.tiers.peers.wire import MOST_STRING_BYTES
from ckptd.tiers.protection.work import stop_if

MOST_RECORD_BYTES = 2**24
"""Enough for a string of 16 TiB."""

MOST_SLOTS = 4096

_BLOCK_BYTES = 256 * 1024
"""Copied and checksummed at a time, so that the checksum finds the bytes in cache."""

Pages = Annotated[int, msgspec.Meta(gt=0, le=MAX_SLOT_BYTES, multiple_of=PAGE)]
Ints = npt.NDArray[np.int64]
Checksums = npt.NDArray[np.uint32]


class SlotRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A slot of the string: `size` in bytes, `digest` of its layout, `region`: the place of its frozen region among
    those of the record."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
    size: Pages
    region: Annotated[int, msgspec.Meta(ge=0, lt=MOST_SLOTS)] | None


class SealRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """See the module docstring. `slots`: ranks ascending; `regions`: bytes of the frozen regions that follow them, in
    the order in which slots name them; `checksums`: CRC-32C of each piece, little-endian, 4 bytes each."""

    slots: Annotated[tuple[SlotRecord, ...], msgspec.Meta(max_length=MOST_SLOTS)]
    regions: Annotated[tuple[Pages, ...], msgspec.Meta(max_length=MOST_SLOTS)]
    checksums: bytes

    @property
    def size(self) -> int:
        """Bytes of the string."""
        return sum(slot.size for slot in self.slots) + sum(self.regions)

    @property
    def fragments(self) -> Fragments:
        """The pieces, for who gives the string away."""
        return Fragments(np.append(_grid(self.size)[0], self.size), self.crc)

    @property
    def crc(self) -> Checksums:
        """CRC-32C of each piece."""
        return np.frombuffer(self.checksums, "<u4")

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> SealRecord:
        """Raises FormatError for anything but what `encode` gives."""
        if len(raw) > MOST_RECORD_BYTES:
            raise FormatError(f"seal record of {len(raw)} bytes, expected at most {MOST_RECORD_BYTES}")
        try:
            found = msgspec.msgpack.decode(raw, type=cls)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise FormatError(f"seal record: {error}") from None
        if found.encode() != raw:
            raise FormatError("seal record: not spelt as this version spells it")
        return found._checked()

    def _checked(self) -> SealRecord:
        ranks = [slot.rank for slot in self.slots]
        if ranks != sorted(set(ranks)):
            raise FormatError(f"seal record: ranks {ranks[:20]}, expected them ascending, each once")
        named = list(dict.fromkeys(slot.region for slot in self.slots if slot.region is not None))
        if named != list(range(len(self.regions))):
            raise FormatError(f"seal record: slots name frozen regions {named[:20]}, it has {len(self.regions)}")
        if self.size >= MOST_STRING_BYTES or len(self.checksums) != 4 * -(-self.size // PIECE_BYTES):
            raise FormatError(f"seal record: {len(self.checksums)} bytes of checksums for a string of {self.size}")
        return self

    def make_slots(self) -> Memory:
        """New memory for the string, which somebody waits for. Raises ConfigError where memory is short."""
        names = [f"ckptd-slot-{slot.rank}" for slot in self.slots] + ["ckptd-frozen"] * len(self.regions)
        sizes = [*(slot.size for slot in self.slots), *self.regions]
        descriptors: list[int] = []
        try:
            for name, size in zip(names, sizes, strict=True):
                descriptors.append(sealed_memory(name, size, urgent=True))
            extents = [Extent(descriptor, 0, size) for descriptor, size in zip(descriptors, sizes, strict=True)]
            return Memory(self, descriptors, Extents(extents))
        except BaseException:
            _close(descriptors)
            raise


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory that a string is being written into, through `extents`."""

    record: SealRecord
    descriptors: list[int]
    extents: Extents

    def open(self, snapshot: SnapshotId) -> list[Slot]:
        """The slots, which own the memory from here on. Raises CorruptionError where they are not what the record
        says."""
        own, regions = self.descriptors[: len(self.record.slots)], self.descriptors[len(self.record.slots) :]
        slots: list[Slot] = []
        try:
            for descriptor, wanted in zip(own, self.record.slots, strict=True):
                frozen = None if wanted.region is None else regions[wanted.region]
                slots.append(Slot.open(descriptor, frozen).duplicate())
                found = slots[-1].geometry.rank, slots[-1].geometry.digest, slots[-1].state().snapshot
                if found != (wanted.rank, wanted.digest, snapshot):
                    raise FormatError(f"found {found}, expected {(wanted.rank, wanted.digest, snapshot)}")
        except FormatError as error:
            for slot in slots:
                slot.close()
            raise CorruptionError(f"what was rebuilt of {snapshot} is not what its seal record says: {error}") from None
        finally:
            self.close()
        return slots

    def close(self) -> None:
        """Frees what has not been opened. Idempotent."""
        self.extents.close()
        _close(self.descriptors)
        self.descriptors.clear()


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def describe(snapshot: SnapshotId, slots: Sequence[Slot], cancellation: Cancellation | None = None) -> SealRecord:
    """The seal record of the string that `slots` are, once every chunk has been found to be what was captured.

    Reads the string once. Raises CorruptionError naming the slot, and the tensor where it is one.
    """
    memories = memories_of(slots)
    regions = memories[len(slots) :]
    parts = []
    for slot in memories[: len(slots)]:
        if slot.state().snapshot != snapshot:
            raise CorruptionError(f"slot of rank {slot.geometry.rank}: holds {slot.state().snapshot}, not {snapshot}")
        region = None if slot.region is None else _place(slot.region, regions)
        parts.append(SlotRecord(slot.geometry.rank, slot.geometry.digest, slot.geometry.size, region))
    chunks = list(_chunks(memories, len(slots)))
    size = sum(memory.geometry.size for memory in memories)
    bounds = [at for chunk in chunks for at in (chunk.starts, chunk.stops)]
    cuts, crc = _checksums(string_of(slots), bounds, size, lambda: stop_if(cancellation, f"describing {snapshot}"))
    for chunk in chunks:
        chunk.check(cuts, crc)
    return SealRecord(
        tuple(parts),
        tuple(region.geometry.size for region in regions),
        _joined(cuts, crc, *_grid(size)).astype("<u4").tobytes(),
    )


def damaged_pieces(slots: Sequence[Slot], record: SealRecord, turn: Callable[[], None]) -> list[int]:
    """The pieces of a string that differ from its record. All are, where the memory has another size. `turn` is called
    often."""
    extents = string_of(slots)
    if sum(extent.size for extent in extents) != record.size:
        return list(range(len(record.crc)))
    _, crc = _checksums(extents, [], record.size, turn)
    return np.flatnonzero(crc != record.crc).tolist()


def _place(region: Slot, regions: Sequence[Slot]) -> int:
    return next(i for i, other in enumerate(regions) if os.path.sameopenfile(region.descriptor, other.descriptor))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Where the chunks of one slot lie in the string, and what they should be."""

    slot: Slot
    starts: Ints
    stops: Ints
    expected: Checksums
    rows: Ints

    def check(self, cuts: Ints, crc: Checksums) -> None:
        """Raises CorruptionError for the first that differs."""
        wrong = np.flatnonzero(_joined(cuts, crc, self.starts, self.stops) != self.expected)
        if len(wrong):
            catalog = self.slot.catalog()
            row = int(self.rows[wrong[0]])
            raise CorruptionError(
                f"slot of rank {self.slot.geometry.rank}: {catalog.tensors[catalog.tensor[row]].key}, chunk at "
                f"{int(catalog.file_offset[row])}: its bytes are not those that were captured ({len(wrong)} such)"
            )


def _chunks(memories: Sequence[Slot], slots: int) -> Iterator[_Chunks]:
    """The chunks of each slot, those in its frozen region too. Raises CorruptionError for damage to tables, lists of
    checksums and objects."""
    bases = list(itertools.accumulate((memory.geometry.size for memory in memories), initial=0))
    for number, slot in enumerate(memories[:slots]):
        catalog = slot.catalog()
        slot.objects()
        start = bases[number] + slot.geometry.data_offset + catalog.file_offset
        if slot.region is not None:
            base = bases[slots + _place(slot.region, memories[slots:])] + slot.region.geometry.data_offset
            start = np.where(catalog.file == FROZEN_FILE, base + catalog.file_offset, start)
        rows = np.flatnonzero(catalog.raw)
        yield _Chunks(slot, start[rows], (start + catalog.raw)[rows], catalog.crc[rows], rows)


def _grid(size: int) -> tuple[Ints, Ints]:
    """Where pieces begin and end."""
    starts = np.arange(0, size, PIECE_BYTES, dtype=np.int64)
    return starts, np.minimum(starts + PIECE_BYTES, size)


def _checksums(
    extents: Sequence[Extent], cuts: Sequence[Ints], size: int, turn: Callable[[], None]
) -> tuple[Ints, Checksums]:
    """The string cut at these offsets and at all boundaries of pieces, and the CRC-32C of each fragment."""
    offsets = np.unique(np.concatenate([np.array([0, size], np.int64), _grid(size)[0], *cuts]))
    ends = offsets[1:].tolist()
    crc = [0] * len(ends)
    string, block = Extents(extents), bytearray(_BLOCK_BYTES)
    fragment = 0
    try:
        for start in range(0, size, _BLOCK_BYTES):
            turn()
            copy = memoryview(block)[: min(_BLOCK_BYTES, size - start)]
            string.copy(start, copy)
            done = 0
            while done < len(copy):
                stop = min(ends[fragment] - start, len(copy))
                crc[fragment] = crc32c(copy[done:stop], crc[fragment])
                fragment += ends[fragment] - start == stop
                done = stop
    finally:
        string.close()
    return offsets, np.array(crc, np.uint32)


def _joined(cuts: Ints, crc: Checksums, starts: Ints, stops: Ints) -> Checksums:
    """The CRC-32C of ranges that begin and end at cuts, from those of the fragments between."""
    first, last = np.searchsorted(cuts, starts), np.searchsorted(cuts, stops)
    found = crc[first]
    sizes, values = np.diff(cuts).tolist(), crc.tolist()
    for index in np.flatnonzero(last - first > 1):
        total = int(found[index])
        for fragment in range(first[index] + 1, last[index]):
            total = crc32c_combine(total, values[fragment], sizes[fragment])
        found[index] = total
    return found
