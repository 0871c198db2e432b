"""One small trial from end to end: its figures are there, its bytes came back, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.launch import TrialError, run_trial
from benchmarks.worker import Trial


def trial(directory: Path, contender: str) -> Trial:
    return Trial(contender, str(directory), state_bytes=25_000_000, batch=2, saves=2, calm_steps=2)


@pytest.mark.slow
def test_a_trial_measures_and_cleans_up(tmp_path: Path) -> None:
    outcome = run_trial(trial(tmp_path / "trial", "torch.save"), ranks=1, timeout_s=120)
    (rank,) = outcome.ranks
    assert rank["loaded"]
    assert len(rank["saves"]) == 2
    assert all(0 < save[figure] for save in rank["saves"] for figure in ("stall_s", "sealed_s", "durable_s"))
    assert rank["disk_bytes"] >= rank["local_bytes"] == 2 * 1024 * 1024 * 12
    assert outcome.peak_bytes >= outcome.training_bytes > rank["local_bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="no such contender"):
        run_trial(trial(tmp_path / "trial", "no such contender"), ranks=1, timeout_s=120)
    assert list(tmp_path.iterdir()) == []
