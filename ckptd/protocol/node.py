"""The state machine of one node's daemon: its ranks, their slots, and what of them the job's nodes are told.

Owns what concerns this node alone: connections, the ranks of the epoch, layouts and slots, who waits for what. What all
nodes of a job decide together - grants, seals, protection, flushes - is the member machine's (protocol/cluster), which
lives in here; a job on one node is one of one member. Does no I/O and reads no clock. `NodeState` is the part that
outlives the daemon (the server writes it into the arena before any action is carried out), `Member`s come back by their
Hello. Elsewhere: what becomes of grants (grants.py), which slots a rank gets (layouts.py), who waits for a flush
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
from ckptd.protocol.actions import Action, Disconnect, Drop, Exit, WriteRecord
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.epoch import adopted
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Outcome, Standing
from ckptd.protocol.grants import Grants
from ckptd.protocol.members import Member, complaint_of
from ckptd.protocol.quiet import Quiet
from ckptd.protocol.requests import Request, Requests
from ckptd.protocol.slots import Sealed
from ckptd.protocol.state import NodeState, describe
from ckptd.protocol.surveys import Surveys
from ckptd.protocol.voice import Voice


class NodeMachine:
    """See the module docstring. The server calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: NodeState, now_s: float) -> None:
        self.state = state
        self._voice = Voice()
        self.members = self._voice.members
        self._surveys = Surveys(state, self._voice)
        self.job = MemberMachine(state.cluster, state.policy)
        """What the nodes of the job decide together."""
        relayout = lambda: self._start_survey(self.state.generation + 1)  # noqa: E731
        self._grants = Grants(state, self.job, self._voice, relayout)
        self._now_s = now_s
        self._requests = Requests()
        self._beginning: set[int] = set()
        self._quiet = Quiet(now_s)
        self._draining = False
        self._disbanded = False
        self.resting = False
        """Protection has had all the CPU that it is to have for now."""
        self._available_bytes, self._limit = 0, ""

    # --- events

    def take(self) -> list[Action]:
        """The actions since the last call, in order."""
        self._advance()
        return self._voice.take()

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
                self._voice.say(peer, m.Report(self.report()))
            case m.Stop():
                self._voice.say(peer, m.Stopped())
                self._voice.do(Exit("stopped on request"))
            case _:
                self._from_member(peer, message)

    def _from_member(self, peer: int, message: m.Message) -> None:
        found = self.members.of(peer)
        if found is None:
            self._voice.refuse(peer, "DaemonError", f"{type(message).__name__} from a connection that is no rank")
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
                if message.cost_s is not None and message.step_s > 0:
                    member.cost = message.cost_s / message.step_s
                if member.wants is not None and member.wants < message.step:
                    member.wants = None
            case m.Captured() | m.Missed():
                self._grants.hear(rank, message)
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
                self._voice.do(Disconnect(peer))
                self.members[rank].peer = None

    def recorded(self, peer: int, error: str | None, now_s: float) -> None:
        """The epoch record is durable in the store, or cannot be written."""
        self._now_s = now_s
        if peer in self._beginning:
            self._beginning.discard(peer)
            if error is None:
                self._voice.say(peer, m.Begun())
            else:
                self._voice.refuse(peer, "StoreError", error)

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
        answer = self.prepare(message.epoch)
        if isinstance(answer, cluster.Refuse):
            text = f"epoch {message.epoch} is not above {answer.promised}"
            self._voice.refuse(peer, "DaemonError", text, answer.promised)
        else:
            self._voice.say(peer, m.Promise(answer))

    def prepare(self, epoch: Epoch) -> cluster.Promise | cluster.Refuse:
        """Promises an epoch, to rank 0 or, where this node has left the job, to another node."""
        answer = self.job.prepare(epoch)
        if isinstance(answer, cluster.Promise):
            self._quiet.end()
            self._disconnect_members()
        return answer

    def join(self, begin: cluster.Begin) -> None:
        """The epoch that was promised begins with this node as a guest: it holds what others may need, and has no ranks
        of its own."""
        if begin.epoch == self.state.promised != self.state.epoch and self.state.policy is not None:
            self._adopt(begin, [], self.state.policy)

    def _begin(self, peer: int, message: m.Begin) -> None:
        epoch = message.begin.epoch
        if epoch != self.state.promised:
            self._voice.refuse(peer, "DaemonError", f"epoch {epoch} is not the promised one", self.state.promised)
            return
        complaint = complaint_of(message.begin.membership.world, message.ranks)
        if complaint is not None:
            self._voice.refuse(peer, "ConfigError", complaint)
            return
        self._quiet.end()
        if self.state.epoch != epoch:
            self._adopt(message.begin, message.ranks, message.policy)
        root = self.state.cluster.number == 0
        if message.policy.store is None or not root:
            self._voice.say(peer, m.Begun())
        else:
            self._beginning.add(peer)
            self._voice.do(WriteRecord(peer, message.policy.store, self.state.cluster.records[-1]))

    def _adopt(self, begin: cluster.Begin, ranks: list[int], policy: m.Policy) -> None:
        """The epoch begins here; what it neither restores nor keeps is freed."""
        self._disconnect_members()
        self._voice.coming.clear()
        self._voice.do(*(Drop(slot) for slot in self.state.begin(begin.membership.world, ranks, policy)))
        self.job.policy = policy
        self.job.begin(begin)
        self._disbanded = False
        newest = self.state.cluster.newest
        for request in self._requests.retarget(None if newest is None else newest.snapshot):
            self._voice.say(request.peer, request.answer(None))
        self._start_survey(self.state.generation + 1)

    def _hello(self, peer: int, message: m.Hello, process: tuple[int, int] | None) -> None:
        state, rank, instance = self.state, message.rank, message.instance
        if not self._compatible(peer, message.protocol, message.job):
            return
        if complaint_of(message.world, message.ranks) is None and state.is_unheard_of(message.epoch):
            self._adopt_unheard(message)
        if message.epoch != state.epoch or state.frozen or rank not in state.ranks:
            text = f"rank {rank} of epoch {message.epoch} is not served here"
            if state.promised is not None and message.epoch < state.promised:
                text += " any more: the job was launched again; two jobs need two names (job=)"
            self._voice.refuse(peer, "DaemonError", text, state.promised)
            return
        other, returns = self.members.of(peer), rank in state.instances
        if state.instances.setdefault(rank, instance) != instance or (other is not None and other[0] != rank):
            self._voice.refuse(peer, "DaemonError", f"rank {rank} of epoch {message.epoch} is another process")
            return
        member = self.members.setdefault(rank, Member())
        if member.peer not in (None, peer):
            self._voice.do(Disconnect(member.peer))
        member.peer, member.wants = peer, None
        state.left.discard(rank)
        if process is not None:
            state.processes[instance] = process
        self._quiet.end()
        self.job.heard_of(message.granted)
        self._voice.coming[rank] = returns

    def _welcome(self) -> None:
        """Who has said Hello is in as soon as what the epoch goes on from is here, maybe rebuilt."""
        point = self.state.cluster.point if self.state.cluster.continued else None
        holding = None if point is None else self.state.cluster.find(point)
        if self.state.frozen or (holding is not None and not holding.data):
            return
        coming, self._voice.coming = dict(self._voice.coming), {}
        for rank, returns in coming.items():
            peer = self.members.peer(rank)
            if peer is not None:
                self._voice.do(repeats.welcome(self.state, peer, rank))
                if not self._surveys.repeat(peer, rank, returns):
                    self._start_survey(self.state.generation + 1)
                for news in repeats.news(self.state, rank):
                    self._voice.say(peer, news)

    def not_rebuilt(self, snapshot: SnapshotId, error: str, why: str) -> None:
        """What the epoch was to go on from cannot be rebuilt here, for now or ever: whoever waits for it is told."""
        if snapshot == self.state.cluster.point:
            coming, self._voice.coming = dict(self._voice.coming), {}
            for rank in coming:
                peer = self.members.peer(rank)
                if peer is not None:
                    self._voice.refuse(peer, error, why)

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
        self.state.count("rebuilt")
        return list(slots.values())

    def _adopt_unheard(self, message: m.Hello) -> None:
        """An epoch whose Begin went to a daemon that has lost its memory: this one takes its place. Of a job on several
        nodes it is no member: nothing is captured until the next epoch."""
        alone = len(message.ranks) == message.world
        begin = adopted(self.state.cluster, message.epoch, message.restore_point, message.world, alone=alone)
        self._adopt(begin, message.ranks, message.policy)

    def _compatible(self, peer: int, protocol: int, job: str) -> bool:
        if protocol != m.PROTOCOL:
            text = f"protocol {protocol}; this daemon speaks {m.PROTOCOL}: it was started by another version, stop it"
            self._voice.refuse(peer, "VersionError", text)
        elif job != self.state.job:
            self._voice.refuse(peer, "DaemonError", f"job {job!r}; this daemon serves {self.state.job!r}")
        else:
            return True
        return False

    def _disconnect_members(self) -> None:
        """Fences off the ranks of the epoch so far. Where no pid is visible, the end of its connection is the only sign
        of a process's end, and is taken as such."""
        for rank, member in self.members.items():
            if member.peer is not None:
                self._voice.do(Disconnect(member.peer))
            elif not self.state.is_visible(rank):
                self.state.table.writer_ended(self.state.instances[rank])
        self.members.clear()

    # --- requests

    def _flush(self, peer: int, message: m.Flush) -> None:
        store, newest = message.to or self.state.own_store, self.state.cluster.newest
        if store is None:
            self._voice.refuse(peer, "ConfigError", f"job {self.state.job!r} has no store; name one")
        elif newest is None:
            self._voice.say(peer, m.Flushed(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Flushed)

    def _terminating(self, peer: int) -> None:
        """A rank got SIGTERM. Where another rank is already dead, a restart is under way and memory is enough."""
        store, newest = self.state.own_store, self.state.cluster.newest
        if store is None or newest is None or self.state.left:
            self._voice.say(peer, m.Drained(None))
        else:
            self._want_durable(peer, newest.snapshot, store, m.Drained)

    def _want_durable(
        self, peer: int, target: SnapshotId, store: str, answer: Callable[[int | None], m.Message]
    ) -> None:
        durable = self.state.cluster.durable
        if store == self.state.own_store and durable is not None and self._is_durable(target):
            self._voice.say(peer, answer(durable.step))
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
                self._grants.kill_unanswered()
                self._grants.seal()
                self._retire()
                self._surveys.plan(self._available_bytes, self._limit)
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
                self._grants.issue(action)
            case cluster.Revoke():
                self._grants.revoke(action)
            case cluster.Free(part="data"):
                self.state.table.free(action.snapshot)
                self._voice.do(action)
            case cluster.Announce():
                self._announce(action)
            case cluster.FlushEnded():
                self._flush_ended(action.outcome)
            case cluster.Survey():
                if action.generation > self.state.generation:
                    self._start_survey(action.generation)
            case cluster.Differ():
                self._grants.differ()
            case cluster.Gather():
                self._surveys.gather(action)
            case cluster.Disband():
                self._disbanded = True
            case cluster.Leave():
                if not self.state.ranks:
                    self._voice.do(Exit("nothing is held here that anybody needs"))
            case _:
                self._voice.do(action)

    def _announce(self, action: cluster.Announce) -> None:
        """A level has been reached; the restore point's are known to those who restored it."""
        if action.snapshot.epoch != self.state.epoch:
            return
        if action.level is Level.SEALED:
            self.state.count("sealed")
            self.members.satisfied(action.step)
        elif self.state.parity:
            self.state.count("protected")
        else:
            return
        self._voice.broadcast(m.Reached(action.step, action.level, action.snapshot.step))

    def _flush_ended(self, outcome: Outcome) -> None:
        flush, error = outcome.flush, outcome.error
        own, current = flush.store == self.state.own_store, flush.snapshot.epoch == self.state.epoch
        self.state.count("flushed" if error is None else "flush_errors")
        if error is not None:
            self.state.last_error = error = error[: m.MAX_TEXT]
        if own and current:
            self._voice.broadcast(
                m.Reached(flush.step, Level.DURABLE) if error is None else m.FlushFailed(flush.step, error)
            )
        for request in self._requests.ended(outcome):
            if error is None:
                self._voice.say(request.peer, request.answer(flush.step))
            else:
                self._voice.refuse(request.peer, "StoreError", error)

    def _satisfy(self) -> None:
        """Who asks for a step that is sealed already is told so."""
        newest = self.state.cluster.newest
        if newest is None or newest.step is None or newest.snapshot.epoch != self.state.epoch:
            return
        asking = [rank for rank, member in self.members.present() if member.wants is not None]
        self.members.satisfied(newest.step)
        for rank in asking:
            if self.members[rank].wants is None:
                self._voice.tell(rank, m.Reached(newest.step, Level.SEALED, newest.snapshot.step))

    def _retire(self) -> None:
        """Slots that fit no layout go as soon as they hold nothing."""
        if len(self.state.layouts) == len(self.state.ranks):
            self._voice.do(*(Drop(slot.slot) for slot in self.state.table.retire(self.state.layouts)))

    def _start_survey(self, generation: int) -> None:
        """Nothing is captured by the old layout."""
        self._grants.kill_all()
        self._surveys.start(generation)

    def gathered(self, generation: int) -> None:
        """The pieces of all ranks of the job are here."""
        self._surveys.gathered(generation)

    # --- where the node stands

    def _standing(self) -> Standing:
        """What the root is told of this node's ranks."""
        state = self.state
        present = self._voice.listening()
        wants = {member.wants for member in present} if len(present) == len(state.ranks) else {None}
        asked = wants.pop() if len(wants) == 1 else None
        return Standing(
            boundary=max((member.boundary for member in present), default=-1),
            room=self._room(present),
            asked=asked,
            asking=any(member.wants is not None for member in present),
            cost=max((member.cost for member in present if member.cost is not None), default=None),
            survey=state.generation,
            pieces=self._surveys.pieces,
            resting=self.resting,
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
        waits = self.state.cluster.flushing is not None or self._requests.open or self._wish_for_itself()
        if waits and (self._is_alone or not self._quiet.waited(self._now_s)):
            return
        if not waits:
            self._quiet.end_waiting()
        if self._draining:
            self._voice.do(Exit("asked to end by a signal"))
        elif self._disbanded or self._quiet.parted(self.job.closed, self._now_s):
            self._voice.broadcast(m.Closed())
            self._voice.do(Exit("the job has closed"))
        elif any(self.members.present()) or self._beginning or self.state.has_living_ranks:
            self._quiet.end()
        elif (linger_s := self._quiet.too_long_s(self.state, self._now_s)) is not None:
            self._voice.do(Exit(f"nobody came for {linger_s:.0f} s"))

    @property
    def _is_alone(self) -> bool:
        """The job has no other nodes, that might be gone with what this one waits for."""
        membership = self.state.cluster.membership
        return membership is None or len(membership.arenas) <= 1

    # --- small things

    def report(self) -> dict[str, Any]:
        """What `ckptd status` shows; JSON-able."""
        connected = {rank: member.boundary for rank, member in self.members.present()}
        return {
            **describe(self.state, connected),
            "interval": self.job.interval,
            "lingering_s": self._quiet.lasted_s(self._now_s),
        }
