"""Figures of the benchmark tables from made-up outcomes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.launch import Outcome
from benchmarks.report import COLUMNS, markdown, row

GIGABYTE = 10**9


def rank(stalls: list[float], *, loaded: bool = True, load_s: float = 1.0) -> dict[str, Any]:
    saves = [
        {"stall_s": stall, "sealed_s": stall + 1, "durable_s": stall + 2, "lost_s": 2 * stall, "steps": 4}
        for stall in stalls
    ]
    return {
        "saves": saves,
        "calm_step_s": 0.5,
        "cold_load_s": 2 * load_s,
        "load_s": load_s,
        "load_from_memory_s": None,
        "loaded": loaded,
        "disk_bytes": 7,
        "local_bytes": GIGABYTE,
        "memcpy_s": 0.2,
    }


def outcome(*ranks: dict[str, Any], training: int = GIGABYTE, peak: int = 3 * GIGABYTE) -> Outcome:
    return Outcome(list(ranks), training, peak)


def test_a_save_takes_as_long_as_its_slowest_rank() -> None:
    found = row("x", [outcome(rank([0.1, 0.5]), rank([0.3, 0.2]))])
    assert (found.stall_s.least, found.stall_s.greatest, found.saves) == (0.3, 0.5, 2)
    assert found.state_bytes == 2 * GIGABYTE
    assert found.lost_s_per_gb.greatest == pytest.approx(0.5)


def test_memory_is_a_multiple_of_the_state_of_all_ranks() -> None:
    found = row("x", [outcome(rank([0.1]), rank([0.1]))])
    assert (found.peak_multiple.median, found.extra_multiple.median) == (1.5, 1.0)


def test_rounds_are_pooled() -> None:
    found = row("x", [outcome(rank([0.1], load_s=1.0)), outcome(rank([0.3], load_s=5.0)), outcome(rank([0.2]))])
    assert found.stall_s.median == pytest.approx(0.2)
    assert (found.load_s.median, found.load_s.greatest) == (1.0, 5.0)


def test_one_rank_that_loads_other_bytes_marks_the_row() -> None:
    found = row("x", [outcome(rank([0.1]), rank([0.1], loaded=False))])
    assert not found.loaded
    assert "x (LOADED OTHER BYTES)" in markdown("title", ["machine"], [found])


def test_only_some_can_load_from_memory() -> None:
    fast = {**rank([0.1]), "load_from_memory_s": 0.25}
    assert row("x", [outcome(rank([0.1]))]).load_from_memory_s is None
    found = row("x", [outcome(fast, {**fast, "load_from_memory_s": 0.5})]).load_from_memory_s
    assert found is not None
    assert found.median == 0.5


def test_the_table_is_whole() -> None:
    text = markdown("title", ["machine"], [row(name, [outcome(rank([0.1]))]) for name in ("one", "two")])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
