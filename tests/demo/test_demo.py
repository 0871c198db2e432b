"""What the demo does with runs that go wrong. CI runs the demo itself, whose exit status says whether all was kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import demo
import pytest


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    stage = demo.Stage(tmp_path)
    stage.output("broken").write_text("the reason")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(demo.DemoError, match=r"(?s)broken: ended with status 3.*the reason"):
        demo.follow(stage, "broken", process, demo.Run(tmp_path), lambda run: None, timeout_s=60)


def test_a_run_that_hangs_is_given_up(tmp_path: Path) -> None:
    stage = demo.Stage(tmp_path)
    stage.output("hung").write_text("the last it said")
    process = subprocess.Popen(["sleep", "60"], env=stage.environment)
    with pytest.raises(demo.DemoError, match=r"(?s)hung: not done after 0 s, at step 0.*the last it said"):
        demo.follow(stage, "hung", process, demo.Run(tmp_path), lambda run: None, timeout_s=0)
    stage.clear()
    assert process.wait(10) == -signal.SIGKILL


def test_a_stage_is_cleared_of_its_own_processes_alone(tmp_path: Path) -> None:
    stage, other = demo.Stage(tmp_path / "mine"), demo.Stage(tmp_path / "other")
    sleep = ["sleep", "60"]
    mine = subprocess.Popen(sleep, env=stage.environment)
    theirs = subprocess.Popen(sleep, env=other.environment)
    try:
        stage.clear()
        assert mine.wait(10) == -signal.SIGKILL
        assert theirs.poll() is None
        assert stage.leftovers(patience_s=0) == []
        assert other.leftovers(patience_s=0) == [f"process {theirs.pid}"]
    finally:
        other.clear()
        theirs.wait(10)
