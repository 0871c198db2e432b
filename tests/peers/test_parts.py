"""The parts by themselves: throttle, addresses, sources over slots."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import ConfigError, CorruptionError, FormatError
from ckptd.core.native import crc32c
from ckptd.tiers.arena import Geometry, Slot
from ckptd.tiers.peers import (
    DescriptorSource,
    Extent,
    Extents,
    Fragments,
    MemorySource,
    Throttle,
    check_reachable,
    listening_address,
    string_of,
)
from ckptd.tiers.peers.address import join_address, split_address
from ckptd.tiers.throttle import Bucket
from tests.peers.nodes import credentials, in_thread, random_bytes

# --- throttle


@given(
    rate=st.floats(1, 1e10),
    events=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e9)), max_size=50),
)
@settings(deadline=None)
def test_a_bucket_never_gives_more_than_its_rate(rate: float, events: list[tuple[float, float]]) -> None:
    """Whoever waits as told gets at most rate x time + burst, and the last request, at any moment."""
    bucket, now, given_out = Bucket(rate, 0.0), 0.0, 0.0
    for idle, amount in events:
        now += idle
        now += bucket.delay(now)
        assert given_out <= rate * (now + 0.1 + 1e-5) * (1 + 1e-9)
        bucket.charge(amount, now)
        given_out += amount


def test_a_bucket_pays_its_debt_and_saves_little() -> None:
    bucket = Bucket(100.0, 0.0)
    assert bucket.delay(0.0) == 0
    bucket.charge(60.0, 0.0)
    assert bucket.delay(0.0) == pytest.approx(0.5)
    assert bucket.delay(0.3) == pytest.approx(0.2)
    assert bucket.delay(1000.0) == 0
    bucket.charge(10.0, 1000.0)
    assert bucket.delay(1000.0) == 0
    bucket.charge(10.0, 999.0)  # a clock that goes back gives nothing
    assert bucket.delay(999.0) == pytest.approx(0.1)
    unlimited = Bucket(None, 0.0)
    unlimited.charge(1e30, 0.0)
    assert unlimited.delay(0.0) == 0
    with pytest.raises(ValueError, match="positive"):
        Bucket(0.0, 0.0)


def test_cpu_that_was_spent_is_waited_for() -> None:
    now = [0.0]

    class Fake(Throttle):
        def _wait(self, seconds: float | None) -> None:
            assert seconds is not None
            now[0] += seconds

    throttle = Fake(cpu_share=0.25, clock=lambda: now[0])
    for _ in range(10):
        assert throttle.admit(10**12)
        throttle.spent(1.0)
    assert throttle.admit(1)
    assert now[0] == pytest.approx(10 / 0.25 - 0.1)


def test_a_paused_throttle_admits_nothing_until_resumed_or_cancelled() -> None:
    throttle, cancelled = Throttle(), [False]
    throttle.pause()
    admitted: list[bool] = []
    end = in_thread(lambda: admitted.append(throttle.admit(5, lambda: cancelled[0])))
    throttle.wake()
    assert throttle.admitted_bytes == 0
    cancelled[0] = True
    throttle.wake()
    assert end() is None
    end = in_thread(lambda: admitted.append(throttle.admit(5)))
    throttle.resume()
    assert end() is None
    assert admitted == [False, True]
    assert throttle.admitted_bytes == 5


# --- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 0)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("::1", ("::1", 0)),
        ("[fe80::1]", ("fe80::1", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected
    assert split_address(join_address(*expected)) == expected


@pytest.mark.parametrize("text", ["host:", "host:65536", "host:x", ":5", "[::1]:99999", "host:-1", "host:\u0665"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST"):
        listening_address({"CKPTD_ADDRESS": text})


def test_where_to_listen() -> None:
    assert listening_address({"MASTER_ADDR": "127.0.0.1"}) == ("127.0.0.1", 0)
    assert listening_address({"MASTER_ADDR": "::1"}) == ("::1", 0)
    assert listening_address({"MASTER_ADDR": "::1", "CKPTD_ADDRESS": "127.0.0.2:81"}) == ("127.0.0.2", 81)
    for environ, text in [
        ({}, "MASTER_ADDR.*or CKPTD_ADDRESS, found neither"),
        ({"CKPTD_ADDRESS": "0.0.0.0"}, "every address and none"),
        ({"CKPTD_ADDRESS": "[::]:5"}, "every address and none"),
        ({"CKPTD_ADDRESS": "no host.invalid"}, "not an address or a name"),
        ({"MASTER_ADDR": "no host.invalid"}, "does not resolve"),
        ({"CKPTD_ADDRESS": "fe80::1"}, "another node on each link"),
        ({"CKPTD_ADDRESS": "a" * 70 + ".invalid"}, "not an address or a name"),
    ]:
        with pytest.raises(ConfigError, match=text):
            listening_address(environ)


def test_loopback_among_others_is_refused() -> None:
    """A node whose own name leads to 127.0.1.1 would announce an address that means somebody else elsewhere."""
    plain = credentials("a", tls=False)
    check_reachable([plain.announce("127.0.0.1", 1), plain.announce("::1", 1)])
    check_reachable([plain.announce("10.0.0.1", 1), plain.announce("fd00::1", 1)])
    with pytest.raises(ConfigError, match=r"nodes a \(127\.0\.1\.1\) listen.*CKPTD_ADDRESS"):
        check_reachable([plain.announce("127.0.1.1", 1), credentials("b", tls=False).announce("10.0.0.1", 1)])


# --- sources


def _slot(rank: int, data: np.ndarray, frozen: np.ndarray | None = None) -> Slot:
    """A slot that has room for `data`, without a table: only where its parts lie matters here."""
    slots = []
    for content in (data, frozen):
        if content is not None:
            offset = 3 * 4096
            geometry = Geometry(rank, "", offset, 0, offset, 0, offset, 0, offset, len(content))
            slot = Slot.create(geometry, b"")
            os.pwrite(slot.descriptor, content.tobytes(), offset)
            slots.append(slot)
    slots[0].region = slots[1] if frozen is not None else None
    return slots[0]


def test_slots_are_one_string() -> None:
    """Whole images, rank by rank whatever their order, then each frozen region once though two slots share it."""
    slots = [_slot(3, random_bytes(9000)), _slot(0, random_bytes(5000), random_bytes(300)), _slot(2, random_bytes(0))]
    slots.append(Slot(os.dup(slots[0].descriptor), slots[0].geometry, slots[1].region))
    images = [os.pread(slot.descriptor, 10**6, 0) for slot in (slots[1], slots[2], slots[0], slots[3])]
    assert slots[1].region is not None
    whole = np.frombuffer(b"".join([*images, os.pread(slots[1].region.descriptor, 10**6, 0)]), np.uint8)
    before = len(os.listdir("/proc/self/fd"))
    source = DescriptorSource(string_of(slots))
    assert source.size == len(whole)
    edges = np.cumsum([len(image) for image in images]).tolist()
    ranges = [(0, len(whole)), *((edge - 1, edge + 1) for edge in edges), (len(whole) - 1, len(whole))]
    for start, stop in ranges:
        target = np.zeros(stop - start, np.uint8)
        assert source.read(start, target.data) == crc32c(whole[start:stop])
        assert np.array_equal(target, whole[start:stop])
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_extents_take_what_is_written_over_their_edges() -> None:
    descriptors = [os.memfd_create("extent") for _ in range(2)]
    for descriptor in descriptors:
        os.ftruncate(descriptor, 100)
    extents = Extents([Extent(descriptors[0], 10, 50), Extent(descriptors[1], 0, 0), Extent(descriptors[1], 20, 80)])
    content, found = random_bytes(extents.size), np.zeros(extents.size, np.uint8)
    for start, stop in [(0, 1), (1, 49), (49, 90), (90, 130)]:
        extents.write(start, content.data[start:stop])
    extents.copy(0, found.data)
    extents.close()
    assert np.array_equal(found, content)
    assert os.pread(descriptors[0], 50, 10) == content[:50].tobytes()
    assert os.pread(descriptors[0], 40, 60) == bytes(40)
    for descriptor in descriptors:
        os.close(descriptor)


def test_what_lies_in_one_extent_can_be_mapped() -> None:
    """At any offset; not over an edge, and not where the memory ends before the extent does."""
    content = random_bytes(30_000)
    descriptor = os.memfd_create("mapped")
    os.write(descriptor, content.tobytes())
    extents = Extents([Extent(descriptor, 100, 9_000), Extent(descriptor, 20_000, 10_100)])
    os.close(descriptor)
    for start, stop, place in [(0, 9_000, 100), (5_000, 5_001, 5_100), (9_000, 15_000, 20_000)]:
        mapped = extents.map(start, stop - start)
        assert mapped is not None
        assert bytes(mapped) == content[place : place + stop - start].tobytes()
        with pytest.raises(TypeError):
            mapped[0] = 1
    assert extents.map(8_999, 2) is None
    assert extents.map(19_000, 100) is None
    before = len(os.listdir("/proc/self/fd"))
    extents.close()
    assert len(os.listdir("/proc/self/fd")) < before
    assert bytes(mapped) == content[20_000:26_000].tobytes()


def test_memory_that_ends_early_is_corrupt() -> None:
    descriptor = os.memfd_create("short")
    os.write(descriptor, bytes(10))
    source = DescriptorSource([Extent(descriptor, 5, 6)])
    with pytest.raises(CorruptionError, match="memory ends"):
        source.read(0, memoryview(bytearray(6)))
    source.close()
    os.close(descriptor)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_fragments_find_any_damage_inside_whole_ones(data: st.DataObject) -> None:
    content = random_bytes(200)
    cuts = np.array([0, *sorted(data.draw(st.sets(st.integers(1, 199), max_size=8))), 200])
    crc = np.array([crc32c(content[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)], np.uint32)
    start = data.draw(st.integers(0, 199))
    stop = data.draw(st.integers(start + 1, 200))
    damaged = data.draw(st.integers(0, 199))
    source = MemorySource(content.data, Fragments(cuts, crc))
    target = memoryview(bytearray(stop - start))
    assert source.read(start, target) == crc32c(content[start:stop])
    assert bytes(target) == content[start:stop].tobytes()
    content[damaged] ^= 1
    index = int(np.searchsorted(cuts, damaged, side="right")) - 1
    if start <= cuts[index] and cuts[index + 1] <= stop:
        with pytest.raises(CorruptionError, match=rf"\[{cuts[index]}, {cuts[index + 1]}\): CRC32C"):
            source.read(start, target)
    else:
        assert source.read(start, target) == crc32c(content[start:stop])
    source.close()


def test_fragments_must_fit() -> None:
    for offsets, count in [([0, 5], 2), ([1, 5], 1), ([0, 5, 5], 2), ([0, 5, 4], 2)]:
        with pytest.raises(FormatError, match="ascending offsets"):
            Fragments(np.array(offsets), np.zeros(count, np.uint32))
    with pytest.raises(FormatError, match="for a string of 6"):
        DescriptorSource([Extent(0, 0, 6)], Fragments(np.array([0, 5]), np.zeros(1, np.uint32)))
