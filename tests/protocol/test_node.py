"""Single rules of the machine, each with the story of what happened without it. Whole runs are in transcripts/."""

from __future__ import annotations

import pytest

from ckptd.core.types import SnapshotId
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Send
from ckptd.protocol.members import MAX_RANKS
from ckptd.protocol.state import recover
from tests.protocol.transcript import Script, epoch

E1, E2 = epoch(1), epoch(2)


def after(transcript: str) -> Script:
    """A script that has played a transcript."""
    script = Script()
    script.play(f"> play {transcript}")
    return script


def restarted(script: Script, point: str = "E1@9") -> None:
    """A new launch has begun."""
    script.play(f"> l: Prepare epoch=E2\n> l: Begin epoch=E2 world=2 restore_point={point}\n> recorded\n> l gone")


# --- outcomes


def test_a_late_missed_does_not_undo_captured() -> None:
    """A rank that had captured, and was granted the same again after a reconnection, answered that it came late."""
    script = after("start")
    script.play("> a: Captured grant=4 slot=1\n> a: Missed grant=4 reason='late'")
    assert any("Reached step=4" in word for word in script.play("> b: Captured grant=4 slot=4"))


def test_different_steps_are_counted_and_told() -> None:
    """Ranks that used a grant for different steps: a third one would have copied for nothing, and nobody counted it."""
    script = Script()
    script.play("> l: Prepare epoch=E1\n> l: Begin world=3\n> recorded")
    for name, rank in (("a", 0), ("b", 1), ("c", 2)):
        script.play(f"> {name}: Hello rank={rank}\n> {name}: Pieces")
    for name in "abc":
        script.play(f"> {name}: Layout digest='{name}' slot_bytes=10")
    for name, slot in (("a", 1), ("b", 4), ("c", 7)):
        script.play(f"> {name}: Ready slot={slot}\n> {name}: Boundary step=1")
    said = script.play("> a: Captured grant=3 step=3 slot=1\n> b: Captured grant=3 step=4 slot=4")
    assert "    c < Revoke grant=3" in said
    assert script.machine.state.counters["skipped"] == 1


def test_a_step_that_is_half_captured_is_not_granted_again() -> None:
    """An earlier grant is being used for the step that is asked for: a second grant sealed it twice, and two snapshots
    of one step held all slots for ever."""
    script = after("start")
    script.play("> a: Captured grant=4 step=5 slot=1")
    said = script.play("> a: Request step=5\n> b: Request step=5")
    assert said == []
    assert any("Reached step=5" in word for word in script.play("> b: Captured grant=4 step=5 slot=4"))


def test_no_grant_is_numbered_like_another() -> None:
    """The daemon restarted and gave a number a second time; a rank answered with the outcome of the first."""
    script = after("start")
    script.play("> b: Missed grant=4 reason='failed'\n> a: Missed grant=4 reason='revoked'")
    script.play("> daemon restarts\n> a: Hello rank=0")
    said = script.play("> b: Hello rank=1\n> b: Boundary step=1")
    assert not any("Grant step=4" in word for word in said)


# --- membership


def test_an_epoch_has_one_process_a_rank() -> None:
    """A second one would have been sent the grants of the first, and both would have written to one slot."""
    script = after("seal")
    (refusal,) = script.play("> c: Hello epoch=E1 world=2 rank=0 instance='other'")
    assert "is another process" in refusal


def test_a_connection_is_one_rank() -> None:
    """Else what rank 1 says would have been taken for what rank 0 says."""
    script = after("seal")
    (refusal,) = script.play("> a: Hello epoch=E1 world=2 rank=1 instance='b1'")
    assert "is another process" in refusal


def test_too_many_ranks_are_refused_by_name() -> None:
    """Their descriptors would not have fitted a packet."""
    script = Script()
    script.play("> l: Prepare epoch=E1")
    (refusal,) = script.play(f"> l: Begin world={MAX_RANKS + 1}")
    assert "ConfigError" in refusal
    assert script.machine.state.epoch is None


def test_where_no_pid_is_visible_the_connection_is_the_sign_of_life() -> None:
    """In another pid namespace: what such a process had not answered stayed quarantined for ever."""
    script = Script()
    script.play("> l: Prepare epoch=E1\n> l: Begin world=1\n> recorded\n> l gone")
    script.play("> a: Hello rank=0 seen=False\n> a: Pieces\n> a: Layout digest='A' slot_bytes=10")
    script.play("> a: Ready slot=1\n> a: Boundary step=1")
    assert "granted 3" in script.play("> slots")[0]
    script.play("> a gone")
    assert "1 of rank 0 quarantined" in script.play("> slots")[0]
    script.play("> l: Prepare epoch=E2")
    script.play("> l: Begin epoch=E2")
    assert "1 of rank 0 free" in script.play("> slots")[0]


def test_a_closed_job_stays_closed() -> None:
    """The daemon was killed after one rank had heard Closed and gone: the other waited for it, then the daemon for
    half an hour."""
    script = after("seal")
    script.play("> a: Close\n> daemon restarts\n> a dead\n> b: Hello rank=1")
    said = script.play("> b: Close")
    assert said == ["    b < Closed", "    exits: the job has closed"]


def test_a_promise_holds_off_the_end() -> None:
    """A daemon that had lingered almost long enough promised a snapshot, and left before Begin."""
    script = after("rank_death")
    script.play("> daemon restarts\n> tick 99\n> l: Prepare epoch=E2")
    assert script.play("> tick 50") == []
    assert script.play("> l: Begin epoch=E2 restore_point=E1@9\n> recorded")
    assert script.play("> tick 99") == []
    assert script.play("> tick 1") == ["    exits: nobody came for 100 s"]


# --- layouts


def test_slots_in_the_making_go_with_their_epoch() -> None:
    """A fenced-off trainer offered one later, and it was kept for nobody."""
    script = Script()
    script.play("> l: Prepare epoch=E1\n> l: Begin world=1\n> recorded\n> l gone\n> a: Hello rank=0\n> a: Pieces")
    script.play("> a: Layout digest='A' slot_bytes=10")
    script.play("> l: Prepare epoch=E2")
    said = script.play("> l: Begin epoch=E2")
    assert said[:3] == ["    drops slot 1", "    drops slot 2", "    drops slot 3"]


def test_after_a_shortage_who_comes_back_is_asked_again() -> None:
    """Else a message that was lost meant no snapshots for the rest of the epoch."""
    script = Script()
    script.play("> l: Prepare epoch=E1\n> l: Begin world=1\n> recorded\n> l gone\n> a: Hello rank=0\n> a: Pieces")
    (refusal,) = script.play("> room 19\n> a: Layout digest='A' slot_bytes=10")
    assert "2 slots for 1 ranks need 20 bytes, 19 are available" in refusal
    script.play("> a gone")
    assert "    a < Survey generation=2" in script.play("> a: Hello rank=0")


def test_idle_slots_of_the_dead_make_room() -> None:
    """A restart with another layout: the old slots are dropped first, and their bytes count."""
    script = after("rank_death")
    restarted(script)
    script.play("> room 0\n> x: Hello rank=0\n> y: Hello rank=1\n> x: Pieces\n> y: Pieces")
    script.play("> x: Layout digest='new' slot_bytes=100")
    said = script.play("> y: Layout digest='new' slot_bytes=100")
    assert said == [
        *(f"    drops slot {slot}" for slot in (1, 2, 4, 5)),
        "    x < Allot generation=2 reuse=[] create=[7, 8]",
        "    y < Allot generation=2 reuse=[] create=[9, 10]",
    ]


def test_recovered_without_a_slot_that_was_ready() -> None:
    """What it held is gone; new slots are asked for. Slots in the making stay in the books."""
    script = after("seal")
    state = script.machine.state
    made = state.table.create(0, "A", 100)
    assert recover(state, {1, 2, 4, 5, 6, 99}) == [99]
    assert state.table.sealed == []
    assert state.surveying
    assert made in state.table.slots
    assert [granted.dead for granted in state.table.granted] == [False, False]


def test_recovered_with_a_slot_whose_ready_was_not_noted() -> None:
    """The keeper has it, the ledger does not: it is dropped, and offered again by its trainer."""
    script = after("seal")
    made = script.machine.state.table.create(0, "A", 100)
    assert recover(script.machine.state, {1, 2, 3, 4, 5, 6, made.slot}) == [made.slot]
    assert not script.machine.state.surveying
    assert not made.ready


# --- flushes


def test_sigterm_before_the_first_seal_flushes_the_restore_point() -> None:
    """It was only in memory, and the node went away with it although time allowed."""
    script = after("seal")
    restarted(script)
    script.play("> x: Hello rank=0\n> y: Hello rank=1")
    assert script.play("> x: Terminating") == ["    writes E1@9 to /store"]
    assert "    x < Drained step=9" in script.play("> written\n> committed")


def test_an_abandoned_restart_flushes_the_restore_point() -> None:
    """A job that dies again before its first seal left the only copy in memory."""
    script = after("seal")
    restarted(script)
    script.play("> x: Hello rank=0\n> y: Hello rank=1\n> x dead")
    assert "    writes E1@9 to /store" in script.play("> y dead")


def test_sigterm_while_ranks_come_back_to_a_new_daemon() -> None:
    """Not being back yet is not being dead: the first to come was told not to wait."""
    script = after("seal")
    script.play("> daemon restarts\n> a: Hello rank=0")
    assert script.play("> a: Terminating") == ["    writes E1@9 to /store"]


def test_durable_in_another_store_is_not_durable_here() -> None:
    """The job was started again with another store: a flush was answered from what the old one held."""
    script = after("flush_and_close")
    script.play("> policy store='/other'")
    restarted(script)
    script.play("> x: Hello rank=0")
    assert script.play("> x: Flush") == ["    writes E1@9 to /other"]


def test_a_branch_that_was_left_is_not_durable() -> None:
    """Step 9 was durable when the job went back to 6: that says nothing about 6, nor when a flush is due."""
    script = after("flush_and_close")
    restarted(script, point="E1@6")
    assert script.machine.state.cluster.durable is None


def test_a_flush_goes_on_over_a_restart() -> None:
    """Of what the job goes on from. Who had asked for it is answered; of anything else it is given up."""
    script = after("seal")
    script.play("> tool: Flush")
    script.play("> l: Prepare epoch=E2")
    assert "    writes E1@9 to /store" in script.play("> l: Begin epoch=E2 world=2 restore_point=E1@9")
    assert script.play("> written\n> committed")[1:] == ["    tool < Flushed step=9"]
    assert script.machine.state.cluster.durable == SnapshotId(E1, 9)

    script = after("seal")
    script.play("> tool: Flush")
    said = script.play("> l: Prepare epoch=E2\n> l: Begin epoch=E2 world=2 restore_point=None")
    assert "    frees E1@8" in said
    assert not any("writes E1@" in word for word in said)


def test_a_tool_that_waits_for_what_is_gone_is_answered() -> None:
    """The job was started from nothing: the daemon would never have ended, waiting for a flush to begin."""
    script = after("seal")
    script.play("> tool: Flush to='/elsewhere'")
    said = script.play("> l: Prepare epoch=E2\n> l: Begin epoch=E2 restore_point=None")
    assert "    tool < Flushed step=None" in said


def test_a_daemon_that_is_asked_to_end_grants_nothing_more() -> None:
    """Else, flushing what came newly each time, it would never have ended."""
    script = after("seal")
    script.machine.drain(0.0)
    assert script.play("> tick 1") == ["    writes E1@9 to /store"]
    said = script.play("> a: Captured grant=10 slot=1\n> b: Captured grant=10 slot=4")
    assert not any("Grant" in word for word in said)
    assert "    writes E1@10 to /store" in script.play("> written\n> committed")
    script.play("> a: Missed grant=12 reason='stall'")
    assert script.play("> written\n> committed")[-1] == "    exits: asked to end by a signal"


@pytest.mark.parametrize("error", ["x" * 10**6, "é" * 10**6])
def test_long_errors_are_cut(error: str) -> None:
    """A message that does not fit a packet ended the daemon's work in the middle."""
    script = after("seal")
    script.play("> a: Flush")
    assert script.flush is not None
    script.machine.job.flush_failed(script.flush.number, error)
    said = [action.message for action in script.machine.take() if isinstance(action, Send)]
    assert [len(m.encode(message)) > m.MAX_TEXT for message in said]
