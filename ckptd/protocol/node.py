"""The state machine of one node's daemon: epochs, members, grants, seals, flushes. Events in, actions out.

Owns every decision of the daemon; does no I/O and reads no clock. `NodeState` is the part that outlives the daemon
(the server writes it into the arena before any action is carried out), `Member`s come back by their Hello.

Invariants
- Epochs only grow: nothing of an epoch below the promise is served (promise 5).
- A snapshot is sealed only when every rank of the epoch has captured the same step (promises 4, 8).
- The newest sealed snapshot, one being flushed, and the restore point until the first seal of its epoch keep their
  slots (promise 3).
- Every handler is idempotent; after a lost connection both sides repeat what they last said.
- Safety never depends on `now`: time only decides when to flush and when to leave (promise 15).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Action, Disconnect, Drop, Exit, Send, StartFlush, WriteRecord
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.slots import Granted
from ckptd.protocol.state import NodeState, describe

PIPELINE = 2
"""Snapshots that may be granted and not yet sealed at a time."""

IDLE_S = 60.0
"""A daemon that no epoch has begun on leaves after this time."""

MAX_RECORDS = 1000
MAX_WORLD = 4096


@dataclasses.dataclass
class Member:
    """A rank of the current epoch as far as this daemon process has heard of it."""

    peer: int | None
    instance: str
    boundary: int = -1
    step_s: float = 0.0
    wants: int | None = None
    pieces: bool = False
    layout: m.Layout | None = None
    closed: bool = False
    left: bool = False


@dataclasses.dataclass
class FlushRequest:
    """A connection that waits for `target` to be durable; `answer` makes its reply of the durable step."""

    peer: int
    target: SnapshotId
    store: str
    answer: Callable[[int | None], m.Message]


class NodeMachine:
    """See the module docstring. The server calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: NodeState, now_s: float) -> None:
        self.state = state
        self.members: dict[int, Member] = {}
        self._now_s = now_s
        self._out: list[Action] = []
        self._cadence: Cadence | None = None
        self._granted_step = 0
        self._flushing: StartFlush | None = None
        self._refused_flush: SnapshotId | None = None
        self._requests: list[FlushRequest] = []
        self._beginning: set[int] = set()
        self._quiet_since_s: float | None = now_s
        self._planned = False
        self._available_bytes = 0
        if state.policy is not None:
            self._cadence = Cadence(state.policy, _step(state.durable) or _step(state.restore_point) or 0)
        self._granted_step = max((g.grant for g in state.table.granted), default=0)

    # --- events

    def take(self) -> list[Action]:
        """The actions since the last call, in order."""
        self._advance()
        out, self._out = self._out, []
        return out

    def handle(
        self,
        peer: int,
        message: m.Message,
        now_s: float,
        *,
        process: tuple[int, int] | None = None,
        available_bytes: int = 0,
    ) -> None:
        """A message arrived. Looked up by the server: for Hello the sender's `process` (pid, start time; None where no
        pid is visible), for Layout the `available_bytes` that new slots may take."""
        self._now_s = now_s
        self._available_bytes = available_bytes
        match message:
            case m.Prepare():
                self._prepare(peer, message)
            case m.Begin():
                self._begin(peer, message)
            case m.Hello():
                self._hello(peer, message, process)
            case m.Flush():
                self._flush(peer, message)
            case m.Status():
                self._send(peer, m.Report(self.report()))
            case m.Stop():
                self._send(peer, m.Stopped())
                self._out.append(Exit("stopped on request"))
            case _:
                self._from_member(peer, message)

    def _from_member(self, peer: int, message: m.Message) -> None:
        found = self._member_of(peer)
        if found is None:
            self._refuse(peer, "DaemonError", f"{type(message).__name__} from a connection that is no rank")
            return
        rank, member = found
        match message:
            case m.Pieces():
                member.pieces = message.generation == self.state.generation
            case m.Layout():
                if message.generation == self.state.generation:
                    member.layout = message
            case m.Ready():
                slot = self.state.table.get(message.slot)
                if slot is not None and slot.rank == rank:
                    slot.ready = True
            case m.Boundary():
                member.boundary = max(member.boundary, message.step)
                member.step_s = message.step_s
            case m.Captured() | m.Missed():
                self._outcome(rank, message)
            case m.Request():
                member.boundary = max(member.boundary, message.step)
                member.wants = message.step
            case m.Terminating():
                self._terminating(peer)
            case m.Close():
                member.closed = True
            case m.Leave():
                member.left = True

    def gone(self, peer: int, now_s: float) -> None:
        """The connection is lost. The process may live on, and may come back."""
        self._now_s = now_s
        self._requests = [request for request in self._requests if request.peer != peer]
        self._beginning.discard(peer)
        for member in self.members.values():
            if member.peer == peer:
                member.peer = None

    def dead(self, instance: str, now_s: float) -> None:
        """The process of a rank has ended: it writes no more."""
        self._now_s = now_s
        self.state.table.writer_ended(instance)
        for member in self.members.values():
            if member.instance == instance:
                member.left = True
                member.peer = None
        self.state.processes.pop(instance, None)

    def recorded(self, peer: int, error: str | None, now_s: float) -> None:
        """The epoch record is durable in the store, or cannot be written."""
        self._now_s = now_s
        if peer in self._beginning:
            self._beginning.discard(peer)
            if error is None:
                self._send(peer, m.Begun())
            else:
                self._refuse(peer, "StoreError", error)

    def flush_done(self, snapshot: SnapshotId, store: str, now_s: float) -> None:
        """A flush has committed."""
        self._now_s = now_s
        self._flushing = None
        self._count("flushed")
        if self.state.policy is not None and store == self.state.policy.store:
            self.state.durable = max(self.state.durable or snapshot, snapshot)
            if snapshot.epoch == self.state.epoch:
                self._broadcast(m.Reached(snapshot.step, Level.DURABLE))
        for request in [r for r in self._requests if r.store == store and r.target <= snapshot]:
            self._requests.remove(request)
            self._send(request.peer, request.answer(snapshot.step))

    def flush_failed(self, snapshot: SnapshotId, store: str, error: str, now_s: float) -> None:
        """A flush has failed; memory keeps the snapshot, and the next due one is tried."""
        self._now_s = now_s
        self._flushing = None
        self._count("flush_errors")
        self.state.last_error = error
        if self.state.policy is not None and store == self.state.policy.store:
            self._refused_flush = snapshot
            if snapshot.epoch == self.state.epoch:
                self._broadcast(m.FlushFailed(snapshot.step, error))
        for request in [r for r in self._requests if r.store == store and r.target <= snapshot]:
            self._requests.remove(request)
            self._refuse(request.peer, "StoreError", error)

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        self._now_s = now_s

    # --- epochs

    @property
    def frozen(self) -> bool:
        """A newer epoch is promised and has not begun: nothing is sealed, granted or freed."""
        return self.state.epoch is None or (self.state.promised or self.state.epoch) > self.state.epoch

    def _prepare(self, peer: int, message: m.Prepare) -> None:
        state = self.state
        if not self._compatible(peer, message.protocol, message.job):
            return
        if state.promised is not None and message.epoch <= state.promised:
            self._refuse(peer, "DaemonError", f"epoch {message.epoch} is not above {state.promised}", state.promised)
            return
        state.promised = message.epoch.check()
        self._disconnect_members()
        self._send(peer, m.Promise([s.snapshot for s in state.table.sealed], state.records))

    def _begin(self, peer: int, message: m.Begin) -> None:
        state = self.state
        if message.epoch != state.promised or not 1 <= message.world <= MAX_WORLD:
            self._refuse(peer, "DaemonError", f"epoch {message.epoch} is not the promised one", state.promised)
            return
        if state.epoch != message.epoch:
            self._adopt(message.epoch, message.world, message.restore_point, message.policy)
        record = state.records[-1]
        if message.policy.store is None:
            self._send(peer, m.Begun())
        else:
            self._beginning.add(peer)
            self._out.append(WriteRecord(peer, message.policy.store, record))

    def _adopt(self, epoch: Epoch, world: int, point: SnapshotId | None, policy: m.Policy) -> None:
        """The epoch begins here; what it neither restores nor flushes is freed."""
        state = self.state
        self._disconnect_members()
        state.promised = state.epoch = epoch
        state.world, state.policy, state.restore_point = world, policy, point
        state.records = [*state.records, EpochRecord(epoch, point)][-MAX_RECORDS:]
        state.layouts, state.sizes = {}, {}
        for granted in state.table.granted:
            granted.dead = True
        state.table.keep(self._pinned())
        self._cadence = Cadence(policy, _step(point) or 0)
        self._granted_step = 0
        self._refused_flush = None
        self._start_survey()

    def _hello(self, peer: int, message: m.Hello, process: tuple[int, int] | None) -> None:
        state = self.state
        if not self._compatible(peer, message.protocol, message.job):
            return
        if state.epoch is None and message.epoch >= (state.promised or message.epoch):
            self._adopt(message.epoch.check(), message.world, message.restore_point, message.policy)
        if message.epoch != state.epoch or self.frozen or not 0 <= message.rank < state.world:
            self._refuse(
                peer, "DaemonError", f"rank {message.rank} of epoch {message.epoch} is not served here", state.promised
            )
            return
        older = self.members.get(message.rank)
        if older is not None and older.peer is not None and older.peer != peer:
            self._out.append(Disconnect(older.peer))
        if older is None or older.instance != message.instance:
            older = Member(peer, message.instance)
        older.peer = peer
        self.members[message.rank] = older
        if process is not None:
            state.processes[message.instance] = process
        self._quiet_since_s = None
        self._welcome(peer, message.rank)

    def _welcome(self, peer: int, rank: int) -> None:
        """Tells a rank what is here and repeats what it may have missed."""
        state = self.state
        point = None if state.restore_point is None else state.table.holding(state.restore_point)
        readable = () if point is None else tuple(point.slots[r] for r in sorted(point.slots))
        slots = [slot for number in readable if (slot := state.table.get(number)) is not None]
        infos = [m.SlotInfo(s.slot, s.rank, s.digest, s.size) for s in slots]
        owned = [s.slot for s in state.table.slots if s.rank == rank and s.ready]
        self._send(peer, m.Welcome(0, owned, infos), readable=readable)
        if self.state.surveying and not self.members[rank].pieces:
            self._send(peer, m.Survey(state.generation))
        for granted in state.table.granted:
            if granted.epoch == state.epoch and rank in granted.silent:
                message = m.Revoke(granted.grant) if granted.dead else m.Grant(granted.grant, granted.slots[rank])
                self._send(peer, message)
        newest = state.table.newest(state.epoch)
        if newest is not None:
            self._send(peer, m.Reached(newest.snapshot.step, Level.SEALED))
        if state.durable is not None and state.durable.epoch == state.epoch:
            self._send(peer, m.Reached(state.durable.step, Level.DURABLE))

    def _compatible(self, peer: int, protocol: int, job: str) -> bool:
        if protocol != m.PROTOCOL:
            self._refuse(peer, "VersionError", f"protocol {protocol}; this daemon speaks {m.PROTOCOL}")
        elif job != self.state.job:
            self._refuse(peer, "DaemonError", f"job {job!r}; this daemon serves {self.state.job!r}")
        else:
            return True
        return False

    def _disconnect_members(self) -> None:
        for member in self.members.values():
            if member.peer is not None:
                self._out.append(Disconnect(member.peer))
        self.members = {}

    # --- outcomes of grants

    def _outcome(self, rank: int, message: m.Captured | m.Missed) -> None:
        epoch = self.state.epoch
        granted = None if epoch is None else self.state.table.find(epoch, message.grant)
        if granted is None or granted.writers.get(rank) != self.members[rank].instance:
            return
        if isinstance(message, m.Captured):
            if granted.slots.get(rank) == message.slot:
                self.state.table.answer(granted, rank, message.step)
                if rank == 0 and self._cadence is not None:
                    self._cadence.observe(message.stall_s, self.members[rank].step_s)
            return
        if rank not in granted.outcome and not granted.dead:
            self._count(f"missed_{message.reason}")
            if message.reason == "late" and self._cadence is not None:
                self._cadence.late()
            if message.reason == "layout":
                self._start_survey()
        self._kill(granted)
        self.state.table.answer(granted, rank, None)

    def _kill(self, granted: Granted) -> None:
        """NotSealed: tells the writers that have not answered."""
        if granted.dead:
            return
        granted.dead = True
        self._count("skipped")
        for rank in granted.silent:
            member = self.members.get(rank)
            if member is not None and member.peer is not None:
                self._send(member.peer, m.Revoke(granted.grant))

    # --- requests

    def _flush(self, peer: int, message: m.Flush) -> None:
        store = message.to or (self.state.policy.store if self.state.policy else None)
        newest = self.state.table.newest()
        if store is None:
            self._refuse(peer, "ConfigError", f"job {self.state.job!r} has no store; name one")
        elif newest is None:
            self._send(peer, m.Flushed(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Flushed)

    def _terminating(self, peer: int) -> None:
        """A rank got SIGTERM. Where another rank is already dead, a restart is under way and memory is enough."""
        store = self.state.policy.store if self.state.policy else None
        newest = self.state.table.newest(self.state.epoch)
        broken = len(self.members) < self.state.world or any(member.left for member in self.members.values())
        if store is None or newest is None or broken:
            self._send(peer, m.Drained(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Drained)

    def _want_durable(
        self, peer: int, target: SnapshotId, store: str, answer: Callable[[int | None], m.Message]
    ) -> None:
        own = self.state.policy is not None and store == self.state.policy.store
        if own and self.state.durable is not None and self.state.durable >= target:
            self._send(peer, answer(self.state.durable.step))
            return
        self._requests.append(FlushRequest(peer, target, store, answer))
        self._refused_flush = None

    # --- what follows from the state: run after every event

    def _advance(self) -> None:
        if not self.frozen:
            self._seal()
            self._break()
            self._free()
            self._plan()
            self._grant()
        self._start_flush()
        self._settle()

    def _seal(self) -> None:
        for sealed in list(self.state.table.seal()):
            if sealed.snapshot.epoch == self.state.epoch:
                self._count("sealed")
                for member in self.members.values():
                    if member.wants is not None and member.wants <= sealed.snapshot.step:
                        member.wants = None
                self._broadcast(m.Reached(sealed.snapshot.step, Level.SEALED))

    def _break(self) -> None:
        """A rank that has left or is dead never answers: what it was to capture is NotSealed."""
        lost = {rank for rank, member in self.members.items() if member.left}
        for granted in self.state.table.granted:
            if any(rank in lost for rank in granted.silent) and granted.epoch == self.state.epoch:
                self._kill(granted)

    def _pinned(self) -> set[SnapshotId]:
        """Sealed snapshots that must stay: newest, being flushed, and the restore point until something newer."""
        state = self.state
        newest = state.table.newest(state.epoch)
        pinned = {newest.snapshot} if newest else {state.restore_point} if state.restore_point else set()
        if self._flushing is not None:
            pinned.add(self._flushing.snapshot)
        return pinned

    def _free(self) -> None:
        self.state.table.keep(self._pinned())
        if len(self.state.layouts) == self.state.world:
            self._out += [Drop(slot) for slot in self.state.table.retire(self.state.layouts)]

    def _start_survey(self) -> None:
        """The layout is unknown or has changed: ask every rank for its pieces."""
        self.state.generation += 1
        self.state.surveying, self._planned = True, False
        for member in self.members.values():
            member.pieces, member.layout = False, None
        self._broadcast(m.Survey(self.state.generation))

    def _plan(self) -> None:
        """Pieces of all -> Plan to all; layouts of all -> slots for all."""
        if len(self.members) < self.state.world or not self.state.surveying:
            return
        members = [self.members[rank] for rank in range(self.state.world)]
        if all(member.layout is not None for member in members):
            self._allot([member.layout for member in members if member.layout is not None])
        elif all(member.pieces for member in members) and not self._planned:
            self._planned = True
            self._broadcast(m.Plan(self.state.generation), pieces=tuple(range(self.state.world)))

    def _allot(self, layouts: list[m.Layout]) -> None:
        table, policy = self.state.table, self.state.policy
        wanted = 3 if policy is not None and policy.store is not None else 2
        reuse = [table.matching(r, layout.digest, layout.slot_bytes)[:wanted] for r, layout in enumerate(layouts)]

        def needed(count: int) -> int:
            return sum(max(0, count - len(old)) * lay.slot_bytes for old, lay in zip(reuse, layouts, strict=True))

        count = next((c for c in range(wanted, 1, -1) if needed(c) <= self._available_bytes), 0)
        self.state.surveying = self._planned = False
        if count == 0:
            text = (
                f"snapshot memory: 2 slots for {len(layouts)} ranks need {needed(2)} more bytes, "
                f"{self._available_bytes} are available on this node; free memory, raise the limit, or use fewer bytes"
            )
            self.state.last_error = text
            self._broadcast(m.Refuse("ConfigError", text))
            return
        if count < wanted:
            self.state.last_error = f"memory for {count} slots a rank instead of {wanted}: a flush stops snapshots"
        for rank, layout in enumerate(layouts):
            self.state.layouts[rank], self.state.sizes[rank] = layout.digest, layout.slot_bytes
            kept = [slot.slot for slot in reuse[rank]]
            made = [table.create(rank, layout.digest, layout.slot_bytes).slot for _ in range(count - len(kept))]
            peer = self.members[rank].peer
            if peer is not None:
                self._send(peer, m.Allot(layout.generation, kept, made), slots=tuple(kept))

    def _grant(self) -> None:
        state = self.state
        present = [member for member in self.members.values() if member.peer is not None and not member.left]
        if len(present) < state.world or any(member.closed for member in present) or self.state.surveying:
            return
        if len(state.layouts) < state.world or self._cadence is None:
            return
        wants = {member.wants for member in present}
        if wants != {None}:
            self._grant_on_request(wants)
            return
        boundary = max(member.boundary for member in present)
        while boundary >= 0:
            step = self._cadence.next_step(boundary, self._granted_step)
            alive = [g for g in state.table.granted if not g.dead]
            if len(alive) >= PIPELINE or step > boundary + self._cadence.lead + 1 or not self._issue(step):
                return

    def _grant_on_request(self, wants: set[int | None]) -> None:
        """Every rank stands at one boundary: what is granted beyond it is taken back, then that step is granted."""
        if len(wants) != 1:
            return
        (step,) = wants
        assert step is not None and self.state.epoch is not None
        newest = self.state.table.newest(self.state.epoch)
        if newest is not None and newest.snapshot.step >= step:
            for member in self.members.values():
                member.wants = None
            self._broadcast(m.Reached(newest.snapshot.step, Level.SEALED))
            return
        for granted in self.state.table.granted:
            if granted.step is None and granted.grant != step:
                self._kill(granted)
        if self.state.table.find(self.state.epoch, step) is None:
            self._issue(step)

    def _issue(self, step: int) -> bool:
        """Grants `step` to every rank if every rank has a free slot."""
        state = self.state
        assert state.epoch is not None
        slots: dict[int, int] = {}
        for rank in range(state.world):
            free = state.table.free(rank, state.layouts[rank])
            if not free:
                return False
            slots[rank] = free[0]
        writers = {rank: member.instance for rank, member in self.members.items()}
        state.table.granted.append(Granted(state.epoch, step, slots, writers))
        self._granted_step = max(self._granted_step, step)
        for rank, slot in slots.items():
            peer = self.members[rank].peer
            if peer is not None:
                self._send(peer, m.Grant(step, slot))
        return True

    def _start_flush(self) -> None:
        if self._flushing is not None:
            return
        policy, table = self.state.policy, self.state.table
        newest = table.newest()
        if newest is None:
            return
        own = policy.store if policy is not None else None
        store = self._requests[0].store if self._requests else own
        if store is None or not (self._requests or self._due(newest.snapshot)):
            return
        slots = tuple(newest.slots[rank] for rank in sorted(newest.slots))
        self._flushing = StartFlush(newest.snapshot, slots, store, policy.keep if policy and store == own else None)
        if self._cadence is not None and store == own:
            self._cadence.flushed(newest.snapshot.step, self._now_s)
        self._out.append(self._flushing)

    def _due(self, snapshot: SnapshotId) -> bool:
        """Whether the newest sealed snapshot should be flushed without being asked."""
        if snapshot == self._refused_flush or (self.state.durable is not None and self.state.durable >= snapshot):
            return False
        if snapshot.epoch != self.state.epoch or self._cadence is None:
            return False
        return self._abandoned or self._cadence.flush_due(snapshot.step, self._now_s)

    @property
    def _abandoned(self) -> bool:
        """The epoch has begun here, and every rank is dead or has left without closing."""
        left = {member.instance for member in self.members.values() if member.left}
        gone = all(member.left or member.peer is None for member in self.members.values())
        return self.state.epoch is not None and gone and left.issuperset(self.state.processes)

    def _settle(self) -> None:
        """Leave when the job is closed, or when nobody has come for too long."""
        if self._flushing is not None or self._requests:
            return
        members = self.members.values()
        if self.state.world and len(members) == self.state.world and all(member.closed for member in members):
            self._broadcast(m.Closed())
            self._out.append(Exit("the job has closed"))
            return
        if any(member.peer is not None for member in members):
            self._quiet_since_s = None
            return
        if self._quiet_since_s is None:
            self._quiet_since_s = self._now_s
        if self._now_s - self._quiet_since_s >= self._linger_s:
            self._out.append(Exit(f"nobody came for {self._linger_s:.0f} s"))

    # --- small things

    def report(self) -> dict[str, Any]:
        """What `ckptd status` shows; JSON-able."""
        ranks = [
            {
                "rank": rank,
                "pid": self.state.processes.get(member.instance, (0, 0))[0],
                "alive": member.instance in self.state.processes,
                "connected": member.peer is not None,
                "step": member.boundary if member.boundary >= 0 else None,
            }
            for rank, member in sorted(self.members.items())
        ]
        return {
            **describe(self.state),
            "ranks": ranks,
            "interval": self._cadence.interval if self._cadence else None,
            "lingering_s": None if self._quiet_since_s is None else self._now_s - self._quiet_since_s,
        }

    @property
    def _linger_s(self) -> float:
        return IDLE_S if self.state.policy is None else self.state.policy.linger_s

    def _member_of(self, peer: int) -> tuple[int, Member] | None:
        return next(((rank, member) for rank, member in self.members.items() if member.peer == peer), None)

    def _count(self, name: str) -> None:
        self.state.counters[name] = self.state.counters.get(name, 0) + 1

    def _send(self, peer: int, message: m.Message, **descriptors: Any) -> None:
        self._out.append(Send(peer, message, **descriptors))

    def _refuse(self, peer: int, error: str, text: str, promised: Epoch | None = None) -> None:
        self._send(peer, m.Refuse(error, text, promised))

    def _broadcast(self, message: m.Message, **descriptors: Any) -> None:
        for _, member in self._present():
            assert member.peer is not None
            self._send(member.peer, message, **descriptors)

    def _present(self) -> Iterator[tuple[int, Member]]:
        return ((rank, member) for rank, member in sorted(self.members.items()) if member.peer is not None)


def _step(snapshot: SnapshotId | None) -> int | None:
    return None if snapshot is None else snapshot.step
