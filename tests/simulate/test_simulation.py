"""Schedules of a job on several nodes, and proof that the oracle sees it when a rule is left out.

`python -m tests.simulate --seed N` replays a seed that fails here.
"""

from __future__ import annotations

import time

import msgspec
import pytest

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.protocol.cluster import epoch, member, messages
from ckptd.protocol.cluster.facts import Entry, Held, conjunction
from ckptd.protocol.cluster.flushing import Flushing
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.parity import Work
from ckptd.protocol.cluster.state import ClusterState, Holding
from tests.simulate.launch import Launch
from tests.simulate.oracle import BrokenPromiseError
from tests.simulate.simulation import Simulation

CHUNKS, SEEDS = 4, 50
"""A beginning of what `make simulate` runs."""

ENOUGH = 250
"""Seeds within which a broken rule must show."""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_everything_holds_whatever_happens(chunk: int) -> None:
    """Prints how many schedules a second were run (`-s`)."""
    began = time.perf_counter()
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        try:
            Simulation(seed).run()
        except BrokenPromiseError as violation:
            pytest.fail(f"python -m tests.simulate --seed {seed}: {violation}")
    print(f"{SEEDS / (time.perf_counter() - began):.1f} schedules a second")


def test_the_runs_meet_what_they_are_for() -> None:
    """Losses, rebuilds, damage, flushes, guests and degraded restarts happen in these runs."""
    met: set[str] = set()
    for seed in range(20):
        simulation = Simulation(seed, trace=True)
        simulation.run()
        text = "\n".join(simulation.trace or [])
        words = (
            "lose n",
            "Rebuild(",
            "Encode(",
            "Verify(",
            "Commit(",
            "is durable",
            "is protected",
            " kill",
            "damage n",
        )
        met |= {word for word in words if word in text}
        for start in simulation.starts:
            choice = start.launch.choice
            if choice is not None and choice.point is not None:
                met |= {"from memory"} if choice.held else {"from store"}
                met |= {"degraded"} if choice.held and choice.tolerates < start.launch.shape.parity else set()
                met |= {"two kept"} if choice.protected not in (None, choice.point) else set()
    assert met >= {
        "lose n",
        "Rebuild(",
        "Encode(",
        "Verify(",
        "Commit(",
        "is durable",
        "is protected",
        " kill",
        "damage n",
    }
    assert met >= {"from memory", "degraded", "two kept"}


def breaks(*needles: str, first: int = 0) -> None:
    """Some seed must end in a BrokenPromiseError that says one of these. `first`: where the search begins, since it
    would take long from 0 on."""
    said: set[str] = set()
    for seed in range(first, first + ENOUGH):
        try:
            Simulation(seed).run()
        except BrokenPromiseError as violation:
            said.add(str(violation))
            if any(needle in str(violation) for needle in needles):
                return
    pytest.fail(f"no seed says {needles}; they say {said}")


def test_keeping_the_restore_point_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin frees the protected snapshot beside a restore point that is only sealed."""
    begin = epoch.begin

    def forgetful(state: ClusterState, message: messages.Begin) -> list[messages.Free]:
        return begin(state, msgspec.structs.replace(message, protected=None))

    monkeypatch.setattr(member, "begin", forgetful)
    breaks("is freed", "was protected")


def test_restoring_what_lacks_parity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most m strings are lost: that alone gives nothing back."""
    tolerated = epoch.tolerated
    believing = lambda held: tolerated([msgspec.structs.replace(h, parity=True) for h in held])  # noqa: E731
    monkeypatch.setattr(epoch, "tolerated", believing)
    breaks("there is too little")


def test_wanting_parity_from_every_survivor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A survivor may have rebuilt its data and not its parity."""
    tolerated = epoch.tolerated

    def strict(held: list[Held]) -> int | None:
        parity = held[0].shape.parity if held else 0
        complete = len({h.string for h in held if h.data}) == (held[0].shape.count if held else 0)
        return tolerated(held) if parity == 0 or complete or all(h.parity for h in held if h.data) else None

    monkeypatch.setattr(epoch, "tolerated", strict)
    breaks("was protected")


def test_keeping_only_what_is_known_to_be_protected_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root alone knew, and is lost. Everybody else had posted Parity. One of some thousand schedules shows it: the
    root must have died before as well, and named something newer when it came back."""
    monkeypatch.setattr(epoch, "may_be_protected", lambda held: False)
    breaks("is freed", "was protected", first=2500)


def test_freeing_on_the_own_groups_protection_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other group has not protected the newer snapshot yet, and needs the older one of all."""
    machines: dict[str, MemberMachine] = {}
    enter = MemberMachine._enter

    def registered(self: MemberMachine) -> None:
        machines[self.state.arena] = self
        enter(self)

    def has_parity(arena: str, snapshot: SnapshotId) -> bool:
        found = machines[arena].state.find(snapshot) if arena in machines else None
        return found is not None and found.parity is True

    def in_group(state: ClusterState, decided: messages.Decided) -> SnapshotId | None:
        members, number, known = state.membership, state.number, epoch.newest_known(state, decided)
        if members is None or number is None:
            return known
        group = [members.arenas[other] for other in members.shape.group_of(number)]
        if len(members.shape.groups) == 1:
            return known
        everywhere = [h.snapshot for h in state.holdings if all(has_parity(arena, h.snapshot) for arena in group)]
        return max([*everywhere, *([] if known is None else [known])], default=None)

    monkeypatch.setattr(MemberMachine, "_enter", registered)
    monkeypatch.setattr(member, "newest_known", in_group)
    breaks("is freed")


def test_beginning_without_all_promises_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node of the job has not answered, and counts as lost."""

    def hasty(self: Launch) -> None:
        if self.choice is None and len(self.promises.keys() & set(self.arenas)) >= max(len(self.arenas) - 1, 1):
            self.choice = epoch.choose(list(self.promises.values()), self._records, self._stored)
            self.record = EpochRecord(self.epoch, self.choice.point)

    monkeypatch.setattr(Launch, "_choose", hasty)
    breaks("is freed", "was protected", "was sealed")


def test_freeing_at_a_seal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer sealed snapshot frees the protected one."""

    def sealed(state: ClusterState, decided: messages.Decided) -> SnapshotId | None:
        return max((verdict.snapshot for verdict in decided.verdicts if verdict.sealed), default=None)

    monkeypatch.setattr(member, "newest_known", sealed)
    breaks("is freed")


def test_going_on_after_a_promise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory is of something that goes on changing."""
    monkeypatch.setattr(ClusterState, "frozen", property(lambda self: self.membership is None))
    breaks("")


def test_taking_silence_for_no_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that has not heard of somebody's Sealed takes the snapshot for dead."""

    def forgetful(snapshot: SnapshotId, entries: list[Entry | None]) -> Entry:
        found = conjunction(snapshot, entries)
        return msgspec.structs.replace(found, sealed=bool(found.sealed))

    monkeypatch.setattr(member, "conjunction", forgetful)
    breaks("nothing is protected any more", "was sealed")


def test_parity_that_was_not_made_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed counts as done."""
    monkeypatch.setattr(MemberMachine, "encoding_failed", MemberMachine.encoded)
    breaks("its parity is freed")


def test_parity_of_one_is_not_parity_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node takes its own Parity for that of everybody below it."""

    def own(snapshot: SnapshotId, entries: list[Entry | None]) -> Entry:
        found = conjunction(snapshot, entries)
        parity = None if entries[0] is None else entries[0].parity
        return msgspec.structs.replace(found, parity=parity)

    monkeypatch.setattr(member, "conjunction", own)
    breaks("its parity is freed")


def test_parity_without_seal_records_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not sent, and nobody waits for them: decoded bytes that nobody can interpret or check."""
    may_encode = Work._may_encode

    def careless(self: Work, holding: Holding) -> bool:
        group = holding.shape.group_of(holding.string)
        everything = dict.fromkeys(group, b"") | holding.records
        known = Holding(holding.snapshot, holding.string, holding.shape, encoded=holding.encoded, records=everything)
        return may_encode(self, known)

    monkeypatch.setattr(Work, "_offer_record", lambda *_: iter(()))
    monkeypatch.setattr(Work, "_may_encode", careless)
    monkeypatch.setattr(Work, "has_all_records_out", lambda *_: True)
    breaks("seal records of")


def test_encoding_over_what_is_protected_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One parity set for all."""
    monkeypatch.setattr(ClusterState, "free_area", lambda self: 0)
    breaks("its parity is freed")


def test_one_more_slot_than_there_is_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stands = MemberMachine.stands
    monkeypatch.setattr(
        MemberMachine, "stands", lambda self, standing: stands(self, msgspec.structs.replace(standing, room=9))
    )
    breaks("holds more than")


def test_a_commit_before_all_have_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flushing, "to_commit", lambda self: self.running)
    breaks("without all files")


def test_a_dead_branch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest snapshot in memory, whatever epochs began since."""
    monkeypatch.setattr(epoch, "live", lambda snapshots, records: sorted(snapshots, key=lambda s: s.step, reverse=True))
    breaks("of a dead branch")


def test_giving_up_parity_before_anything_follows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots hold the protected snapshot and one that can neither be protected nor aborted."""

    def hasty(self: MemberMachine, snapshot: SnapshotId) -> None:
        holding = self.state.find(snapshot)
        if holding is not None and not self.state.frozen and self.state.is_current(snapshot) and not holding.parity:
            holding.parity = False

    monkeypatch.setattr(MemberMachine, "give_up_parity", hasty)
    breaks("nothing is protected any more")


def test_different_steps_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that use a grant at different steps, and nobody who compares them."""

    def careless(snapshot: SnapshotId, entries: list[Entry | None]) -> Entry:
        return conjunction(snapshot, [None if e is None else msgspec.structs.replace(e, step=0) for e in entries])

    monkeypatch.setattr(member, "conjunction", careless)
    breaks("captured at steps")
