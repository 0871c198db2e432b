"""Thousands of runs of a job with random faults, and proof that the oracle sees it when a rule is left out."""

from __future__ import annotations

import msgspec
import pytest

from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.grants import Grants
from ckptd.protocol.slots import Granted, SlotTable
from ckptd.protocol.state import NodeState
from tests.protocol import node
from tests.protocol.oracle import BrokenPromiseError
from tests.protocol.simulate import TURNS, Simulation
from tests.protocol.trainer import Trainer

CHUNKS, SEEDS = 10, 80
ENOUGH = 400
"""Seeds within which a broken rule must show."""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_everything_holds_whatever_happens(chunk: int) -> None:
    """`python -m tests.protocol.simulate --seed N` replays a seed that fails here."""
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        try:
            Simulation(seed).run(TURNS)
        except BrokenPromiseError as violation:
            pytest.fail(f"python -m tests.protocol.simulate --seed {seed}: {violation}")


def test_the_runs_meet_what_they_are_for() -> None:
    """Snapshots are sealed, flushed, restored from memory and from the store, and daemons come back, in these runs."""
    met: set[str] = set()
    for seed in range(60):
        simulation = Simulation(seed, trace=True)
        simulation.run(TURNS)
        met |= {str(line[0]).strip() for line in simulation.trace or []}
        met |= {"restored from memory" for launch in simulation.launches if launch.from_memory}
        met |= {"restored from store" for launch in simulation.launches if launch.choice and not launch.from_memory}
        met |= {type(line[2]).__name__ for line in simulation.trace or [] if line[0] == "    sends"}
    assert met >= {"restored from memory", "restored from store", "kill daemon", "doom daemon", "kill job", "stall"}
    assert met >= {"Revoke", "Reached", "Drained", "FlushFailed", "Closed", "Flushed", "Allot", "Plan", "Refuse"}


def breaks(needle: str) -> None:
    """Some seed must end in a BrokenPromiseError that says `needle`."""
    said = set()
    for seed in range(ENOUGH):
        try:
            Simulation(seed).run(TURNS)
        except BrokenPromiseError as violation:
            said.add(str(violation))
            if needle in str(violation):
                return
    pytest.fail(f"no seed says {needle!r}; they say {said}")


def test_freeing_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest sealed snapshot goes when the next one is granted."""
    issue = Grants.issue

    def careless(self: Grants, capture: cluster.Capture) -> None:
        self._state.table.sealed.clear()
        issue(self, capture)

    monkeypatch.setattr(Grants, "issue", careless)
    breaks("announced sealed")


def test_forgetting_the_restore_point_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only snapshots of the live epoch are kept."""

    def forgetful(self: Grants) -> None:
        table = self._state.table
        table.sealed = [sealed for sealed in table.sealed if sealed.snapshot.epoch == self._state.epoch]

    monkeypatch.setattr(Grants, "kill_unanswered", forgetful)
    breaks("restore point is gone")


def test_sealing_without_all_ranks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One captured shard is enough."""
    monkeypatch.setattr(Granted, "complete", property(lambda self: not self.dead and any(self.outcome.values())))
    breaks("is sealed; slot")


def test_mixing_steps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that use a late grant for a later step, and a machine that takes different steps for one snapshot."""
    monkeypatch.setattr(Trainer, "heeds_lateness", False)

    def answer(self: SlotTable, granted: Granted, rank: int, step: int | None, replicas: object = None) -> bool:
        if rank in granted.writers and rank not in granted.outcome:
            granted.outcome[rank] = step is not None
            granted.dead = granted.dead or step is None
            granted.step = granted.step or step
        return True

    monkeypatch.setattr(SlotTable, "answer", answer)
    breaks("is sealed; slot")


def test_believing_replicas_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks say of what they have in common is not looked at."""
    answer = SlotTable.answer
    monkeypatch.setattr(
        SlotTable, "answer", lambda self, granted, rank, step, _=None: answer(self, granted, rank, step)
    )
    breaks("have in common differs")


def test_late_grants_are_no_danger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine alone sees to it that a snapshot is of one step."""
    monkeypatch.setattr(Trainer, "heeds_lateness", False)
    for seed in range(100):
        Simulation(seed).run(TURNS)


def test_freeing_while_frozen_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise does not stop the old epoch."""
    monkeypatch.setattr(ClusterState, "frozen", property(lambda self: self.epoch is None))
    breaks("")


def test_reusing_slots_of_the_silent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No quarantine: what a dead snapshot had is free at once, though a zombie may write to it."""
    busy = SlotTable.busy

    def careless(self: SlotTable) -> set[int]:
        return busy(SlotTable(sealed=self.sealed, granted=[g for g in self.granted if not g.dead]))

    monkeypatch.setattr(SlotTable, "busy", careless)
    breaks("a slot is in use twice")


def test_numbers_that_begin_again_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arena that takes the place of a lost one numbers its slots from 1 again: old grants name new slots."""
    monkeypatch.setattr(node, "NUMBERS_APART", 0)
    breaks("")


def test_acting_before_persisting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon killed after it said something that it had not written down."""
    carry_out = node.Node.carry_out

    def careless(self: node.Node) -> None:
        before = self.ledger
        carry_out(self)
        if self.budget is None and before is not None:
            return
        self.ledger = before

    monkeypatch.setattr(node.Node, "carry_out", careless)
    breaks("")


def test_the_state_survives_as_bytes() -> None:
    """What a daemon leaves behind is what the next one reads."""
    simulation = Simulation(5)
    for _ in range(TURNS):
        simulation._turn()
    if simulation.node.machine is not None:
        state = simulation.node.machine.state
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=NodeState) == state
