"""The state machine of one node's daemon: epochs, members, grants, seals, flushes. Events in, actions out.

Owns every decision of the daemon; does no I/O and reads no clock. `NodeState` is the part that outlives the daemon
(the server writes it into the arena before any action is carried out), `Member`s come back by their Hello. Decided
elsewhere: which slots a rank gets (layouts.py), when to grant (cadence.py), what to flush (flushes.py), when nobody has
been here for too long (quiet.py).

Invariants
- Epochs only grow: nothing of an epoch below the promise is served (promise 5). An epoch has one process a rank.
- A snapshot is sealed only when every rank of the epoch has captured the same step (promises 4, 8).
- The newest sealed snapshot, one being flushed, and the restore point until the first seal of its epoch keep their
  slots (promise 3).
- Every handler is idempotent; after a lost connection both sides repeat what they last said.
- Safety never depends on `now`: time only decides when to flush and when to leave (promise 15).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol import messages as m
from ckptd.protocol import repeats
from ckptd.protocol.actions import Action, Disconnect, Drop, Exit, Send, WriteRecord
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.flushes import Flushes, Request
from ckptd.protocol.layouts import allot
from ckptd.protocol.members import Member, Members
from ckptd.protocol.quiet import Quiet
from ckptd.protocol.slots import Granted
from ckptd.protocol.state import NodeState, describe

PIPELINE = 2
"""Snapshots that may be granted and not yet sealed at a time."""

MAX_WORLD = 120
"""Ranks of one node: a Welcome passes two descriptors for each, and the kernel passes 253 at a time."""

COMPARE_EVERY = 100
"""In one of so many snapshots the ranks compare what they have in common, and in the first of each layout."""


class NodeMachine:
    """See the module docstring. The server calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: NodeState, now_s: float) -> None:
        self.state = state
        self.members = Members()
        self._now_s = now_s
        self._out: list[Action] = []
        self._cadence: Cadence | None = None
        self._flushes = Flushes()
        self._beginning: set[int] = set()
        self._quiet = Quiet(now_s)
        self._planned = False
        self._draining = False
        self._available_bytes, self._limit = 0, ""
        if state.policy is not None:
            self._cadence = Cadence(state.policy, max(_step(state.durable), _step(state.restore_point)))

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
        limit: str = "",
    ) -> None:
        """A message arrived. Looked up by the server: for Hello the sender's `process` (pid, start time; None where no
        pid is visible), for Layout the `available_bytes` that new slots may take, and what limits them."""
        self._now_s = now_s
        self._available_bytes, self._limit = available_bytes, limit
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
        found = self.members.of(peer)
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
                    slot.ready, slot.owner = True, self.state.instances[rank]
            case m.Boundary():
                member.boundary = max(member.boundary, message.step)
                member.step_s = message.step_s
                if member.wants is not None and member.wants < message.step:
                    member.wants = None
            case m.Captured() | m.Missed():
                self._outcome(rank, message)
            case m.Request():
                member.boundary = max(member.boundary, message.step)
                member.wants = message.step
            case m.Terminating():
                self._terminating(peer)
            case m.Close():
                self.state.closed.add(rank)
            case m.Leave():
                self.state.left.add(rank)

    def gone(self, peer: int, now_s: float) -> None:
        """The connection is lost. The process may live on, and may come back."""
        self._now_s = now_s
        self._flushes.gone(peer)
        self._beginning.discard(peer)
        found = self.members.of(peer)
        if found is not None:
            rank, member = found
            member.peer = None
            if not self.state.is_visible(rank):
                self.state.left.add(rank)

    def dead(self, instance: str, now_s: float) -> None:
        """The process of a rank has ended: it writes no more."""
        self._now_s = now_s
        self.state.table.writer_ended(instance)
        self.state.processes.pop(instance, None)
        for rank in [r for r, known in self.state.instances.items() if known == instance]:
            self.state.left.add(rank)
            peer = self.members.peer(rank)
            if peer is not None:
                self._out.append(Disconnect(peer))
                self.members[rank].peer = None

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
        self._count("flushed")
        live = self.state.is_live(snapshot)
        if live and store == self.state.own_store:
            self.state.durable = max(self.state.durable or snapshot, snapshot)
            if snapshot.epoch == self.state.epoch:
                self._broadcast(m.Reached(snapshot.step, Level.DURABLE))
        for request in self._flushes.ended(snapshot, store, live):
            self._send(request.peer, request.answer(snapshot.step))

    def flush_failed(self, snapshot: SnapshotId, store: str, error: str, now_s: float) -> None:
        """A flush has failed; memory keeps the snapshot, and the next due one is tried."""
        self._now_s = now_s
        self._count("flush_errors")
        self.state.last_error = error = error[: m.MAX_TEXT]
        if store == self.state.own_store:
            self._flushes.failed = (snapshot, error)
            if snapshot.epoch == self.state.epoch:
                self._broadcast(m.FlushFailed(snapshot.step, error))
        for request in self._flushes.ended(snapshot, store, self.state.is_live(snapshot)):
            self._refuse(request.peer, "StoreError", error)

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        self._now_s = now_s

    def drain(self, now_s: float) -> None:
        """The daemon itself is asked to end: it flushes the newest sealed snapshot first."""
        self._now_s = now_s
        self._draining = True

    # --- epochs

    def _prepare(self, peer: int, message: m.Prepare) -> None:
        state = self.state
        if not self._compatible(peer, message.protocol, message.job):
            return
        if state.promised is not None and message.epoch <= state.promised:
            self._refuse(peer, "DaemonError", f"epoch {message.epoch} is not above {state.promised}", state.promised)
            return
        state.promised = message.epoch
        self._quiet.end()
        self._disconnect_members()
        self._send(peer, m.Promise([s.snapshot for s in state.table.sealed], state.records))

    def _begin(self, peer: int, message: m.Begin) -> None:
        state = self.state
        if message.epoch != state.promised:
            self._refuse(peer, "DaemonError", f"epoch {message.epoch} is not the promised one", state.promised)
            return
        if message.world > MAX_WORLD:
            self._refuse(peer, "ConfigError", f"{message.world} ranks on one node; at most {MAX_WORLD} are served")
            return
        self._quiet.end()
        if state.epoch != message.epoch:
            self._adopt(message.epoch, message.world, message.restore_point, message.policy)
        if message.policy.store is None:
            self._send(peer, m.Begun())
        else:
            self._beginning.add(peer)
            self._out.append(WriteRecord(peer, message.policy.store, state.records[-1]))

    def _adopt(self, epoch: Epoch, world: int, point: SnapshotId | None, policy: m.Policy) -> None:
        """The epoch begins here; what it neither restores nor flushes is freed."""
        self._disconnect_members()
        self._out += [Drop(slot) for slot in self.state.begin(epoch, world, point, policy)]
        self.state.table.keep(self._pinned())
        self._cadence = Cadence(policy, _step(point))
        self._flushes.failed = None
        newest = self.state.newest()
        for request in self._flushes.retarget(None if newest is None else newest.snapshot):
            self._send(request.peer, request.answer(None))
        self._start_survey()

    def _hello(self, peer: int, message: m.Hello, process: tuple[int, int] | None) -> None:
        state, rank, instance = self.state, message.rank, message.instance
        if not self._compatible(peer, message.protocol, message.job):
            return
        if message.world <= MAX_WORLD and self.state.is_unheard_of(message.epoch):
            self._adopt(message.epoch, message.world, message.restore_point, message.policy)
        if message.epoch != state.epoch or self.state.frozen or rank >= state.world:
            self._refuse(
                peer, "DaemonError", f"rank {rank} of epoch {message.epoch} is not served here", state.promised
            )
            return
        other, returns = self.members.of(peer), rank in state.instances
        if state.instances.setdefault(rank, instance) != instance or (other is not None and other[0] != rank):
            self._refuse(peer, "DaemonError", f"rank {rank} of epoch {message.epoch} is another process")
            return
        member = self.members.setdefault(rank, Member())
        if member.peer not in (None, peer):
            self._out.append(Disconnect(member.peer))
        member.peer, member.wants = peer, None
        state.left.discard(rank)
        if process is not None:
            state.processes[instance] = process
        self._quiet.end()
        self._welcome(peer, rank, returns)

    def _welcome(self, peer: int, rank: int, returns: bool) -> None:
        """Tells a rank what is here and repeats what it may have missed."""
        state, failed = self.state, self._flushes.failed
        self._out.append(repeats.welcome(state, peer, rank))
        self._repeat_layout(peer, rank, returns)
        for message in repeats.news(state, rank):
            self._send(peer, message)
        if failed is not None and failed[0].epoch == state.epoch:
            self._send(peer, m.FlushFailed(failed[0].step, failed[1]))

    def _repeat_layout(self, peer: int, rank: int, returns: bool) -> None:
        """What a rank may have missed of a survey, or of what came out of it."""
        state, member = self.state, self.members[rank]
        if not state.surveying and len(state.layouts) < state.world:
            self._start_survey()
        elif state.surveying and not member.pieces:
            self._send(peer, m.Survey(state.generation))
        elif state.surveying and self._planned and member.layout is None:
            self._send(peer, m.Plan(state.generation), pieces=tuple(range(state.world)))
        elif not state.surveying and returns:
            again = repeats.allotted(state, peer, rank)
            if again is not None:
                self._out.append(again)
            for slot in state.table.slots:  # its Ready may be lost; what it has not mapped yet it misses as "layout"
                if slot.rank == rank and slot.ready:
                    slot.owner = state.instances[rank]

    def _compatible(self, peer: int, protocol: int, job: str) -> bool:
        if protocol != m.PROTOCOL:
            self._refuse(peer, "VersionError", f"protocol {protocol}; this daemon speaks {m.PROTOCOL}")
        elif job != self.state.job:
            self._refuse(peer, "DaemonError", f"job {job!r}; this daemon serves {self.state.job!r}")
        else:
            return True
        return False

    def _disconnect_members(self) -> None:
        """Fences off the ranks of the epoch so far. Where no pid is visible, the end of its connection is the only sign
        of a process's end, and is taken as such."""
        for rank, member in self.members.items():
            if member.peer is not None:
                self._out.append(Disconnect(member.peer))
            elif not self.state.is_visible(rank):
                self.state.table.writer_ended(self.state.instances[rank])
        self.members.clear()

    # --- outcomes of grants

    def _outcome(self, rank: int, message: m.Captured | m.Missed) -> None:
        epoch = self.state.epoch
        granted = None if epoch is None else self.state.table.find(epoch, message.grant)
        if granted is None or granted.writers.get(rank) != self.state.instances[rank]:
            return
        if isinstance(message, m.Captured):
            if granted.slots.get(rank) == message.slot:
                self._captured(rank, granted, message)
            return
        first = rank not in granted.outcome and not granted.dead
        self.state.table.answer(granted, rank, None)
        if first:
            self._count(f"missed_{message.reason}")
            if message.reason == "late" and self._cadence is not None:
                self._cadence.late()
            if message.reason == "layout":
                self._start_survey()

    def _captured(self, rank: int, granted: Granted, message: m.Captured) -> None:
        """Where what ranks have in common turns out to differ, the layout is made anew: each keeps its own."""
        if not self.state.table.answer(granted, rank, message.step, message.replicas):
            self._count("replicas_differ")
            self._start_survey()
        if rank == 0 and self._cadence is not None and not granted.compare:
            self._cadence.observe(message.stall_s, self.members[rank].step_s)

    def _kill(self, granted: Granted) -> None:
        """NotSealed: tells the writers that have not answered."""
        granted.dead = True
        if granted.told:
            return
        granted.told = True
        self._count("skipped")
        for rank in granted.silent:
            self._send_rank(rank, m.Revoke(granted.grant))

    # --- requests

    def _flush(self, peer: int, message: m.Flush) -> None:
        store, newest = message.to or self.state.own_store, self.state.newest()
        if store is None:
            self._refuse(peer, "ConfigError", f"job {self.state.job!r} has no store; name one")
        elif newest is None:
            self._send(peer, m.Flushed(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Flushed)

    def _terminating(self, peer: int) -> None:
        """A rank got SIGTERM. Where another rank is already dead, a restart is under way and memory is enough."""
        store, newest = self.state.own_store, self.state.newest()
        if store is None or newest is None or self.state.left:
            self._send(peer, m.Drained(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Drained)

    def _want_durable(
        self, peer: int, target: SnapshotId, store: str, answer: Callable[[int | None], m.Message]
    ) -> None:
        if store == self.state.own_store and self.state.durable is not None and self.state.durable >= target:
            self._send(peer, answer(self.state.durable.step))
        else:
            self._flushes.ask(Request(peer, target, store, answer))

    # --- what follows from the state: run after every event

    def _advance(self) -> None:
        if not self.state.frozen:
            self._break()
            self._seal()
            self._free()
            self._plan()
            self._grant()
        self._start_flush()
        self._settle()

    def _seal(self) -> None:
        for sealed in list(self.state.table.seal()):
            if sealed.snapshot.epoch == self.state.epoch:
                self._count("sealed")
                self._note_compared(sealed.compared)
                if self._cadence is not None:
                    self._cadence.sealed()
                self.members.satisfied(sealed.snapshot.step)
                self._broadcast(m.Reached(sealed.snapshot.step, Level.SEALED))

    def _note_compared(self, compared: bool) -> None:
        if compared:
            self.state.uncompared = 0
        elif self.state.uncompared is not None:
            self.state.uncompared += 1

    def _break(self) -> None:
        """A rank that has left or is dead never answers: what it was to capture is NotSealed."""
        for granted in self.state.table.granted:
            if granted.dead or (granted.epoch == self.state.epoch and self.state.left.intersection(granted.silent)):
                self._kill(granted)

    def _pinned(self) -> set[SnapshotId]:
        """Sealed snapshots that must stay: newest, being flushed, and the restore point until something newer."""
        state = self.state
        newest = state.table.newest(state.epoch)
        pinned = {newest.snapshot} if newest else {state.restore_point} if state.restore_point else set()
        if self._flushes.running is not None:
            pinned.add(self._flushes.running.snapshot)
        return pinned

    def _free(self) -> None:
        self.state.table.keep(self._pinned())
        if len(self.state.layouts) == self.state.world:
            self._out += [Drop(slot.slot) for slot in self.state.table.retire(self.state.layouts)]

    def _start_survey(self) -> None:
        """The layout is unknown or has changed: ask every rank for its pieces. Nothing is captured by the old one."""
        self.state.generation += 1
        self.state.surveying, self._planned = True, False
        for granted in self.state.table.granted:
            self._kill(granted)
        self.members.forget_layouts()
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
        """Slots for all; idle ones that fit nobody make room first."""
        state = self.state
        made = allot(state, layouts, self._available_bytes, self._limit)
        self._out += [Drop(slot) for slot in made.dropped]
        state.surveying = self._planned = False
        state.last_error = made.complaint or state.last_error
        if made.allotments is None:
            assert made.complaint is not None
            self._broadcast(m.Refuse("ConfigError", made.complaint))
            return
        for rank, (reuse, create) in enumerate(made.allotments):
            self._send_rank(rank, m.Allot(state.generation, reuse, create), slots=tuple(reuse))

    def _grant(self) -> None:
        state = self.state
        present = [member for _, member in self.members.present()]
        if len(present) < state.world or state.left or state.closed or state.surveying or self._draining:
            return
        if len(state.layouts) < state.world or self._cadence is None:
            return
        wants = {member.wants for member in present}
        if wants != {None}:
            self._grant_on_request(wants)
            return
        boundary = max(member.boundary for member in present)
        while boundary >= 0:
            step = self._cadence.next_step(boundary, state.granted_step)
            alive = [g for g in state.table.granted if not g.dead]
            if len(alive) >= PIPELINE or step > boundary + self._cadence.lead + 1 or not self._issue(step):
                return

    def _grant_on_request(self, wants: set[int | None]) -> None:
        """Every rank stands at one boundary: what is granted beyond it is taken back, then that step is granted."""
        if len(wants) != 1:
            return
        (step,) = wants
        assert step is not None
        assert self.state.epoch is not None
        newest = self.state.table.newest(self.state.epoch)
        if newest is not None and newest.snapshot.step >= step:
            self.members.satisfied(step)
            self._broadcast(m.Reached(newest.snapshot.step, Level.SEALED))
            return
        mine = [granted for granted in self.state.table.granted if granted.epoch == self.state.epoch]
        for granted in mine:
            if granted.step is None and granted.grant != step:
                self._kill(granted)
        if not any(step in (granted.step, granted.grant) for granted in mine):
            self._issue(step)

    def _issue(self, step: int) -> bool:
        """Grants `step` to every rank if every rank has a free slot."""
        state = self.state
        assert state.epoch is not None
        slots: dict[int, int] = {}
        for rank in range(state.world):
            free = state.table.free(rank, state.layouts[rank], state.instances[rank])
            if not free:
                return False
            slots[rank] = free[0]
        compare = state.uncompared is None or state.uncompared >= COMPARE_EVERY - 1
        state.table.granted.append(Granted(state.epoch, step, slots, dict(state.instances), compare=compare))
        state.granted_step = max(state.granted_step, step)
        for rank, slot in slots.items():
            self._send_rank(rank, m.Grant(step, slot, compare))
        return True

    def _start_flush(self) -> None:
        newest, policy = self.state.newest(), self.state.policy
        if newest is None:
            return
        keep = None if policy is None else policy.keep
        started = self._flushes.start(newest, self.state.own_store, self._due(newest.snapshot), keep)
        if started is not None:
            if self._cadence is not None and started.store == self.state.own_store:
                self._cadence.flushed(newest.snapshot.step, self._now_s)
            self._out.append(started)

    def _due(self, snapshot: SnapshotId) -> bool:
        """Whether the newest sealed snapshot should be flushed without being asked."""
        failed, durable = self._flushes.failed, self.state.durable
        if (failed is not None and failed[0] == snapshot) or (durable is not None and durable >= snapshot):
            return False
        if self._draining or self._abandoned:
            return True
        cadence = self._cadence
        return (
            snapshot.epoch == self.state.epoch and cadence is not None and cadence.flush_due(snapshot.step, self._now_s)
        )

    @property
    def _abandoned(self) -> bool:
        """The epoch has begun here, and every rank that joined is dead or has left without closing."""
        joined = self.state.instances
        return bool(joined) and all(
            rank in self.state.left or not (self.state.is_visible(rank) or self.members.peer(rank) is not None)
            for rank in joined
        )

    def _settle(self) -> None:
        """Leave when the job is closed, or when nobody has come for too long."""
        if self._flushes.running is not None or self._flushes.requests:
            return
        if self._draining:
            self._out.append(Exit("asked to end by a signal"))
            return
        if self.state.world and len(self.state.closed) == self.state.world:
            self._broadcast(m.Closed())
            self._out.append(Exit("the job has closed"))
            return
        if any(self.members.present()) or self._beginning or self.state.has_living_ranks:
            self._quiet.end()
            return
        linger_s = self._quiet.too_long_s(self.state, self._now_s)
        if linger_s is not None:
            self._out.append(Exit(f"nobody came for {linger_s:.0f} s"))

    # --- small things

    def report(self) -> dict[str, Any]:
        """What `ckptd status` shows; JSON-able."""
        connected = {rank: member.boundary for rank, member in self.members.present()}
        return {
            **describe(self.state, connected),
            "interval": self._cadence.interval if self._cadence else None,
            "lingering_s": self._quiet.lasted_s(self._now_s),
        }

    def _count(self, name: str) -> None:
        self.state.counters[name] = self.state.counters.get(name, 0) + 1

    def _send(self, peer: int, message: m.Message, **descriptors: Any) -> None:
        self._out.append(Send(peer, message, **descriptors))

    def _send_rank(self, rank: int, message: m.Message, **descriptors: Any) -> None:
        peer = self.members.peer(rank)
        if peer is not None:  # a rank that is away is told when it comes back
            self._send(peer, message, **descriptors)

    def _refuse(self, peer: int, error: str, text: str, promised: Epoch | None = None) -> None:
        self._send(peer, m.Refuse(error, text[: m.MAX_TEXT], promised))

    def _broadcast(self, message: m.Message, **descriptors: Any) -> None:
        for rank, _ in self.members.present():
            self._send_rank(rank, message, **descriptors)


def _step(snapshot: SnapshotId | None) -> int:
    return 0 if snapshot is None else snapshot.step
