"""Which snapshot is made durable, where and when: the root's part of flushing. Pure.

One flush runs at a time, always of the newest sealed snapshot; each has a number, and ends once. A root that starts
again learns the newest flush, and the last one that has ended, from the members.
"""

from __future__ import annotations

from collections.abc import Collection

from ckptd.core.types import SnapshotId
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.cluster.facts import Entry
from ckptd.protocol.cluster.messages import Facts
from ckptd.protocol.cluster.standing import Flush, Outcome, Wish
from ckptd.protocol.messages import Policy


class Flushing:
    """See the module docstring. `flush`: the newest; `last`: how the last one ended, if any did."""

    def __init__(self, policy: Policy | None, cadence: Cadence | None, durable: SnapshotId | None) -> None:
        """`durable`: what the members know to be in the job's own store."""
        self.flush: Flush | None = None
        self.last: Outcome | None = None
        self._policy, self._cadence = policy, cadence
        self._durable = durable
        self._written = False

    @property
    def ended(self) -> int:
        """The number of the last flush that has ended."""
        return 0 if self.last is None else self.last.flush.number

    @property
    def running(self) -> Flush | None:
        """The flush under way."""
        return self.flush if self.flush is not None and self.flush.number > self.ended else None

    def is_writing(self, snapshot: SnapshotId) -> bool:
        """It is being made durable."""
        return self.running is not None and self.running.snapshot == snapshot

    def hear(self, up: Facts, complete: bool) -> None:
        """What all have said of it. `complete`: really all."""
        if up.flush is not None and (self.flush is None or up.flush.number > self.flush.number):
            self.flush = up.flush
        if up.last is not None and up.last.flush.number > self.ended:
            self._end(up.last)
        failed, running = up.standing.failed, self.running
        if running is not None and failed is not None and failed.number == running.number:
            self._end(Outcome(running, failed.error))
        running = self.running
        self._written = complete and running is not None and up.standing.written >= running.number

    def to_commit(self) -> Flush | None:
        """The flush of which all nodes have written their files."""
        return self.running if self._written else None

    def end(self, number: int, error: str | None) -> None:
        """COMMIT is in the store, or cannot be."""
        if self.running is not None and self.running.number == number:
            self._end(Outcome(self.running, error))

    def name(self, newest: Entry, wishes: Collection[Wish], now_s: float) -> None:
        """Begins the next flush, if one is wished for, or due; `newest`: the newest sealed snapshot."""
        if self.running is not None or self._policy is None:
            return
        own, step = self._policy.store, newest.step or 0
        wished = [wish.store for wish in wishes if wish.after >= self.ended and wish.snapshot <= newest.snapshot]
        store = wished[0] if wished else own if self._is_due(newest, step, now_s) else None
        if store is None:
            return
        number = 1 if self.flush is None else self.flush.number + 1
        self.flush = Flush(number, newest.snapshot, step, store, self._policy.keep if store == own else None)
        if self._cadence is not None and store == own:
            self._cadence.flushed(step, now_s)

    def _is_due(self, newest: Entry, step: int, now_s: float) -> bool:
        """By cadence; what is durable, or has failed, is not tried again."""
        assert self._policy is not None
        own, name = self._policy.store, SnapshotId(newest.snapshot.epoch, step)
        failed = self.last is not None and self.last.error is not None and self.last.flush.store == own
        if failed and self.last is not None and self.last.flush.snapshot == newest.snapshot:
            return False
        if own is None or self._cadence is None or (self._durable is not None and self._durable >= name):
            return False
        return self._cadence.flush_due(step, now_s)

    def _end(self, outcome: Outcome) -> None:
        self.last = outcome
        own = self._policy is not None and outcome.flush.store == self._policy.store
        if own and outcome.error is None:
            self._durable = SnapshotId(outcome.flush.snapshot.epoch, outcome.flush.step)
