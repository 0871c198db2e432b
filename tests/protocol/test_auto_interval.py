"""`snapshot_every="auto"` in simulated loops: ranks measure, the root decides, and what the loop really loses is
compared with the budget. Times are drawn, nothing waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from ckptd.protocol.cadence import Cadence
from ckptd.trainer.estimates import DIFFERENCES, Estimates, usual
from tests.protocol.test_cadence import cadence

STEPS = 12_000
Times = Callable[[random.Random, int], float]


class Loop:
    """Ranks that wait for each other at the end of each step. Costs are in steps: `stall` is drawn for each rank and
    capture, `slowdown` is of the step beside it, `noise` of all steps, `step` may drift."""

    def __init__(
        self,
        stall: Times,
        slowdown: float = 0.0,
        noise: float = 0.05,
        ranks: int = 1,
        step: Callable[[int], float] = lambda number: 1.0,
        **policy: Any,
    ) -> None:
        self.random = random.Random(1)
        self.stall, self.slowdown, self.noise, self.step = stall, slowdown, noise, step
        self.cadence: Cadence = cadence(snapshot_steps=None, **policy)
        self.ranks = [Estimates() for _ in range(ranks)]
        self.granted: set[int] = set()
        self.newest = 0
        self.captured = self.lost_s = self.total_s = 0.0

    def run(self, steps: int, begin: int = 0) -> float:
        """Share of the time that snapshots took."""
        self.captured = self.lost_s = self.total_s = 0.0
        stalls: list[float] = []
        for boundary in range(begin, begin + steps):
            base = self.step(boundary) * max(0.1, self.random.gauss(1.0, self.noise))
            longest = max(stalls, default=0.0)
            lost = (longest + self.slowdown * self.step(boundary)) if stalls else 0.0
            for rank, estimates in enumerate(self.ranks):
                if stalls:
                    estimates.stall(stalls[rank])
                waits = longest - stalls[rank] + self.slowdown * self.step(boundary) if stalls else 0.0
                estimates.step(base + waits, beside=bool(stalls))
            self.total_s, self.lost_s = self.total_s + base + lost, self.lost_s + lost
            stalls = self.boundary(boundary)
        return self.lost_s / self.total_s

    def boundary(self, step: int) -> list[float]:
        """What each rank waits for a capture at the end of a step; nothing if there is none."""
        costs = [found.cost_s / found.step_s for found in self.ranks if found.cost_s is not None and found.step_s]
        if costs:
            self.cadence.observe(max(costs))
        self.newest = self.cadence.next_step(step, self.newest) if step + 1 >= self.newest else self.newest
        self.granted.add(self.newest)
        if step not in self.granted:
            return []
        self.captured += 1
        self.cadence.sealed()
        return [self.stall(self.random, step) for _ in self.ranks]


def constant(seconds: float) -> Times:
    return lambda source, step: seconds


def varying(seconds: float) -> Times:
    """As measured times do: twice as long now and then, ten times as long rarely."""
    return lambda source, step: seconds * source.lognormvariate(0.0, 0.5)


LOOPS: dict[str, Callable[[], Loop]] = {
    "cheap": lambda: Loop(constant(0.001)),
    "dear": lambda: Loop(constant(0.3)),
    "varying": lambda: Loop(varying(0.1)),
    "noisy steps": lambda: Loop(varying(0.05), noise=0.2),
    "slows the next step": lambda: Loop(constant(0.01), slowdown=0.2),
    "only slows the next step": lambda: Loop(constant(0.0), slowdown=0.1),
    "many ranks": lambda: Loop(varying(0.1), ranks=8, slowdown=0.05),
    "steps grow": lambda: Loop(varying(0.1), step=lambda number: 1.0 + number / 2000),
    "steps shrink": lambda: Loop(varying(0.1), step=lambda number: 5.0 - number / 4000),
    "another budget": lambda: Loop(varying(0.5), overhead_budget=0.05),
    "with flushes": lambda: Loop(varying(0.9), flush_steps=500),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_the_loop_loses_ends_under_the_budget(name: str) -> None:
    """And not under a tenth of it, unless every step is captured already."""
    loop = LOOPS[name]()
    loop.run(STEPS // 3)
    lost = loop.run(STEPS, begin=STEPS // 3)
    budget = loop.cadence._policy.overhead_budget
    assert lost <= budget
    assert lost >= budget / 10 or loop.captured >= 0.95 * STEPS


def test_what_can_be_told_from_noise_is_found() -> None:
    """A slow-down that is small against the noise of a step counts once there are enough steps to tell."""
    loop = Loop(constant(0.0), slowdown=0.04, noise=0.02)
    loop.run(STEPS)
    assert loop.ranks[0].slowdown_s == pytest.approx(0.04, rel=0.3)


def test_noise_is_no_slow_down() -> None:
    """Captures that cost nothing are taken at nearly every step, however much steps differ."""
    loop = Loop(constant(0.0), noise=0.3)
    loop.run(STEPS)
    assert loop.captured >= 0.9 * STEPS


@pytest.mark.parametrize("at", [2, 3, 5, 100, 5000])
def test_an_outlier_is_forgotten(at: int) -> None:
    """One capture that took as long as a thousand steps: soon there are as many snapshots as before."""

    def stall(source: random.Random, step: int) -> float:
        return 1000.0 if at <= step < at + 2 else 0.001

    loop = Loop(stall)
    loop.run(at + 300)
    loop.run(1000, begin=at + 300)
    assert loop.captured >= 950


def test_a_bad_time_is_forgotten() -> None:
    """Another program takes the disk and the cores for an hour; then all is as before."""

    def stall(source: random.Random, step: int) -> float:
        return 2.0 if 1000 <= step < 4000 else 0.002

    loop = Loop(stall)
    loop.run(4000)
    assert loop.cadence.interval > 100
    loop.run(4000, begin=4000)
    loop.run(1000, begin=8000)
    assert loop.captured >= 950


def test_estimates_need_something_to_estimate_from() -> None:
    found = Estimates()
    assert (found.step_s, found.slowdown_s, found.cost_s) == (0.0, 0.0, None)
    for _ in range(2 * DIFFERENCES):
        found.step(1.0, beside=True)
        found.stall(0.1)
    assert found.slowdown_s == 0.0
    assert found.cost_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0.0), ([2.0], 2.0), ([1.0, 3.0], 2.0), ([1.0, 1.0, 1000.0], 5 / 3), ([1.0] * 14 + [9e9, 9e9], 1.25)],
)
def test_the_usual_value(values: list[float], expected: float) -> None:
    assert usual(values) == expected
