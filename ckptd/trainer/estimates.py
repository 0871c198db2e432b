"""How long a step takes, and what a snapshot adds to that: robust estimates from noisy times. Pure arithmetic.

Two things are measured: what the training thread waits for a capture, and by how much steps beside a capture are slower
than others. The latter is taken where the two kinds meet, each step against the ones of the other kind just before it,
so that what drifts with time (longer sequences, a busy neighbour) cancels out; and it counts only where it can be told
from noise. Outliers move little: in means they count as three times the median, and of differences the median is taken.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Collection

STEPS, STALLS, NEIGHBOURS = 32, 16, 8
DIFFERENCES = 128
"""Recent steps, captures, steps of one kind to compare one of the other with, and such comparisons."""

LEAST_NEIGHBOURS, LEAST_DIFFERENCES = 3, 8
OUTLIER = 3.0
SIGNIFICANT = 3.0
"""Standard errors that a difference must have."""


class Estimates:
    """See the module docstring. All in seconds."""

    def __init__(self) -> None:
        self._steps: collections.deque[float] = collections.deque(maxlen=STEPS)
        self._stalls: collections.deque[float] = collections.deque(maxlen=STALLS)
        self._kinds: tuple[collections.deque[float], collections.deque[float]] = (
            collections.deque(maxlen=NEIGHBOURS),
            collections.deque(maxlen=NEIGHBOURS),
        )
        self._differences: collections.deque[float] = collections.deque(maxlen=DIFFERENCES)
        self._last: bool | None = None
        self._slowdown: float | None = 0.0

    def step(self, seconds: float, beside: bool) -> None:
        """A step took so long, without what was waited for in it. `beside`: it began with a capture."""
        others = self._kinds[not beside]
        if beside != self._last and len(others) >= LEAST_NEIGHBOURS:
            difference = seconds - statistics.median(others)
            self._differences.append(difference if beside else -difference)
            self._slowdown = None
        self._last = beside
        self._kinds[beside].append(seconds)
        self._steps.append(seconds)

    def stall(self, seconds: float) -> None:
        """A capture held the training thread up for so long."""
        self._stalls.append(seconds)

    @property
    def step_s(self) -> float:
        """A step; 0 before the first one."""
        return usual(self._steps)

    @property
    def slowdown_s(self) -> float:
        """By how much a step beside a capture is slower, as far as that can be told."""
        if self._slowdown is None:
            self._slowdown = _significant(self._differences)
        return self._slowdown

    @property
    def cost_s(self) -> float | None:
        """What a capture costs the loop; None before the first one."""
        return usual(self._stalls) + self.slowdown_s if self._stalls else None


def usual(values: Collection[float]) -> float:
    """The mean, in which nothing counts for more than OUTLIER times the median; 0 of none."""
    if not values:
        return 0.0
    most = OUTLIER * statistics.median(values)
    return sum(min(value, most) for value in values) / len(values)


def _significant(differences: Collection[float]) -> float:
    """The median, if it is above 0 by enough."""
    if len(differences) < LEAST_DIFFERENCES:
        return 0.0
    middle = statistics.median(differences)
    spread = 1.4826 * statistics.median([abs(difference - middle) for difference in differences])
    error = 1.2533 * spread / math.sqrt(len(differences))
    return middle if middle > SIGNIFICANT * error else 0.0
