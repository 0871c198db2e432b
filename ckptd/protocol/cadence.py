"""When to capture and when to flush: arithmetic on steps and measured costs; no clock of its own.

Grants are issued a number of steps ahead (`lead`), so that every rank has heard of a grant before it reaches the step.
A grant that comes late doubles the lead; a run of snapshots in time halves it again, since with a long lead snapshots
are rare: with one of a step every step can be captured into two slots, of which one holds the snapshot before.

`snapshot_every="auto"` takes the shortest interval that keeps what captures are measured to cost within the budget. It
shrinks at once and at most doubles with each capture: one bad measurement is followed by a better one soon. Where every
step could be captured, one in so many is not, so that steps without a capture are seen beside those with one.
"""

from __future__ import annotations

import math

from ckptd.protocol.messages import Policy

LEAD, LEAST_LEAD, MAX_LEAD = 2, 1, 1024
SEALS_IN_TIME = 16
"""After so many seals without a late grant, half the lead is tried: at worst one snapshot in seventeen is lost."""

SEALS_AT_FIRST = 4
"""The same before any grant has been late: most steps are long enough."""

AIM = 0.9
"""Of the budget: what is left is for costs that vary."""

CALM_EVERY, CALM_AT = 32, 17
"""Of so many steps in a row, the one that is not captured."""

MAX_INTERVAL = 10**6
"""Of `snapshot_every="auto"`: however expensive a capture was, it is tried again one day."""


class Cadence:
    """Decides the next step to grant, and whether a sealed step is due to be flushed."""

    def __init__(self, policy: Policy, started_at: int) -> None:
        """`started_at`: the step that the epoch was restored at, counted as flushed."""
        self._policy = policy
        self._flushed_step = started_at
        self._flushed_s: float | None = None
        self._in_time, self._enough = 0, SEALS_AT_FIRST
        self._wanted = 1
        self.lead: int = LEAD
        self.interval = policy.snapshot_steps or 1

    def observe(self, cost: float) -> None:
        """A capture costs the loop this share of a step, by what all ranks have measured."""
        if self._policy.snapshot_steps is None and math.isfinite(cost):
            allowed = AIM * self._policy.overhead_budget
            self._wanted = max(1, math.ceil(min(cost / allowed, MAX_INTERVAL)))
            self.interval = min(self.interval, self._wanted)

    def late(self) -> None:
        """A grant reached a rank after its step."""
        self.lead = min(2 * self.lead, MAX_LEAD)
        self._in_time, self._enough = 0, SEALS_IN_TIME

    def sealed(self) -> None:
        """Every rank heard of a grant in time, and has captured."""
        self._widen()
        self._in_time += 1
        if self._in_time >= self._enough:
            self.lead = max(self.lead // 2, LEAST_LEAD)
            self._in_time = 0

    def wasted(self) -> None:
        """A grant was not used by all, though heard of in time: it may have cost as much as a snapshot."""
        self._widen()

    def _widen(self) -> None:
        if self._policy.snapshot_steps is None:
            self.interval = min(2 * self.interval, self._wanted)

    def next_step(self, boundary: int, granted: int) -> int:
        """The first step to capture that is `lead` ahead of the furthest `boundary` and after the last `granted`."""
        first = max(boundary + self.lead, granted + 1)
        flush = self._policy.flush_steps
        if self._policy.snapshot_steps is not None:
            return min(_multiple(self.interval, first), _multiple(flush or self.interval, first))
        if flush is None:
            step = max(first, granted + self.interval)
        else:  # evenly from flush to flush, rather than steps to flush on top of the others
            each = -(-flush // max(flush // self.interval, 1))
            step = min(max(first, granted + each), _multiple(flush, first))
        calm = self.interval == 1 and step % CALM_EVERY == CALM_AT and (flush is None or step % flush != 0)
        return step + calm

    def flush_due(self, step: int, now_s: float) -> bool:
        """Whether a snapshot of `step`, the newest sealed one, should be flushed."""
        if self._policy.flush_steps is not None:
            return step // self._policy.flush_steps > self._flushed_step // self._policy.flush_steps
        if self._policy.flush_s is not None:
            if self._flushed_s is None:
                self._flushed_s = now_s
            return now_s - self._flushed_s >= self._policy.flush_s
        return False

    def flushed(self, step: int, now_s: float) -> None:
        """A flush of `step` begins."""
        self._flushed_step, self._flushed_s = step, now_s


def _multiple(of: int, least: int) -> int:
    return -(-least // of) * of
