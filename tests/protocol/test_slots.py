"""Bookkeeping of slots: when one is free, how a snapshot ends, what stays."""

from __future__ import annotations

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.layouts import Allotment, distribute
from ckptd.protocol.messages import Layout
from ckptd.protocol.slots import Granted, Sealed, SlotTable
from tests.protocol.transcript import epoch

E1, E2 = epoch(1), epoch(2)


def table(ranks: int = 2, each: int = 2) -> SlotTable:
    """Slots 1, 2 of rank 0, 3, 4 of rank 1 ..., all mapped by process p<rank>."""
    made = SlotTable()
    for rank in range(ranks):
        for _ in range(each):
            slot = made.create(rank, "d", 100)
            slot.ready, slot.owner = True, f"p{rank}"
    return made


def grant(made: SlotTable, number: int, slots: dict[int, int], of: Epoch = E1) -> Granted:
    """A grant to the processes p<rank>."""
    made.granted.append(Granted(of, number, number, slots, {rank: f"p{rank}" for rank in slots}))
    return made.granted[-1]


def test_a_slot_is_free_if_mapped_and_idle() -> None:
    """Not ready, of another layout, mapped by another process, surplus, granted or sealed: not free."""
    made = table(1, 6)
    assert made.vacant(0, "d", "p0") == [1, 2, 3, 4, 5, 6]
    made.slots[0].ready = False
    made.slots[1].digest = "other"
    made.slots[2].owner = "an older process"
    made.slots[3].surplus = True
    grant(made, 7, {0: 5})
    made.sealed.append(Sealed(SnapshotId(E1, 6), SnapshotId(E1, 6), {0: 6}))
    assert made.vacant(0, "d", "p0") == []
    assert made.vacant(1, "d", "p0") == []


def test_sealed_when_every_writer_captured_the_same_step() -> None:
    """And not before; it moves to the sealed ones with its slots."""
    made = table()
    granted = grant(made, 5, {0: 1, 1: 3})
    made.answer(granted, 0, 6)
    assert list(made.seal()) == []
    made.answer(granted, 1, 6)
    assert list(made.seal()) == [granted]
    assert made.sealed == [Sealed(SnapshotId(E1, 6), SnapshotId(E1, 5), {0: 1, 1: 3})]
    assert made.granted == []
    assert made.busy() == {1, 3}


def test_different_steps_are_no_snapshot() -> None:
    """Both have captured: the snapshot is dead, its slots are free."""
    made = table()
    granted = grant(made, 5, {0: 1, 1: 3})
    made.answer(granted, 0, 5)
    made.answer(granted, 1, 6)
    assert granted.dead
    assert list(made.seal()) == []
    assert made.busy() == set()


def test_an_outcome_never_changes() -> None:
    """Neither a repeated message nor a contradicting one has an effect; nor one of somebody who was not asked."""
    made = table()
    granted = grant(made, 5, {0: 1, 1: 3})
    made.answer(granted, 0, 5)
    made.answer(granted, 0, None)
    made.answer(granted, 0, 7)
    made.answer(granted, 9, None)
    assert (granted.outcome, granted.step, granted.dead) == ({0: True}, 5, False)


def test_a_dead_snapshot_keeps_the_slots_of_the_silent() -> None:
    """They may still be writing: until they answer, or their process has ended."""
    made = table()
    granted = grant(made, 5, {0: 1, 1: 3})
    made.answer(granted, 0, None)
    assert made.busy() == {3}
    assert made.quarantined(E1) == set()
    assert made.quarantined(E2) == {3}
    made.writer_ended("p0")
    assert made.busy() == {3}
    made.writer_ended("p1")
    list(made.seal())
    assert made.granted == []
    assert made.busy() == set()


def test_what_is_freed_is_held_no_more() -> None:
    """Known by its grant; other snapshots keep their slots."""
    made = table()
    made.sealed = [Sealed(SnapshotId(E1, step), SnapshotId(E1, 10 + step), {0: step}) for step in (1, 2)]
    made.free(SnapshotId(E1, 11))
    assert made.busy() == {2}
    assert made.holding(SnapshotId(E1, 11)) is None
    assert made.holding(SnapshotId(E1, 12)) == made.sealed[0]


def test_retired_slots_are_idle_and_fit_nobody() -> None:
    """Busy ones stay, whatever they are."""
    made = table(2, 2)
    made.slots[1].surplus = True
    grant(made, 5, {0: 1})
    assert [slot.slot for slot in made.retire({0: "new", 1: "d"})] == [2]
    assert [slot.slot for slot in made.retire({0: "d"})] == [3, 4]
    assert [slot.slot for slot in made.slots] == [1]


def test_allotted_as_many_as_memory_allows() -> None:
    """Three a rank, else two, else none; what fits is used again."""
    layouts = [Layout(1, "d", 100), Layout(1, "d", 100)]
    assert distribute(SlotTable(), E1, [0, 1], layouts, 3, 600) == [Allotment([], [1, 2, 3]), Allotment([], [4, 5, 6])]
    assert distribute(SlotTable(), E1, [0, 1], layouts, 3, 599) == [Allotment([], [1, 2]), Allotment([], [3, 4])]
    assert distribute(SlotTable(), E1, [0, 1], layouts, 3, 399) is None
    assert distribute(table(2, 2), E1, [0, 1], layouts, 3, 200) == [Allotment([1, 2], [5]), Allotment([3, 4], [6])]
    assert distribute(table(2, 2), E1, [0, 1], layouts, 3, 0) == [Allotment([1, 2], []), Allotment([3, 4], [])]


def test_slots_in_the_making_count() -> None:
    """A second survey of the same layout does not make them twice."""
    made = table(1, 2)
    made.slots[1].ready = False
    assert distribute(made, E1, [0], [Layout(2, "d", 100)], 2, 0) == [Allotment([1], [2])]


def test_more_slots_than_wanted_are_surplus() -> None:
    """They are not granted any more, and go when idle."""
    made = table(1, 3)
    assert distribute(made, E1, [0], [Layout(1, "d", 100)], 2, 0) == [Allotment([1, 2], [])]
    assert [slot.slot for slot in made.retire({0: "d"})] == [3]


def test_quarantined_slots_are_left_to_zombies() -> None:
    """Nobody knows how long one lives. Where memory is short, they are taken into account all the same."""
    layouts = [Layout(1, "d", 100)]
    made = table(1, 3)
    grant(made, 5, {0: 2}, of=E1).dead = True
    assert distribute(made, E2, [0], layouts, 3, 100) == [Allotment([1, 3], [4])]
    assert made.get(2) is not None
    made.writer_ended("p0")
    list(made.seal())
    assert [slot.slot for slot in made.retire({0: "d"})] == [2]

    made = table(1, 2)
    grant(made, 5, {0: 2}, of=E1).dead = True
    assert distribute(made, E2, [0], layouts, 3, 0) == [Allotment([1, 2], [])]
