"""The rules of protection hold in every state of small jobs, and each rule left out is found out.

What is checked of each state (`Model.broken`): with any losses that are covered, at most m a group, something at least
as new as the newest protected snapshot can be restored; nothing of that one was freed; without a loss, something at
least as new as the newest sealed one can be restored; a restore point, once chosen, is still there.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.models.explore import Explored, explore, stuck
from tests.models.protection import MUTATIONS, PROTECTED, Model
from tests.models.state import State

MOST_STATES = 100_000

MIRROR = Model(1, 1)
TRIPLE = Model(2, 1)
TWO_PARITIES = Model(1, 2)
TWO_MIRRORS = Model(1, 1, groups=2)
TWO_TRIPLES = Model(2, 1, groups=2)

COUNTEREXAMPLES = {
    "group": TWO_MIRRORS,
    "abort": MIRROR,
    "forgetful": MIRROR,
    "thaw": MIRROR,
    "seal": MIRROR,
    "overwrite": MIRROR,
    "unpinned": MIRROR,
    "strict": TWO_PARITIES,
}


def visit(model: Model) -> Explored[State]:
    return explore(model.initial(), model.successors, model.broken, most_states=MOST_STATES)


def stuck_states(model: Model) -> tuple[Explored[State], list[State]]:
    """States from which nothing is ever protected again, however lucky the job is, unless it is restarted."""
    explored = visit(model)
    assert explored.complete, explored.broken
    return explored, stuck(explored, model.epoch_steps, lambda label: label.endswith(PROTECTED))


@pytest.mark.parametrize(
    ("model", "states"),
    [
        (MIRROR, 67),
        (dataclasses.replace(MIRROR, slots=3), 269),
        (TRIPLE, 129),
        (dataclasses.replace(TRIPLE, slots=3), 853),
        (TWO_PARITIES, 359),
        (TWO_MIRRORS, 1047),
        (TWO_TRIPLES, 3366),
        (dataclasses.replace(MIRROR, lazy=True, slots=3, most_columns=4), 56154),
    ],
    ids=["1+1", "1+1, 3 slots", "2+1", "2+1, 3 slots", "1+2", "1+1 twice", "2+1 twice", "1+1, 3 slots, lazy"],
)
def test_the_rules_hold_in_every_state(model: Model, states: int) -> None:
    """The number of states is that of the whole model: a step that is lost by mistake would be seen."""
    explored = visit(model)
    assert explored.complete, explored.broken
    assert len(explored.parents) == states


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_rule_left_out_is_found_out(mutation: str) -> None:
    explored = visit(dataclasses.replace(COUNTEREXAMPLES[mutation], mutation=mutation))
    assert explored.broken is not None, f"no counterexample to: {MUTATIONS[mutation]}"


def test_one_group_may_free_on_its_own() -> None:
    """Why the rule about the job-wide Protected needs two groups to be found."""
    assert visit(dataclasses.replace(MIRROR, mutation="group")).complete


def test_freeing_on_the_own_group_loses_the_protected_snapshot_of_another() -> None:
    broken = visit(dataclasses.replace(TWO_MIRRORS, mutation="group")).broken
    assert broken is not None
    assert broken.rule == "the newest protected snapshot is lost with no more losses than promised"
    assert broken.steps[-1].endswith("frees 0 wrongly")


def test_a_restart_that_drops_the_protected_snapshot_loses_it() -> None:
    """0 is protected, 1 sealed. A restart without any loss restores 1; a node lost then takes 1 and, unpinned, 0."""
    broken = visit(dataclasses.replace(MIRROR, mutation="unpinned")).broken
    assert broken is not None
    assert broken.steps[-2:] == ["node 0.0 completes parity of 0: 0 is protected", "restart from 1 without any loss"]


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("model", [MIRROR, TRIPLE, TWO_PARITIES, TWO_MIRRORS], ids=["1+1", "2+1", "1+2", "1+1 twice"])
def test_something_can_always_be_protected_again(model: Model, slots: int) -> None:
    assert stuck_states(dataclasses.replace(model, slots=slots))[1] == []


def test_two_slots_are_stuck_if_parity_is_given_up_before_anything_follows() -> None:
    """One holds the protected snapshot, the other a sealed one that can neither be protected nor aborted."""
    explored, states = stuck_states(dataclasses.replace(MIRROR, hasty=True))
    assert explored.path(states[0])[-1] == "node 0.0 gives up parity of 1"


@pytest.mark.parametrize("model", [MIRROR, TRIPLE], ids=["1+1", "2+1"])
def test_three_slots_are_stuck_if_what_follows_frees_nothing(model: Model) -> None:
    """They hold the protected snapshot and two without parity."""
    assert stuck_states(dataclasses.replace(model, slots=3, supersede=False))[1] != []


def test_a_restored_snapshot_must_become_protected_itself() -> None:
    """Else restore point and protected snapshot hold both slots for ever."""
    explored, states = stuck_states(dataclasses.replace(MIRROR, resume=False))
    assert explored.path(states[0])[-1] == "restart from 1 without any loss"
