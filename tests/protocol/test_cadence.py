"""Which step is granted next, and when a flush is due."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ckptd.protocol.cadence import (
    AIM,
    CALM_AT,
    CALM_EVERY,
    LEAD,
    LEAST_LEAD,
    MAX_INTERVAL,
    MAX_LEAD,
    SEALS_AT_FIRST,
    SEALS_IN_TIME,
    Cadence,
)
from ckptd.protocol.messages import Policy
from tests.protocol.transcript import POLICY


def cadence(started_at: int = 0, **policy: Any) -> Cadence:
    """With the given options."""
    return Cadence(msgspec.convert(POLICY | policy, Policy), started_at)


@pytest.mark.parametrize(
    ("interval", "flush", "boundary", "granted", "expected"),
    [
        (1, None, 10, 0, 12),
        (1, None, 10, 12, 13),
        (5, None, 10, 0, 15),
        (5, None, 13, 0, 15),
        (5, None, 14, 0, 20),
        (100, 30, 10, 0, 30),
        (100, 30, 80, 0, 90),
        (100, 30, 90, 0, 100),
        (7, None, 10**17, 0, 100000000000000002 + (-100000000000000002) % 7),
    ],
)
def test_next_step(interval: int, flush: int | None, boundary: int, granted: int, expected: int) -> None:
    """The first multiple of the interval, or a step to flush, that is ahead enough; exact for any step."""
    made = cadence(snapshot_steps=interval, flush_steps=flush)
    assert made.next_step(boundary, granted) == expected


def test_late_grants_come_earlier() -> None:
    """The lead doubles, to a limit."""
    made = cadence()
    made.late()
    assert made.next_step(10, 0) == 10 + 2 * LEAD
    for _ in range(100):
        made.late()
    assert made.lead == MAX_LEAD


def test_lead_shrinks_when_all_is_well() -> None:
    """With a long lead two snapshots in so many steps are all there is: one stall of the daemon must not do that for
    good. A late grant starts the count anew."""
    made = cadence()
    for _ in range(3):
        made.late()
    for _ in range(SEALS_IN_TIME - 1):
        made.sealed()
    made.late()
    assert made.lead == 16 * LEAD
    for _ in range(SEALS_IN_TIME):
        made.sealed()
    assert made.lead == 8 * LEAD
    for _ in range(100 * SEALS_IN_TIME):
        made.sealed()
    assert made.lead == LEAST_LEAD


def test_the_least_lead_is_tried_soon() -> None:
    """Two slots hold every step then; who is too fast for it is so once."""
    made = cadence()
    for _ in range(SEALS_AT_FIRST):
        assert made.next_step(10, 0) == 10 + LEAD
        made.sealed()
    assert made.next_step(10, 0) == 11
    made.late()
    for _ in range(SEALS_IN_TIME - 1):
        made.sealed()
    assert made.next_step(10, 0) == 10 + LEAD


def captured(made: Cadence, cost: float, times: int = 1) -> None:
    """Snapshots that are sealed, each of which has cost a share of a step."""
    for _ in range(times):
        made.observe(cost)
        made.sealed()


def test_the_interval_keeps_the_cost_within_the_budget() -> None:
    """1 % of the time, of which some is left for what varies: half a step every 56 steps."""
    made = cadence(snapshot_steps=None)
    assert made.interval == 1
    captured(made, 0.5, times=10)
    assert made.interval == math.ceil(0.5 / (AIM * 0.01))
    captured(made, 0.0)
    assert made.interval == 1


def test_one_outlier_is_followed_by_a_better_measurement_soon() -> None:
    """A first capture that took a thousand steps' time does not put the second one off for a hundred thousand steps."""
    made = cadence(snapshot_steps=None)
    captured(made, 1000.0)
    assert made.interval == 2
    captured(made, 1000.0, times=3)
    assert made.interval == 16
    made.observe(0.001)
    assert made.interval == 1


def test_snapshots_in_vain_count_as_much() -> None:
    """A copy that is given up has held the loop: what is never sealed must become rare as well. A grant that came too
    late has cost nothing."""
    made = cadence(snapshot_steps=None)
    made.observe(1.0)
    made.late()
    assert made.interval == 1
    for _ in range(20):
        made.wasted()
    assert made.interval == math.ceil(1.0 / (AIM * 0.01))


@pytest.mark.parametrize("cost", [0.0, 5e-324, 1.0, 1e308, math.inf, math.nan])
def test_no_measurement_breaks_it(cost: float) -> None:
    """Clocks stand still, jump, and lie."""
    made = cadence(snapshot_steps=None, overhead_budget=1e-9)
    captured(made, cost, times=100)
    assert 1 <= made.interval <= MAX_INTERVAL


def test_a_fixed_interval_is_fixed() -> None:
    """Measurements change nothing, and no step is left out."""
    made = cadence(snapshot_steps=10)
    captured(made, 100.0, times=10)
    assert made.interval == 10
    every = cadence(snapshot_steps=1)
    assert [every.next_step(step, 0) for step in range(100)] == [step + LEAD for step in range(100)]


def granted(made: Cadence, steps: int) -> list[int]:
    """The steps that are granted while so many are done."""
    found: list[int] = []
    for boundary in range(steps):
        found.append(made.next_step(boundary, found[-1] if found else 0))
    return sorted({step for step in found if step <= steps})


def test_some_steps_are_left_out_to_compare_with() -> None:
    """Where all might be captured, one in so many is not; but a step that is to be flushed always is."""
    free = granted(cadence(snapshot_steps=None), 10 * CALM_EVERY)
    assert [step for step in range(2, 10 * CALM_EVERY) if step not in free] == [
        CALM_AT + CALM_EVERY * number for number in range(10)
    ]
    assert CALM_AT in granted(cadence(snapshot_steps=None, flush_steps=CALM_AT), 100)


@pytest.mark.parametrize(
    ("cost", "flush", "interval"), [(2.0, 500, 250), (2.9, 500, 500), (1.4, 500, 167), (9.0, 500, 500)]
)
def test_snapshots_to_flush_are_not_added_to_the_others(cost: float, flush: int, interval: int) -> None:
    """They are among them, or the budget would be kept twice; what is asked for with flush_every comes in any case."""
    made = cadence(snapshot_steps=None, flush_steps=flush)
    captured(made, cost, times=20)
    found = granted(made, 5 * flush)
    assert {flush * number for number in range(1, 6)} <= set(found)
    gaps = {later - earlier for earlier, later in zip(found, found[1:], strict=False)}
    assert max(gaps) == interval
    assert min(gaps) >= interval - 2


def test_flushes_by_steps() -> None:
    """Due with the first snapshot at or after each multiple since the last flush."""
    made = cadence(started_at=450, flush_steps=100)
    assert not made.flush_due(499, 0.0)
    assert made.flush_due(500, 0.0)
    assert made.flush_due(503, 0.0)
    made.flushed(503, 0.0)
    assert not made.flush_due(599, 0.0)
    assert made.flush_due(600, 0.0)


def test_flushes_by_time() -> None:
    """From the first snapshot on."""
    made = cadence(flush_s=60.0)
    assert not made.flush_due(1, 1000.0)
    assert not made.flush_due(2, 1059.0)
    assert made.flush_due(3, 1060.0)
    made.flushed(3, 1060.0)
    assert not made.flush_due(4, 1119.0)
    assert made.flush_due(5, 1120.0)


def test_without_a_rule_nothing_is_due() -> None:
    """Flushes happen on request, and at the end."""
    assert not cadence().flush_due(10**6, 1e9)
