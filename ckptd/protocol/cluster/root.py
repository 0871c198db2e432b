"""What the root of an epoch decides: verdicts, grants, what to encode and to write. Nothing here outlives the daemon.

Owns the grants that are out and the names of what is encoded and written. A root that starts again learns both from the
facts of the others, and decides nothing on what it has not heard.
"""

from __future__ import annotations

import dataclasses

from ckptd.core.types import SnapshotId
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.cluster.facts import Entry, merged, newer
from ckptd.protocol.cluster.messages import Decided, Facts
from ckptd.protocol.cluster.state import ClusterState

PIPELINE = 2
"""Snapshots that may be granted and not yet sealed at a time; one, where members have two slots."""

DEAD = 16
"""Verdicts of that many dead snapshots are repeated; who has missed one says NotSealed again when it is asked."""


@dataclasses.dataclass
class Root:
    """See the module docstring. `cadence`: of the job's policy; without one nothing is granted."""

    cadence: Cadence | None
    verdicts: dict[SnapshotId, Entry] = dataclasses.field(default_factory=dict)
    granted: int = 0
    protected: SnapshotId | None = None
    encoding: SnapshotId | None = None
    flushing: SnapshotId | None = None
    ended: SnapshotId | None = None
    durable: SnapshotId | None = None
    flush_wanted: bool = False

    def decide(self, state: ClusterState, up: Facts) -> Decided:
        """The decisions that follow from the facts of all, as far as they have come."""
        assert state.epoch is not None
        self._judge(up)
        self.granted = max(self.granted, up.granted)
        self.encoding = newer(self.encoding, up.encoding)
        self.flushing = newer(self.flushing, up.flushing)
        self.ended = newer(self.ended, up.ended)
        self._name_encoding(state)
        self._name_flush()
        self._grant(state, up)
        return Decided(
            state.epoch,
            0,
            tuple(self.verdicts[snapshot] for snapshot in sorted(self.verdicts)),
            self.protected,
            self.encoding,
            self.flushing,
            self.ended,
            self.durable,
        )

    def to_commit(self) -> SnapshotId | None:
        """What all have written and nobody has given up."""
        verdict = None if self.flushing is None else self.verdicts.get(self.flushing)
        ended = self.ended is not None and self.flushing is not None and self.ended >= self.flushing
        return self.flushing if verdict is not None and verdict.written and not ended else None

    def committed(self, snapshot: SnapshotId) -> None:
        """COMMIT is in the store."""
        self.durable = newer(self.durable, snapshot)
        self.ended = newer(self.ended, snapshot)

    def _judge(self, up: Facts) -> None:
        """Verdicts are conjunctions of facts; they only grow."""
        for entry in up.entries:
            old = self.verdicts.get(entry.snapshot)
            verdict = self.verdicts[entry.snapshot] = merged(old, entry)
            if self.cadence is not None and verdict.sealed is not None and (old is None or old.sealed is None):
                if verdict.sealed:
                    self.cadence.sealed()
                elif verdict.late:
                    self.cadence.late()
            if verdict.protected:
                self.protected = newer(self.protected, entry.snapshot)
        dead = sorted((s for s, verdict in self.verdicts.items() if verdict.sealed is False), reverse=True)
        old_ones = [s for s in self.verdicts if self.protected is not None and s < self.protected]
        for snapshot in {*dead[DEAD:], *old_ones}:
            if snapshot != self.flushing:
                del self.verdicts[snapshot]

    def _name_encoding(self, state: ClusterState) -> None:
        """The restore point first, then the newest that is sealed; one until it is protected or given up."""

        def is_open(snapshot: SnapshotId | None) -> bool:
            verdict = None if snapshot is None else self.verdicts.get(snapshot)
            return verdict is not None and bool(verdict.sealed) and verdict.parity is None

        point = self.verdicts.get(state.point) if state.continued and state.point is not None else None
        if point is not None and point.parity is None:
            self.encoding = newer(self.encoding, state.point if point.sealed else None)
        elif not is_open(self.encoding):
            self.encoding = newer(self.encoding, max(filter(is_open, self.verdicts), default=None))

    def _name_flush(self) -> None:
        running = self.flushing is not None and (self.ended is None or self.ended < self.flushing)
        newest = max((s for s, verdict in self.verdicts.items() if verdict.sealed), default=None)
        if self.flush_wanted and not running and newest is not None:
            if self.ended is None or newest > self.ended:
                self.flushing = newest
            self.flush_wanted = False

    def _grant(self, state: ClusterState, up: Facts) -> None:
        assert state.epoch is not None
        assert state.membership is not None
        if self.cadence is None or not up.ready or up.boundary < 0 or up.heard < len(state.membership.arenas):
            return
        waiting = [s for s, v in self.verdicts.items() if v.sealed is None and s.epoch == state.epoch]
        step = self.cadence.next_step(up.boundary, self.granted)
        if len(waiting) >= min(PIPELINE, state.membership.slots - 1) or step > up.boundary + self.cadence.lead + 1:
            return
        self.granted = step
        snapshot = SnapshotId(state.epoch, step)
        self.verdicts[snapshot] = Entry(snapshot)
