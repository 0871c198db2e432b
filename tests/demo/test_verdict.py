"""The demo must be able to fail: each promise of its closing table, broken in made-up logs, is seen."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import demo
import pytest

STEPS = 20
DIGEST = "ab" * 32


class Log:
    """Writes the progress logs of a made-up run. Step 12 was the last before the kill; the restore gives step 10."""

    def __init__(self, directory: Path, with_ckptd: bool) -> None:
        directory.mkdir()
        self.directory, self.with_ckptd, self.clock = directory, with_ckptd, 1000.0

    def write(self, rank: int, **fields: Any) -> None:
        self.clock += 0.5
        with (self.directory / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"time": self.clock, **fields}) + "\n")

    def start(self) -> None:
        for rank in range(demo.RANKS):
            self.write(rank, event="start", pid=100 + rank)

    def steps(self, first: int, last: int, source: str = "none", restored: int = 0, shift: float = 0.0) -> None:
        for step in range(first, last + 1):
            statistics = {
                "restored": {"step": restored, "source": source},
                "stall_s_total": 0.001 * step,
                "snapshots_sealed": step,
                "snapshots_skipped": 0,
            }
            extra = {"statistics": statistics} if self.with_ckptd else {}
            self.write(0, event="step", step=step, loss=5.0 - step / 10 + shift, **extra)

    def end(self, weights: str = DIGEST) -> None:
        for rank in range(demo.RANKS):
            self.write(rank, event="end", weights=weights)

    def run(self) -> demo.Run:
        run = demo.Run(self.directory)
        run.read()
        return run


@pytest.fixture
def reference(tmp_path: Path) -> demo.Run:
    log = Log(tmp_path / "reference", with_ckptd=False)
    log.start()
    log.steps(1, STEPS)
    log.end()
    return log.run()


def interrupted(tmp_path: Path, *, source: str = "memory", shift: float = 0.0, weights: str = DIGEST) -> demo.Run:
    log = Log(tmp_path / "ckptd", with_ckptd=True)
    log.start()
    log.steps(1, 12)
    log.start()
    log.steps(11, STEPS, source, restored=10, shift=shift)
    log.end(weights)
    return log.run()


def killer_at(time_s: float) -> demo.Killer:
    killer = demo.Killer(demo.Moment(rank=1, after_step=12, fraction=0.5))
    killer.at, killer.pid = time_s, 101
    return killer


def verdict(findings: list[demo.Finding]) -> dict[str, bool | None]:
    return {finding.name: finding.good for finding in findings}


def loaded(step: int = STEPS, digest: str = DIGEST) -> dict[str, Any]:
    return {"step": step, "loaded": digest, "read": digest}


def test_a_run_as_promised_passes(tmp_path: Path, reference: demo.Run) -> None:
    run = interrupted(tmp_path)
    findings = demo.judge_recovery(run, killer_at(1006.0)) + demo.judge_stall(run)
    findings += demo.judge_result(reference, run, loaded(), STEPS)
    assert all(finding.good is not False for finding in findings)
    assert {finding.name: finding.value for finding in findings}["steps lost"] == "2"


def test_restoring_from_the_store_is_not_as_promised(tmp_path: Path) -> None:
    found = verdict(demo.judge_recovery(interrupted(tmp_path, source="store"), killer_at(1006.0)))
    assert found["state restored from"] is False


def test_a_run_that_was_never_killed_does_not_pass(tmp_path: Path, reference: demo.Run) -> None:
    killer = demo.Killer(demo.Moment(rank=1, after_step=12, fraction=0.5))
    assert verdict(demo.judge_recovery(reference, killer)) == {"restarts": False}


def test_starting_over_from_nothing_does_not_pass(tmp_path: Path) -> None:
    log = Log(tmp_path / "ckptd", with_ckptd=True)
    log.start()
    log.steps(1, 12)
    log.start()
    log.steps(1, STEPS)
    found = verdict(demo.judge_recovery(log.run(), killer_at(1006.0)))
    assert found["steps lost"] is False


@pytest.mark.parametrize("shift", [1e-7, 1.0])
def test_a_loss_that_differs_in_any_bit_is_seen(tmp_path: Path, reference: demo.Run, shift: float) -> None:
    found = verdict(demo.judge_result(reference, interrupted(tmp_path, shift=shift), loaded(), STEPS))
    assert found["final loss"] is False


def test_other_weights_are_seen(tmp_path: Path, reference: demo.Run) -> None:
    run = interrupted(tmp_path, weights="cd" * 32)
    found = verdict(demo.judge_result(reference, run, loaded(), STEPS))
    assert found["weights (SHA-256)"] is False
    assert found["final loss"] is True


@pytest.mark.parametrize("wrong", [loaded(step=STEPS - 1), loaded(digest="cd" * 32), {**loaded(), "read": "cd" * 32}])
def test_a_load_that_gives_something_else_is_seen(tmp_path: Path, reference: demo.Run, wrong: dict[str, Any]) -> None:
    found = verdict(demo.judge_result(reference, interrupted(tmp_path), wrong, STEPS))
    assert found["loaded by one process"] is False


def test_a_line_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    whole = json.dumps({"event": "start", "time": 1.0, "pid": 5}) + "\n"
    step = json.dumps({"event": "step", "time": 2.0, "step": 1, "loss": 3.0}) + "\n"
    run = demo.Run(tmp_path)
    run.read()
    assert run.last_step == 0
    path.write_text(whole + step[:10])
    run.read()
    assert (run.pids, run.last_step) == ({0: 5}, 0)
    path.write_text(whole + step)
    run.read()
    assert run.last_step == 1


def test_the_moment_is_drawn_from_the_seed() -> None:
    moments = [demo.choose_moment(seed, 100) for seed in range(200)]
    assert moments == [demo.choose_moment(seed, 100) for seed in range(200)]
    assert {moment.rank for moment in moments} == {0, 1}
    assert all(20 <= moment.after_step < 80 and 0 <= moment.fraction < 1 for moment in moments)
    assert len({moment.after_step for moment in moments}) > 30


def test_nobody_is_killed_before_there_is_something_to_restore(tmp_path: Path) -> None:
    log = Log(tmp_path / "ckptd", with_ckptd=True)
    log.start()
    log.write(0, event="step", step=1, loss=1.0, statistics={"snapshots_sealed": 0})
    killer = demo.Killer(demo.Moment(rank=0, after_step=1, fraction=0.0))
    run = log.run()
    killer.watch(run)
    assert killer.at is None
    victim = subprocess.Popen(["sleep", "60"])
    run.pids[0] = victim.pid
    log.write(0, event="step", step=2, loss=1.0, statistics={"snapshots_sealed": 1})
    run.read()
    killer.watch(run)
    assert victim.wait(10) == -signal.SIGKILL
    assert (killer.at is not None, killer.pid) == (True, victim.pid)


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("keep me")
    assert demo.main(["--directory", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
