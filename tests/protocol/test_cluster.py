"""The rules of several nodes, one by one. Whole runs with faults are in tests/simulate."""

from __future__ import annotations

import itertools
import random

import pytest

from ckptd.core.errors import FormatError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import choose, numbered, tolerated
from ckptd.protocol.cluster.epoch import promise as promise_of
from ckptd.protocol.cluster.facts import Entry, Held, Membership, Shape, children_of, conjunction, merged, parent_of
from ckptd.protocol.cluster.member import GIVE_UP_AFTER, MemberMachine
from ckptd.protocol.cluster.standing import Failure, Flush, Standing, Wish, together
from ckptd.protocol.cluster.state import ClusterState, Holding, recover
from tests.protocol.cluster import EPOCH, POLICY, Job, epoch
from tests.simulate.launch import Launch

E1, E2 = epoch(1), epoch(2)
TRIPLE = Shape(((0, 1, 2),), 1)
TWO_PARITIES = Shape(((0, 1, 2, 3),), 2)


def held(step: int, string: int, shape: Shape, parity: bool = True, posted: bool | None = None, **other: int) -> Held:
    at = other.get("at", step)
    return Held(SnapshotId(E1, step), string, shape, at, True, parity, parity if posted is None else posted)


def promise(arena: str, *items: Held, protected: int | None = None) -> m.Promise:
    known = None if protected is None else SnapshotId(E1, protected)
    return m.Promise(E2, arena, items, known, (EpochRecord(E1),))


# --- facts and the tree


def test_every_member_has_one_parent_that_knows_it() -> None:
    for count, fan_out in itertools.product((1, 2, 16, 17, 300), (1, 2, 16)):
        for number in range(1, count):
            parent = parent_of(number, fan_out)
            assert parent is not None
            assert number in children_of(parent, count, fan_out)
        assert sum(len(children_of(number, count, fan_out)) for number in range(count)) == count - 1


def test_silence_is_neither_yes_nor_no() -> None:
    x = SnapshotId(E1, 4)
    yes, no = Entry(x, 4, True, True), Entry(x, None, False)
    assert conjunction(x, [yes, None]).sealed is None
    assert conjunction(x, [yes, None, no]).sealed is False
    assert conjunction(x, [yes, yes]).protected
    assert conjunction(x, [yes, Entry(x, 5, True, True)]).sealed is False


def test_facts_may_come_twice_and_in_any_order() -> None:
    x = SnapshotId(E1, 4)
    heard = [Entry(x), Entry(x, 4, True), Entry(x, 4, True, None, True), Entry(x, 4, True, True)]
    ends = []
    for order in itertools.permutations([*heard, heard[1]]):
        known = None
        for entry in order:
            known = merged(known, entry)
        ends.append(known)
    assert all(known == Entry(x, 4, True, True, True) for known in ends)


def test_where_all_stand() -> None:
    """Of what all must have the least; of what one suffices for the most."""
    wish, later = Wish("/a", SnapshotId(E1, 4), 1), Wish("/a", SnapshotId(E1, 5), 2)
    one = Standing(7, 2, 7, True, 0.1, 3, 3, 2, None, (wish,), True, True)
    two = Standing(6, 1, 6, True, None, 4, 2, 1, Failure(2, "full"), (later, Wish("/b", SnapshotId(E1, 1), 0)), True)
    both = together([one, two])
    assert both == together([two, one, two, both])
    assert both == Standing(
        7, 1, None, True, 0.1, 4, 2, 1, Failure(2, "full"), (later, Wish("/b", SnapshotId(E1, 1), 0)), True
    )
    assert together([one]) == one


# --- where an epoch begins


def test_a_group_may_lack_as_many_as_it_has_parities() -> None:
    """A member that lacks its parity counts as one that lacks everything, unless all data is there."""
    whole = [held(5, string, TWO_PARITIES) for string in range(4)]
    bare = [held(5, string, TWO_PARITIES, parity=False) for string in range(4)]
    assert tolerated(whole) == 2
    assert tolerated(whole[:3]) == 1
    assert tolerated([*whole[:2], bare[2]]) == 0
    assert tolerated([whole[0], *bare[1:3]]) is None
    assert tolerated(bare) == 0
    assert tolerated(bare[:3]) is None


def test_what_was_captured_at_different_steps_is_no_snapshot() -> None:
    assert tolerated([held(5, 0, TRIPLE), held(5, 1, TRIPLE, at=6), held(5, 2, TRIPLE)]) is None


def test_what_may_have_been_declared_is_kept_though_nobody_knows() -> None:
    """4 was protected, then 7: the root alone knew that, and was cut off. 9, sealed by all, has parity on two of three
    others. 9 is restored; one more loss takes it, and then 7 must be there: it was promised to survive two losses."""
    others = [
        promise(
            f"n{string}",
            held(4, string, TWO_PARITIES),
            held(7, string, TWO_PARITIES),
            held(9, string, TWO_PARITIES, parity=string < 3),
            protected=4,
        )
        for string in (1, 2, 3)
    ]
    choice = choose(others, [])
    assert choice.point == SnapshotId(E1, 9)
    assert choice.tolerates == 0
    assert choice.protected == SnapshotId(E1, 7)


def test_memory_and_store_are_one_lineage_by_steps() -> None:
    """Grant 8 was used at step 9, and is durable too: it is restored from memory, and the lineage knows it as 9."""
    found = [promise(f"n{string}", held(8, string, TRIPLE, at=9)) for string in range(3)]
    choice = choose(found, [], [SnapshotId(E1, 9)])
    assert (choice.point, choice.name, len(choice.held)) == (SnapshotId(E1, 8), SnapshotId(E1, 9), 3)
    assert choose(found, [], [SnapshotId(E1, 9)], spoiled=[SnapshotId(E1, 9)]).held == {}
    assert choose(found, [], [SnapshotId(E1, 7)], lambda name: name.step < 9).name == SnapshotId(E1, 7)


def test_the_store_has_what_memory_has_not() -> None:
    stored = [SnapshotId(E1, 3)]
    choice = choose([promise("n0", held(5, 0, TRIPLE)), promise("n3")], [], stored)
    assert (choice.point, choice.held, choice.protected) == (SnapshotId(E1, 3), {}, None)
    whole = [promise(f"n{string}", held(5, string, TRIPLE)) for string in range(3)]
    assert choose(whole, [], stored).point == SnapshotId(E1, 5)


def test_a_dead_branch_is_not_chosen() -> None:
    """The record of an epoch that went back to before it is in the store only."""
    whole = [promise(f"n{string}", held(5, string, TRIPLE)) for string in range(3)]
    assert choose(whole, [EpochRecord(E2, SnapshotId(E1, 3))]).point is None


def test_who_holds_a_string_keeps_its_number() -> None:
    found = {"c": held(5, 0, TRIPLE), "a": held(5, 2, TRIPLE)}
    assert numbered(["a", "b", "c"], found, TRIPLE) == (("c", "b", "a"), True)
    copies = {"a": held(5, 0, TRIPLE, parity=False), "b": held(5, 0, TRIPLE)}
    assert numbered(["a", "b", "c"], copies, TRIPLE)[0][0] == "b", "the copy with parities is the one that stays"
    assert numbered(["a", "b", "c", "d"], found, TWO_PARITIES) == (("a", "b", "c", "d"), False)


def test_a_refused_launch_takes_a_higher_number() -> None:
    launch = Launch(["a", "b"], ["z"], Shape(((0, 1),), 1), "f" * 16)
    launch.heard(m.Promise(launch.epoch, "a", (), None, ()))
    launch.heard(m.Refuse(launch.epoch, "b", Epoch(7, "0" * 16)))
    assert launch.epoch == Epoch(8, "f" * 16)
    launch.heard(m.Refuse(Epoch(1, "f" * 16), "a", launch.epoch))
    assert launch.epoch == Epoch(8, "f" * 16), "a late answer to the first number"
    assert [arena for arena, _ in launch.messages()] == ["a", "b", "z"]
    for arena in ("a", "b"):
        launch.heard(m.Promise(launch.epoch, arena, (), None, ()))
    assert launch.choice is None
    launch.expire()
    assert launch.choice is not None
    assert launch.record == EpochRecord(launch.epoch)


# --- members


def test_one_node_is_protected_by_itself() -> None:
    """N = 1, m = 0: every seal is one of the whole job, and frees what is older."""
    job = Job(1, 1, 0)
    for step in range(10):
        job.steps(step)
    announced = [a for a in job.said[0] if isinstance(a, m.Announce)]
    newest = max(a.snapshot for a in announced)
    assert {a.level for a in announced if a.snapshot == newest} == {Level.SEALED, Level.PROTECTED}
    assert [h.snapshot for h in job.machines[0].state.holdings if h.data] == [newest]
    assert not any(isinstance(a, m.Encode) for a in job.said[0])


@pytest.mark.parametrize("slots", [2, 3])
def test_all_are_told_the_same(slots: int) -> None:
    job = Job(12, 4, 1, slots=slots, fan_out=2)
    for step in range(20):
        job.steps(step)
    announced = [[a for a in said if isinstance(a, m.Announce)] for said in job.said]
    assert len([a for a in announced[0] if a.level == Level.PROTECTED]) >= 3
    assert all(others == announced[0] for others in announced)


@pytest.mark.parametrize("slots", [2, 3])
def test_parity_is_not_given_up_before_anything_follows(slots: int) -> None:
    """With two slots nothing could follow any more; three do not need it, since what follows has a slot."""
    job = Job(2, 2, 1, slots=slots)
    machine = job.machines[0]
    for step in range(4):
        job.steps(step)
    for holding in machine.state.holdings:
        holding.parity = None
        newest = max(s for s, verdict in machine.verdicts.items() if verdict.sealed)
        machine.give_up_parity(holding.snapshot)
        assert holding.parity is None or holding.snapshot == machine.state.protected or holding.snapshot < newest


def test_what_is_known_does_not_grow_while_protection_stands_still() -> None:
    """Hours of snapshots that are sealed, passed over and freed, while one of them cannot be encoded."""
    job = Job(8, 4, 1, fan_out=2)
    job.cannot_encode = {5}
    for step in range(300):
        job.steps(step)
    sealed = {a.step for a in job.said[0] if isinstance(a, m.Announce) and a.level == Level.SEALED}
    assert len(sealed) > 100
    for machine in job.machines:
        assert len(machine.state.holdings) <= 4
        assert len(machine.verdicts) <= 4
        assert sum(len(facts.entries) for facts in machine._below.values()) <= 4 * 2
    encoding = next(h.snapshot for h in job.machines[5].state.holdings if h.area is not None)
    job.machines[5].encoded(encoding)
    job._carry_out(5)
    job.settle()
    assert {machine.state.protected for machine in job.machines} == {encoding}


def test_what_cannot_be_encoded_does_not_keep_what_follows_from_being_protected() -> None:
    """A string that has rotted before its parity was made: its encoding fails again and again."""
    job = Job(4, 4, 1)
    job.cannot_encode = {2}
    for step in range(3):
        job.steps(step)
    (stuck,) = [h.snapshot for h in job.machines[2].state.holdings if h.area is not None]
    for step in range(3, 3 + GIVE_UP_AFTER):
        assert all(machine.state.find(stuck) is not None for machine in job.machines)
        job.machines[2].encoding_failed(stuck)
        job.machines[2].repeat()
        job.steps(step)
    job.cannot_encode.clear()
    for holding in job.machines[2].state.holdings:
        job.machines[2].encoding_failed(holding.snapshot)
    job.machines[2].repeat()
    for step in range(3 + GIVE_UP_AFTER, 40):
        job.steps(step)
    for machine in job.machines:
        assert machine.state.find(stuck) is None
        assert machine.state.protected is not None
        assert machine.state.protected > stuck


def test_a_member_that_has_missed_the_end_of_a_snapshot_lets_go_of_it() -> None:
    """A grant that was dead and forgotten before this member heard of it."""
    job = Job(2, 2, 1)
    machine = job.machines[1]
    job.stands(1, 0)
    machine.handle(m.Decided(EPOCH, 0, (Entry(SnapshotId(EPOCH, 3)),)))
    machine.take()
    machine.handle(m.Decided(EPOCH, 0, (Entry(SnapshotId(EPOCH, 9)),), over=SnapshotId(EPOCH, 5)))
    assert m.Revoke(SnapshotId(EPOCH, 3)) in machine.take()
    assert [h.snapshot.step for h in machine.state.holdings] == [9]


def test_nothing_happens_between_promise_and_begin() -> None:
    job = Job(2, 2, 1)
    for step in range(3):
        job.steps(step)
    machine = job.machines[1]
    granted = next(h.snapshot for h in machine.state.holdings if h.capturing)
    machine.handle(m.Prepare(E2), "launch")
    (tell,) = machine.take()
    assert isinstance(tell, m.Tell)
    assert isinstance(tell.message, m.Promise)
    machine.captured(granted, granted.step)
    job.stands(1, 9)
    machine.repeat()
    assert machine.take() == []


def test_an_epoch_has_a_number_of_its_own() -> None:
    """Without a store a launch begins to count at 1 again: half of the restarts took the number of the epoch before."""
    state = ClusterState("a")
    first, same = Epoch(1, "5" * 16), Epoch(1, "9" * 16)
    assert isinstance(promise_of(state, first), m.Promise)
    assert isinstance(promise_of(state, first), m.Promise), "said again"
    refusal = promise_of(state, same)
    assert isinstance(refusal, m.Refuse)
    launch = Launch(["a"], [], Shape(((0,),), 0), same.nonce)
    launch.heard(refusal)
    assert launch.epoch == Epoch(2, same.nonce)
    assert isinstance(promise_of(state, launch.epoch), m.Promise)


def test_an_arena_that_is_not_named_posts_nothing() -> None:
    """Its memory was lost: a daemon with the same address and another arena is another node."""
    machine = MemberMachine(ClusterState("fresh"), POLICY)
    verdict = Entry(SnapshotId(EPOCH, 3))
    machine.handle(m.Decided(EPOCH, 0, (verdict,)))
    machine.stands(Standing(1, 2))
    machine.repeat()
    assert machine.take() == []


def test_the_level_of_a_restore_point_says_what_it_survives() -> None:
    for tolerates, level in ((2, Level.PROTECTED), (1, Level.SEALED)):
        state = ClusterState("a", promised=E2)
        members = Membership(E2, ("a", "b", "c", "d"), (), TWO_PARITIES)
        MemberMachine(state).handle(m.Begin(E2, members, SnapshotId(E1, 5), 5, True, tolerates, {}, None))
        assert state.point_level == level
        state.confirmed = True
        assert state.point_level is None


def test_a_new_daemon_frees_what_nobody_knows_and_misses_what_is_gone() -> None:
    known, gone, unknown = (SnapshotId(E1, step) for step in (4, 5, 7))
    holdings = [Holding(x, 0, TRIPLE, data=True, area=0, encoded=True) for x in (known, gone)]
    state = ClusterState("a", holdings=holdings)
    assert recover(state, [known, unknown], [known, gone, unknown]) == [(unknown, "data"), (unknown, "parity")]
    assert [(h.data, h.encoded) for h in holdings] == [(True, True), (False, True)]


def test_a_grant_that_comes_after_a_later_one_is_missed() -> None:
    job = Job(2, 2, 1)
    machine = job.machines[1]
    job.stands(1, 0)
    machine.take()
    machine.handle(m.Decided(EPOCH, 0, (Entry(SnapshotId(EPOCH, 9)),)))
    machine.take()
    machine.handle(m.Decided(EPOCH, 0, (Entry(SnapshotId(EPOCH, 7)), Entry(SnapshotId(EPOCH, 9)))))
    (tell,) = [a for a in machine.take() if isinstance(a, m.Tell)]
    assert isinstance(tell.message, m.Facts)
    missed, open_ = tell.message.entries
    assert (missed.snapshot.step, missed.sealed, missed.late) == (7, False, True)
    assert (open_.snapshot.step, open_.sealed) == (9, None)


def test_a_root_that_starts_again_grants_nothing_below_what_was_granted() -> None:
    """It has forgotten its grants. One below another would be missed by all who heard of that, or, dead and forgotten
    everywhere, be captured again as something else."""
    job = Job(2, 2, 1)
    again = MemberMachine(job.machines[0].state, POLICY)
    again.stands(Standing(39, 2))
    again.handle(m.Facts(EPOCH, 1, (), 1, Standing(39, 2), granted=41))
    decided = [a.message for a in again.take() if isinstance(a, m.Tell) and isinstance(a.message, m.Decided)]
    assert [verdict.snapshot.step for verdict in decided[-1].verdicts] == [42]


def test_a_guest_makes_the_record_of_what_is_copied_from_it() -> None:
    """Sealed by all, 5 was never named to be encoded, so nobody had made records of it. The next epoch restored it on
    other nodes, which found all strings at guests and could not check one of them: with two slots, held by 4 and 5,
    nothing was ever captured again, whatever was restarted."""
    holdings = [Holding(SnapshotId(E1, step), 2, TRIPLE, step=step, data=True, sealed=True) for step in (4, 5)]
    machine = MemberMachine(ClusterState("z", promised=E2, holdings=holdings))
    members = Membership(E2, ("a", "b", "c"), ("z",), TRIPLE)
    point = SnapshotId(E1, 5)
    machine.handle(m.Begin(E2, members, point, 5, True, 0, {"z": 2}, SnapshotId(E1, 4)))
    assert m.Describe(point) in machine.take()
    machine.described(point, b"record")
    assert machine.take() == []
    assert holdings[1].records == {2: b"record"}


# --- packets


def test_hostile_packets_are_refused() -> None:
    source = random.Random(1)
    good = m.encode(m.Decided(E1, 0, (Entry(SnapshotId(E1, 3)),)))
    assert isinstance(m.decode(good), m.Decided)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            m.decode(bytes(data[: source.randint(0, len(data))]))
        except FormatError:
            continue
    bad = Shape(((0, 1), (1, 2)), 1)
    for hostile in (
        m.Recorded(E1, 0, SnapshotId(E1, -1)),
        m.Prepare(Epoch(-1, "0" * 16)),
        m.Promise(E1, "a", (Held(SnapshotId(E1, 1), 0, bad, 1, True, True, True),), None, ()),
        m.Promise(E1, "a", (Held(SnapshotId(E1, 1), 3, TRIPLE, 1, True, True, True),), None, ()),
        m.Begin(E1, Membership(E1, ("a", "b"), (), TRIPLE), None, 0, False, 0, {}, None),
        m.Begin(E1, Membership(E2, ("a",), (), Shape(((0,),), 0)), None, 0, False, 0, {}, None),
        m.Begin(E1, Membership(E1, ("a",), (), Shape(((0,),), 0)), None, -1, False, 0, {}, None),
        m.Decided(E1, 0, (), flush=Flush(-1, SnapshotId(E1, 1), 1, "/store", None)),
        m.Facts(E1, 0, (), 1, Standing(wishes=(Wish("/store", SnapshotId(E1, -1), 0),)), 0),
    ):
        with pytest.raises(FormatError):
            m.decode(m.encode(hostile))
    for data in (b"", b"\xff", b"\x80", good[:-1], good + b"\x00"):
        with pytest.raises(FormatError):
            m.decode(data)
