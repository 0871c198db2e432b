"""Trainers that are killed: what was sealed stands, the restart resumes from memory, and the end is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.faults.lab import Fault, Lab, Run

COPY = "ckptd.trainer.copying:CopyJobs.copy"
COMMIT = "ckptd.tiers.arena:Slot.commit"
SETTLE = "ckptd.trainer.capture:Capture._settle"
CHOOSE = "ckptd.trainer.start:_choose"
HELLO = "ckptd.trainer.start:_hello"
FILL = "ckptd.trainer.restoring:fill_alone"


def restarts(lab: Lab, name: str, fault: Fault, **launch: object) -> Run:
    """Launches the job, sees it killed by `fault`, and checks that nothing announced is lost by it."""
    run = lab.start(faults={name: fault}, **launch)  # type: ignore[arg-type]
    run.dies()
    assert lab.fired(name), run.said()
    return run


def sealed(lab: Lab) -> int:
    """The newest sealed step, once every trainer is known to be dead."""
    status = lab.reaches(lambda s: not any(rank["alive"] for rank in s["ranks"]), "the death of all ranks")
    step: int = status["newest"]["sealed"]
    return step


def test_killed_at_every_moment(lab: Lab, expected: Callable[..., str]) -> None:
    """One process, killed again and again: in the copy (C), around the commit of the slot and the seal (S), in the
    middle of a step, during the start, during the restore (L). Each restart goes on from the newest sealed step."""
    moments = {
        "before the copy": Fault(COPY, call=4),
        "after the copy": Fault(COPY, when="after", call=4),
        "after the commit": Fault(COMMIT, when="after", call=4),
        "after it is said": Fault(SETTLE, when="after", call=4),
        "in a step": Fault("backward", call=6),
        "between Prepare and Begin": Fault(CHOOSE, when="after"),
        "between Begin and Hello": Fault(HELLO),
        "after Hello": Fault(HELLO, when="after"),
        "before the restore": Fault(FILL),
        "after the restore": Fault(FILL, when="after"),
    }
    lazy = {"in the window": Fault(COPY, when="after", call=8), "after the window": Fault(COMMIT, call=4)}
    last = 0
    for name, fault in {**moments, **lazy}.items():
        run = restarts(lab, name, fault, capture="lazy" if name in lazy else "eager")
        if run.step:
            assert (run.restored()["step"], run.restored()["source"]) == (last, "memory" if last else "none")
            before, last = last, sealed(lab)
            assert before <= last <= run.step
    run = lab.start()
    assert run.finishes()["hash"] == expected()
    assert (run.restored()["step"], run.restored()["source"]) == (last, "memory")
    assert last > 8
    assert 40 in lab.checkpoints()
    lab.ends_clean()


def test_ranks_killed(lab: Lab, expected: Callable[..., str]) -> None:
    """Two ranks (DDP, BatchNorm): one or all of them are killed in the copy, after the commit, in the restore. A step
    that only one of them has captured is never restored."""
    two = {"ranks": 2, "parallel": "ddp"}
    restarts(lab, "rank 1 in the copy", Fault(COPY, when="after", call=4, process="rank1"), **two)
    first = sealed(lab)
    run = restarts(lab, "rank 0 after the commit", Fault(COMMIT, when="after", call=4, process="rank0"), **two)
    assert (run.restored()["step"], run.restored()["source"]) == (first, "memory")
    second = sealed(lab)
    both = {f"rank {r}": Fault(COPY, when="after", call=4, process=f"rank{r}") for r in (0, 1)}
    run = lab.start(faults=both, **two)  # type: ignore[arg-type]
    assert run.ends() == [-signal.SIGKILL] * 2
    assert run.restored()["step"] == second
    restarts(lab, "rank 1 in the restore", Fault(FILL, process="rank1"), **two)
    run = lab.start(**two)  # type: ignore[arg-type]
    assert run.finishes()["hash"] == expected(**two)
    assert run.restored()["source"] == "memory"
    lab.ends_clean()


def test_torchrun_restarts(lab: Lab, expected: Callable[..., str]) -> None:
    """FSDP2 under torchrun, which restarts the ranks itself."""
    fault = Fault(COPY, when="after", call=5, process="rank1")
    ended = lab.start(parallel="fsdp", torchrun=True, faults={"rank 1 in the copy": fault}).finishes()
    assert lab.fired("rank 1 in the copy")
    assert ended["hash"] == expected(ranks=2, parallel="fsdp")
    assert ended["statistics"]["restored"]["source"] == "memory"
    lab.ends_clean()


def test_all_trainers_die_for_good(lab: Lab, expected: Callable[..., str]) -> None:
    """The daemon flushes the newest sealed snapshot alone, lingers, and leaves; later the job goes on from the store.
    A child that the trainer has forked lives on with its socket and its memory open: that changes nothing."""
    run = lab.start("--fork", flush_every=1000, linger_s=2.0, faults={"kill": Fault("backward", call=15)})
    run.dies()
    newest = sealed(lab)
    lab.daemons_end()
    assert lab.checkpoints() == [newest]
    os.killpg(run.pid, signal.SIGKILL)  # the forked child: it must still be there
    lab.ends_clean()
    run = lab.start()
    assert run.finishes()["hash"] == expected()
    assert (run.restored()["step"], run.restored()["source"]) == (newest, "store")
    lab.ends_clean()


def test_no_linger(lab: Lab, expected: Callable[..., str]) -> None:
    """With `linger_s=0` a daemon still lets its job start, waits for trainers that live while it is replaced, flushes
    when they are dead, and only then leaves at once."""
    faults = {
        "daemon": Fault("backward", "kill daemon", call=12),
        "hold": Fault("step", "hold", call=13),
        "trainer": Fault("backward", call=25),
    }
    run = lab.start(faults=faults, linger_s=0.0, flush_every=1000)
    lab.holds("hold")
    status = lab.reaches(lambda s: s["ranks"] and s["ranks"][0]["connected"], "the next daemon")
    lab.release("hold")
    run.dies()
    assert all(lab.fired(name) for name in faults)
    lab.daemons_end()
    (step,) = lab.checkpoints()
    assert step >= status["newest"]["sealed"] > 0
    run = lab.start(linger_s=0.0)
    assert run.finishes()["hash"] == expected()
    assert (run.restored()["step"], run.restored()["source"]) == (step, "store")
    lab.ends_clean()
