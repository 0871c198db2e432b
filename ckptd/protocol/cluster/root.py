"""What the root of an epoch decides: verdicts, grants, surveys, what to encode. Nothing here outlives the daemon.

Owns the grants that are out and the name of what is encoded; what to write and when is in flushing.py. A root that
starts again learns them from the facts of the others, and decides nothing on what it has not heard.
"""

from __future__ import annotations

import dataclasses

import msgspec

from ckptd.core.types import SnapshotId
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.cluster.facts import Entry, merged, newer
from ckptd.protocol.cluster.flushing import Flushing
from ckptd.protocol.cluster.messages import Decided, Facts
from ckptd.protocol.cluster.state import ClusterState

PIPELINE = 2
"""Snapshots that may be granted and not yet sealed at a time."""

DEAD = 16
"""Verdicts of that many dead snapshots are repeated; who has missed one says NotSealed again when it is asked."""

COMPARE_EVERY = 100
"""In one of so many snapshots the ranks compare what they have in common, and in the first of each layout."""


@dataclasses.dataclass
class Root:
    """See the module docstring. `cadence`: of the job's policy; without one nothing is granted."""

    cadence: Cadence | None
    flushing: Flushing
    verdicts: dict[SnapshotId, Entry] = dataclasses.field(default_factory=dict)
    granted: int = 0
    protected: SnapshotId | None = None
    encoding: SnapshotId | None = None
    survey: int = 0
    plan: int = 0
    closed: bool = False
    over: SnapshotId | None = None
    _uncompared: int | None = None

    def decide(self, state: ClusterState, up: Facts, now_s: float) -> Decided:
        """The decisions that follow from the facts of all, as far as they have come."""
        assert state.epoch is not None
        assert state.membership is not None
        complete = up.heard == len(state.membership.arenas)
        self._judge(up)
        self._forget(state)
        self.granted = max(self.granted, up.granted)
        self.encoding = newer(self.encoding, up.encoding)
        self._name_encoding(state, up.standing.resting)
        self._survey(up, complete)
        self.flushing.hear(up, complete)
        newest = self._newest()
        if newest is not None and complete:
            self.flushing.name(newest, up.standing.wishes, now_s)
        if complete:
            self._grant(state, up)
        idle = self.flushing.running is None and not up.standing.wishes
        self.closed = self.closed or (complete and up.standing.closed and idle)
        return Decided(
            state.epoch,
            0,
            tuple(self.verdicts[snapshot] for snapshot in sorted(self.verdicts)),
            self.protected,
            self.encoding,
            self.survey,
            self.plan,
            self.flushing.flush,
            self.flushing.last,
            self.closed,
            self.over,
        )

    def _judge(self, up: Facts) -> None:
        """Verdicts are conjunctions of facts; they only grow. What is decided needs no checksums any more."""
        for entry in up.entries:
            old = self.verdicts.get(entry.snapshot)
            if old is None and self.over is not None and entry.snapshot <= self.over:
                continue
            verdict = merged(old, msgspec.structs.replace(entry, replicas={}))
            self.verdicts[entry.snapshot] = verdict
            if verdict.sealed is not None and (old is None or old.sealed is None):
                self._note(verdict)
            if verdict.protected:
                self.protected = newer(self.protected, entry.snapshot)

    def _forget(self, state: ClusterState) -> None:
        """What is over is no longer listed: dead for a while, older than what is protected, or superseded, that is, its
        parity was given up and a newer one is sealed by all."""
        newest, protected = self._newest(), newer(state.protected, self.protected)
        dead = sorted((s for s, verdict in self.verdicts.items() if verdict.sealed is False), reverse=True)
        for snapshot, verdict in list(self.verdicts.items()):
            given_up = verdict.sealed and verdict.parity is False and snapshot != protected
            superseded = given_up and newest is not None and snapshot < newest.snapshot
            old = self.protected is not None and snapshot < self.protected
            if (superseded or old or snapshot in dead[DEAD:]) and not self.flushing.is_writing(snapshot):
                del self.verdicts[snapshot]
                self.over = newer(self.over, snapshot)

    def _note(self, verdict: Entry) -> None:
        """What a verdict says of the cadence, and of when to compare next."""
        if verdict.sealed and verdict.compare:
            self._uncompared = 0
        elif verdict.sealed and self._uncompared is not None:
            self._uncompared += 1
        if self.cadence is None:
            return
        if verdict.sealed:
            self.cadence.sealed()
        elif verdict.late:
            self.cadence.late()
        else:
            self.cadence.wasted()

    def _newest(self) -> Entry | None:
        """The newest snapshot that is sealed by all."""
        return max((v for v in self.verdicts.values() if v.sealed), key=lambda v: v.snapshot, default=None)

    def _name_encoding(self, state: ClusterState, resting: bool) -> None:
        """The restore point first, then the newest that is sealed, unless a node is `resting`. One until it is
        protected or given up."""

        def is_open(snapshot: SnapshotId | None) -> bool:
            verdict = None if snapshot is None else self.verdicts.get(snapshot)
            return verdict is not None and bool(verdict.sealed) and verdict.parity is None

        point = self.verdicts.get(state.point) if state.continued and state.point is not None else None
        if point is not None and point.parity is None:
            self.encoding = newer(self.encoding, state.point if point.sealed else None)
        elif not is_open(self.encoding) and not resting:
            self.encoding = newer(self.encoding, max(filter(is_open, self.verdicts), default=None))

    def _survey(self, up: Facts, complete: bool) -> None:
        """The newest generation that a node wants is that of all; it is planned when all pieces are there. A new layout
        begins with a comparison, and what was granted for the old one is dead."""
        if up.standing.survey > self.survey:
            self.survey, self._uncompared = up.standing.survey, None
        if complete and up.standing.pieces == self.survey:
            self.plan = self.survey

    # --- grants

    def _grant(self, state: ClusterState, up: Facts) -> None:
        """By cadence; or what all ranks ask for, while they wait."""
        standing = up.standing
        if self.cadence is None or standing.boundary < 0:
            return
        if standing.cost is not None:
            self.cadence.observe(standing.cost)
        if standing.asking:
            if standing.asked is not None:
                self._grant_on_request(state, standing.asked, standing.room)
            return
        step = self.cadence.next_step(standing.boundary, self.granted)
        if step <= standing.boundary + self.cadence.lead + 1:
            self._issue(state, step, None, standing.room)

    def _grant_on_request(self, state: ClusterState, step: int, room: int) -> None:
        """Every rank stands at one boundary: what is granted and not used is taken back, then that is granted."""
        newest = self._newest()
        if newest is not None and newest.snapshot.epoch == state.epoch and (newest.step or 0) >= step:
            return
        waiting = self._open(state)
        if any(step in (verdict.step, verdict.wanted_step) for verdict in waiting):
            return
        for verdict in waiting:
            if verdict.step is None:
                self.verdicts[verdict.snapshot] = msgspec.structs.replace(verdict, sealed=False)
        self._issue(state, max(self.granted + 1, step), step, room)

    def _issue(self, state: ClusterState, number: int, at: int | None, room: int) -> None:
        """One more grant, where there is room for it."""
        assert state.epoch is not None
        if len(self._open(state)) >= min(PIPELINE, room):
            return
        self.granted = number
        snapshot = SnapshotId(state.epoch, number)
        compare = self._uncompared is None or self._uncompared >= COMPARE_EVERY - 1
        self.verdicts[snapshot] = Entry(snapshot, at=at, compare=compare)

    def _open(self, state: ClusterState) -> list[Entry]:
        return [v for s, v in self.verdicts.items() if v.sealed is None and s.epoch == state.epoch]
