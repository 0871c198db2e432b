"""Pulls and messages between real servers and clients on loopback."""

from __future__ import annotations

import contextlib
import os
import threading

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import (
    CkptdError,
    ConfigError,
    CorruptionError,
    DaemonError,
    DeadlineError,
    FormatError,
    NotFoundError,
)
from ckptd.core.native import crc32c
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers import Cancellation, DescriptorSource, Extent, Fragments, Peer, Peers, Pull, Sources, Throttle
from ckptd.tiers.peers.pulling import interleave
from ckptd.tiers.peers.wire import BATCH_BYTES, CALL_BYTES, MOST_MESSAGE_BYTES, SCHEMA, Ticket, headers
from tests.peers.nodes import SIZE, SNAPSHOT, WAIT_S, Child, Node, Scripted, credentials, in_thread, pair, random_bytes


@pytest.mark.parametrize("tls", [True, False])
def test_any_range_arrives_as_it_is(tls: bool) -> None:
    data = random_bytes(CALL_BYTES + SIZE)
    with pair(tls=tls) as (node, peer):
        node.give(data)
        for offset, size in [(0, len(data)), (1, PIECE_BYTES), (len(data) - 1, 1), (12345, CALL_BYTES), (7, 0)]:
            target = np.full(size + 2, 7, np.uint8)
            peer.pull(SNAPSHOT, "string", offset, target.data[1 : 1 + size])
            assert np.array_equal(target[1 : 1 + size], data[offset : offset + size])
            assert target[0] == target[-1] == 7


@pytest.mark.parametrize("tls", [True, False])
def test_a_call_over_the_end_of_an_extent_arrives_as_it_is(tls: bool) -> None:
    """The one is sent as it lies in memory, the other copied; for who pulls they are the same."""
    data = random_bytes(CALL_BYTES + SIZE)
    descriptor = os.memfd_create("two extents")
    os.write(descriptor, data.tobytes())
    edge = CALL_BYTES // 2 + 77
    with pair(tls=tls) as (node, peer):
        extents = [Extent(descriptor, 0, edge), Extent(descriptor, edge, len(data) - edge)]
        node.sources.register(SNAPSHOT, "string", DescriptorSource(extents))
        os.close(descriptor)
        target = np.zeros(len(data), np.uint8)
        for start in (0, edge):
            peer.pull(SNAPSHOT, "string", start, target.data[start:])
            assert np.array_equal(target[start:], data[start:])


def test_checksums_come_with_the_bytes() -> None:
    """One for each batch, counted from the beginning of the pull, over more than one call; also where a batch was wrong
    at first."""
    data = random_bytes(CALL_BYTES + SIZE)
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", Scripted(data, wrong=1))
        target, crc = np.zeros(len(data) - 5, np.uint8), np.zeros(-(-(len(data) - 5) // BATCH_BYTES), np.uint32)
        peers = Peers({"there": peer})
        peers.pull([Pull("there", SNAPSHOT, "string", 5, target.data, crc)])
        assert crc.tolist() == [crc32c(data[at : at + BATCH_BYTES]) for at in range(5, len(data), BATCH_BYTES)]
        peers.close()


def test_what_is_not_there_is_refused_by_name() -> None:
    target = np.zeros(100, np.uint8)
    with pair() as (node, peer):
        node.give(random_bytes(150))
        with pytest.raises(NotFoundError, match=r"node there at 127.0.0.1:\d+: parity of step 40"):
            peer.pull(SNAPSHOT, "parity", 0, target.data)
        with pytest.raises(FormatError, match=r"\[51, 151\): expected a range of its 150 bytes"):
            peer.pull(SNAPSHOT, "string", 51, target.data)


def test_a_batch_that_arrives_wrong_is_asked_for_once_more() -> None:
    """The second of four is damaged on the way; only it crosses the network again."""
    data = random_bytes(SIZE)

    class Second(Scripted):
        def read(self, offset: int, into: memoryview) -> int:
            self.wrong = int(offset == BATCH_BYTES and (offset, len(into)) not in self.reads)
            return super().read(offset, into)

    source = Second(data)
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        target = np.zeros(SIZE, np.uint8)
        peer.pull(SNAPSHOT, "string", 0, target.data)
        assert np.array_equal(target, data)
        assert [offset // BATCH_BYTES for offset, _ in source.reads] == [0, 1, 2, 3, 1]


def test_a_batch_that_is_wrong_twice_is_corrupt() -> None:
    source = Scripted(random_bytes(SIZE), wrong=2)
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        with pytest.raises(
            CorruptionError, match=r"node there at .*: string of step 40 .*, 1000 bytes at 17: .* twice"
        ):
            peer.pull(SNAPSHOT, "string", 17, np.zeros(1000, np.uint8).data)
        assert len(source.reads) == 2


def test_damaged_memory_is_found_by_the_node_that_has_it() -> None:
    """Fragments: the server compares whole ones with what was captured, before it sends."""
    data = random_bytes(30_000)
    cuts = np.array([0, 10_000, 10_001, 30_000])
    crc = np.array([crc32c(data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)], np.uint32)
    descriptor = os.memfd_create("damaged")
    os.write(descriptor, data.tobytes())
    with pair() as (node, peer):
        source = DescriptorSource(
            [Extent(descriptor, 0, 20_000), Extent(descriptor, 20_000, 10_000)], Fragments(cuts, crc)
        )
        node.sources.register(SNAPSHOT, "string", source)
        target = np.zeros(30_000, np.uint8)
        for start, stop in [(0, 30_000), (1, 30_000), (5, 9_000), (10_000, 10_001), (9_999, 29_999)]:
            target[:] = 0
            peer.pull(SNAPSHOT, "string", start, target.data[start:stop])
            assert np.array_equal(target[start:stop], data[start:stop])
        os.pwrite(descriptor, bytes([data[15_000] ^ 1]), 15_000)
        peer.pull(SNAPSHOT, "string", 0, target.data[:10_001])
        with pytest.raises(CorruptionError, match=r"node there .*string of step 40.*\[10001, 30000\): CRC32C"):
            peer.pull(SNAPSHOT, "string", 0, target.data)
    os.close(descriptor)


def test_damaged_memory_is_found_by_who_receives_it() -> None:
    """Mapped memory goes with the checksums that it should have, unread; only whole fragments have one."""
    data = random_bytes(2 * BATCH_BYTES + 1000)
    cuts = np.array([0, BATCH_BYTES, 2 * BATCH_BYTES, len(data)])
    crc = np.array([crc32c(data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)], np.uint32)
    descriptor = os.memfd_create("damaged")
    os.write(descriptor, data.tobytes())
    with pair() as (node, peer):
        extent = Extent(descriptor, 0, len(data))
        node.sources.register(SNAPSHOT, "string", DescriptorSource([extent], Fragments(cuts, crc)))
        target = np.zeros(len(data), np.uint8)
        found = np.zeros(3, np.uint32)
        peer.pull(SNAPSHOT, "string", 0, target.data, crc=found)
        assert np.array_equal(target, data)
        assert np.array_equal(found, crc)
        os.pwrite(descriptor, bytes([data[BATCH_BYTES + 5] ^ 1]), BATCH_BYTES + 5)
        peer.pull(SNAPSHOT, "string", 0, target.data[:BATCH_BYTES])
        with pytest.raises(CorruptionError, match=rf"node there .* {BATCH_BYTES} bytes at {BATCH_BYTES}: .* twice"):
            peer.pull(SNAPSHOT, "string", 0, target.data)
        peer.pull(SNAPSHOT, "string", 1, target.data[1:])  # nothing is known of such ranges
        assert target[BATCH_BYTES + 5] == data[BATCH_BYTES + 5] ^ 1
    os.close(descriptor)


def test_a_killed_peer_is_named() -> None:
    """SIGKILL while a pull waits for the third piece: the pull ends with an error long before its deadline."""
    here = credentials("here")
    with Child(here, SIZE, hold_at=2 * PIECE_BYTES) as child:
        peer = Peer(here, child.announcement, deadline_s=10 * WAIT_S)
        end = in_thread(lambda: peer.pull(SNAPSHOT, "string", 0, np.zeros(SIZE, np.uint8).data))
        child.wait_held()
        child.process.kill()
        error = end()
        assert isinstance(error, DaemonError)
        assert "node child at 127.0.0.1" in str(error)
        with pytest.raises(DaemonError, match="node child"):
            peer.ask("Ping", b"")
        peer.close()


def test_a_stopped_peer_meets_the_deadline() -> None:
    """SIGSTOP: its kernel still answers, it does not. Once it goes on, so do pulls."""
    here = credentials("here")
    with Child(here, SIZE) as child:
        peer = Peer(here, child.announcement, deadline_s=WAIT_S)
        target = np.zeros(SIZE, np.uint8)
        peer.pull(SNAPSHOT, "string", 0, target.data)
        child.stop()
        for deadline_s in (0.2, 0.05):
            with pytest.raises(DeadlineError, match=rf"node child at .* within {deadline_s:g} s"):
                peer.pull(SNAPSHOT, "string", 0, target.data, deadline_s=deadline_s)
        fresh = Peer(here, child.announcement)
        with pytest.raises(DeadlineError):
            fresh.ask("Ping", b"", deadline_s=0.2)
        child.process.send_signal(18)
        target[:] = 0
        peer.pull(SNAPSHOT, "string", 0, target.data)
        assert np.array_equal(target, random_bytes(SIZE))
        peer.close()
        fresh.close()


def test_a_call_that_does_not_end_keeps_nobody_from_leaving() -> None:
    """A pull without a deadline that hangs: the node closes all the same, and its process ends.

    Flight would wait for the call in three places: in `shutdown`, in the server's destructor, and when Python exits.
    """
    here = credentials("here")
    assert here.identity is not None
    with Child(here, 10, hold_at=0) as child:
        client = flight.FlightClient(
            f"grpc+tls://127.0.0.1:{child.announcement.port}",
            tls_root_certs=child.announcement.certificate,
            override_hostname=child.announcement.server_name,
            cert_chain=here.identity.certificate,
            private_key=here.identity.key,
        )
        ticket = flight.Ticket(Ticket(SNAPSHOT, "string", 0, 10).encode())
        reader = client.do_get(ticket, flight.FlightCallOptions(headers=headers(here)))
        child.wait_held()
        assert child.leave() == "left"
        reader.cancel()
        client.close()
    with Child(here, 10) as child:
        assert child.leave() == "closed"


def test_a_peer_that_is_slow_to_read_meets_the_deadline() -> None:
    source = Scripted(random_bytes(SIZE), hold_at=PIECE_BYTES)
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        with pytest.raises(DeadlineError):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(SIZE, np.uint8).data, deadline_s=0.3)
        source.go_on.set()


def test_cancelled_in_the_middle() -> None:
    source = Scripted(random_bytes(SIZE), hold_at=PIECE_BYTES)
    cancellation = Cancellation()
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        target = np.zeros(SIZE, np.uint8)
        end = in_thread(lambda: peer.pull(SNAPSHOT, "string", 0, target.data, cancellation=cancellation))
        assert source.held.wait(WAIT_S)
        cancellation.cancel()
        error = end()
        assert isinstance(error, DaemonError)
        assert "cancelled" in str(error)
        source.go_on.set()
        with pytest.raises(DaemonError, match="cancelled"):
            peer.pull(SNAPSHOT, "string", 0, target.data, cancellation=cancellation)


def test_withdrawn_memory_is_read_no_more() -> None:
    """`withdraw` waits for the piece being read and returns when the slot may be written again."""
    source = Scripted(random_bytes(SIZE), hold_at=PIECE_BYTES)
    with pair() as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        pull = in_thread(lambda: peer.pull(SNAPSHOT, "string", 0, np.zeros(SIZE, np.uint8).data))
        assert source.held.wait(WAIT_S)
        withdrawal = in_thread(lambda: node.sources.withdraw(SNAPSHOT))
        assert not source.closed
        source.go_on.set()
        assert withdrawal() is None
        assert source.closed
        reads = len(source.reads)
        error = pull()
        assert error is None or isinstance(error, NotFoundError)
        assert len(source.reads) == reads
        with pytest.raises(NotFoundError):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(1, np.uint8).data)


def test_many_streams_share_few_buffers() -> None:
    """Sixteen streams of four nodes' worth of threads; the server copies at most two batches at a time."""
    data = random_bytes(CALL_BYTES + SIZE)
    source = Scripted(data)
    with pair(buffers=2, peer={"streams": 16}) as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        targets = [np.zeros(PIECE_BYTES // 2, np.uint8) for _ in range(48)]
        peers = Peers({"there": peer}, streams=16)
        peers.pull([Pull("there", SNAPSHOT, "string", 1000 * i, target.data) for i, target in enumerate(targets)])
        peers.close()
        for i, target in enumerate(targets):
            assert np.array_equal(target, data[1000 * i : 1000 * i + len(target)])
        assert 1 <= source.most_running <= 2


def test_several_peers_and_the_first_error_ends_all() -> None:
    here = credentials("here")
    data = random_bytes(SIZE)
    with Node("one", [here]) as one, Node("two", [here]) as two:
        one.give(data)
        held = Scripted(data, hold_at=0)
        two.sources.register(SNAPSHOT, "string", held)
        two.give(data, "parity")
        peers = Peers({node.announcement.node: Peer(here, node.announcement) for node in (one, two)})
        first, second = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        peers.pull([Pull("one", SNAPSHOT, "string", 0, first.data), Pull("two", SNAPSHOT, "parity", 0, second.data)])
        assert np.array_equal(first, data)
        assert np.array_equal(second, data)
        wanted = [Pull("two", SNAPSHOT, "string", 0, first.data), Pull("one", SNAPSHOT, "nothing", 0, second.data)]
        mine = Cancellation()
        with pytest.raises(NotFoundError, match="nothing of step 40"):
            peers.pull(wanted, cancellation=mine)
        assert not mine.cancelled
        with pytest.raises(NotFoundError, match="'three'"):
            peers.pull([Pull("three", SNAPSHOT, "string", 0, first.data)])
        held.go_on.set()
        peers.close()


def test_pulls_are_dealt_in_turns() -> None:
    target = memoryview(bytearray(2 * CALL_BYTES + 5))
    wanted = [Pull("a", SNAPSHOT, "string", 100, target), Pull("b", SNAPSHOT, "parity", 0, target[:10])]
    found = [(pull.node, pull.offset, len(pull.into)) for pull in interleave(wanted)]
    assert found == [
        ("a", 100, CALL_BYTES),
        ("b", 0, 10),
        ("a", 100 + CALL_BYTES, CALL_BYTES),
        ("a", 100 + 2 * CALL_BYTES, 5),
    ]


# --- messages


def test_messages_and_their_errors() -> None:
    def answer(node: str, kind: str, body: bytes) -> bytes:
        if kind == "Refuse":
            raise ConfigError("not on my watch")
        return f"{node} {kind} ".encode() + body if kind == "Echo" else bytes(MOST_MESSAGE_BYTES + len(body))

    with pair(answer=answer) as (_, peer):
        assert peer.ask("Echo", b"body") == b"here Echo body"
        assert len(peer.ask("Big", b"")) == MOST_MESSAGE_BYTES
        assert len(peer.ask("Echo", bytes(MOST_MESSAGE_BYTES - 10))) == MOST_MESSAGE_BYTES
        with pytest.raises(ConfigError, match=r"node there at .*: not on my watch$"):
            peer.ask("Refuse", b"")
        with pytest.raises(FormatError, match=f"answer to Big of {MOST_MESSAGE_BYTES + 1} bytes"):
            peer.ask("Big", b"1")
        with pytest.raises(FormatError, match=f"of {MOST_MESSAGE_BYTES + 1} bytes"):
            peer.ask("Echo", bytes(MOST_MESSAGE_BYTES + 1))
        with pytest.raises(FormatError, match="expected a name"):
            peer.ask("no spaces", b"")


def test_a_message_has_a_deadline() -> None:
    leave = threading.Event()

    def answer(node: str, kind: str, body: bytes) -> bytes:
        leave.wait(WAIT_S)
        return b""

    with pair(answer=answer) as (_, peer):
        with pytest.raises(DeadlineError, match=r"within 0.1 s"):
            peer.ask("Wait", b"", deadline_s=0.1)
        leave.set()


def test_who_did_not_answer_in_time_is_asked_on_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a cut TCP goes on waiting for as long as the cut has lasted. Other errors cost no connection."""
    made: list[object] = []
    client = flight.FlightClient
    monkeypatch.setattr(flight, "FlightClient", lambda *place, **how: made.append(place) or client(*place, **how))
    leave = threading.Event()

    def answer(node: str, kind: str, body: bytes) -> bytes:
        leave.wait(WAIT_S)
        if kind == "Refused":
            raise NotFoundError("nothing")
        return b""

    source = Scripted(random_bytes(SIZE), hold_at=0)
    with pair(answer=answer, peer={"streams": 1}) as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        target = np.zeros(1, np.uint8).data
        for asks in (
            lambda limit: peer.ask("Wait", b"", limit),
            lambda limit: peer.pull(SNAPSHOT, "string", 0, target, deadline_s=limit),
        ):
            made.clear()
            with pytest.raises(DeadlineError):
                asks(0.1)
            leave.set()
            source.go_on.set()
            for _ in range(2):
                asks(WAIT_S)
            assert len(made) == 2
            leave.clear()
            source.go_on.clear()
        leave.set()
        made.clear()
        for _ in range(2):
            with pytest.raises(NotFoundError):
                peer.ask("Refused", b"")
        source.go_on.set()
        assert made == []


def test_messages_do_not_wait_behind_pulls() -> None:
    """All connections for pulls are busy; a message is answered meanwhile. Closing leaves the pull its connection."""
    source = Scripted(random_bytes(SIZE), hold_at=0)
    with pair(answer=lambda node, kind, body: b"heard", peer={"streams": 1}) as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        end = in_thread(lambda: peer.pull(SNAPSHOT, "string", 0, np.zeros(SIZE, np.uint8).data))
        assert source.held.wait(WAIT_S)
        assert peer.ask("Fact", b"") == b"heard"
        with pytest.raises(DeadlineError, match="all connections were busy"):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(1, np.uint8).data, deadline_s=0.01)
        peer.close()
        source.go_on.set()
        assert end() is None
        for call in (lambda: peer.ask("Fact", b""), lambda: peer.pull(SNAPSHOT, "string", 0, memoryview(bytearray(1)))):
            with pytest.raises(DaemonError, match="has closed"):
                call()


def test_too_many_calls_are_refused() -> None:
    entered, leave = threading.Event(), threading.Event()

    def answer(node: str, kind: str, body: bytes) -> bytes:
        entered.set()
        leave.wait(WAIT_S)
        return b"done"

    with pair(answer=answer, most_calls=1, peer={"streams": 2}) as (node, peer):
        node.give(random_bytes(10))
        first = in_thread(lambda: peer.ask("Wait", b""))
        assert entered.wait(WAIT_S)
        for _ in range(3):
            with pytest.raises(DaemonError, match="busy"):
                peer.ask("Wait", b"")
            with pytest.raises(DaemonError, match="busy"):
                peer.pull(SNAPSHOT, "string", 0, np.zeros(1, np.uint8).data)
        leave.set()
        assert first() is None
        peer.pull(SNAPSHOT, "string", 0, np.zeros(1, np.uint8).data)


# --- hostile clients


def _raw(node: Node) -> tuple[flight.FlightClient, flight.FlightCallOptions]:
    """A client with the right headers that says what it likes."""
    options = flight.FlightCallOptions(timeout=WAIT_S, headers=headers(credentials("here", tls=False)))
    return flight.FlightClient(f"grpc://127.0.0.1:{node.announcement.port}"), options


_GOOD = Ticket(SNAPSHOT, "string", 0, 100)
_HOSTILE = {
    "empty": b"",
    "garbage": b"\xc1garbage",
    "not utf-8": msgspec.msgpack.encode(_GOOD).replace(b"string", b"\xff\xfe\xfd\xfc\xfb\xfa"),
    "trailing": _GOOD.encode() + b"\x00",
    "one field more": msgspec.msgpack.encode([*msgspec.to_builtins(_GOOD), 1]),
    "snapshot with a field more": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40, 1], "string", 0, 100]),
    "field missing": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0]),
    "length zero": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0, 0]),
    "length beyond a call": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0, CALL_BYTES + 1]),
    "length enormous": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0, 2**64 - 1]),
    "length negative": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0, -5]),
    "offset negative": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", -1, 5]),
    "offset enormous": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 2**63, 5]),
    "offset a float": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 0.0, 5]),
    "beyond the end": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 1000, 1]),
    "across the end": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "string", 901, 100]),
    "a path": msgspec.msgpack.encode([[[6, "fedcba9876543210"], 40], "../../etc/passwd", 0, 5]),
    "nonce": msgspec.msgpack.encode([[[6, "fedcba987654321X"], 40], "string", 0, 5]),
    "step negative": msgspec.msgpack.encode([[[6, "fedcba9876543210"], -40], "string", 0, 5]),
    "deep": b"\x91" * 1000,
    "long": b"\x00" * 2_000_000,
    "padded integers": _GOOD.encode().replace(b"\x28\xa6string", b"\xcd\x00\x28\xa6string"),
}


@pytest.fixture(scope="module")
def target_node():  # type: ignore[no-untyped-def]
    with pair(tls=False) as (node, _):
        source = Scripted(random_bytes(1000))
        node.sources.register(SNAPSHOT, "string", source)
        yield node, source


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_tickets_reach_no_source(name: str, target_node: tuple[Node, Scripted]) -> None:
    node, source = target_node
    before = len(source.reads)
    client, options = _raw(node)
    with client, pytest.raises(flight.FlightServerError) as caught:
        client.do_get(flight.Ticket(_HOSTILE[name]), options).read_all()
    assert caught.value.extra_info == b"FormatError"
    assert len(source.reads) == before
    assert len(str(caught.value)) < 4000


def test_other_calls_of_flight_are_not_answered(target_node: tuple[Node, Scripted]) -> None:
    client, options = _raw(target_node[0])
    with client:
        with pytest.raises(NotImplementedError):
            list(client.list_flights(options=options))
        with pytest.raises(NotImplementedError):
            client.get_flight_info(flight.FlightDescriptor.for_path("x"), options)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_or_are_a_format_error(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert Ticket.decode(raw).encode() == raw


# --- hostile servers


class _Liar(flight.FlightServerBase):
    """Answers every ticket with the given batches."""

    def __init__(self, schema: pa.Schema, answers: list[tuple[pa.RecordBatch, bytes | None]]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.schema, self.answers = schema, answers

    def do_get(self, context: object, ticket: object) -> flight.GeneratorStream:
        return flight.GeneratorStream(self.schema, (a if a[1] is not None else a[0] for a in self.answers))


def _batch(size: int, nulls: bool = False) -> pa.RecordBatch:
    values = pa.array([None] * size if nulls else np.zeros(size, np.uint8), pa.uint8())
    return pa.record_batch([values], schema=SCHEMA)


_CRC = crc32c(bytes(100)).to_bytes(4, "little")
_OTHER = pa.schema([("bytes", pa.int64())])
_LIES: dict[str, tuple[pa.Schema, list[tuple[pa.RecordBatch, bytes | None]]]] = {
    "nothing": (SCHEMA, []),
    "short": (SCHEMA, [(_batch(99), _CRC)]),
    "long": (SCHEMA, [(_batch(101), _CRC)]),
    "one piece more": (SCHEMA, [(_batch(100), _CRC), (_batch(100), _CRC)]),
    "an empty piece": (SCHEMA, [(_batch(0), _CRC), (_batch(100), _CRC)]),
    "no checksum": (SCHEMA, [(_batch(100), None)]),
    "half a checksum": (SCHEMA, [(_batch(100), _CRC[:2])]),
    "another schema": (_OTHER, [(pa.record_batch([pa.array([1] * 100)], schema=_OTHER), _CRC)]),
}


@pytest.mark.parametrize("name", _LIES)
def test_lying_peers_are_found(name: str) -> None:
    here = credentials("here", tls=False)
    with _Liar(*_LIES[name]) as liar:
        peer = Peer(here, here.announce("127.0.0.1", liar.port), deadline_s=WAIT_S)
        target = np.full(102, 9, np.uint8)
        with pytest.raises(FormatError, match="node here at"):
            peer.pull(SNAPSHOT, "string", 0, target.data[1:101])
        assert target[0] == target[101] == 9
        peer.close()


def test_a_message_larger_than_a_batch_is_not_taken_in() -> None:
    here = credentials("here", tls=False)
    with _Liar(SCHEMA, [(_batch(2 * PIECE_BYTES), _CRC)]) as liar:
        peer = Peer(here, here.announce("127.0.0.1", liar.port), deadline_s=WAIT_S)
        with pytest.raises(CkptdError, match=r"(?i)larger than max|exhausted|cancelled"):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(100, np.uint8).data)
        peer.close()


def test_nulls_do_not_crash() -> None:
    here = credentials("here", tls=False)
    with _Liar(SCHEMA, [(_batch(100, nulls=True), b"1234")]) as liar:
        peer = Peer(here, here.announce("127.0.0.1", liar.port), deadline_s=WAIT_S)
        with pytest.raises(FormatError, match="missing ones"):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(100, np.uint8).data)
        peer.close()


# --- the throttle in a pull


class _FakeTime(Throttle):
    """Waiting moves the clock, so that what is counted are bytes over seconds that nobody waited for."""

    def __init__(self, bandwidth: float) -> None:
        self.now = 0.0
        super().__init__(bandwidth, clock=lambda: self.now)

    def _wait(self, seconds: float | None) -> None:
        assert seconds is not None
        self.now += seconds


def test_pulls_keep_to_the_bandwidth() -> None:
    throttle = _FakeTime(bandwidth=1e6)
    data = random_bytes(SIZE)
    with pair(peer={"throttle": throttle}) as (node, peer):
        node.give(data)
        target = np.zeros(SIZE, np.uint8)
        for start in range(0, SIZE, PIECE_BYTES):
            peer.pull(SNAPSHOT, "string", start, target.data[start : start + PIECE_BYTES])
        assert throttle.admitted_bytes == SIZE
        last = SIZE % PIECE_BYTES
        assert throttle.now == pytest.approx((SIZE - last) / 1e6 - 0.1)
        assert np.array_equal(target, data)


def test_a_paused_pull_goes_on_and_can_be_cancelled() -> None:
    throttle, cancellation = Throttle(), Cancellation()
    throttle.pause()
    source = Scripted(random_bytes(100))
    with pair(peer={"throttle": throttle}) as (node, peer):
        node.sources.register(SNAPSHOT, "string", source)
        peers = Peers({"there": peer})
        target = np.zeros(100, np.uint8)
        wanted = [Pull("there", SNAPSHOT, "string", 0, target.data)]
        end = in_thread(lambda: peers.pull(wanted, cancellation=cancellation))
        cancellation.cancel()
        assert isinstance(end(), DaemonError)
        assert source.reads == []
        with pytest.raises(DaemonError, match="cancelled"):
            peer.pull(SNAPSHOT, "string", 0, target.data, cancellation=cancellation)
        end = in_thread(lambda: peers.pull(wanted))
        throttle.resume()
        assert end() is None
        assert np.array_equal(target, source.data)
        peers.close()


def test_sources_are_registered_once() -> None:
    sources = Sources()
    sources.register(SNAPSHOT, "string", Scripted(random_bytes(1)))
    with pytest.raises(ValueError, match="registered already"):
        sources.register(SNAPSHOT, "string", Scripted(random_bytes(1)))
    sources.close()
