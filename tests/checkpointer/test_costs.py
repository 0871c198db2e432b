"""What the loop pays is counted where it is paid: in `statistics()`, and event by event in traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ckptd
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, until

STATE_BYTES = 2 * 15 * 4
"""Of Training: weights, and their momentum."""


def trained(home: Home, steps: int, **options: Any) -> dict[str, Any]:
    """A run that captures at many boundaries, and flushes at the end."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=1, **options) as checkpointer:
        for step in checkpointer.steps():
            training.step()
            if step >= steps and checkpointer.statistics()["snapshots_sealed"] >= 3:
                break
    return checkpointer.statistics()


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("capture", ["eager", "lazy"])
def test_the_parts_make_the_whole(home: Home, capture: str) -> None:
    """Waiting before an optimizer step is paid by the loop like everything at the boundary; lazy bytes are not eager
    ones; CPU seconds are those of this process, of all threads that copy."""
    found = trained(home, 20, capture=capture)
    assert found["stall_s_total"] == found["boundary_s"] + found["before_update_s"]
    assert 0 < found["boundary_s"] < found["elapsed_s"]
    assert found["overhead"] == pytest.approx((found["stall_s_total"] + found["slowdown_s"]) / found["elapsed_s"])
    assert 0 < found["cpu_s"] < found["elapsed_s"] + 1
    assert 0 < found["step_s"] * found["steps"]
    assert (found["before_update_s"] > 0) == (found["bytes_lazy"] > 0) == (capture == "lazy")
    assert found["bytes_captured"] == found["bytes_eager"] + found["bytes_lazy"]
    assert found["bytes_eager" if capture == "eager" else "bytes_lazy"] % STATE_BYTES == 0


def test_a_trace_shows_what_happened_to_each_snapshot(home: Home, tmp_path: Path) -> None:
    """The rank's file: the boundary, the copy, the window, the wait, and what became of it. The daemon's: the flush."""
    folder = tmp_path / "traces"
    found = trained(home, 20, capture="lazy", trace=str(folder))
    rank = events(folder, "rank-0")
    spans = {event["name"] for event in rank if event["ph"] == "X"}
    assert spans == {"boundary", "capture", "window", "before update"}
    moments = [(event["name"], event["args"].get("step")) for event in rank if event["ph"] == "i"]
    last = found["steps"]
    assert {("captured", last), ("sealed", last), ("durable", last)} <= set(moments)
    assert sum(name == "captured" for name, _ in moments) == found["snapshots_captured"]
    assert sum(name == "skipped" for name, _ in moments) == found["snapshots_skipped"]
    windows = [event for event in rank if event["name"] == "window"]
    assert sum(event["args"]["bytes"] for event in windows) == found["bytes_lazy"]
    boundaries = [event for event in rank if event["name"] == "boundary"]
    assert sorted(event["args"]["step"] for event in boundaries) == list(range(1, last + 1))
    assert sum(event["dur"] for event in boundaries) <= 1e6 * found["boundary_s"] + 2 * last
    home.assert_nothing_left()
    (daemon,) = folder.glob("daemon-*.json")
    written = [event for event in events(folder, daemon.stem) if event["ph"] == "X"]
    assert {(event["name"], event["args"].get("step")) for event in written} >= {("write", last), ("commit", last)}


def test_why_a_snapshot_was_skipped_is_in_the_trace(home: Home, tmp_path: Path, monkeypatch: Any) -> None:
    training = Training()
    monkeypatch.setenv("CKPTD_TRACE", str(tmp_path / "traces"))
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=1) as checkpointer:
        for step in checkpointer.steps():
            training.step()
            if step == 20:  # another layout: the slots do not fit it
                training.state["more"] = training.model.weight.detach().clone()
            if checkpointer.statistics()["skip_reasons"].get("layout"):
                break
    skipped = [event for event in events(tmp_path / "traces", "rank-0") if event["name"] == "skipped"]
    assert "layout" in {event["args"]["reason"] for event in skipped}


def test_a_trace_that_cannot_be_written_disturbs_nobody(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    found = trained(home, 5, trace="/proc/nothing")
    assert found["snapshots_sealed"] >= 3
    until(lambda: any("the trace ends here" in record.getMessage() for record in caplog.records))
