"""Packets: strict, bounded, and no surprise in them reaches the machine."""

from __future__ import annotations

import contextlib
import random
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import FormatError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.daemon import wire
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.epoch import MAX_RECORDS, Choice, beginning
from ckptd.protocol.cluster.facts import Held, Shape
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.members import MAX_RANKS
from ckptd.protocol.node import NodeMachine
from ckptd.protocol.state import NodeState
from tests.protocol.transcript import POLICY, Script, epoch

E1 = epoch(1)
POINT = SnapshotId(E1, 7)
TO = typing.get_args(m.ToDaemon)
FROM = typing.get_args(m.FromDaemon)
ALONE = Shape(((0,),), 0)
HELD = Held(POINT, 0, ALONE, 7, data=True, parity=True, posted=True)
PROMISE = cluster.Promise(E1, "n", (HELD,), POINT, (EpochRecord(E1, POINT), EpochRecord(E1)), E1, 1)


def begun(at: Epoch, point: SnapshotId | None = POINT, world: int = 2) -> cluster.Begin:
    """How an epoch of one node begins."""
    return beginning(at, Choice(point, 7, {}, 0, None), ["n"], (), ALONE, world)


BEGIN = msgspec.to_builtins(begun(E1))
PLAIN: dict[str, Any] = {
    "begin": begun(E1),
    "ranks": [0, 1],
    "granted": 3,
    "snapshot": POINT,
    "shape": ALONE,
    "strings": [0],
    "held": {"n": (0, True, False)},
    "address": "127.0.0.1",
    "tls_dir": "/tls",
    "contact": b"a node",
    "contacts": [b"another"],
    "arenas": ["n"],
    "nodes": ["a node"],
    "promise": PROMISE,
    "promises": [PROMISE],
    "protocol": 1,
    "job": "job",
    "epoch": E1,
    "restore_point": POINT,
    "world": 2,
    "policy": m.Policy(**POLICY),
    "instance": "p",
    "digest": "d",
    "slot_bytes": 100,
    "step_s": 1.0,
    "cost_s": 0.5,
    "reason": "late",
    "to": "/elsewhere",
    "error": "StoreError",
    "message": "text",
    "promised": E1,
    "slots": [1],
    "pending": [2],
    "restore": [m.SlotInfo(1, 0, "d", 100)],
    "reuse": [1],
    "create": [2],
    "level": Level.SEALED,
    "report": {"slots": [{"bytes": 1}]},
    "compare": True,
    "replicas": {7: 2**32 - 1},
}


def plain(kind: type[m.Message], **other: Any) -> Any:
    """A message of a kind with every field set."""
    return kind(**{f.name: other.get(f.name, PLAIN.get(f.name, 1)) for f in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", [*TO, *FROM])
def test_every_message_comes_back(kind: type[m.Message]) -> None:
    """As it was, from its own direction; as an error from the other."""
    message = plain(kind)
    packet = m.encode(message)
    ours, theirs = ("to", "from") if kind in TO else ("from", "to")
    assert m.decode(packet, ours) == message  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        m.decode(packet, theirs)  # type: ignore[arg-type]


def packet(kind: type[m.Message], **fields: Any) -> bytes:
    """A packet with some fields as given, whatever they are."""
    values = msgspec.to_builtins(plain(kind))
    return msgspec.msgpack.encode({"type": kind.__name__, **values, **fields})


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xc1",
        b"\x90",
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Captured", "grant": 1}),
        b"\x82\xa4type\xa5Hello\xa3job\xa2\xff\xfe",  # no UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 entries
        b"\x81" * 70_000,  # nested
        packet(m.Captured, grant=-1),
        packet(m.Captured, step=2**63),
        packet(m.Captured, step="7"),
        packet(m.Boundary, cost_s=float("nan")),
        packet(m.Boundary, cost_s=-1.0),
        packet(m.Boundary, step=10**18),
        packet(m.Missed, reason="because"),
        packet(m.Hello, rank=-1),
        packet(m.Hello, world=0),
        packet(m.Hello, ranks=[-1]),
        packet(m.Hello, job=""),
        packet(m.Hello, job="j" * 5000),
        packet(m.Hello, instance="i" * 101),
        packet(m.Hello, epoch=[-1, "0" * 16]),
        packet(m.Prepare, epoch=[1, "../../../../etc/x"]),
        packet(m.Begin, begin={**BEGIN, "step": -1}),
        packet(m.Begin, begin={**BEGIN, "point": [[1, "0" * 16], -1]}),
        packet(m.Begin, policy={**POLICY, "snapshot_steps": 0}),
        packet(m.Begin, policy={**POLICY, "flush_steps": -5}),
        packet(m.Begin, policy={**POLICY, "overhead_budget": 0.0}),
        packet(m.Begin, policy={**POLICY, "linger_s": -1.0}),
        packet(m.Borrow, strings=[1]),
        packet(m.Borrow, held={"n": [1, True, True]}),
        packet(m.Borrow, shape=[[[0, 0]], 0]),
        packet(m.Layout, slot_bytes=0),
        packet(m.Layout, slot_bytes=2**60),
        packet(m.Layout, frozen_bytes=-1),
        packet(m.Captured, replicas={1: 2**32}),
        packet(m.Captured, replicas=dict.fromkeys(range(1025), 1)),
        m.encode(m.Status()) + b"\x00",
        b"\x00" * (m.MAX_MESSAGE + 1),
    ],
)
def test_bad_packets_are_refused(bad: bytes) -> None:
    """By a FormatError, nothing else."""
    with pytest.raises(FormatError):
        m.decode(bad, "to")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Or, by a miracle, are a message."""
    for direction in ("to", "from"):
        with contextlib.suppress(FormatError):
            m.decode(data, direction)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*TO, *FROM]), st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_packets_are_refused(kind: type[m.Message], seed: int, times: int) -> None:
    """Bytes changed, removed, doubled."""
    chance = random.Random(seed)
    data = bytearray(m.encode(plain(kind)))
    for _ in range(times):
        at = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at:]
                data += b"\xc0"
            case _:
                data[at:at] = data[at : at + 9]
    with contextlib.suppress(FormatError):
        m.decode(bytes(data), "to" if kind in TO else "from")


def test_a_message_has_a_limit() -> None:
    """What is longer is an error at the sender, and refused where it arrives."""
    with pytest.raises(FormatError, match="expected at most"):
        m.encode(m.Refuse("DaemonError", "x" * m.MAX_MESSAGE))
    with pytest.raises(FormatError, match="expected at most"):
        m.decode(b"\xc0" * (m.MAX_MESSAGE + 1), "from")


def test_whatever_the_machine_says_fits() -> None:
    """Into a packet: the longest lists, the longest names, and the longest errors of a store."""
    far = Epoch(10**18 - 1, "f" * 16)
    records = [EpochRecord(far, SnapshotId(far, 10**18 - 1))] * MAX_RECORDS
    held = (msgspec.structs.replace(HELD, snapshot=SnapshotId(far, 1)),) * 4
    assert m.encode(m.Promise(cluster.Promise(far, "n" * 16, held, POINT, tuple(records))))
    machine, every = NodeMachine(NodeState("job", ClusterState("n")), 0.0), list(range(MAX_RANKS))
    machine.handle(1, plain(m.Prepare, job="é" * 4096), 0.0)
    machine.handle(1, plain(m.Prepare, epoch=epoch(2)), 0.0)
    machine.handle(1, plain(m.Begin, begin=begun(epoch(2), world=MAX_RANKS), ranks=every), 0.0)
    machine.recorded(1, "x" * 10**6, 0.0)
    for rank in every:
        hello = plain(m.Hello, epoch=epoch(2), rank=rank, world=MAX_RANKS, ranks=every, instance=f"p{rank}")
        machine.handle(10 + rank, hello, 0.0)
        machine.handle(10 + rank, plain(m.Pieces, generation=machine.state.generation), 0.0)
    machine.take()
    for rank in every:
        layout = plain(m.Layout, generation=machine.state.generation, digest="d" * 100)
        machine.handle(10 + rank, layout, 0.0, available_bytes=10**12)
        machine.take()
        machine.handle(10 + rank, m.Boundary(1, 1.0), 0.0)
    for rank in every:
        for slot in [slot.slot for slot in machine.state.table.slots if slot.rank == rank]:
            machine.handle(10 + rank, m.Ready(slot), 0.0)
    machine.take()
    (granted, *_) = machine.state.table.granted
    for rank in every:
        machine.handle(10 + rank, m.Captured(granted.grant, granted.at, granted.slots[rank]), 0.0)
    machine.take()
    machine.handle(2, m.Flush("/elsewhere"), 0.0)
    (write,) = [action for action in machine.take() if isinstance(action, cluster.Write)]
    machine.job.flush_failed(write.flush.number, "x" * 10**6)
    machine.handle(2, m.Status(), 0.0)
    said = [m.encode(action.message) for action in machine.take() if hasattr(action, "message")]
    assert max(map(len, said)) <= wire.MAX_PACKET
    assert len(msgspec.msgpack.encode(machine.state)) < 2**20


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 10**18 - 1])
EPOCHS = st.builds(lambda n, last: Epoch(n, f"{last:016x}"), st.integers(0, 3), st.integers(0, 1))
POINTS = st.none() | st.builds(SnapshotId, EPOCHS, NUMBERS)
SECONDS = st.sampled_from([0.0, 1.0, 1e308, float("inf")])
POLICIES = st.builds(
    m.Policy,
    store=st.sampled_from([None, "/store"]),
    snapshot_steps=st.sampled_from([None, 1, 10**18 - 1]),
    flush_steps=st.sampled_from([None, 1, 10**18 - 1]),
    flush_s=st.none() | st.just(1.0),
    keep=st.sampled_from([None, 1]),
    overhead_budget=st.sampled_from([1e-300, 1.0]),
    memory_bytes=st.none() | st.just(1),
    linger_s=SECONDS,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "protocol": st.sampled_from([1, 2]),
    "job": st.sampled_from(["job", "job", "other"]),
    "epoch": EPOCHS,
    "restore_point": POINTS,
    "world": st.sampled_from([1, 2, 2, 3, MAX_RANKS + 1, 10**18 - 1]),
    "ranks": st.sampled_from([[], [0], [0, 1], [0, 1], [1, 2], [0, 0], [10**18 - 1], list(range(MAX_RANKS + 1))]),
    "begin": st.builds(begun, EPOCHS, POINTS, st.sampled_from([1, 2, 2, 3, MAX_RANKS + 1, 10**18 - 1])),
    "policy": POLICIES,
    "instance": st.sampled_from(["a1", "b1", "a2", "q"]),
    "digest": st.sampled_from(["d", "e"]),
    "slot_bytes": st.sampled_from([1, 2**45]),
    "frozen_bytes": st.sampled_from([0, 1, 2**45]),
    "replicas": st.sampled_from([{}, {1: 1}, {1: 2}, {0: 0, 1: 1}]),
    "step_s": SECONDS,
    "cost_s": st.none() | SECONDS,
    "reason": st.sampled_from(typing.get_args(m.Reason)),
    "to": st.sampled_from([None, "/elsewhere"]),
    "address": st.sampled_from(["", "10.0.0.1"]),
    "snapshot": st.builds(SnapshotId, EPOCHS, NUMBERS),
    "shape": st.just(ALONE),
    "strings": st.just([0]),
    "arenas": st.just(["n"]),
    "nodes": st.just(["a node"]),
    "held": st.just({"n": (0, True, True)}),
    "tls_dir": st.sampled_from(["", "/tls"]),
}
ANY = st.one_of(
    [st.builds(kind, **{f.name: FIELDS.get(f.name, NUMBERS) for f in msgspec.structs.fields(kind)}) for kind in TO]
)
FAR_EVENTS = ["gone", "dead", "recorded", "flushed", "failed", "tick", "restart", "drain"]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["", "start", "seal", "rank_death", "layout_change", "flush_failure", "zombie"]),
    st.lists(st.tuples(st.integers(1, 7), ANY | st.sampled_from(FAR_EVENTS)), max_size=60),
)
def test_the_machine_survives_anybody(beginning: str, events: list[tuple[int, Any]]) -> None:
    """Any well-formed message from any connection at any time: no exception, and what it says can be sent."""
    script = Script()
    script.play(f"> play {beginning}" if beginning else "")
    machine = script.machine
    for now, (peer, event) in enumerate(events):
        match event:
            case "gone":
                machine.gone(peer, now)
            case "dead":
                machine.dead("a1", now)
            case "recorded":
                machine.recorded(peer, None, now)
            case "flushed":
                machine.job.written(1)
                machine.take()
                machine.job.committed(1)
            case "failed":
                machine.job.flush_failed(1, "x")
            case "tick":
                machine.tick(now)
            case "drain":
                machine.drain(now)
            case "restart":
                state = msgspec.msgpack.decode(msgspec.msgpack.encode(machine.state), type=NodeState)
                machine = NodeMachine(state, now)
            case _:
                message = m.decode(m.encode(event), "to")
                machine.handle(peer, message, now, process=(peer, 1) if peer % 4 else None, available_bytes=2**50)
        for action in machine.take():
            if hasattr(action, "message"):
                m.encode(action.message)
        msgspec.msgpack.encode(machine.state)
