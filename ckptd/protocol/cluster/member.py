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

from collections.abc import Iterable

import msgspec

from ckptd.core.types import Level, SnapshotId
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import begin, newest_known, promise
from ckptd.protocol.cluster.facts import FAN_OUT, Entry, Part, children_of, conjunction, merged, newer, parent_of
from ckptd.protocol.cluster.parity import Work
from ckptd.protocol.cluster.root import DEAD, Root
from ckptd.protocol.cluster.state import ClusterState, Holding
from ckptd.protocol.messages import Policy


class MemberMachine:
    """See the module docstring. The daemon calls one handler per event, then `take()`s the actions."""

    def __init__(self, state: ClusterState, policy: Policy | None = None, fan_out: int = FAN_OUT) -> None:
        self.state = state
        self._fan_out = fan_out
        self._policy = policy
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
        self._writing: SnapshotId | None = None
        self._committing: SnapshotId | None = None
        self._ended: SnapshotId | None = None
        self._revoked: set[SnapshotId] = set()
        self._boundary = -1
        self._able = False
        self._told_up: m.Facts | None = None
        self._told_down: m.Decided | None = None
        self._root: Root | None = None
        if state.number == 0:
            started_at = 0 if state.point is None else state.point.step
            self._root = Root(None if self._policy is None else Cadence(self._policy, started_at))

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
                self._out.append(m.Tell(answer_to, promise(state, message.epoch)))
            case m.Begin():
                self._begin(message, answer_to)
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

    def boundary(self, step: int, able: bool = True) -> None:
        """The node's ranks have completed `step`; `able`: all are there and may be granted a capture."""
        self._boundary = max(self._boundary, step)
        self._able = able

    def captured(self, snapshot: SnapshotId, step: int, record: bytes) -> None:
        """All ranks of the node have captured a grant at `step`, checksums verified."""
        holding = self.state.find(snapshot)
        if holding is None or not holding.capturing or self.state.frozen:
            return
        holding.capturing = False
        if holding.sealed is None:
            assert self.state.number is not None
            holding.sealed = holding.data = True
            holding.step = step
            holding.records[self.state.number] = record

    def missed(self, snapshot: SnapshotId, late: bool = False) -> None:
        """The ranks have answered, and not all have captured the grant."""
        holding = self.state.find(snapshot)
        if holding is not None and holding.capturing and not self.state.frozen:
            holding.capturing = False
            if holding.sealed is None:
                holding.sealed, holding.late = False, late

    def expire(self, snapshot: SnapshotId) -> None:
        """The ranks take too long over a grant."""
        holding = self.state.find(snapshot)
        if holding is not None and holding.sealed is None and holding.capturing and not self.state.frozen:
            holding.sealed = False

    def give_up_parity(self, snapshot: SnapshotId) -> None:
        """Encoding, or rebuilding before it, takes too long: goes on until something newer is sealed, or protected."""
        state, holding = self.state, self.state.find(snapshot)
        if holding is None or state.frozen or state.membership is None or not state.is_current(snapshot):
            return
        follows = any(verdict.sealed and s > snapshot for s, verdict in self.verdicts.items())
        if (follows or snapshot == state.protected) and holding.parity is None and holding.shape.parity:
            holding.parity = False

    def encoded(self, snapshot: SnapshotId) -> None:
        """The parities of this member are complete and checked."""
        holding = self.state.find(snapshot)
        if holding is not None and self._work.encoding == snapshot and not self.state.frozen:
            self._work.encoding = None
            holding.encoded = True

    def encoding_failed(self, snapshot: SnapshotId) -> None:
        """A source cannot be had now."""
        self._work.encoding_failed(snapshot)

    def rebuilt(self, snapshot: SnapshotId, record: bytes) -> None:
        """The string is whole again, checked against its seal record."""
        holding = self.state.find(snapshot)
        if holding is not None and self._work.rebuilding == snapshot and not self.state.frozen:
            assert self.state.number is not None
            self._work.rebuilding = None
            holding.data = True
            holding.records[self.state.number] = record
            if holding.sealed is None:
                holding.sealed = True

    def rebuilding_failed(self, snapshot: SnapshotId) -> None:
        """Too few sources can be had now."""
        self._work.rebuilding_failed(snapshot)

    def want_flush(self) -> None:
        """Root: the newest sealed snapshot is to be made durable."""
        if self._root is not None:
            self._root.flush_wanted = True

    def written(self, snapshot: SnapshotId) -> None:
        """This node's files of a checkpoint are in the store, synced and listed."""
        holding = self.state.find(snapshot)
        if holding is not None and self._writing == snapshot and not self.state.frozen:
            self._writing, holding.written = None, True

    def flush_failed(self, snapshot: SnapshotId) -> None:
        """Files or COMMIT cannot be written: the flush ends for all."""
        self._ended = newer(self._ended, snapshot)
        self._writing = None if self._writing == snapshot else self._writing

    def committed(self, snapshot: SnapshotId) -> None:
        """Root: COMMIT is in the store."""
        if self._root is not None and self._committing == snapshot and not self.state.frozen:
            self._committing = None
            self._root.committed(snapshot)

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

    def _begin(self, message: m.Begin, answer_to: str) -> None:
        state = self.state
        if state.epoch != message.epoch:
            if state.promised != message.epoch:
                return
            self._out += begin(state, message)
            self._enter()
        if not state.frozen:
            self._out.append(m.Tell(answer_to, m.Begun(message.epoch, state.arena)))

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
            old = self.verdicts.get(verdict.snapshot)
            new = self.verdicts[verdict.snapshot] = merged(old, verdict)
            if new.sealed and (old is None or not old.sealed) and new.step is not None:
                self._out.append(m.Announce(new.snapshot, new.step, Level.SEALED))
        protected = message.protected
        if protected is not None and (known.protected is None or protected > known.protected):
            state.protected, state.confirmed = newer(state.protected, protected), True
            step = self._step(protected)
            if step is not None:
                self._out.append(m.Announce(protected, step, Level.PROTECTED))
        if message.durable is not None and (known.durable is None or message.durable > known.durable):
            self._out.append(m.Announce(message.durable, self._step(message.durable) or 0, Level.DURABLE))
        dead = sorted((s for s, verdict in self.verdicts.items() if verdict.sealed is False), reverse=True)
        protected = newer(known.protected, protected)
        flushing = newer(known.flushing, message.flushing)
        for snapshot in {*dead[DEAD:], *(s for s in self.verdicts if protected is not None and s < protected)}:
            if snapshot != flushing and state.find(snapshot) is None:
                del self.verdicts[snapshot]
        self._known = m.Decided(
            message.epoch,
            state.number or 0,
            tuple(self.verdicts[s] for s in sorted(self.verdicts)),
            protected,
            newer(known.encoding, message.encoding),
            flushing,
            newer(known.ended, message.ended),
            newer(known.durable, message.durable),
        )

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
            if not state.holdings:
                self._out.append(m.Leave())
            return
        before = None
        while before != (own := self._own(), self._known):
            before = (own, self._known)
            if self._root is not None:
                self._learn(self._root.decide(state, self._up(own)))
                self._commit()
            self._follow()
            self._protect()
            self._flush()
            self._free()
        self._tell(own)

    def _children(self) -> range:
        assert self.state.membership is not None
        assert self.state.number is not None
        return children_of(self.state.number, len(self.state.membership.arenas), self._fan_out)

    def _is_wanted(self, snapshot: SnapshotId) -> bool:
        """Facts of it are not superseded."""
        known = self._known
        return known is None or known.protected is None or snapshot >= known.protected or snapshot == known.flushing

    def _own(self) -> m.Facts:
        """What this member has posted."""
        state, known = self.state, self._known
        assert state.epoch is not None
        assert state.number is not None
        assert known is not None
        current = [h for h in state.holdings if state.is_current(h.snapshot) and self._is_wanted(h.snapshot)]
        return m.Facts(
            state.epoch,
            state.number,
            tuple(holding.entry() for holding in sorted(current, key=lambda h: h.snapshot)),
            heard=1,
            ready=self._able and state.has_room(),
            boundary=self._boundary,
            granted=state.granted,
            encoding=known.encoding,
            flushing=known.flushing,
            ended=newer(known.ended, self._ended),
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
        return m.Facts(
            heard[0].epoch,
            heard[0].sender,
            tuple(conjunction(s, [entries.get(s) for entries in found]) for s in wanted),
            heard=sum(facts.heard for facts in heard),
            ready=all(facts.ready for facts in heard),
            boundary=max(facts.boundary for facts in heard),
            granted=max(facts.granted for facts in heard),
            encoding=_newest(facts.encoding for facts in heard),
            flushing=_newest(facts.flushing for facts in heard),
            ended=_newest(facts.ended for facts in heard),
        )

    def _commit(self) -> None:
        assert self._root is not None
        snapshot = self._root.to_commit()
        if snapshot is not None and self._committing != snapshot:
            self._committing = snapshot
            self._out.append(m.Commit(snapshot))

    def _follow(self) -> None:
        """Open verdicts are grants; dead ones take them back."""
        state = self.state
        floor = None if self._known is None else self._known.protected
        for snapshot in sorted(self.verdicts):
            verdict, holding = self.verdicts[snapshot], state.find(snapshot)
            if holding is None and verdict.sealed is None and snapshot.epoch == state.epoch:
                if floor is None or snapshot > floor:
                    self._granted(snapshot)
            elif holding is not None and holding.capturing and False in (verdict.sealed, holding.sealed):
                self._revoke(holding)

    def _granted(self, snapshot: SnapshotId) -> None:
        state = self.state
        assert state.number is not None
        assert state.membership is not None
        holding = Holding(snapshot, state.number, state.membership.shape)
        late = snapshot.step <= max(state.granted, self._boundary)
        if late or not self._able or not state.has_room():
            holding.sealed, holding.late = False, late
        else:
            holding.capturing = True
            self._out.append(m.Capture(snapshot))
        state.granted = max(state.granted, snapshot.step)
        state.holdings.append(holding)

    def _revoke(self, holding: Holding) -> None:
        if holding.snapshot not in self._revoked:
            self._revoked.add(holding.snapshot)
            holding.sealed = False
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

    def _flush(self) -> None:
        assert self._known is not None
        snapshot = self._known.flushing
        if snapshot is None or not self._is_flushing(snapshot):
            return
        holding = self.state.find(snapshot)
        if holding is None or holding.freed:
            self._ended = newer(self._ended, snapshot)
        elif holding.data and not holding.written and self._writing != snapshot:
            self._writing = snapshot
            self._out.append(m.Write(snapshot))

    def _is_flushing(self, snapshot: SnapshotId) -> bool:
        """It is being written, so it stays."""
        ended = newer(self._ended, None if self._known is None else self._known.ended)
        named = None if self._known is None else self._known.flushing
        return snapshot == named and (ended is None or ended < snapshot)

    # --- freeing

    def _free(self) -> None:
        assert self._known is not None
        protected = newest_known(self.state, self._known)
        for holding in list(self.state.holdings):
            snapshot = holding.snapshot
            if self._is_flushing(snapshot) or holding.capturing:
                continue
            verdict = self.verdicts.get(snapshot)
            old = protected is not None and snapshot < protected
            if old or (verdict is not None and verdict.sealed is False and self.state.is_current(snapshot)):
                self._drop(holding)
                self.state.holdings.remove(holding)
            elif self._is_superseded(snapshot, protected):
                self._drop(holding)
                holding.freed = True

    def _is_superseded(self, snapshot: SnapshotId, protected: SnapshotId | None) -> bool:
        """Its parity was given up, and a newer one is sealed by all."""
        verdict = self.verdicts.get(snapshot)
        if verdict is None or verdict.parity is not False or snapshot == protected:
            return False
        return any(other.sealed and s > snapshot for s, other in self.verdicts.items())

    def _drop(self, holding: Holding) -> None:
        if holding.area is not None:
            self._out.append(m.Free(holding.snapshot, "parity"))
        if not holding.freed:
            self._out.append(m.Free(holding.snapshot, "data"))
        self._work.forget(holding.snapshot)
        holding.area, holding.encoded, holding.data = None, False, False
        holding.records.clear()

    # --- telling

    def _tell(self, own: m.Facts) -> None:
        state, known = self.state, self._known
        assert state.number is not None
        assert state.membership is not None
        parent = parent_of(state.number, self._fan_out)
        if parent is not None and (up := self._up(own)) != self._told_up:
            self._told_up = up
            self._out.append(m.Tell(state.membership.arenas[parent], up))
        if known is not None and known != self._told_down:
            self._told_down = known
            listeners = [state.membership.arenas[number] for number in self._children()]
            if state.number == 0:
                listeners += state.membership.guests
            self._out += [m.Tell(arena, known) for arena in listeners]


def _newest(snapshots: Iterable[SnapshotId | None]) -> SnapshotId | None:
    return max((s for s in snapshots if s is not None), default=None)
