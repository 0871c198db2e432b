"""Figures of the benchmark tables from made-up outcomes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.launch import Outcome, reason
from benchmarks.report import COLUMNS, Row, markdown, row

GIGABYTE = 10**9
STEPS, CALM_STEPS = 10, 5


def rank(step_s: float = 1.0, **figures: Any) -> dict[str, Any]:
    return {
        "step_s": step_s,
        "calm_step_s": 0.5,
        "stall_s": 0.1,
        "worst_stall_s": 0.2,
        "saves": 10,
        "kept": 10,
        "durable_s": [2.0],
        "cold_load_s": 2.0,
        "load_s": 1.0,
        "load_from_memory_s": None,
        "loaded": True,
        "disk_bytes": 7,
        "local_bytes": GIGABYTE,
        **figures,
    }


def outcome(*ranks: dict[str, Any], cpu_s: float = 20.0) -> Outcome:
    """`cpu_s` in the steps with the contender; one second in each without."""
    peaks = {"warm": 0, "calm": GIGABYTE, "ready": 3 * GIGABYTE, "trained": 2 * GIGABYTE, "closed": 0, "calm again": 0}
    used = {"warm": 1.0, "calm": 6.0, "ready": 10.0, "trained": 10.0 + cpu_s, "closed": 50.0, "calm again": 55.0}
    return Outcome(list(ranks), peaks, used)


def figures(*outcomes: Outcome, name: str = "x") -> Row:
    return row(name, outcomes, STEPS, CALM_STEPS)


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    found = figures(outcome(rank(1.0), rank(2.0)))
    assert (found.step_s.median, found.throughput.median, found.overhead_s.median) == (2.0, 0.25, 1.5)
    assert found.state_bytes == 2 * GIGABYTE


def test_cpu_time_is_what_is_above_as_many_calm_steps() -> None:
    assert figures(outcome(rank(), cpu_s=20.0)).cpu_s_per_save.median == pytest.approx(1.0)
    assert figures(outcome(rank(saves=1), cpu_s=20.0)).cpu_s_per_save.median == pytest.approx(10.0)
    assert figures(outcome(rank(saves=0), cpu_s=10.0)).cpu_s_per_save.median == pytest.approx(0.0)


def test_memory_is_a_multiple_of_the_state_of_all_ranks() -> None:
    found = figures(outcome(rank(), rank()))
    assert (found.peak_multiple.median, found.extra_multiple.median) == (1.5, 1.0)


def test_a_step_survives_if_every_rank_kept_it() -> None:
    assert figures(outcome(rank(kept=10), rank(kept=9))).kept_share.median == pytest.approx(0.9)


def test_rounds_are_pooled() -> None:
    found = figures(*(outcome(rank(step_s, durable_s=[step_s, 9.0])) for step_s in (1.0, 5.0, 2.0)))
    assert (found.step_s.median, found.step_s.least, found.step_s.greatest, found.trials) == (2.0, 1.0, 5.0, 3)
    assert found.durable_s is not None
    assert (found.durable_s.least, found.durable_s.greatest) == (1.0, 9.0)


def test_one_rank_that_loads_other_bytes_marks_the_row() -> None:
    found = figures(outcome(rank(), rank(loaded=False)))
    assert not found.loaded
    assert "x (LOADED OTHER BYTES)" in markdown("title", ["machine"], [found], {}, 10)


def test_the_table_is_whole_and_compares_with_memcpy() -> None:
    rows = [figures(outcome(rank(step_s)), name=name) for name, step_s in (("memcpy", 0.7), ("other", 1.5))]
    rows.append(figures(outcome(rank(), rank()), name="other"))
    text = markdown("title", ["machine"], rows, {"missing": "no such module"}, 10)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 7
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert table[3].split("|")[4].strip() == "5.0"
    assert table[6].split("|")[4].strip() == ""
    assert "- missing: no such module" in text


def test_the_reason_is_the_error_that_was_raised() -> None:
    assert reason("rank 0 ended before 'calm'\n  File x\nModuleNotFoundError: No module named 'y'\n  warned") == (
        "rank 0 ended before 'calm': ModuleNotFoundError: No module named 'y'"
    )
    assert reason("no such contender") == "no such contender"
