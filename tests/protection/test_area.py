"""Parity areas: what they say of themselves is true after whatever ended their writer."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ckptd.core.errors import CorruptionError, DaemonError, FormatError
from ckptd.core.native import crc32c
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES, Group, Striping
from ckptd.tiers.peers import Cancellation, Throttle
from ckptd.tiers.protection.area import AreaState, ParityArea, parity_lengths, pieces_of
from ckptd.tiers.protection.work import turns
from tests.peers.nodes import in_thread, random_bytes
from tests.protection.group import SNAPSHOT

SIZES = (3 * PIECE_BYTES + 5, 9, 2 * PIECE_BYTES, PIECE_BYTES + 1)
STRIPING = Striping(Group((1, 4, 5, 9), 2), SIZES)
MEMBER = 5


def fill(area: ParityArea, snapshot: SnapshotId = SNAPSHOT, seed: int = 0) -> list[np.ndarray]:
    """The parities of MEMBER, as good as any bytes."""
    area.begin()
    parts = [random_bytes(length, seed + t) for t, length in enumerate(parity_lengths(STRIPING, MEMBER))]
    for t, part in enumerate(parts):
        area.write(t * STRIPING.segment_bytes, part.data)
    sums = [
        np.array([crc32c(part[at : at + PIECE_BYTES]) for at in range(0, len(part), PIECE_BYTES)], np.uint32)
        for part in parts
    ]
    area.commit(snapshot, STRIPING, MEMBER, sums)
    return parts


def read(area: ParityArea) -> list[bytes]:
    found = []
    for source in area.sources():
        target = bytearray(source.size)
        source.read(0, memoryview(target))
        source.close()
        found.append(bytes(target))
    return found


def test_an_area_outlives_its_daemon() -> None:
    """Only the descriptor is left."""
    area = ParityArea.create(STRIPING.parity_bytes)
    assert area.state() == AreaState()
    parts = fill(area)
    left = os.dup(area.descriptor)
    area.close()
    again = ParityArea.open(left)
    state = again.state()
    assert (state.snapshot, state.member, state.striping) == (SNAPSHOT, MEMBER, STRIPING)
    assert read(again) == [part.tobytes() for part in parts]
    again.check()
    again.close()
    again.close()


def test_an_area_is_used_again() -> None:
    area = ParityArea.create(STRIPING.parity_bytes + 12345)
    fill(area)
    later = SnapshotId(SNAPSHOT.epoch, 41)
    parts = fill(area, later, seed=7)
    assert area.state().snapshot == later
    assert read(area) == [part.tobytes() for part in parts]
    area.begin()
    assert area.state() == AreaState()
    with pytest.raises(CorruptionError, match="holds no whole parity"):
        area.sources()
    area.close()


@pytest.mark.parametrize("step", range(6))
def test_whatever_is_torn_is_nothing(step: int) -> None:
    """A daemon is killed while it fills an area that held an older snapshot: a mixture is never taken for whole."""
    area = ParityArea.create(STRIPING.parity_bytes)
    old = fill(area)
    later = SnapshotId(SNAPSHOT.epoch, 41)
    full = ParityArea.create(STRIPING.parity_bytes)
    new = fill(full, later, seed=7)
    # What the second filling writes, in order, and how far it came.
    if step >= 1:
        area.begin()
    if step >= 2:
        area.write(0, new[0].data[: len(new[0]) // 2])
    if step >= 3:
        for t, part in enumerate(new):
            area.write(t * STRIPING.segment_bytes, part.data)
    if step >= 4:
        state_start = _place_of_new_state(area)
        raw = os.pread(full.descriptor, os.fstat(full.descriptor).st_size, 0)
        table = raw[17 * 4096 :][: 4 * sum(map(pieces_of, parity_lengths(STRIPING, MEMBER)))]
        os.pwrite(area.descriptor, table, 17 * 4096)
        if step >= 5:
            os.pwrite(area.descriptor, b"CKPTPST1" + bytes(50), state_start)
    again = ParityArea.open(os.dup(area.descriptor))
    if step == 0:
        assert again.state().snapshot == SNAPSHOT
        assert read(again) == [part.tobytes() for part in old]
    else:
        assert again.state() == AreaState()
    for one in (area, full, again):
        one.close()


def _place_of_new_state(area: ParityArea) -> int:
    """Sequence numbers go up: the next record goes where the older one is."""
    first, second = 4096, 4096 + 8 * 4096
    numbers = [int.from_bytes(os.pread(area.descriptor, 8, place + 8), "little") for place in (first, second)]
    return first if numbers[0] < numbers[1] else second


def test_damage_is_found_before_it_is_given_away() -> None:
    area = ParityArea.create(STRIPING.parity_bytes)
    fill(area)
    area.check()
    lengths = parity_lengths(STRIPING, MEMBER)
    end = os.fstat(area.descriptor).st_size
    base = end - -(-STRIPING.parity_bytes // 4096) * 4096
    place = base + STRIPING.segment_bytes + lengths[1] - 1
    os.pwrite(area.descriptor, bytes([os.pread(area.descriptor, 1, place)[0] ^ 1]), place)
    with pytest.raises(CorruptionError, match=rf"parity 1 of step 40 .*{lengths[1]}\): CRC32C"):
        area.check()
    source = area.sources()[1]
    last = (pieces_of(lengths[1]) - 1) * PIECE_BYTES
    with pytest.raises(CorruptionError):
        source.read(last, memoryview(bytearray(lengths[1] - last)))
    os.pwrite(area.descriptor, b"?", 17 * 4096)
    assert area.state() == AreaState()
    for one in area.sources() if area.state().snapshot else []:
        one.close()
    source.close()
    area.close()


def test_a_check_yields_to_the_job_and_can_be_cancelled() -> None:
    area = ParityArea.create(STRIPING.parity_bytes)
    fill(area)
    cancellation, throttle = Cancellation(), Throttle()
    area.check(turns(throttle, cancellation, "it"))
    throttle.pause()
    end = in_thread(lambda: area.check(turns(throttle, cancellation, "it")))
    cancellation.cancel()
    assert isinstance(end(), DaemonError)
    throttle.resume()
    with pytest.raises(DaemonError, match="it: cancelled"):
        area.check(turns(throttle, cancellation, "it"))
    area.close()


def test_other_descriptors_are_refused() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(FormatError, match="not a memfd"):
        ParityArea.open(read_end)
    area = ParityArea.create(100)
    loose = os.memfd_create("loose")
    os.write(loose, os.pread(area.descriptor, 10**7, 0))
    with pytest.raises(FormatError, match="not sealed"):
        ParityArea.open(loose)
    os.pwrite(area.descriptor, b"?", 30)
    with pytest.raises(FormatError, match="no valid geometry"):
        ParityArea.open(area.descriptor)
    area.close()
    for descriptor in (read_end, write_end, loose):
        os.close(descriptor)


def test_what_does_not_fit_is_refused() -> None:
    area = ParityArea.create(STRIPING.parity_bytes)
    with pytest.raises(ValueError, match="no room"):
        area.write(area.parity_bytes - 1, memoryview(b"ab"))
    with pytest.raises(ValueError, match="other checksums"):
        area.commit(SNAPSHOT, STRIPING, MEMBER, [np.zeros(1, np.uint32)])
    area.close()
