"""The state machine of one node's daemon: its ranks, their slots, and what of them the job's nodes are told.

Owns what concerns this node alone: connections, the ranks of the epoch, layouts and slots, the outcomes of grants, who
waits for what. What all nodes of a job decide together - grants, seals, protection, flushes - is the member machine's
(protocol/cluster), which lives in here; a job on one node is one of one member. Does no I/O and reads no clock.
`NodeState` is the part that outlives the daemon (the server writes it into the arena before any action is carried
out), `Member`s come back by their Hello. Decided elsewhere: which slots a rank gets (layouts.py), who waits for a flush
(requests.py), when nobody has been here for too long (quiet.py).

Invariants
- Epochs only grow: nothing of an epoch below the promise is served (promise 5). An epoch has one process a rank.
- A snapshot is sealed here only when every rank of the node has captured the same step (promises 4, 8).
- What is sealed keeps its slots until the member machine frees it (promise 3).
- Every handler is idempotent; after a lost connection both sides repeat what they last said.
- Safety never depends on `now`: time only decides when to flush and when to leave (promise 15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol import messages as m
from ckptd.protocol import repeats
from ckptd.protocol.actions import Action, Disconnect, Drop, Exit, Send, WriteRecord
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.epoch import adopted
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Outcome, Standing
from ckptd.protocol.layouts import allot
from ckptd.protocol.members import Member, Members
from ckptd.protocol.quiet import Quiet
from ckptd.protocol.requests import Request, Requests
from ckptd.protocol.slots import Granted, Sealed
from ckptd.protocol.state import NodeState, describe

MAX_RANKS = 120
"""Ranks of one node: a Welcome passes two descriptors for each, and the kernel passes 253 at a time."""


PART_S = 10.0
"""How long a node that is done waits for others to have heard of it."""


class NodeMachine:
    """See the module docstring. The server calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: NodeState, now_s: float) -> None:
        self.state = state
        self.members = Members()
        self.job = MemberMachine(state.cluster, state.policy)
        """What the nodes of the job decide together."""
        self._now_s = now_s
        self._out: list[Action] = []
        self._requests = Requests()
        self._beginning: set[int] = set()
        self._quiet = Quiet(now_s)
        self._planned = False
        self._draining = False
        self._disbanded = False
        self._closed_at: float | None = None
        self._cost: float | None = None
        self._coming: dict[int, bool] = {}
        """Ranks that have said Hello and are not in yet; whether they were before."""
        self._available_bytes, self._limit = 0, ""

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
        self._requests.gone(peer)
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

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        self._now_s = now_s

    def drain(self, now_s: float) -> None:
        """The daemon itself is asked to end: it has the newest sealed snapshot flushed first."""
        self._now_s = now_s
        self._draining = True

    # --- epochs

    def _prepare(self, peer: int, message: m.Prepare) -> None:
        if not self._compatible(peer, message.protocol, message.job):
            return
        answer = self.job.prepare(message.epoch)
        if isinstance(answer, cluster.Refuse):
            text = f"epoch {message.epoch} is not above {answer.promised}"
            self._refuse(peer, "DaemonError", text, answer.promised)
            return
        self._quiet.end()
        self._disconnect_members()
        self._send(peer, m.Promise(answer))

    def _begin(self, peer: int, message: m.Begin) -> None:
        epoch = message.begin.epoch
        if epoch != self.state.promised:
            self._refuse(peer, "DaemonError", f"epoch {epoch} is not the promised one", self.state.promised)
            return
        complaint = _complaint(message.begin.membership.world, message.ranks)
        if complaint is not None:
            self._refuse(peer, "ConfigError", complaint)
            return
        self._quiet.end()
        if self.state.epoch != epoch:
            self._adopt(message.begin, message.ranks, message.policy)
        root = self.state.cluster.number == 0
        if message.policy.store is None or not root:
            self._send(peer, m.Begun())
        else:
            self._beginning.add(peer)
            self._out.append(WriteRecord(peer, message.policy.store, self.state.cluster.records[-1]))

    def _adopt(self, begin: cluster.Begin, ranks: list[int], policy: m.Policy) -> None:
        """The epoch begins here; what it neither restores nor keeps is freed."""
        self._disconnect_members()
        self._coming.clear()
        self._out += [Drop(slot) for slot in self.state.begin(begin.membership.world, ranks, policy)]
        self.job.policy = policy
        self.job.begin(begin)
        self._disbanded, self._cost = False, None
        newest = self.state.cluster.newest
        for request in self._requests.retarget(None if newest is None else newest.snapshot):
            self._send(request.peer, request.answer(None))
        self._start_survey(self.state.generation + 1)

    def _hello(self, peer: int, message: m.Hello, process: tuple[int, int] | None) -> None:
        state, rank, instance = self.state, message.rank, message.instance
        if not self._compatible(peer, message.protocol, message.job):
            return
        if _complaint(message.world, message.ranks) is None and state.is_unheard_of(message.epoch):
            self._adopt_unheard(message)
        if message.epoch != state.epoch or state.frozen or rank not in state.ranks:
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
        self.job.heard_of(message.granted)
        self._coming[rank] = returns

    def _welcome(self) -> None:
        """Who has said Hello is in as soon as what the epoch goes on from is here, maybe rebuilt."""
        point = self.state.cluster.point if self.state.cluster.continued else None
        holding = None if point is None else self.state.cluster.find(point)
        if self.state.frozen or (holding is not None and not holding.data and not holding.freed):
            return
        coming, self._coming = self._coming, {}
        for rank, returns in coming.items():
            peer = self.members.peer(rank)
            if peer is not None:
                self._out.append(repeats.welcome(self.state, peer, rank))
                self._repeat_layout(peer, rank, returns)
                for news in repeats.news(self.state, rank):
                    self._send(peer, news)

    def unrecoverable(self, snapshot: SnapshotId, why: str) -> None:
        """What the epoch was to go on from cannot be rebuilt here: whoever waits for it is told."""
        if snapshot == self.state.cluster.point:
            coming, self._coming = self._coming, {}
            for rank in coming:
                peer = self.members.peer(rank)
                if peer is not None:
                    self._refuse(peer, "UnrecoverableError", why)

    def rebuilt(self, snapshot: SnapshotId, found: Sequence[m.SlotInfo], record: bytes) -> list[int]:
        """This node's string of a snapshot has been made anew, in slots like `found`. Their numbers, or none where
        nobody wants it any more."""
        holding = self.state.cluster.find(snapshot)
        if holding is None or holding.name is None or not self.job.rebuilt(snapshot, record):
            return []
        slots: dict[int, int] = {}
        for info in found:
            slot = self.state.table.create(info.rank, info.digest, info.size, info.frozen_bytes)
            slot.ready, slots[info.rank] = True, slot.slot
        self.state.table.sealed.append(Sealed(holding.name, snapshot, slots))
        return list(slots.values())

    def _adopt_unheard(self, message: m.Hello) -> None:
        """An epoch whose Begin went to a daemon that has lost its memory: this one takes its place. Of a job on several
        nodes it is no member: nothing is captured until the next epoch."""
        alone = len(message.ranks) == message.world
        begin = adopted(self.state.cluster, message.epoch, message.restore_point, message.world, alone=alone)
        self._adopt(begin, message.ranks, message.policy)

    def _repeat_layout(self, peer: int, rank: int, returns: bool) -> None:
        """What a rank may have missed of a survey, or of what came out of it."""
        state, member = self.state, self.members[rank]
        if not state.surveying and len(state.layouts) < len(state.ranks):
            self._start_survey(state.generation + 1)
        elif state.surveying and not member.pieces:
            self._send(peer, m.Survey(state.generation))
        elif state.surveying and self._planned and member.layout is None:
            self._send(peer, m.Plan(state.generation), pieces=True)
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

    # --- grants and their outcomes

    def _issue(self, capture: cluster.Capture) -> None:
        """Grants a snapshot to every rank of the node, if every rank has a free slot."""
        state = self.state
        assert state.epoch is not None
        slots: dict[int, int] = {}
        for rank in state.ranks:
            vacant = state.table.vacant(rank, state.layouts[rank], state.instances[rank])
            if not vacant:
                self.job.missed(capture.snapshot)
                return
            slots[rank] = vacant[0]
        number = capture.snapshot.step
        granted = Granted(state.epoch, number, capture.step, slots, dict(state.instances), compare=capture.compare)
        state.table.granted.append(granted)
        for rank in slots:
            self._send_rank(rank, repeats.grant(granted, rank))

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
            granted.late = message.reason == "late"
            if message.reason == "layout":
                self._start_survey(self.state.generation + 1)

    def _captured(self, rank: int, granted: Granted, message: m.Captured) -> None:
        """Where what ranks have in common turns out to differ, the layout is made anew: each keeps its own."""
        if not self.state.table.answer(granted, rank, message.step, message.replicas):
            self._differ()
        self.job.used(granted.name, message.step)
        step_s = self.members[rank].step_s
        if rank == 0 and not granted.compare and step_s > 0:
            self._cost = message.stall_s / step_s

    def _differ(self) -> None:
        self._count("replicas_differ")
        self._start_survey(self.state.generation + 1)

    def _kill(self, granted: Granted) -> None:
        """NotSealed: tells the writers that have not answered, and the job."""
        granted.dead = True
        if granted.told:
            return
        granted.told = True
        self._count("skipped")
        self.job.missed(granted.name, granted.late)
        for rank in granted.silent:
            self._send_rank(rank, m.Revoke(granted.grant))

    # --- requests

    def _flush(self, peer: int, message: m.Flush) -> None:
        store, newest = message.to or self.state.own_store, self.state.cluster.newest
        if store is None:
            self._refuse(peer, "ConfigError", f"job {self.state.job!r} has no store; name one")
        elif newest is None:
            self._send(peer, m.Flushed(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Flushed)

    def _terminating(self, peer: int) -> None:
        """A rank got SIGTERM. Where another rank is already dead, a restart is under way and memory is enough."""
        store, newest = self.state.own_store, self.state.cluster.newest
        if store is None or newest is None or self.state.left:
            self._send(peer, m.Drained(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Drained)

    def _want_durable(
        self, peer: int, target: SnapshotId, store: str, answer: Callable[[int | None], m.Message]
    ) -> None:
        durable = self.state.cluster.durable
        if store == self.state.own_store and durable is not None and self._is_durable(target):
            self._send(peer, answer(durable.step))
        else:
            self._requests.ask(Request(peer, target, store, answer), self.state.cluster.ended)

    def _is_durable(self, target: SnapshotId) -> bool:
        """The job's own store has it, or something newer."""
        holding, durable = self.state.cluster.find(target), self.state.cluster.durable
        name = None if holding is None else holding.name
        return name is not None and durable is not None and durable >= name

    # --- what follows from the state: run after every event

    def _advance(self) -> None:
        """Until the job's decisions and this node's outcomes have nothing to say to each other."""
        self._welcome()
        while True:
            if not self.state.frozen:
                self._break()
                self._seal()
                self._retire()
                self._plan()
                self._satisfy()
                self._wish_for_itself()
            self.job.now_s = self._now_s
            self.job.stands(self._standing())
            actions = self.job.take()
            for action in actions:
                self._carry_out(action)
            if not actions:
                break
        self._settle()

    def _carry_out(self, action: cluster.MemberAction) -> None:
        """What the job has decided, as far as it is this node's to do."""
        match action:
            case cluster.Capture():
                self._issue(action)
            case cluster.Revoke():
                granted = self.state.table.find(action.snapshot.epoch, action.snapshot.step)
                if granted is not None:
                    self._kill(granted)
            case cluster.Free(part="data"):
                self.state.table.free(action.snapshot)
                self._out.append(action)
            case cluster.Announce():
                self._announce(action)
            case cluster.FlushEnded():
                self._flush_ended(action.outcome)
            case cluster.Survey():
                if action.generation > self.state.generation:
                    self._start_survey(action.generation)
            case cluster.Differ():
                self._differ()
            case cluster.Gather():
                self._gather(action)
            case cluster.Disband():
                self._disbanded = True
            case cluster.Leave():
                pass  # one that serves ranks stays with them; any other goes when nobody comes for too long
            case _:
                self._out.append(action)

    def _break(self) -> None:
        """A rank that has left or is dead never answers: what it was to capture is NotSealed."""
        for granted in self.state.table.granted:
            if granted.dead or (granted.epoch == self.state.epoch and self.state.left.intersection(granted.silent)):
                self._kill(granted)

    def _seal(self) -> None:
        """What every rank here has captured is sealed, as far as this node is concerned."""
        for granted in list(self.state.table.seal()):
            assert granted.step is not None
            if not self.job.captured(granted.name, granted.step, granted.replicas):
                self.state.table.free(granted.name)

    def _announce(self, action: cluster.Announce) -> None:
        """A level has been reached; the restore point's are known to those who restored it."""
        if action.snapshot.epoch != self.state.epoch:
            return
        if action.level is Level.SEALED:
            self._count("sealed")
            self.members.satisfied(action.step)
        elif self.state.parity:
            self._count("protected")
        else:
            return
        self._broadcast(m.Reached(action.step, action.level, action.snapshot.step))

    def _flush_ended(self, outcome: Outcome) -> None:
        flush, error = outcome.flush, outcome.error
        own, current = flush.store == self.state.own_store, flush.snapshot.epoch == self.state.epoch
        self._count("flushed" if error is None else "flush_errors")
        if error is not None:
            self.state.last_error = error = error[: m.MAX_TEXT]
        if own and current:
            self._broadcast(m.Reached(flush.step, Level.DURABLE) if error is None else m.FlushFailed(flush.step, error))
        for request in self._requests.ended(outcome):
            if error is None:
                self._send(request.peer, request.answer(flush.step))
            else:
                self._refuse(request.peer, "StoreError", error)

    def _satisfy(self) -> None:
        """Who asks for a step that is sealed already is told so."""
        newest = self.state.cluster.newest
        if newest is None or newest.step is None or newest.snapshot.epoch != self.state.epoch:
            return
        asking = [rank for rank, member in self.members.present() if member.wants is not None]
        self.members.satisfied(newest.step)
        for rank in asking:
            if self.members[rank].wants is None:
                self._send_rank(rank, m.Reached(newest.step, Level.SEALED, newest.snapshot.step))

    def _retire(self) -> None:
        """Slots that fit no layout go as soon as they hold nothing."""
        if len(self.state.layouts) == len(self.state.ranks):
            self._out += [Drop(slot.slot) for slot in self.state.table.retire(self.state.layouts)]

    # --- layouts

    def _start_survey(self, generation: int) -> None:
        """The layout is unknown or has changed: ask every rank for its pieces. Nothing is captured by the old one."""
        self.state.generation = generation
        self.state.surveying, self._planned = True, False
        for granted in self.state.table.granted:
            self._kill(granted)
        self.members.forget_layouts()
        self._broadcast(m.Survey(generation))

    def _gather(self, action: cluster.Gather) -> None:
        """The pieces of all ranks of the job are there. Those of other nodes are fetched first."""
        if action.generation != self.state.generation or not self.state.surveying or self._planned:
            return
        if len(self.state.ranks) < self.state.world:
            self._out.append(action)
        else:
            self.gathered(action.generation)

    def gathered(self, generation: int) -> None:
        """The pieces of all ranks of the job are here."""
        if generation == self.state.generation and self.state.surveying and not self._planned:
            self._planned = True
            self._broadcast(m.Plan(generation), pieces=True)

    def _plan(self) -> None:
        """Layouts of all -> slots for all."""
        if not self.state.surveying or len(self.members) < len(self.state.ranks):
            return
        layouts = [self.members[rank].layout for rank in self.state.ranks]
        if all(layout is not None for layout in layouts):
            self._allot([layout for layout in layouts if layout is not None])

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
        for rank, (reuse, create) in zip(state.ranks, made.allotments, strict=True):
            self._send_rank(rank, m.Allot(state.generation, reuse, create), slots=tuple(reuse))

    # --- where the node stands

    def _standing(self) -> Standing:
        """What the root is told of this node's ranks."""
        state = self.state
        present = [member for rank, member in self.members.present() if rank not in self._coming]
        wants = {member.wants for member in present} if len(present) == len(state.ranks) else {None}
        asked = wants.pop() if len(wants) == 1 else None
        surveyed = state.surveying and not all(
            rank in self.members and self.members[rank].pieces for rank in state.ranks
        )
        return Standing(
            boundary=max((member.boundary for member in present), default=-1),
            room=self._room(present),
            asked=asked,
            asking=any(member.wants is not None for member in present),
            cost=self._cost,
            survey=state.generation,
            pieces=state.generation - 1 if surveyed else state.generation,
            wishes=self._requests.wishes(),
            closed=bool(state.ranks) and len(state.closed) == len(state.ranks),
        )

    def _room(self, present: list[Member]) -> int:
        """How many snapshots may be in the making here at once."""
        state = self.state
        ready = len(present) == len(state.ranks) and len(state.layouts) == len(state.ranks)
        if not ready or state.left or state.closed or state.surveying or self._draining:
            return 0
        vacant = (state.table.vacant(rank, state.layouts[rank], state.instances[rank]) for rank in state.ranks)
        under_way = sum(not granted.dead and granted.epoch == state.epoch for granted in state.table.granted)
        return min((len(slots) for slots in vacant), default=0) + under_way

    def _wish_for_itself(self) -> bool:
        """A node that ends, or that all its ranks have left, wants the newest snapshot durable. Whether it waits."""
        newest, store = self.state.cluster.newest, self.state.own_store
        if newest is None or store is None or not (self._draining or self._abandoned) or self.state.frozen:
            return False
        if self._is_durable(newest.snapshot):
            return False
        return self._requests.want(newest.snapshot, store, self.state.cluster.last)

    @property
    def _abandoned(self) -> bool:
        """The epoch has begun here, and every rank that joined is dead or has left without closing."""
        joined = self.state.instances
        return bool(joined) and all(
            rank in self.state.left or not (self.state.is_visible(rank) or self.members.peer(rank) is not None)
            for rank in joined
        )

    # --- the end

    def _settle(self) -> None:
        """Leave when the job is closed, or when nobody has come for too long."""
        if self.state.cluster.flushing is not None or self._requests.open or self._wish_for_itself():
            return
        if self._draining:
            self._out.append(Exit("asked to end by a signal"))
            return
        if self._disbanded or self._has_waited_to_part():
            self._broadcast(m.Closed())
            self._out.append(Exit("the job has closed"))
            return
        if any(self.members.present()) or self._beginning or self.state.has_living_ranks:
            self._quiet.end()
            return
        linger_s = self._quiet.too_long_s(self.state, self._now_s)
        if linger_s is not None:
            self._out.append(Exit(f"nobody came for {linger_s:.0f} s"))

    def _has_waited_to_part(self) -> bool:
        """All have finished, and some other node has not said that it knows: it may be gone already."""
        if not self.job.closed:
            self._closed_at = None
            return False
        self._closed_at = self._now_s if self._closed_at is None else self._closed_at
        return self._now_s - self._closed_at >= PART_S

    # --- small things

    def report(self) -> dict[str, Any]:
        """What `ckptd status` shows; JSON-able."""
        connected = {rank: member.boundary for rank, member in self.members.present()}
        return {
            **describe(self.state, connected),
            "interval": self.job.interval,
            "lingering_s": self._quiet.lasted_s(self._now_s),
        }

    def _count(self, name: str) -> None:
        self.state.counters[name] = self.state.counters.get(name, 0) + 1

    def _send(self, peer: int, message: m.Message, **descriptors: Any) -> None:
        self._out.append(Send(peer, message, **descriptors))

    def _send_rank(self, rank: int, message: m.Message, **descriptors: Any) -> None:
        peer = self.members.peer(rank)
        if peer is not None and rank not in self._coming:  # who is away is told when it comes back
            self._send(peer, message, **descriptors)

    def _refuse(self, peer: int, error: str, text: str, promised: Epoch | None = None) -> None:
        self._send(peer, m.Refuse(error, text[: m.MAX_TEXT], promised))

    def _broadcast(self, message: m.Message, **descriptors: Any) -> None:
        for rank, _ in self.members.present():
            self._send_rank(rank, message, **descriptors)


def _complaint(world: int, ranks: list[int]) -> str | None:
    """What is wrong with the ranks of a node."""
    if not 0 < len(ranks) <= MAX_RANKS:
        return f"{len(ranks)} ranks on one node; 1 to {MAX_RANKS} are served"
    if ranks != sorted(set(ranks)) or ranks[-1] >= world:
        return f"ranks {ranks} of {world}: expected some of the job's, each once, in order"
    return None
