"""The daemon or its keeper is killed: training goes on and ends the same, what is lost is counted, the new daemon takes
the arena over, and what an interrupted flush left is removed in the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.lab import Fault, Lab, until

COPY = "ckptd.trainer.copying:CopyJobs.copy"
COMMIT = "ckptd.tiers.arena:Slot.commit"
OUTPUT_WRITE = "ckptd.tiers.store.posix:PosixOutput.write"
OUTPUT_SYNC = "ckptd.tiers.store.posix:PosixOutput.sync"
RENAME = "ckptd.tiers.store.posix:PosixDisk.rename"
UNLINK = "ckptd.tiers.store.posix:PosixDisk.unlink"
REMOVE_DIRECTORY = "ckptd.tiers.store.posix:PosixDisk.remove_directory"
MAKE_DIRECTORY = "ckptd.tiers.store.posix:PosixDisk.make_directory"
WRITE_RECORD = "ckptd.daemon.flush:Stores.write_record"
PREPARE = "ckptd.protocol.node:NodeMachine._prepare"
KEEP = "ckptd.daemon.arena:Keeper.keep"
DROP = "ckptd.daemon.arena:Keeper.drop"

FLUSH = {
    "F: before the first chunk": Fault(MAKE_DIRECTORY, when="after", match="data"),
    "F: chunks written": Fault(OUTPUT_WRITE, when="after", match=".ckd"),
    "F: chunk file synced": Fault(OUTPUT_SYNC, when="after", match=".ckd"),
    "M: manifest written": Fault(OUTPUT_WRITE, when="after", match=".parquet"),
    "K: objects synced": Fault(OUTPUT_SYNC, when="after", match="objects.msgpack"),
    "K: COMMIT written": Fault(OUTPUT_SYNC, when="after", match="COMMIT.tmp"),
    "R: before COMMIT has its name": Fault(RENAME, match="COMMIT"),
    "R: COMMIT has its name": Fault(RENAME, when="after", match="COMMIT"),
    "G: before COMMIT goes": Fault(UNLINK, match="'COMMIT'"),
    "G: COMMIT is gone": Fault(UNLINK, when="after", match="'COMMIT'"),
    "G: half of the data is gone": Fault(UNLINK, when="after", match=".ckd"),
    "G: all but the directory": Fault(REMOVE_DIRECTORY, match="step-"),
}
CAPTURE = {
    "C: in a copy": Fault(COPY, "kill daemon", when="after", call=4),
    "S: after a commit": Fault(COMMIT, "kill daemon", when="after", call=4),
    "S: a commit is heard of": Fault("ckptd.protocol.grants:Grants.hear", call=4),
    "a slot is handed to the keeper": Fault(KEEP, when="after", call=2, match="slot/"),
    "in a step": Fault("backward", "kill daemon", call=15),
}
START = {
    "a promise": Fault(PREPARE, when="after"),
    "the record is not written": Fault(WRITE_RECORD),
    "the record has no name yet": Fault(OUTPUT_SYNC, when="after", match="epochs"),
    "the record is written": Fault(WRITE_RECORD, when="after"),
    "between Begin and Hello": Fault("ckptd.trainer.start:_hello", "kill daemon"),
}


@pytest.mark.parametrize("name", [*CAPTURE, *START])
def test_killed_while_it_serves(name: str, lab: Lab, expected: Callable[..., str]) -> None:
    """Whatever it was doing for the trainer, the next one goes on from there."""
    run = lab.start(faults={name: {**CAPTURE, **START}[name]})
    ended = run.finishes()
    assert lab.fired(name), run.said()
    assert ended["hash"] == expected()
    assert bool(ended["statistics"]["daemon_connections_lost"]) == (name in CAPTURE)
    assert 40 in lab.checkpoints()
    lab.ends_clean()


@pytest.mark.parametrize("name", FLUSH)
def test_killed_in_a_flush(name: str, lab: Lab, expected: Callable[..., str]) -> None:
    """Old or new is there and whole; the step that was being flushed, or a later one, is flushed by the next daemon."""
    pace = 0.03 if name.startswith("G") else 0.01  # something goes only where there has been a flush before the last
    run = lab.start(faults={name: FLUSH[name]}, keep=1, pace=pace)
    lab.fires(name)
    lab.checkpoints()
    ended = run.finishes()
    assert ended["hash"] == expected()
    assert lab.checkpoints() == [40]
    lab.ends_clean()


def test_killed_three_times(lab: Lab, expected: Callable[..., str]) -> None:
    """One after the other: the third in the flush of the last step, for which the trainer waits and which the fourth
    repeats. No descriptor is left open by any of it."""
    faults = {
        "first": Fault("backward", "kill daemon", call=10),
        "hold": Fault("step", "hold", call=20),
        "second": Fault("backward", "kill daemon", call=20),
        "later hold": Fault("step", "hold", call=38),
        "third": Fault(RENAME, match="COMMIT"),
    }
    run = lab.start(faults=faults, flush_every=1000)
    for hold in ("hold", "later hold"):
        lab.holds(hold)
        lab.reaches(lambda s: s["ranks"] and s["ranks"][0]["connected"], "the next daemon")
        lab.release(hold)
    assert run.finishes()["hash"] == expected()
    assert all(lab.fired(name) for name in ("first", "second", "third")), run.said()
    descriptors = {event["step"]: event["descriptors"] for event in run.own_events() if "step" in event}
    assert descriptors[38] <= descriptors[9] + 2, descriptors
    lab.ends_clean()


def test_keeper_killed(lab: Lab, expected: Callable[..., str]) -> None:
    """The daemon starts another keeper and gives it everything: killed in its turn, it is replaced with all it had."""
    run = lab.start(faults={"hold": Fault("step", "hold", call=12)}, flush_every=100)
    lab.holds("hold")
    before = lab.reaches(lambda s: bool(s["newest"]["sealed"]), "a sealed snapshot")
    (old,) = lab.kill("keeper")
    until(lambda: lab.pids("keeper") not in ([], [old]), "another keeper")
    lab.reaches(lambda s: s["pid"] == before["pid"], "the same daemon")
    until(lambda: len(lab.kept()) == len(before["slots"]) + 2, "the keeper to hold slots and ledgers")
    lab.kill("daemon")
    after = lab.reaches(lambda s: s["pid"] != before["pid"], "another daemon")
    assert after["newest"] == before["newest"]
    assert after["epoch"] == before["epoch"]
    lab.release("hold")
    assert run.finishes()["hash"] == expected()
    lab.ends_clean()


def test_keeper_and_daemon_killed(lab: Lab, expected: Callable[..., str]) -> None:
    """Everything in memory is lost; the trainer starts both anew and its next snapshots are sealed."""
    faults = {"both": Fault(COMMIT, "kill keeper daemon", when="after", call=4)}
    ended = lab.start(faults=faults).finishes()
    assert lab.fired("both")
    assert ended["hash"] == expected()
    assert 40 in lab.checkpoints()
    lab.ends_clean()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_slots_are_dropped(when: str, storeless: Lab, expected: Callable[..., str]) -> None:
    """The state outgrows its slots; the daemon is killed between its decision to drop the old ones and the keeper's
    hearing of it. The next daemon holds what it has in its books and nothing else."""
    faults = {"drop": Fault(DROP, when=when, call=2), "hold": Fault("step", "hold", call=35)}
    run = storeless.start("--grow", "15", faults=faults)
    storeless.fires("drop")
    storeless.holds("hold")
    status = storeless.reaches(lambda s: (s["newest"]["sealed"] or 0) > 15, "a snapshot in the new slots")
    until(lambda: len(storeless.kept()) == len(status["slots"]) + 2, "the keeper to hold slots and ledgers")
    assert len(status["slots"]) == 2
    storeless.release("hold")
    run.finishes()
    storeless.daemons_end()


def test_everything_killed_after_the_last_commit(lab: Lab, expected: Callable[..., str]) -> None:
    """The trainer remembers a capture whose slot is lost with keeper and daemon: it captures the step again."""
    faults = {"both": Fault(COMMIT, "kill keeper daemon", when="after")}
    ended = lab.start(faults=faults, snapshot_every=1000, flush_every=1000).finishes()
    assert lab.fired("both")
    assert ended["hash"] == expected()
    assert lab.checkpoints() == [40]
    lab.ends_clean()
