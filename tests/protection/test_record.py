"""Seal records: made of sound memory alone, enough to make the slots again, and strict about bytes from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import CorruptionError, DaemonError, FormatError
from ckptd.core.native import crc32c
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.arena import Slot
from ckptd.tiers.peers import Cancellation
from ckptd.tiers.protection.record import SealRecord, SlotRecord, damaged_pieces, describe
from tests.protection.group import CHUNK, SNAPSHOT, images, make_region, make_slot

SIZE = 2 * PIECE_BYTES + 54321


@pytest.fixture
def slots() -> Iterator[list[Slot]]:
    """Rank 3 beside ranks 1 and 2, of which the first and last have frozen regions, not in order."""
    regions = [make_region(1, 300_000, 8), make_region(3, 5_000_000, 9)]
    made = [make_slot(3, SIZE, 3, region=regions[1]), make_slot(1, 1000, 1, region=regions[0]), make_slot(2, 0, 2)]
    for region in regions:
        region.close()
    yield made
    for slot in made:
        slot.close()


def nothing() -> None:
    """Nobody to yield to."""


def flip(slot: Slot, offset: int) -> None:
    found = os.pread(slot.descriptor, 1, offset)
    os.pwrite(slot.descriptor, bytes([found[0] ^ 4]), offset)


def test_a_record_says_what_the_string_is(slots: list[Slot]) -> None:
    record = describe(SNAPSHOT, slots)
    ordered = [slots[1], slots[2], slots[0]]
    memories = [*ordered, slots[1].region, slots[0].region]
    string = b"".join(os.pread(memory.descriptor, 10**8, 0) for memory in memories if memory is not None)
    assert [(slot.rank, slot.digest, slot.size, slot.region) for slot in record.slots] == [
        (slot.geometry.rank, slot.geometry.digest, slot.geometry.size, region)
        for slot, region in zip(ordered, [0, None, 1], strict=True)
    ]
    assert record.size == len(string)
    assert record.crc.tolist() == [crc32c(string[at : at + PIECE_BYTES]) for at in range(0, len(string), PIECE_BYTES)]
    assert SealRecord.decode(record.encode()) == record
    assert damaged_pieces(slots, record, nothing) == []


def test_slots_are_made_again_from_a_record_and_the_bytes(slots: list[Slot]) -> None:
    record = describe(SNAPSHOT, slots)
    string = np.frombuffer(b"".join(images([])) + _string(slots), np.uint8)
    memory = record.make_slots()
    memory.extents.write(0, string.data)
    found = memory.open(SNAPSHOT)
    ordered = [slots[1], slots[2], slots[0]]
    assert images(found) == images(ordered)
    for slot, original in zip(found, ordered, strict=True):
        assert slot.catalog().crc.tolist() == original.catalog().crc.tolist()
        assert slot.frozen_bytes == original.frozen_bytes
        slot.close()


def _string(slots: list[Slot]) -> bytes:
    ordered = sorted(slots, key=lambda slot: slot.geometry.rank)
    memories = [*ordered, *(slot.region for slot in ordered if slot.region is not None)]
    return b"".join(os.pread(memory.descriptor, 10**8, 0) for memory in memories)


def test_other_bytes_make_no_slots(slots: list[Slot]) -> None:
    """All descriptors are closed again."""
    record = describe(SNAPSHOT, slots)
    before = len(os.listdir("/proc/self/fd"))
    other = SnapshotId(SNAPSHOT.epoch, 41)
    for string, snapshot in [(bytes(record.size), SNAPSHOT), (_string(slots), other)]:
        memory = record.make_slots()
        memory.extents.write(0, memoryview(string))
        with pytest.raises(CorruptionError, match=r"what was rebuilt of step 4[01]"):
            memory.open(snapshot)
    assert len(os.listdir("/proc/self/fd")) == before


def test_frozen_memory_that_slots_share_counts_once() -> None:
    region = make_region(0, 10_000, 1)
    slots = [make_slot(0, 100, 1, region=region), make_slot(1, 100, 2, region=region)]
    record = describe(SNAPSHOT, slots)
    assert [slot.region for slot in record.slots] == [0, 0]
    assert record.regions == (region.geometry.size,)
    memory = record.make_slots()
    memory.extents.write(0, memoryview(b"".join([*images(slots[:1])[:1], *images(slots[1:])])))
    found = memory.open(SNAPSHOT)
    assert found[0].region is not None
    assert found[1].region is not None
    assert os.path.sameopenfile(found[0].region.descriptor, found[1].region.descriptor)
    for slot in [*found, *slots, region]:
        slot.close()


def test_a_node_without_ranks_has_an_empty_string() -> None:
    record = describe(SNAPSHOT, [])
    assert (record.size, len(record.crc)) == (0, 0)
    assert SealRecord.decode(record.encode()).make_slots().open(SNAPSHOT) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (0, "model/weight, chunk at 0"),
        (CHUNK, rf"slot of rank 3: model/weight, chunk at {CHUNK}: .*\(1 such\)"),
        (SIZE - 1, "slot of rank 3: model/weight, chunk at"),
    ],
)
def test_bytes_that_changed_since_capture_are_named(slots: list[Slot], place: int, text: str) -> None:
    """Damage before the record: no record is made, so nothing wrong can be protected."""
    flip(slots[0], slots[0].geometry.data_offset + place)
    with pytest.raises(CorruptionError, match=text):
        describe(SNAPSHOT, slots)


def test_frozen_bytes_that_changed_are_named(slots: list[Slot]) -> None:
    assert slots[0].region is not None
    flip(slots[0].region, slots[0].region.geometry.data_offset + CHUNK + 1)
    with pytest.raises(CorruptionError, match=f"slot of rank 3: frozen, chunk at {CHUNK}"):
        describe(SNAPSHOT, slots)


def test_damage_to_tables_and_the_wrong_snapshot_are_named(slots: list[Slot]) -> None:
    with pytest.raises(CorruptionError, match=r"slot of rank 1: holds step 40 .* not step 39"):
        describe(SnapshotId(SNAPSHOT.epoch, 39), slots)
    flip(slots[1], slots[1].geometry.table_offset + 1)
    with pytest.raises(CorruptionError, match="slot of rank 1: its table"):
        describe(SNAPSHOT, slots)
    flip(slots[0], slots[0].geometry.crc_offset)
    with pytest.raises(CorruptionError, match=r"slot of rank [13]"):
        describe(SNAPSHOT, slots)


def test_bytes_that_changed_since_the_record_are_found(slots: list[Slot]) -> None:
    record = describe(SNAPSHOT, slots)
    base = slots[1].geometry.size + slots[2].geometry.size
    flip(slots[0], SIZE)
    assert damaged_pieces(slots, record, nothing) == [(base + SIZE) // PIECE_BYTES]
    assert damaged_pieces(slots[1:], record, nothing) == list(range(len(record.crc)))


def test_a_description_can_be_cancelled(slots: list[Slot]) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(DaemonError, match="cancelled"):
        describe(SNAPSHOT, slots, cancellation)


DIGEST = "0123456789abcdef" * 2
GOOD = SealRecord((SlotRecord(0, DIGEST, 4096, None), SlotRecord(2, DIGEST, PIECE_BYTES, 0)), (8192,), bytes(8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"slots": (GOOD.slots[1], GOOD.slots[0])}, "expected them ascending"),
        ({"slots": (GOOD.slots[0], GOOD.slots[0])}, "expected them ascending"),
        ({"regions": ()}, "it has 0"),
        ({"regions": (8192, 8192)}, "it has 2"),
        ({"regions": (8191,)}, "multiple of 4096"),
        ({"checksums": bytes(7)}, "7 bytes of checksums"),
        ({"checksums": bytes(12)}, "12 bytes of checksums"),
        ({"slots": (SlotRecord(0, DIGEST[1:], 4096, None), GOOD.slots[1])}, "matching regex"),
        ({"slots": (SlotRecord(0, DIGEST, 2**46, None), GOOD.slots[1])}, "<= "),
        ({"slots": tuple(SlotRecord(i, DIGEST, 2**45, None) for i in range(33)), "regions": ()}, "of checksums for a"),
        ({"slots": (SlotRecord(-1, DIGEST, 4096, None), GOOD.slots[1])}, ">= 0"),
    ],
)
def test_records_that_cannot_be_are_refused(change: dict[str, object], text: str) -> None:
    assert SealRecord.decode(GOOD.encode()) == GOOD
    with pytest.raises(FormatError, match=text):
        SealRecord.decode(msgspec.structs.replace(GOOD, **change).encode())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_anything_but_a_format_error(data: st.DataObject) -> None:
    raw = bytearray(GOOD.encode())
    if data.draw(st.booleans()):
        raw = bytearray(data.draw(st.binary(max_size=200)))
    else:
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found = SealRecord.decode(bytes(raw))
    except FormatError:
        return
    assert found.encode() == bytes(raw)
