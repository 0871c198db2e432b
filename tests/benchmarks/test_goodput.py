"""Goodput: what failures cost by the events of a job, and one small job that is really killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import goodput as command
from benchmarks.goodput_report import Event, Failure, Kill, failures, goodput, markdown, schedule

JOB = [
    Event(1.0, "resumed", 0),
    *(Event(1.0 + step, "step", step) for step in range(1, 8)),
    Event(8.5, "killed"),
    Event(10.0, "resumed", 5),
    Event(11.0, "step", 6),
    Event(12.0, "step", 7),
    Event(12.5, "stopped", 7),
]


def test_a_failure_costs_steps_and_a_pause() -> None:
    assert failures(JOB) == [Failure(8.5, lost=2, next_step_s=2.5)]


def test_a_job_killed_while_it_resumes_loses_its_steps_once() -> None:
    events = [*JOB[:9], Event(9.0, "killed"), *JOB[9:]]
    assert failures(events) == [Failure(8.5, 2, 2.5), Failure(9.0, 0, 2.0)]


def test_a_failure_after_which_nothing_came() -> None:
    assert failures(JOB[:9]) == [Failure(8.5, None, None)]


def test_a_step_counts_once_however_often_it_was_trained() -> None:
    found = goodput("x", JOB, calm_step_s=1.0, wrong_bytes=0)
    assert (found.useful_steps, found.trained_steps, found.kills) == (7, 9, 1)
    assert found.steps_per_hour == pytest.approx(7 / 12.5 * 3600)
    assert found.useful_share == pytest.approx(7 / 12.5)
    assert (found.lost_per_failure, found.next_step_s) == (2.0, 2.5)
    text = markdown(["machine"], [found], {"other": "no such module"})
    assert "| x | 2016 | 56% | 7 | 9 | 2.0 | 2.5 | 0 |" in text
    assert "- other: no such module" in text


def test_the_schedule_is_the_seeds() -> None:
    found = schedule(3, seconds=120, kills=6, ranks=2, node_losses=2)
    assert found == schedule(3, seconds=120, kills=6, ranks=2, node_losses=2)
    assert found != schedule(4, seconds=120, kills=6, ranks=2, node_losses=2)
    assert sum(kill.node for kill in found) == 2
    assert all(number * 20 < kill.at_s < (number + 1) * 20 for number, kill in enumerate(found))
    assert schedule(3, 120, 0, 2) == []
    assert {kill.rank for kill in schedule(3, 120, 30, 2)} == {0, 1}


@pytest.mark.slow
def test_a_job_that_is_killed_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill comes when some steps are done, whatever the machine takes for them; and nothing is left behind."""
    monkeypatch.setattr(command, "planned", lambda options: [Kill(options.minutes * 30, rank=1)])
    sizes = ["--state", "3M", "--context", "16", "--batch", "1", "--flush-every", "5"]
    status = command.main([*sizes, "--minutes", "0.2", "--only", "ckptd", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "goodput.json").read_text())
    assert record["failures"] == {}
    (row,) = record["rows"]
    assert status == 0
    assert (row["wrong_bytes"], row["kills"]) == (0, 1)
    assert 0 < row["useful_steps"] <= row["trained_steps"] + 1  # killed when a step was captured but not yet told
    assert max(0, row["trained_steps"] - row["useful_steps"]) == row["lost_per_failure"]
    assert row["seconds"] >= 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goodput.json", "goodput.md", "goodput.svg"]
