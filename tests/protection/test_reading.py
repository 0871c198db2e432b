"""What is lost comes back from whatever is left, or an error says what is missing; nothing wrong is ever delivered."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator

import numpy as np
import pytest

from ckptd.core.errors import CorruptionError, DaemonError, UnrecoverableError
from ckptd.core.native import crc32c
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers import Cancellation
from ckptd.tiers.protection import Holders, SealedGroup
from ckptd.tiers.protection.area import pieces_of
from ckptd.tiers.protection.work import ROW_BYTES, WORKERS
from tests.peers.nodes import WAIT_S, Scripted, in_thread
from tests.protection.group import SNAPSHOT, Cluster, images, protected

MIB = 2**20
SIZES = [9 * MIB + 7, 37 * MIB + 4321, 0, 18 * MIB, 22 * MIB, 5 * MIB]


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (2, 2), (3, 1)], ids=str)
def whole(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A protected group that tests only read."""
    k, m = request.param
    with protected(k, m, SIZES[: k + m]) as cluster:
        yield cluster


def losses(cluster: Cluster) -> list[tuple[int, ...]]:
    most = cluster.group.parity_count
    return [lost for size in range(1, most + 1) for lost in itertools.combinations(cluster.group.nodes, size)]


def string(cluster: Cluster, number: int) -> np.ndarray:
    return np.frombuffer(b"".join(images(cluster.members[number].slots)), np.uint8)


def test_every_loss_comes_back(whole: Cluster) -> None:
    """All subsets of up to m losses; the lost member gets its string from the others, slots as they were."""
    for lost in losses(whole):
        for number in lost:
            whole.check_rebuild(number, number, whole.holders(lost))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (2, 2)])
def test_one_loss_too_many_is_refused_by_name(k: int, m: int) -> None:
    with protected(k, m, [10 * MIB] * (k + m)) as cluster:
        for lost in itertools.combinations(cluster.group.nodes, m + 1):
            with pytest.raises(
                UnrecoverableError, match=rf"step 40 .*string {lost[0]}: stripe .* its positions are left"
            ):
                cluster.members[lost[0]].protector.rebuild(cluster.sealed, lost[0], cluster.holders(lost))
            assert cluster.members[lost[0]].protector.buffers._used == 0


def test_what_somebody_holds_whole_is_copied(whole: Cluster) -> None:
    """An old holder gives the string itself: its size is all that is pulled, and parities are not asked for."""
    for number in whole.group.nodes:
        by = (number + 1) % len(whole.members)
        before = whole.members[by].throttle.admitted_bytes
        whole.check_rebuild(by, number, Holders({number: [whole.members[number].name]}, {}))
        assert whole.members[by].throttle.admitted_bytes - before == whole.sealed.striping.sizes[number]


def test_any_range_is_read_while_nodes_are_lost(whole: Cluster) -> None:
    """By one that lost its own, or by one that is asked for a source itself."""
    generator = np.random.default_rng(1)
    for lost in losses(whole):
        number = lost[0]
        expected = string(whole, number)
        for by in {number, (number + 1) % len(whole.members)}:
            for _ in range(3 if len(expected) else 0):
                start, stop = sorted(generator.integers(0, len(expected) + 1, 2))
                target = np.full(stop - start, 7, np.uint8)
                whole.members[by].protector.read(whole.sealed, number, whole.holders(lost), int(start), target.data)
                assert np.array_equal(target, expected[start:stop])


def test_a_degraded_read_takes_only_what_it_needs() -> None:
    """Few bytes: one piece of each of k sources, though the string has many."""
    with protected(2, 1, [40 * MIB, 38 * MIB, 41 * MIB]) as cluster:
        expected = string(cluster, 1)
        member = cluster.members[1]
        for start, size, pieces in [(12345, 10, 1), (PIECE_BYTES - 1, 2, 2), (30 * MIB, 0, 0)]:
            before = member.throttle.admitted_bytes
            target = bytearray(size)
            member.protector.read(cluster.sealed, 1, cluster.holders({1}), start, memoryview(target))
            assert bytes(target) == expected[start : start + size].tobytes()
            assert member.throttle.admitted_bytes - before == pieces * 2 * PIECE_BYTES
        assert member.protector.buffers.most_used <= WORKERS * 3


def test_rebuilding_takes_bounded_memory() -> None:
    with protected(2, 2, [4 * ROW_BYTES] * 4) as cluster:
        for member in cluster.members:
            member.protector.buffers.most_used = 0
        cluster.check_rebuild(0, 0, cluster.holders({0, 1}))
        assert cluster.members[0].protector.buffers.most_used <= WORKERS * 3


# ---- what goes wrong


def flip(descriptor: int, place: int) -> None:
    os.pwrite(descriptor, bytes([os.pread(descriptor, 1, place)[0] ^ 1]), place)


def test_corrupt_pieces_are_avoided_where_they_are() -> None:
    """A piece of a string here, a piece of a parity there: with two parities each is replaced by another source, though
    no source is whole."""
    with protected(2, 2, [60 * MIB] * 4) as cluster:
        for number in (1, 2, 3):
            flip(cluster.members[number].slots[0].descriptor, (2 * number + 1) * PIECE_BYTES + 5)
            area = cluster.members[number].area
            assert area is not None
            flip(area.descriptor, os.fstat(area.descriptor).st_size - number * PIECE_BYTES)
        cluster.check_rebuild(0, 0, cluster.holders({0}))
        for number in (1, 2, 3):
            with pytest.raises(CorruptionError):
                cluster.members[number].protector.verify_string(
                    SNAPSHOT, cluster.members[number].slots, cluster.records[number]
                )


def test_a_damaged_string_is_rebuilt_from_the_others() -> None:
    """What scrubbing leads to: the owner gives up its own copy for what the others have."""
    with protected(3, 1, SIZES[:4]) as cluster:
        before = images(cluster.members[1].slots)
        flip(cluster.members[1].slots[0].descriptor, 20 * MIB)
        slots = cluster.members[1].protector.rebuild(cluster.sealed, 1, cluster.holders({1}))
        assert images(slots) == before
        cluster.members[1].protector.verify_string(SNAPSHOT, slots, cluster.records[1])
        for slot in slots:
            slot.close()


def test_too_much_corruption_says_where() -> None:
    with protected(2, 1, [20 * MIB] * 3) as cluster:
        flip(cluster.members[1].slots[0].descriptor, 13 * MIB)
        with pytest.raises(
            UnrecoverableError,
            match=r"are lost, 1 of its positions.*n1: node n1 at .*string of step 40.* at 12582912: .*twice",
        ):
            cluster.members[0].protector.rebuild(cluster.sealed, 0, cluster.holders({0}))


def test_a_holder_that_gives_damaged_bytes_is_replaced_by_decoding() -> None:
    with protected(2, 1, [20 * MIB] * 3) as cluster:
        expected = images(cluster.members[0].slots)
        flip(cluster.members[0].slots[0].descriptor, 9 * MIB)
        slots = cluster.members[1].protector.rebuild(cluster.sealed, 0, cluster.holders())
        assert images(slots) == expected
        for slot in slots:
            slot.close()


def test_a_parity_of_other_strings_is_not_believed() -> None:
    """Its own checksums agree; what it gives back does not."""
    with protected(1, 2, [20 * MIB] * 3) as cluster:
        area = cluster.members[1].area
        assert area is not None
        state, sources = area.state(), area.sources()
        lengths = [source.size for source in sources]
        area.begin()
        zeros = np.zeros(area.parity_bytes, np.uint8)
        area.write(0, zeros.data)
        sums = [
            np.array(
                [crc32c(zeros[: min(PIECE_BYTES, length - at * PIECE_BYTES)]) for at in range(pieces_of(length))],
                np.uint32,
            )
            for length in lengths
        ]
        cluster.members[1].protector.withdraw(SNAPSHOT, "parity")
        area.commit(SNAPSHOT, state.striping, state.member, sums)
        cluster.members[1].protector.give_parity(area)
        area.check()
        cluster.check_rebuild(2, 2, cluster.holders({2}))
        cluster.check_rebuild(0, 0, cluster.holders({0}))


@pytest.mark.parametrize("lost", [{0}, {0, 3}])
def test_a_source_that_dies_in_the_middle_is_replaced(lost: Collection[int]) -> None:
    """While at least k are left; else it is refused, with what happened on the way."""
    with protected(2, 2, [4 * ROW_BYTES] * 4, deadline_s=2) as cluster:
        victim = cluster.members[1]
        victim.protector.withdraw(SNAPSHOT, "data")
        held = Scripted(string(cluster, 1), hold_at=ROW_BYTES)
        victim.node.sources.register(SNAPSHOT, "string", held)
        expected = images(cluster.members[0].slots)
        outcome: list[list[bytes]] = []

        def rebuild() -> None:
            slots = cluster.members[0].protector.rebuild(cluster.sealed, 0, cluster.holders(lost))
            outcome.append(images(slots))
            for slot in slots:
                slot.close()

        end = in_thread(rebuild)
        assert held.held.wait(WAIT_S)
        closing = in_thread(victim.node.server.close)
        error = end()
        held.go_on.set()
        assert closing() is None
        if len(lost) == 1:
            assert error is None
            assert outcome == [expected]
        else:
            assert isinstance(error, DaemonError)
            assert "n1: node n1 at" in str(error)


def test_who_is_no_member_any_more_may_still_hold_it() -> None:
    """A name that nobody knows is a holder that failed."""
    with protected(2, 1, [20 * MIB] * 3) as cluster:
        left = cluster.holders({0})
        holders = Holders({**left.strings, 0: ["gone"]}, left.parities)
        cluster.check_rebuild(0, 0, holders)


def test_rebuilding_can_be_cancelled() -> None:
    with protected(2, 1, [40 * MIB] * 3) as cluster:
        member, cancellation = cluster.members[0], Cancellation()
        before = len(os.listdir("/proc/self/fd"))
        member.throttle.pause()
        end = in_thread(lambda: member.protector.rebuild(cluster.sealed, 0, cluster.holders({0}), cancellation))
        cancellation.cancel()
        error = end()
        assert isinstance(error, DaemonError)
        assert "cancelled" in str(error)
        member.throttle.resume()
        assert member.protector.buffers._used == 0
        assert len(os.listdir("/proc/self/fd")) == before
        cluster.check_rebuild(0, 0, cluster.holders({0}))


def test_without_seal_records_nothing_can_be_told() -> None:
    with protected(2, 1, [MIB] * 3) as cluster:
        records = {0: cluster.records[0], 2: cluster.records[2]}
        with pytest.raises(
            UnrecoverableError, match="seal records of members 1 are missing, expected those of 0, 1, 2"
        ):
            SealedGroup(SNAPSHOT, cluster.group, records)


def test_slots_of_another_snapshot_are_not_opened() -> None:
    """The bytes are those of the record, but it was asked for as another one."""
    with protected(1, 1, [MIB, MIB]) as cluster:
        later = SnapshotId(SNAPSHOT.epoch, 41)
        cluster.members[0].protector.give_string(later, cluster.members[0].slots, cluster.records[0])
        sealed = SealedGroup(later, cluster.group, cluster.records)
        with pytest.raises(CorruptionError, match="what was rebuilt of step 41"):
            cluster.members[1].protector.rebuild(sealed, 0, Holders({0: ["n0"]}, {}))
