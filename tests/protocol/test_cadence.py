"""Which step is granted next, and when a flush is due."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ckptd.protocol.cadence import LEAD, MAX_INTERVAL, MAX_LEAD, SEALS_IN_TIME, Cadence
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
    assert made.lead == LEAD


def test_the_interval_keeps_the_stall_within_the_budget() -> None:
    """1 % of the time: a stall of 0.5 s with steps of 1 s comes every 50 steps."""
    made = cadence(snapshot_steps=None)
    assert made.interval == 1
    made.observe(0.5, 1.0)
    assert made.interval == 50
    made.observe(0.0, 1.0)
    assert made.interval == 1


@pytest.mark.parametrize("stall_s", [0.0, 1e-300, 1.0, 1e308, math.inf, math.nan])
@pytest.mark.parametrize("step_s", [0.0, 5e-324, 1.0, 1e308, math.inf, math.nan])
def test_no_measurement_breaks_it(stall_s: float, step_s: float) -> None:
    """Clocks stand still, jump, and lie."""
    made = cadence(snapshot_steps=None, overhead_budget=1e-9)
    made.observe(stall_s, step_s)
    assert 1 <= made.interval <= MAX_INTERVAL


def test_a_fixed_interval_is_fixed() -> None:
    """Measurements change nothing."""
    made = cadence(snapshot_steps=10)
    made.observe(100.0, 1.0)
    assert made.interval == 10


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
