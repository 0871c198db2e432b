"""Ranks that train nothing: clients of real daemons that say what a trainer says and capture bytes that are known.

A rank is a thread here. It enters by the trainer's own start (trainer/start.py) and keeps a session as a trainer does;
in the place of the process group stands a barrier of threads, in the place of a model a string of bytes that follows
from rank and step. So a job on many nodes costs no more than its daemons, and every byte that comes back can be told.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ckptd.core.catalog import Catalog
from ckptd.core.config import Options, World
from ckptd.core.errors import CkptdError, DaemonError
from ckptd.core.native import address_of, crc32c
from ckptd.core.types import Level, SnapshotId
from ckptd.daemon import keeper, launch
from ckptd.daemon.address import connect
from ckptd.daemon.client import refusal
from ckptd.daemon.session import Session
from ckptd.format.objects import pack_table
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.protocol import messages as m
from ckptd.tiers.arena import Slot, layout
from ckptd.tiers.peers import listening_address
from ckptd.tiers.peers.address import join_address
from ckptd.trainer.collective import Group
from ckptd.trainer.places import Places
from ckptd.trainer.start import Entry, Start
from tests.faults.lab import LIMIT_S, Node, environment, until

SHORT = 120_000
"""Bytes of rank 0's string, by default: one piece, of which a node in need asks one other."""

LONG = PIECE_BYTES * 5 // 4
"""Of these it asks two others in groups of 2 + m."""

CHUNK = 50_000
OBJECTS_ROOM = 4096


Exchange = Callable[[int], None]
"""Called once in the n-th exchange of a launch, counted from 1, when all ranks have said what they have to say and none
has heard it. What it raises ends the launch."""

PLACES, NUMBER, REFUSED, ANOTHER_NUMBER, PROMISED, INVITER, DECIDED, BEGUN, MET, JOINED = range(1, 11)
"""The exchanges of a launch that goes on from memory, on several nodes without a store: the first number is always one
that they have promised before."""


class AbandonedError(Exception):
    """The ranks of a launch have been killed while it started."""


def content(rank: int, step: int, size: int) -> np.ndarray:
    """What a rank holds after a step."""
    return np.random.default_rng([rank, step]).integers(0, 256, size, np.uint8)


def objects(rank: int, step: int) -> dict[str, bytes]:
    """Beside it."""
    return {"counts": msgspec.msgpack.encode({"rank": rank, "step": step})}


def _catalog(rank: int, size: int) -> Catalog:
    places = [(start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]
    return Catalog.build(
        [(f"model/{rank}", "uint8", (size,))],
        [0] * len(places),
        [[start] for start, _ in places],
        [[part] for _, part in places],
        file_offset=[start for start, _ in places],
    )


class Host(Node):
    """A node whose daemon is started from here. `variables`: of its daemon, and of its ranks' start. `prefix`: of the
    command that starts the daemon."""

    def __init__(
        self, job: str, name: str, runtime: Path, variables: dict[str, str], prefix: Sequence[str] = ()
    ) -> None:
        super().__init__(job, runtime)
        self.name, self._prefix = name, prefix
        self.lan_address = variables.get("CKPTD_ADDRESS", "")
        own = {"CKPTD_NODE": name, "CKPTD_RUNTIME_DIR": str(runtime), "MASTER_ADDR": "127.0.0.1"}
        self.variables = {**own, **variables}

    def start(self) -> None:
        """Starts a keeper with its daemon; `wait` for it."""
        self.address.create()
        command = [sys.executable, "-I", "-S", keeper.__file__, "--directory", str(self.address.directory), "--"]
        subprocess.run(
            [*self._prefix, *command, *launch.command(self.address)],
            stdin=subprocess.DEVNULL,
            env={**environment(), **self.variables},
            check=True,
            timeout=LIMIT_S,
        )

    def wait(self) -> None:
        """Until the daemon listens."""
        until(self._answers, lambda: f"the daemon of node {self.name}; {self.said()}")

    def _answers(self) -> bool:
        try:
            connect(self.address).close()
        except DaemonError:
            return False
        return True


class _Threads(Group):
    """Ranks that are threads: one barrier in the place of a process group."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[bytes], exchange: Exchange) -> None:
        super().__init__(None)
        self.rank, self.size = rank, barrier.parties
        self._barrier, self._said, self._exchange, self._count = barrier, said, exchange, 0

    def all_gather(self, data: bytes) -> list[bytes]:
        self._count += 1
        self._said[self.rank] = data
        if self._barrier.wait() == 0:
            self._exchange(self._count)
        self._barrier.wait()
        found = list(self._said)
        self._barrier.wait()
        return found

    def broadcast(self, data: bytes | None) -> bytes:
        return self.all_gather(data or b"")[0]


@dataclasses.dataclass(frozen=True)
class _Start(Start):
    """That of a trainer on a node of its own."""

    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def _listening(self) -> tuple[str, str]:
        if len(self.places.nodes) == 1:
            return "", ""
        return join_address(*listening_address(self.variables)), self.variables.get("CKPTD_TLS_DIR", "")


class Rank:
    """A rank that is in; the session's Handler. What it may capture it captures when it is asked to (`request`)."""

    def __init__(self, entry: Entry, host: Host, size: int) -> None:
        """`size`: of its string; no two ranks have strings of one length."""
        self.host, self.choice, self.number = host, entry.choice, entry.hello.rank
        self.size = size + 7_001 * self.number
        self.restored = entry.restore
        self.granted = 0
        self.hesitates = False
        """Does not use the grants that it gets."""
        self._changed = threading.Condition()
        self._slots: dict[int, Slot] = {}
        self._grants: dict[int, m.Grant] = {}
        self._outcomes: dict[int, m.Captured | m.Missed] = {}
        self._wanted = -1
        self._levels: dict[Level, int] = {}
        self._refused: CkptdError | None = None
        self._closed = False
        with self._changed:
            self._session = Session(host.address, entry.connection, entry.hello, self)

    # --- what a test asks

    def check_restored(self) -> list[int]:
        """Every byte of what this rank's node was given is what was captured; whose bytes these were."""
        point = self.choice.snapshot
        assert point is not None
        for slot in self.restored:
            rank, rows = slot.geometry.rank, slot.catalog()
            assert slot.state().snapshot == point
            assert slot.objects() == objects(rank, point.step)
            found = np.zeros(int(rows.raw.sum()), np.uint8)
            for row in range(len(rows)):
                start, size = int(rows.file_offset[row]), int(rows.raw[row])
                slot.read(start, int(rows.crc[row]), memoryview(found)[start : start + size])
            assert np.array_equal(found, content(rank, point.step, len(found))), f"rank {rank}, {point}"
        return sorted(slot.geometry.rank for slot in self.restored)

    def request(self, step: int) -> None:
        """Stands at the boundary of `step` and wants it captured."""
        with self._changed:
            self._wanted = step
            self._capture()
        self._session.say(m.Request(step))

    def level(self, level: Level) -> int:
        """The newest step known to have reached it, -1 if none."""
        return self._levels.get(level, -1)

    def reaches(self, level: Level, step: int) -> None:
        """Waits until `step` has reached `level`. Raises what the daemon refused."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._refused or self.level(level) >= step, LIMIT_S)
            if self._refused is not None:
                raise self._refused
        assert found, f"rank {self.number}: step {step} is not {level}: {self.host.status()}; {self.host.said()}"

    def is_granted(self, step: int) -> None:
        """Waits for a grant that can be used for a step."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._due(step), LIMIT_S), self.host.said()

    def close(self) -> None:
        """The rank has finished."""
        self._session.say(m.Close())

    def closes(self) -> None:
        """Waits for its daemon to let it go."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._closed, LIMIT_S), self.host.said()
        self.vanish()

    def vanish(self) -> None:
        """Says no more, and lets go of everything: as the end of its process would."""
        self._session.end()
        for slot in (*self._slots.values(), *self.restored):
            slot.close()

    @property
    def reconnected(self) -> int:
        """How often its connection was lost."""
        return self._session.lost

    # --- the session's thread

    def received(self, message: m.Message, descriptors: list[int]) -> None:
        with self._changed:
            match message:
                case m.Survey():
                    pieces = os.memfd_create("pieces", os.MFD_CLOEXEC)
                    os.write(pieces, b"pieces of rank %d" % self.number)
                    self._session.say(m.Pieces(message.generation), [pieces])
                case m.Plan():
                    geometry, _ = layout(self.number, self._catalog(), OBJECTS_ROOM)
                    self._session.say(m.Layout(message.generation, geometry.digest, geometry.size))
                case m.Allot():
                    self._allot(message, descriptors)
                    descriptors = []
                case m.Grant():
                    self.granted = max(self.granted, message.grant)
                    self._grants[message.grant] = message
                    self._capture()
                case m.Revoke():
                    self._settle(m.Missed(message.grant, "revoked"))
                case m.Reached():
                    self._levels[message.level] = max(self.level(message.level), message.step)
                case m.Refuse():
                    self._refused = self._refused or refusal(message)
                case m.Closed():
                    self._closed = True
                case _:
                    pass
            self._changed.notify_all()
        for descriptor in descriptors:
            os.close(descriptor)

    def repeat(self) -> list[m.Message]:
        with self._changed:
            wanted: list[m.Message] = [m.Request(self._wanted)] if self._wanted >= 0 else []
            return [*self._outcomes.values(), *wanted]

    def _allot(self, message: m.Allot, descriptors: list[int]) -> None:
        for number, descriptor in zip(message.reuse, descriptors, strict=True):
            self._slots[number] = Slot.open(descriptor)
        for number in message.create:
            if number not in self._slots:
                self._slots[number] = Slot.create(*layout(self.number, self._catalog(), OBJECTS_ROOM))
        for number in (*message.reuse, *message.create):
            self._session.say(m.Ready(number), [os.dup(self._slots[number].descriptor)])

    def _capture(self) -> None:
        """Uses the newest grant that is due."""
        if self.hesitates:
            return
        due = self._due(self._wanted)
        for grant in due[:-1]:
            self._settle(m.Missed(grant, "revoked"))
        for grant in due[-1:]:
            slot = self._slots.get(self._grants[grant].slot)
            if slot is None:
                self._settle(m.Missed(grant, "layout"))
                continue
            slot.begin()
            data, rows = content(self.number, self._wanted, self.size), self._catalog()
            ctypes.memmove(slot.map(), address_of(data), len(data))
            places = zip(rows.file_offset.tolist(), rows.raw.tolist(), strict=True)
            crcs = np.array([crc32c(data[start : start + size]) for start, size in places], np.uint32)
            snapshot = SnapshotId(self.choice.epoch, self._wanted)
            slot.commit(snapshot, crcs, pack_table(objects(self.number, self._wanted)))
            self._settle(m.Captured(grant, self._wanted, self._grants[grant].slot))

    def _catalog(self) -> Catalog:
        return _catalog(self.number, self.size)

    def _due(self, step: int) -> list[int]:
        return sorted(n for n, grant in self._grants.items() if grant.step <= step and n not in self._outcomes)

    def _settle(self, outcome: m.Captured | m.Missed) -> None:
        if outcome.grant not in self._outcomes:
            self._outcomes[outcome.grant] = outcome
            self._session.say(outcome)


def _ignored(exchange: int) -> None:
    pass


def dies_at(exchange: int, then: Callable[[], object] = lambda: None) -> Exchange:
    """All ranks of a launch are killed at an exchange, after `then` was done."""

    def one(number: int) -> None:
        if number == exchange:
            then()
            raise AbandonedError

    return one


def enter(
    hosts: Sequence[Host], ranks_here: int = 1, exchange: Exchange = _ignored, string_bytes: int = SHORT, **chosen: Any
) -> list[Rank | Exception]:
    """A launch of the job on these nodes, whose daemons listen: of each rank itself, or why it is not in.
    `string_bytes`: of rank 0, others have a little more; `chosen`: options of the Checkpointer."""
    options = dataclasses.replace(Options(linger_s=60.0, flush_every=None), **chosen)
    size = len(hosts) * ranks_here
    barrier, said = threading.Barrier(size, timeout=LIMIT_S), [b""] * size
    found: list[Rank | Exception | None] = [None] * size

    def one(rank: int, host: Host) -> None:
        group, world = _Threads(rank, barrier, said, exchange), World(rank, size, rank % ranks_here, ranks_here)
        memory_bytes = None if options.memory == "auto" else options.memory
        policy = m.Policy(None, 10**6, None, None, None, 0.01, memory_bytes, options.linger_s)
        try:
            places = Places.find(group, world, options.redundancy, host.variables)
            start = _Start(host.address, group, places, options, policy, _anything, (), host.variables)
            found[rank] = Rank(start.enter(), host, string_bytes)
        except (CkptdError, threading.BrokenBarrierError) as error:
            found[rank] = error
        except AbandonedError as error:
            found[rank] = error
            barrier.abort()

    threads = [
        threading.Thread(target=one, args=(rank, hosts[rank // ranks_here]), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert None not in found, f"ranks {[n for n, x in enumerate(found) if x is None]}; {[h.said() for h in hosts]}"
    return [x for x in found if x is not None]


class Launch:
    """A launch that goes on beside the test."""

    def __init__(self, hosts: Sequence[Host], **how: Any) -> None:
        self._found: list[Rank | Exception] = []
        self._thread = threading.Thread(
            target=lambda: self._found.extend(enter(hosts, **how)), name="launch", daemon=True
        )
        self._thread.start()

    def ends(self) -> list[Rank | Exception]:
        """Waits until every rank is in, or is not."""
        self._thread.join(2 * LIMIT_S)
        assert self._found, "the launch does not end"
        return self._found

    def fails(self) -> None:
        """Waits until no rank is in."""
        assert [rank for rank in self.ends() if isinstance(rank, Rank)] == []


def _anything(snapshot: SnapshotId) -> bool:
    return True


class Crew:
    """Ranks of one launch that are all in."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = list(ranks)

    @classmethod
    def enter(cls, hosts: Sequence[Host], **how: Any) -> Crew:
        """A launch that succeeds; raises the error of the first rank that is refused."""
        return cls.of(enter(hosts, **how))

    @classmethod
    def of(cls, found: Sequence[Rank | Exception]) -> Crew:
        """All of a launch."""
        ranks = [rank for rank in found if isinstance(rank, Rank)]
        for refused in found:
            if not isinstance(refused, Rank):
                cls(ranks).vanish()
                raise refused
        return cls(ranks)

    @property
    def step(self) -> int:
        """What it has restored; 0 if nothing."""
        point = self.ranks[0].choice.snapshot
        return 0 if point is None else point.step

    def check_restored(self) -> None:
        """All of them have what was captured, and between them nothing is missing."""
        assert {rank.choice.source for rank in self.ranks} == {"memory"}
        found = {number for rank in self.ranks for number in rank.check_restored()}
        assert found == set(range(self.ranks[0].choice.world))

    def request(self, step: int) -> None:
        """All stand at the boundary of a step."""
        self._each(lambda rank: rank.request(step))

    def snapshot(self, step: int, level: Level = Level.PROTECTED) -> None:
        """Captures a step, which then reaches a level by the word of every node."""
        self.request(step)
        for rank in self.ranks:
            rank.reaches(level, step)

    def vanish(self) -> None:
        """All ranks end as processes do that are killed."""
        self._each(Rank.vanish)

    def close(self) -> None:
        """All ranks finish; their daemons let them go."""
        self._each(Rank.close)
        self._each(Rank.closes)

    def _each(self, does: Callable[[Rank], None]) -> None:
        for rank in self.ranks:
            does(rank)
