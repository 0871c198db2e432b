"""Sealed to protected, on real servers: every byte that is promised, none more than the formula, whatever happens."""

from __future__ import annotations

import os
import re
import threading

import numpy as np
import pytest

from ckptd.core.errors import CorruptionError, DaemonError, DeadlineError, NotFoundError
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers import Cancellation, DescriptorSource, string_of
from ckptd.tiers.protection import AreaState, ParityArea, SealedGroup
from ckptd.tiers.protection.shares import STAGED_ROWS
from ckptd.tiers.protection.work import ROW_BYTES, WORKERS
from tests.peers.nodes import WAIT_S, Scripted, in_thread
from tests.protection.group import SNAPSHOT, Cluster, Member, images, make_slot, protected, start_encoding

MIB = 2**20
CODES = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 3), (4, 1), (3, 2), (4, 2)]


def sizes(count: int) -> list[int]:
    """Unequal: one empty, one within a piece, one of several rows, others between; of no round number."""
    return [[9 * MIB + 7, 0, 37 * MIB + 4321, 1000, 22 * MIB, 5 * MIB + 1][number] for number in range(count)]


def parities(member: Member) -> list[bytes]:
    assert member.area is not None
    found = []
    for source in member.area.sources():
        target = bytearray(source.size)
        source.read(0, memoryview(target))
        source.close()
        found.append(bytes(target))
    return found


def strings(cluster: Cluster) -> list[np.ndarray]:
    return [np.frombuffer(b"".join(images(member.slots)), np.uint8) for member in cluster.members]


def expected_parities(cluster: Cluster) -> dict[int, list[bytes]]:
    """By the formula of docs/erasure.md alone, byte by byte through a table of products."""
    striping, whole = cluster.sealed.striping, strings(cluster)
    k, m, n = cluster.group.data_count, cluster.group.parity_count, len(cluster.group.nodes)
    found: dict[int, list[bytes]] = {number: [b""] * m for number in range(n)}
    for stripe in range(n):
        for t in range(m):
            total = np.zeros(striping.length(stripe), np.uint8)
            for p in range(k):
                segment = whole[(stripe + m + p) % n][p * striping.segment_bytes : (p + 1) * striping.segment_bytes]
                total[: len(segment)] ^= PRODUCTS[INVERSE[(k + t) ^ p]][segment]
            found[(stripe + t) % n][t] = total.tobytes()
    return found


def _times(left: int, right: int) -> int:
    found = 0
    while right:
        found ^= left if right & 1 else 0
        left = (left << 1) ^ (0x11D if left & 0x80 else 0)
        right >>= 1
    return found


PRODUCTS = np.array([[_times(left, right) for right in range(256)] for left in range(256)], np.uint8)
INVERSE = {left: int(np.flatnonzero(PRODUCTS[left] == 1)[0]) for left in range(1, 256)}


def pulled_by_plan(sealed: SealedGroup, number: int) -> int:
    sources = sum(source.size for row in sealed.striping.encoding(number) for source in row.sources)
    return sources + sum(row.length for row in sealed.striping.shares(number))


@pytest.mark.parametrize(("k", "m"), CODES)
def test_parities_are_what_the_document_says(k: int, m: int) -> None:
    """Unequal strings and an empty one; traffic and memory as promised."""
    with protected(k, m, sizes(k + m)) as cluster:
        expected = expected_parities(cluster)
        for member in cluster.members:
            assert member.area is not None
            assert parities(member) == expected[member.number]
            assert member.area.state().snapshot == SNAPSHOT
            member.protector.verify_parity(member.area)
            questions = member.throttle.admitted_bytes - pulled_by_plan(cluster.sealed, member.number)
            assert 0 <= questions < 1000
            assert member.protector.buffers.most_used <= WORKERS * (k + 1) + (STAGED_ROWS + 1) * (m - 1)


def test_traffic_is_the_formula() -> None:
    """(1 + (m - 1) / k) D where segments are whole pieces; the questions are a byte each."""
    size = 2 * 3 * PIECE_BYTES - 6 * 4096  # with the pages of a slot's tables just six pieces
    with protected(2, 2, [size] * 4) as cluster:
        whole = cluster.sealed.striping.sizes[0]
        assert whole == 6 * PIECE_BYTES
        for member in cluster.members:
            assert 0 <= member.throttle.admitted_bytes - whole * 3 // 2 < 100


def test_memory_does_not_grow_with_the_string() -> None:
    """Strings of many rows; what is staged stays what it was."""
    with protected(1, 2, [5 * ROW_BYTES, 3 * ROW_BYTES, 4 * ROW_BYTES]) as cluster:
        for member in cluster.members:
            assert member.protector.buffers.most_used <= 2 * WORKERS + STAGED_ROWS + 1


def test_without_any_bytes_there_is_nothing_to_do_and_it_is_protected() -> None:
    with protected(2, 2, [0, 0, 0, 0]) as cluster:
        for member in cluster.members:
            assert member.area is not None
            assert member.area.state().snapshot == SNAPSHOT


def test_one_that_comes_late_is_waited_for() -> None:
    """The encoder stands with two rows for it, and nothing has to be made again."""
    with Cluster(1, 2, [4 * ROW_BYTES - MIB] * 3) as cluster:
        cluster.seal()
        ends = [start_encoding(cluster, member) for member in cluster.members[:2]]
        # Member 2 has not begun: it holds parity 1 of member 1's stripe.
        stands_at(cluster.members[1], STAGED_ROWS)
        ends.append(start_encoding(cluster, cluster.members[2]))
        assert [end() for end in ends] == [None, None, None]
        assert made_again(cluster) == 0
        check_all(cluster)


def check_all(cluster: Cluster) -> None:
    """All parities are whole, and any m of them give back what the others lack."""
    for member in cluster.members:
        assert member.area is not None
        member.area.check()
    count, m = len(cluster.members), cluster.group.parity_count
    for number in range(count):
        lost = {(number + other) % count for other in range(m)}
        cluster.check_rebuild(number, number, cluster.holders(lost))


def stands_at(member: Member, rows: int) -> None:
    """Until a member has encoded so many rows."""
    deadline = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        encoding = member.protector._encodings.get(SNAPSHOT)
        if encoding is not None and len(encoding.shares._encoded) >= rows:
            return
        deadline.wait(0.01)
    raise AssertionError(f"member {member.number} did not encode {rows} rows")


def made_again(cluster: Cluster) -> int:
    """Bytes that were pulled beyond the plan, questions aside."""
    return sum(
        (member.throttle.admitted_bytes - pulled_by_plan(cluster.sealed, member.number)) // PIECE_BYTES * PIECE_BYTES
        for member in cluster.members
    )


def test_one_that_never_comes_is_not_waited_for_long() -> None:
    """What an encoder has given up is made again when the holder comes at last."""
    with Cluster(1, 2, [4 * ROW_BYTES - MIB] * 3) as cluster:
        cluster.seal()
        cluster.members[1].protector._patience_s = 0.3
        ends = [start_encoding(cluster, member) for member in cluster.members[:2]]
        assert ends[1]() is None
        cluster.encode([2])
        assert ends[0]() is None
        assert made_again(cluster) == 2 * ROW_BYTES
        check_all(cluster)


def test_shares_that_are_not_to_be_had_are_given_up_by_name() -> None:
    with Cluster(1, 2, [2 * ROW_BYTES] * 3, patience_s=0.3) as cluster:
        cluster.seal()
        error = start_encoding(cluster, cluster.members[1])()
        assert isinstance(error, DeadlineError)
        assert "node n0 gave no row 0 of parity 1 for 0.3 s" in str(error)
        cluster.encode()
        check_all(cluster)


def test_a_member_may_begin_again_when_others_have_finished() -> None:
    """Its daemon was killed: the shares that had gone are made again, the others do nothing, nobody is waited for."""
    with protected(2, 2, [6 * ROW_BYTES - MIB] * 4) as cluster:
        member = cluster.members[3]
        assert member.area is not None
        member.area.begin()
        member.protector.withdraw(SNAPSHOT, "parity")
        before = member.throttle.admitted_bytes
        cluster.encode([3])
        assert member.throttle.admitted_bytes - before < pulled_by_plan(cluster.sealed, 3) + 1000
        check_all(cluster)


def test_all_may_begin_again_together() -> None:
    with protected(2, 2, sizes(4)) as cluster:
        expected = [parities(member) for member in cluster.members]
        cluster.encode()
        assert [parities(member) for member in cluster.members] == expected


# ---- what goes wrong


def flip(member: Member, place: int) -> None:
    descriptor = member.slots[0].descriptor
    os.pwrite(descriptor, bytes([os.pread(descriptor, 1, place)[0] ^ 1]), place)


def errors_of(cluster: Cluster) -> list[BaseException | None]:
    return [end() for end in [start_encoding(cluster, member) for member in cluster.members]]


@pytest.mark.parametrize("knows", [True, False])
def test_memory_that_changed_after_its_record_goes_into_no_parity(knows: bool) -> None:
    """Also where who gives it away takes the checksum of the damaged bytes: the seal record tells."""
    with Cluster(2, 1, [20 * MIB] * 3, patience_s=1) as cluster:
        cluster.seal()
        flip(cluster.members[1], 5 * PIECE_BYTES - 1)
        if not knows:
            cluster.members[1].protector.withdraw(SNAPSHOT, "data")
            cluster.members[1].node.sources.register(
                SNAPSHOT, "string", DescriptorSource(string_of(cluster.members[1].slots))
            )
        errors = errors_of(cluster)
        told = [error for error in errors if error is not None]
        assert len(told) == 1
        assert isinstance(told[0], CorruptionError)
        assert re.search(
            r"node n1 at .* string of step 40 .* bytes at 16777216: .* wrong twice"
            if knows
            else r"node n1: string 1 of step 40 .*, piece 4: CRC32C .*, its seal record says",
            str(told[0]),
        )
        failed = cluster.members[errors.index(told[0])]
        assert failed.area is not None
        assert failed.area.state() == AreaState()
        with pytest.raises(CorruptionError, match=r"1 of 6 pieces .* first is number 4"):
            failed.protector.verify_string(SNAPSHOT, cluster.members[1].slots, cluster.records[1])
        flip(cluster.members[1], 5 * PIECE_BYTES - 1)  # as a rebuild would
        cluster.encode()
        check_all(cluster)


@pytest.mark.parametrize("wrong", [1, 10**9])
def test_bytes_that_arrive_wrong_are_asked_for_again_or_refused(wrong: int) -> None:
    with Cluster(2, 1, [20 * MIB] * 3, patience_s=1) as cluster:
        cluster.seal()
        bent = cluster.members[0]
        bent.protector.withdraw(SNAPSHOT, "data")
        bent.node.sources.register(SNAPSHOT, "string", Scripted(strings(cluster)[0], wrong=wrong))
        errors = errors_of(cluster)
        if wrong == 1:
            assert errors == [None] * 3
            check_all(cluster)
        else:
            assert errors[0] is None
            for error in errors[1:]:
                assert isinstance(error, CorruptionError)
                assert "node n0" in str(error)


def test_a_member_that_dies_in_the_middle_ends_the_others() -> None:
    """By name and within a deadline; nobody has a parity that is not whole."""
    with Cluster(2, 2, [4 * ROW_BYTES] * 4, patience_s=1, deadline_s=3) as cluster:
        cluster.seal()
        victim = cluster.members[2]
        victim.protector.withdraw(SNAPSHOT, "data")
        held = Scripted(strings(cluster)[2], hold_at=ROW_BYTES)
        victim.node.sources.register(SNAPSHOT, "string", held)
        cancellation = Cancellation()
        ends = [start_encoding(cluster, member) for member in cluster.members if member is not victim]
        last = start_encoding(cluster, victim, cancellation)
        assert held.held.wait(WAIT_S)
        cancellation.cancel()
        closing = in_thread(victim.node.server.close)
        for error in [end() for end in ends]:
            assert isinstance(error, DaemonError | DeadlineError | NotFoundError)
        assert isinstance(last(), DaemonError)
        held.go_on.set()
        assert closing() is None
        for member in cluster.members:
            assert member.area is not None
            assert member.area.state() == AreaState()


@pytest.mark.parametrize("throttled", [False, True])
def test_encoding_can_be_cancelled(throttled: bool) -> None:
    """While it waits for its turn, or for the others. Nothing stays registered or in use."""
    with Cluster(1, 2, [3 * ROW_BYTES] * 3) as cluster:
        cluster.seal()
        member = cluster.members[0]
        if throttled:
            member.throttle.pause()
        cancellation = Cancellation()
        end = start_encoding(cluster, member, cancellation)
        if not throttled:
            stands_at(member, STAGED_ROWS)
        cancellation.cancel()
        error = end()
        assert isinstance(error, DaemonError)
        assert "cancelled" in str(error)
        member.throttle.resume()
        for name in ("share/1", "ready/1", "parity/0"):
            with pytest.raises(NotFoundError):
                member.node.sources.find(SNAPSHOT, name)
        assert member.protector.buffers._used == 0
        cluster.encode()
        check_all(cluster)


def test_shares_end_when_the_parity_is_freed() -> None:
    with protected(1, 2, [10 * MIB] * 3) as cluster:
        for member in cluster.members:
            member.protector.withdraw(SNAPSHOT, "parity")
            member.protector.withdraw(SNAPSHOT, "parity")
            assert member.protector.buffers._used == 0
            for name in ("share/1", "ready/1", "parity/0", "parity/1"):
                with pytest.raises(NotFoundError):
                    member.node.sources.find(SNAPSHOT, name)
            assert member.node.sources.find(SNAPSHOT, "string").size


def test_two_snapshots_at_once() -> None:
    """One is rebuilt while another is encoded."""
    with protected(2, 2, [30 * MIB, 20 * MIB, 10 * MIB, 33 * MIB]) as cluster:
        later = SnapshotId(SNAPSHOT.epoch, 41)
        slots = [[make_slot(2 * n, 25 * MIB, 50 + n, snapshot=later)] for n in range(4)]
        members = cluster.members
        records = {n: members[n].protector.describe(later, slots[n]) for n in range(4)}
        sealed = SealedGroup(later, cluster.group, records)
        areas = [ParityArea.create(sealed.striping.parity_bytes) for _ in range(4)]
        for n in range(4):
            members[n].protector.give_string(later, slots[n], records[n])

        def encode(n: int) -> None:
            members[n].protector.encode(sealed, n, areas[n])

        ends = [in_thread(lambda n=n: encode(n)) for n in range(4)]  # type: ignore[misc]
        for number in range(4):
            cluster.check_rebuild((number + 1) % 4, number, cluster.holders({number}))
        assert [end() for end in ends] == [None] * 4
        for n, area in enumerate(areas):
            area.check()
            assert area.state().snapshot == later
            assert area.state().striping == sealed.striping
            area.close()
            members[n].protector.withdraw(later, "data")
            slots[n][0].close()


def test_a_new_daemon_gives_what_its_predecessor_left() -> None:
    """Descriptors of slots and area are all that it has."""
    with protected(1, 1, [10 * MIB, 12 * MIB]) as cluster:
        member = cluster.members[0]
        assert member.area is not None
        left = ParityArea.open(os.dup(member.area.descriptor))
        member.protector.close()
        member.protector.give_parity(left)
        member.protector.give_string(SNAPSHOT, member.slots, cluster.records[0])
        left.close()
        cluster.check_rebuild(1, 1, cluster.holders({1}))
