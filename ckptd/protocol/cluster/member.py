"""The state machine of one member of a job: its facts, and what follows from the root's decisions. Pure.

Owns every decision of protection on this node; member 0 has the root beside it. Does no I/O and reads no clock.
`ClusterState` is the part that outlives the daemon, and is written before any action is carried out.

Invariants
- Facts are posted only by the arena that Begin named, and never taken back.
- Data of the newest protected snapshot, of the restore point, of what is being written, and of everything newer that is
  not dead or superseded, is kept.
- While a newer epoch is promised nothing is posted, decided, encoded or freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import begin, newest_known, promise
from ckptd.protocol.cluster.facts import FAN_OUT, Entry, Part, children_of, conjunction, merged, newer, parent_of
from ckptd.protocol.cluster.flushing import Flushing
from ckptd.protocol.cluster.parity import Kind, Work
from ckptd.protocol.cluster.root import Root
from ckptd.protocol.cluster.standing import Failure, Flush, Outcome, Standing, together
from ckptd.protocol.cluster.state import ClusterState, Holding
from ckptd.protocol.messages import MAX_TEXT, Policy

GIVE_UP_AFTER = 16
"""Failures of this node's work on a snapshot, a pause after each, before its parity is given up."""


class MemberMachine:
    """See the module docstring. The daemon calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: ClusterState, policy: Policy | None = None, fan_out: int = FAN_OUT) -> None:
        self.state = state
        self.policy = policy
        """Of the job; takes effect with the next epoch."""
        self.now_s = 0.0
        self._fan_out = fan_out
        self._out: list[m.MemberAction] = []
        self._enter()

    def _enter(self) -> None:
        """A new epoch, or a new daemon: nothing has been heard yet."""
        state = self.state
        self.verdicts: dict[SnapshotId, Entry] = {}
        self._known = None if state.epoch is None else m.Decided(state.epoch, 0, ())
        self._below: dict[int, m.Facts] = {}
        self._gathered: m.Facts | None = None
        self._work = Work()
        self._writing = self._committing = 0
        self._failed: Failure | None = None
        self._standing = Standing()
        self._done = False
        self._told_up: m.Facts | None = None
        self._told_down: m.Decided | None = None
        self._root: Root | None = None
        if state.number == 0:
            started_at = max(state.point_step, 0 if state.durable is None else state.durable.step)
            cadence = None if self.policy is None else Cadence(self.policy, started_at)
            self._root = Root(cadence, Flushing(self.policy, cadence, state.durable))

    @property
    def closed(self) -> bool:
        """All ranks of the job have finished, as far as this member knows."""
        return self._known is not None and self._known.closed

    @property
    def interval(self) -> int | None:
        """Root: steps between snapshots."""
        return None if self._root is None or self._root.cadence is None else self._root.cadence.interval

    # --- events

    def take(self) -> list[m.MemberAction]:
        """The actions since the last call, in order."""
        self._advance()
        out, self._out = self._out, []
        return out

    def handle(self, message: m.BetweenDaemons, answer_to: str = "") -> None:
        """A message from another daemon; `answer_to`: whoever asks for a promise or begins an epoch."""
        state = self.state
        match message:
            case m.Prepare():
                self._out.append(m.Tell(answer_to, self.prepare(message.epoch)))
            case m.Begin():
                self.begin(message)
                if state.epoch == message.epoch and not state.frozen:
                    self._out.append(m.Tell(answer_to, m.Begun(message.epoch, state.arena)))
            case _ if state.frozen or message.epoch != state.epoch:
                return
            case m.Facts():
                self._hear_facts(message)
            case m.Decided():
                expected = 0 if state.number is None else parent_of(state.number, self._fan_out)
                if message.sender == expected:
                    self._learn(message)
            case m.SealRecord():
                self._hold_record(message)
            case m.Recorded():
                self._work.acknowledged.setdefault(message.snapshot, set()).add(message.sender)

    def prepare(self, epoch: Epoch) -> m.Promise | m.Refuse:
        """Promises not to serve lower epochs, and freezes."""
        return promise(self.state, epoch)

    def begin(self, message: m.Begin) -> None:
        """The epoch that was promised begins; anything else is ignored."""
        if self.state.epoch != message.epoch and self.state.promised == message.epoch:
            self._out += begin(self.state, message)
            self._enter()

    def heard_of(self, granted: int) -> None:
        """Somebody knows of grants up to this number: a daemon that takes the place of a lost one gives higher ones."""
        self.state.granted = max(self.state.granted, granted)

    def stands(self, standing: Standing) -> None:
        """Where the node's ranks stand now. What this machine knows itself - flushes - is not looked at."""
        self._standing = standing

    def captured(self, snapshot: SnapshotId, step: int, replicas: Mapping[int, int] | None = None) -> bool:
        """All ranks of the node have captured a grant at `step`, checksums verified. Whether it is kept."""
        holding = self.state.find(snapshot)
        if holding is None or not holding.capturing or holding.sealed is not None or self.state.frozen:
            return False
        holding.capturing, holding.sealed, holding.data = False, True, True
        holding.step, holding.replicas = step, dict(replicas or {})
        return True

    def used(self, snapshot: SnapshotId, step: int) -> None:
        """A rank has captured a grant at `step`: it is too late to take it back."""
        holding = self.state.find(snapshot)
        if holding is not None and holding.capturing and holding.step is None and not self.state.frozen:
            holding.step = step

    def missed(self, snapshot: SnapshotId, late: bool = False) -> None:
        """Not all ranks will capture the grant."""
        holding = self.state.find(snapshot)
        if holding is not None and holding.capturing and not self.state.frozen:
            holding.capturing, holding.sealed, holding.late = False, False, late

    def described(self, snapshot: SnapshotId, record: bytes) -> None:
        """The seal record of this member's string."""
        holding = self.state.find(snapshot)
        if holding is not None and self._work.describing == snapshot and not self.state.frozen:
            self._work.describing = None
            holding.records[holding.string] = record

    def describing_failed(self, snapshot: SnapshotId, damaged: bool) -> None:
        """It cannot be done now; or the string is `damaged`, and is rebuilt where that is possible."""
        holding = self.state.find(snapshot)
        if holding is not None and self._work.describing == snapshot and not self.state.frozen:
            holding.data = not damaged
            self._fails("describe", snapshot)

    def _fails(self, work: Kind, snapshot: SnapshotId) -> None:
        """Again, later; but not for ever, where something newer can be protected."""
        if self._work.fails(work, snapshot) >= GIVE_UP_AFTER:
            self.give_up_parity(snapshot)

    def give_up_parity(self, snapshot: SnapshotId) -> None:
        """Encoding, or what must be done before it, fails for good: only if something newer is sealed, or protected."""
        state, holding = self.state, self.state.find(snapshot)
        if holding is None or state.frozen or not state.is_current(snapshot):
            return
        replaceable = snapshot == state.protected or self._is_followed(snapshot)
        if replaceable and holding.parity is None and holding.shape.parity:
            holding.parity = False

    def encoded(self, snapshot: SnapshotId) -> None:
        """The parities of this member are complete and checked."""
        holding = self.state.find(snapshot)
        if holding is not None and self._work.encoding == snapshot and not self.state.frozen:
            self._work.encoding = None
            holding.encoded = True

    def encoding_failed(self, snapshot: SnapshotId) -> None:
        """A source cannot be had now."""
        if self._work.encoding == snapshot:
            self._fails("encode", snapshot)

    def rebuilt(self, snapshot: SnapshotId, record: bytes) -> bool:
        """The string is whole again, checked against its seal record. Whether anybody wants it."""
        holding = self.state.find(snapshot)
        if holding is None or self._work.rebuilding != snapshot or self.state.frozen:
            return False
        assert self.state.number is not None
        self._work.rebuilding = None
        holding.data = True
        holding.records[self.state.number] = record
        if holding.sealed is None:
            holding.sealed = True
        return True

    def rebuilding_failed(self, snapshot: SnapshotId) -> None:
        """Too few sources can be had now."""
        if self._work.rebuilding == snapshot:
            self._fails("rebuild", snapshot)

    def written(self, number: int) -> None:
        """This node's files of a flush are in the store, synced and listed."""
        if self._writing == number and not self.state.frozen:
            self.state.written = number

    def flush_failed(self, number: int, error: str) -> None:
        """Files or COMMIT cannot be written: the flush ends for all."""
        if number in (self._writing, self._committing):
            self._failed = Failure(number, error[:MAX_TEXT])

    def committed(self, number: int) -> None:
        """Root: COMMIT is in the store."""
        if self._root is not None and self._committing == number and not self.state.frozen:
            self._root.flushing.end(number, None)

    def scrub(self) -> None:
        """Verify the next thing that is held."""
        verify = None if self.state.frozen else self._work.scrub(self.state)
        if verify is not None:
            self._out.append(verify)

    def verified(self, snapshot: SnapshotId, part: Part, intact: bool) -> None:
        """Checksums agree, or not."""
        holding = self.state.find(snapshot)
        if holding is not None:
            self._work.verified(holding, part, intact)

    def repeat(self) -> None:
        """Time to say again what may not have arrived."""
        self._told_up = self._told_down = None
        self._work.repeat()

    # --- what arrives

    def _hear_facts(self, message: m.Facts) -> None:
        assert self.state.membership is not None
        if self.state.number is None or message.sender not in self._children():
            return
        old = self._below.get(message.sender)
        entries = {} if old is None else {entry.snapshot: entry for entry in old.entries}
        for entry in message.entries:
            entries[entry.snapshot] = merged(entries.get(entry.snapshot), entry)
        kept = tuple(entry for snapshot, entry in entries.items() if self._is_wanted(snapshot))
        self._below[message.sender] = msgspec.structs.replace(message, entries=kept)
        self._gathered = None

    def _learn(self, message: m.Decided) -> None:
        """What was known stays known."""
        state, known = self.state, self._known
        assert known is not None
        for verdict in message.verdicts:
            self._learn_verdict(verdict)
        protected = message.protected
        if protected is not None and (known.protected is None or protected > known.protected):
            state.protected, state.confirmed = newer(state.protected, protected), True
            step = self._step(protected)
            if step is not None:
                self._out.append(m.Announce(protected, step, Level.PROTECTED))
        self._learn_flush(message.flush, message.last)
        for snapshot in list(self.verdicts):
            if message.ends(snapshot) and not self._is_flushing(snapshot):
                del self.verdicts[snapshot]
        if message.survey > known.survey:
            self._out.append(m.Survey(message.survey))
        if message.plan > known.plan:
            self._out.append(m.Gather(message.plan))
        self._known = m.Decided(
            message.epoch,
            state.number or 0,
            tuple(self.verdicts[s] for s in sorted(self.verdicts)),
            newer(known.protected, protected),
            newer(known.encoding, message.encoding),
            max(known.survey, message.survey),
            max(known.plan, message.plan),
            state.flush,
            state.last,
            known.closed or message.closed,
            newer(known.over, message.over),
        )

    def _learn_verdict(self, verdict: Entry) -> None:
        old = self.verdicts.get(verdict.snapshot)
        new = self.verdicts[verdict.snapshot] = merged(old, verdict)
        if new.sealed and (old is None or not old.sealed) and new.step is not None:
            self._out.append(m.Announce(new.snapshot, new.step, Level.SEALED))
        if new.differ and (old is None or not old.differ):
            self._out.append(m.Differ(new.snapshot))

    def _learn_flush(self, flush: Flush | None, last: Outcome | None) -> None:
        state = self.state
        if flush is not None and (state.flush is None or flush.number > state.flush.number):
            state.flush = flush
        if last is None or (state.last is not None and last.flush.number <= state.last.flush.number):
            return
        state.last = last
        own = self.policy is not None and last.flush.store == self.policy.store
        if own and last.error is None:
            state.durable = SnapshotId(last.flush.snapshot.epoch, last.flush.step)
        self._out.append(m.FlushEnded(last))

    def _step(self, snapshot: SnapshotId) -> int | None:
        verdict, holding = self.verdicts.get(snapshot), self.state.find(snapshot)
        if verdict is not None and verdict.step is not None:
            return verdict.step
        return None if holding is None else holding.step

    def _hold_record(self, message: m.SealRecord) -> None:
        state, holding = self.state, self.state.find(message.snapshot)
        if state.number is None or holding is None or message.sender not in holding.shape.group_of(state.number):
            return
        assert state.membership is not None
        assert state.epoch is not None
        holding.records[message.sender] = message.record
        answer = m.Recorded(state.epoch, state.number, message.snapshot)
        self._out.append(m.Tell(state.membership.arenas[message.sender], answer))

    # --- what follows from the state: run after every event

    def _advance(self) -> None:
        state = self.state
        if state.frozen or self._known is None:
            return
        if state.number is None:
            self._free()
            self._out += self._work.due_at_guest(state)
            if not state.holdings and not self._done:
                self._done = True
                self._out.append(m.Leave())
            return
        before: tuple[m.Facts, m.Decided] | None = None
        up: m.Facts | None = None
        while before != (own := self._own(), self._known):
            before = (own, self._known)
            if self._root is not None:
                up = self._up(own)
                self._learn(self._root.decide(state, up, self.now_s))
                self._commit()
            self._follow()
            self._protect()
            self._flush()
            self._free()
        up = up or self._up(own)
        self._tell(up)
        if self._known.closed and up.standing.parted and not self._done:
            self._done = True
            self._out.append(m.Disband())

    def _children(self) -> range:
        assert self.state.membership is not None
        assert self.state.number is not None
        return children_of(self.state.number, len(self.state.membership.arenas), self._fan_out)

    def _is_wanted(self, snapshot: SnapshotId) -> bool:
        """Facts of it are not superseded."""
        known = self._known
        assert known is not None
        old = known.protected is not None and snapshot < known.protected
        return self._is_flushing(snapshot) or not (old or known.ends(snapshot))

    def _own(self) -> m.Facts:
        """What this member has posted."""
        state, known = self.state, self._known
        assert state.epoch is not None
        assert state.number is not None
        assert known is not None
        current = [h for h in state.holdings if state.is_current(h.snapshot) and self._is_wanted(h.snapshot)]
        parted = known.closed and len(self._below) == len(self._children())
        return m.Facts(
            state.epoch,
            state.number,
            tuple(holding.entry() for holding in sorted(current, key=lambda h: h.snapshot)),
            heard=1,
            standing=msgspec.structs.replace(self._standing, written=state.written, failed=self._failed, parted=parted),
            granted=state.granted,
            encoding=known.encoding,
            flush=state.flush,
            last=state.last,
        )

    def _up(self, own: m.Facts) -> m.Facts:
        """What this member and all below it have posted."""
        children = self._children()
        if not children:
            return own
        if self._gathered is None:
            self._gathered = self._joined([self._below.get(number) for number in children])
        return self._joined([own, self._gathered]) or own

    def _joined(self, parts: list[m.Facts | None]) -> m.Facts | None:
        """What holds of all parts, as far as they have been heard of; None if none has."""
        heard = [facts for facts in parts if facts is not None]
        if not heard:
            return None
        found = [{entry.snapshot: entry for entry in facts.entries} if facts else {} for facts in parts]
        wanted = sorted(s for s in {s for entries in found for s in entries} if self._is_wanted(s))
        outcomes = [facts.last for facts in heard if facts.last is not None]
        return m.Facts(
            heard[0].epoch,
            heard[0].sender,
            tuple(conjunction(s, [entries.get(s) for entries in found]) for s in wanted),
            heard=sum(facts.heard for facts in heard),
            standing=together([facts.standing for facts in heard]),
            granted=max(facts.granted for facts in heard),
            encoding=_newest(facts.encoding for facts in heard),
            flush=max((f.flush for f in heard if f.flush is not None), key=_number, default=None),
            last=max(outcomes, key=lambda outcome: outcome.flush.number, default=None),
        )

    def _commit(self) -> None:
        assert self._root is not None
        flush = self._root.flushing.to_commit()
        if flush is not None and self._committing != flush.number:
            self._committing = flush.number
            self._out.append(m.Commit(flush))

    def _follow(self) -> None:
        """Open verdicts are grants; dead ones take them back."""
        state = self.state
        floor = None if self._known is None else self._known.protected
        for snapshot in sorted(self.verdicts):
            verdict, holding = self.verdicts[snapshot], state.find(snapshot)
            if holding is None and verdict.sealed is None and snapshot.epoch == state.epoch:
                if floor is None or snapshot > floor:
                    self._granted(verdict)
            elif holding is not None and holding.capturing and verdict.sealed is False:
                self._revoke(holding)
            elif holding is not None and verdict.sealed:
                holding.agreed, holding.replicas = True, {}
        for holding in state.holdings:
            if holding.capturing and self._is_over(holding.snapshot):
                self._revoke(holding)

    def _granted(self, verdict: Entry) -> None:
        """A grant that has come too late, or for which there is no room, is NotSealed by all."""
        state, standing, snapshot = self.state, self._standing, verdict.snapshot
        assert state.number is not None
        assert state.membership is not None
        holding = Holding(snapshot, state.number, state.membership.shape, world=state.membership.world)
        asked = verdict.at is not None
        late = snapshot.step <= state.granted or (not asked and snapshot.step <= standing.boundary)
        if late or standing.room == 0 or (asked and standing.asked != verdict.at):
            holding.sealed, holding.late = False, late
        else:
            holding.capturing = True
            self._out.append(m.Capture(snapshot, verdict.wanted_step, asked, verdict.compare))
        state.granted = max(state.granted, snapshot.step)
        state.holdings.append(holding)

    def _revoke(self, holding: Holding) -> None:
        holding.capturing, holding.sealed = False, False
        self._out.append(m.Revoke(holding.snapshot))

    def _protect(self) -> None:
        """Work for parity; Parity once all of it is done."""
        assert self._known is not None
        self._out += self._work.due(self.state, self.verdicts, self._known.encoding)
        for holding in self.state.holdings:
            if not self.state.is_current(holding.snapshot) or holding.parity is not None or not holding.sealed:
                continue
            verdict = self.verdicts.get(holding.snapshot)
            whole = holding.data and holding.encoded and verdict is not None and bool(verdict.sealed)
            if holding.shape.parity == 0 or (whole and self._work.has_all_records_out(self.state, holding)):
                holding.parity = True
            elif self._is_passed_over(holding.snapshot):
                holding.parity = False

    def _is_followed(self, snapshot: SnapshotId) -> bool:
        """A newer snapshot is sealed by all."""
        return any(verdict.sealed and s > snapshot for s, verdict in self.verdicts.items())

    def _is_passed_over(self, snapshot: SnapshotId) -> bool:
        """It will never be encoded: something newer will be next. Whoever knows that the newer one is sealed also knows
        what the root had named before."""
        assert self._known is not None
        return snapshot not in (self._known.encoding, self.state.point) and self._is_followed(snapshot)

    def _flush(self) -> None:
        flush = self.state.flushing
        if flush is None or flush.number in (self._writing, self.state.written):
            return
        holding = self.state.find(flush.snapshot)
        if holding is None:
            self._failed = Failure(flush.number, f"member {self.state.number} does not hold {flush.snapshot} any more")
        elif holding.data:
            self._writing = flush.number
            self._out.append(m.Write(flush))

    def _is_flushing(self, snapshot: SnapshotId) -> bool:
        """It is being written, so it stays."""
        flush = self.state.flushing
        return flush is not None and flush.snapshot == snapshot

    # --- freeing

    def _free(self) -> None:
        assert self._known is not None
        protected = newest_known(self.state, self._known)
        for holding in list(self.state.holdings):
            snapshot = holding.snapshot
            if self._is_flushing(snapshot) or holding.capturing:
                continue
            verdict = self.verdicts.get(snapshot)
            dead = verdict is not None and verdict.sealed is False and self.state.is_current(snapshot)
            if dead or self._is_over(snapshot) or (protected is not None and snapshot < protected):
                if holding.area is not None:
                    self._out.append(m.Free(snapshot, "parity"))
                self._out.append(m.Free(snapshot, "data"))
                self._work.forget(snapshot)
                self.state.holdings.remove(holding)

    def _is_over(self, snapshot: SnapshotId) -> bool:
        """The root says that nobody needs it any more."""
        return self._known is not None and self._known.ends(snapshot) and self.state.is_current(snapshot)

    # --- telling

    def _tell(self, up: m.Facts) -> None:
        state, known = self.state, self._known
        assert state.number is not None
        assert state.membership is not None
        parent = parent_of(state.number, self._fan_out)
        if parent is not None and up != self._told_up:
            self._told_up = up
            self._out.append(m.Tell(state.membership.arenas[parent], up))
        if known is not None and known != self._told_down:
            self._told_down = known
            listeners = [state.membership.arenas[number] for number in self._children()]
            if state.number == 0:
                listeners += state.membership.guests
            self._out += [m.Tell(arena, known) for arena in listeners]


def _number(flush: Flush) -> int:
    return flush.number


def _newest(snapshots: Iterable[SnapshotId | None]) -> SnapshotId | None:
    return max((s for s in snapshots if s is not None), default=None)
