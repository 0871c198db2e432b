"""Small trials from end to end: their figures are there, the bytes came back, and nothing stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.launch import TrialError, run_trial
from benchmarks.worker import Trial
from benchmarks.workload import shape


def trial(directory: Path, contender: str) -> Trial:
    return Trial(contender, str(directory), 3_000_000, batch=1, context=16, steps=4, calm_steps=1, flush_every=4)


@pytest.mark.slow
@pytest.mark.parametrize(("contender", "ranks"), [("torch.save", 2), ("ckptd", 1), ("ckptd, on disk only", 1)])
def test_a_trial_measures_and_cleans_up(tmp_path: Path, contender: str, ranks: int) -> None:
    outcome = run_trial(trial(tmp_path / "trial", contender), ranks, 120, tmp_path / "environments")
    assert len(outcome.ranks) == ranks
    for rank in outcome.ranks:
        assert rank["loaded"]
        assert 0 < rank["kept"] <= rank["saves"] == (4 if contender == "ckptd" else 1)
        assert all(0 < rank[figure] for figure in ("step_s", "calm_step_s", "stall_s", "cold_load_s", "load_s"))
        assert rank["disk_bytes"] > 0
    assert outcome.bytes["trained"] > sum(rank["local_bytes"] for rank in outcome.ranks) > 2_000_000
    assert outcome.cpu_s["trained"] > outcome.cpu_s["ready"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="no such contender"):
        run_trial(trial(tmp_path / "trial", "no such contender"), 1, 120, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_needs_nothing_of_ours() -> None:
    """Peers run it in environments in which ckptd is not installed."""
    check = "import sys, benchmarks.worker; assert 'ckptd' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize("size", [1_000_000, 50_000_000, 300_000_000, 1_200_000_000])
def test_the_model_is_about_as_large_as_asked(size: int) -> None:
    layers, width = shape(size)
    assert layers * width * width * 12 * 12 == pytest.approx(size, rel=0.25 if size > 10**7 else 2)
    assert shape(1_200_000_000) == (14, 768)
