"""The work that protects: seal records to the group, encoding, rebuilding, scrubbing. Part of the member machine; pure.

Owns what runs at the moment, which a new daemon begins again. One of each kind of work runs at a time. Whatever fails
waits for `repeat`, so that a failure does not spin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ckptd.core.types import SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Entry, Part
from ckptd.protocol.cluster.state import ClusterState, Holding

Kind = Literal["describe", "encode", "rebuild"]


@dataclasses.dataclass
class Work:
    """See the module docstring. `acknowledged`: snapshot -> members that hold its seal record from here."""

    describing: SnapshotId | None = None
    encoding: SnapshotId | None = None
    rebuilding: SnapshotId | None = None
    verifying: tuple[SnapshotId, Part] | None = None
    acknowledged: dict[SnapshotId, set[int]] = dataclasses.field(default_factory=dict)
    _offered: set[SnapshotId] = dataclasses.field(default_factory=set)
    _failed: set[tuple[Kind, SnapshotId]] = dataclasses.field(default_factory=set)
    _failures: dict[SnapshotId, int] = dataclasses.field(default_factory=dict)
    _scrubbed: tuple[SnapshotId, str] | None = None

    def repeat(self) -> None:
        """Time for what has failed, and for what may not have arrived."""
        self._failed.clear()
        self._offered.clear()

    def forget(self, snapshot: SnapshotId) -> None:
        """It is freed: whatever worked on it has been stopped."""
        if self.encoding == snapshot:
            self.encoding = None
        if self.describing == snapshot:
            self.describing = None
        if self.rebuilding == snapshot:
            self.rebuilding = None
        if self.verifying is not None and self.verifying[0] == snapshot:
            self.verifying = None
        self.acknowledged.pop(snapshot, None)
        self._failures.pop(snapshot, None)

    def fails(self, work: Kind, snapshot: SnapshotId) -> int:
        """What runs has failed, and is begun again after a pause. How often work on the snapshot has failed so far."""
        if work == "describe":
            self.describing = None
        elif work == "encode":
            self.encoding = None
        else:
            self.rebuilding = None
        self._failed.add((work, snapshot))
        self._failures[snapshot] = failures = self._failures.get(snapshot, 0) + 1
        return failures

    def due(
        self, state: ClusterState, verdicts: dict[SnapshotId, Entry], named: SnapshotId | None
    ) -> Iterator[m.MemberAction]:
        """What is to be begun now. `named`: what the root wants to be encoded."""
        for holding in state.holdings:
            if not state.is_current(holding.snapshot):
                continue
            verdict = verdicts.get(holding.snapshot)
            if verdict is not None and verdict.sealed and holding.shape.parity:
                yield from self._offer_record(state, holding)
            if self._may_rebuild(state, holding):
                self.rebuilding = holding.snapshot
                yield m.Rebuild(holding.snapshot)
            wanted = holding.snapshot == named and verdict is not None and verdict.sealed and holding.parity is None
            if wanted and self._may_describe(holding):
                self.describing = holding.snapshot
                yield m.Describe(holding.snapshot)
            if (wanted or holding.parity) and self._may_encode(holding):
                if holding.area is None:
                    holding.area = state.free_area()
                if holding.area is not None:
                    self.encoding = holding.snapshot
                    yield m.Encode(holding.snapshot, holding.area)

    def due_at_guest(self, state: ClusterState) -> Iterator[m.Describe]:
        """Who copies a string of the restore point from a guest needs its record, which is made only of what the root
        of its epoch had named."""
        for holding in state.holdings:
            if holding.snapshot == state.point and self._may_describe(holding):
                self.describing = holding.snapshot
                yield m.Describe(holding.snapshot)

    def has_all_records_out(self, state: ClusterState, holding: Holding) -> bool:
        """Every other member of the group holds the seal record."""
        assert state.number is not None
        others = set(holding.shape.group_of(state.number)) - {state.number}
        return others <= self.acknowledged.get(holding.snapshot, set())

    def scrub(self, state: ClusterState) -> m.Verify | None:
        """The next string or parity to verify, in turn."""
        if self.verifying is not None:
            return None
        parts: list[tuple[SnapshotId, Part]] = []
        for holding in state.holdings:
            if holding.data:
                parts.append((holding.snapshot, "data"))
            if holding.encoded and holding.area is not None:
                parts.append((holding.snapshot, "parity"))
        parts.sort()
        if not parts:
            return None
        after = (part for part in parts if self._scrubbed is not None and part > self._scrubbed)
        self.verifying = self._scrubbed = next(after, parts[0])
        return m.Verify(*self.verifying)

    def verified(self, holding: Holding, part: Part, intact: bool) -> None:
        """What is damaged counts as lacking until it is whole again. Facts stand."""
        if self.verifying != (holding.snapshot, part):
            return
        self.verifying = None
        if not intact and part == "data":
            holding.data = False
        elif not intact:
            holding.encoded = False

    def _offer_record(self, state: ClusterState, holding: Holding) -> Iterator[m.Tell]:
        assert state.number is not None
        assert state.membership is not None
        record = holding.records.get(state.number)
        if record is None or holding.snapshot in self._offered:
            return
        self._offered.add(holding.snapshot)
        assert state.epoch is not None
        for number in holding.shape.group_of(state.number):
            if number != state.number and number not in self.acknowledged.get(holding.snapshot, set()):
                message = m.SealRecord(state.epoch, state.number, holding.snapshot, record)
                yield m.Tell(state.membership.arenas[number], message)

    def _may_rebuild(self, state: ClusterState, holding: Holding) -> bool:
        lost = holding.sealed or (holding.sealed is None and holding.snapshot == state.point)
        failed = ("rebuild", holding.snapshot) in self._failed
        return bool(lost) and not (holding.data or holding.capturing or failed) and self.rebuilding is None

    def _may_describe(self, holding: Holding) -> bool:
        """Only what is to be encoded or copied needs a record: making it reads the whole string."""
        wanted = holding.shape.parity > 0 and holding.data and holding.string not in holding.records
        return wanted and self.describing is None and ("describe", holding.snapshot) not in self._failed

    def _may_encode(self, holding: Holding) -> bool:
        """Parity is of use only to who has the seal records of its whole group: they say what comes out of decoding."""
        if holding.shape.parity == 0 or holding.encoded or self.encoding is not None:
            return False
        known = holding.records.keys() >= set(holding.shape.group_of(holding.string))
        return known and ("encode", holding.snapshot) not in self._failed
