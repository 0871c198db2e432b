"""Breadth-first search through all states of a model: the shortest way to a broken rule, and states without a way on.

Knows nothing of the models. States must be hashable and canonical: symmetric ones equal.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)
Step = tuple[str, State]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A rule that does not hold, and the shortest sequence of steps after which it does not."""

    rule: str
    steps: list[str]

    def __str__(self) -> str:
        return f"{self.rule} after {len(self.steps)} steps: {'; '.join(self.steps)}"


@dataclasses.dataclass(frozen=True)
class Explored(Generic[State]):
    """All states that were reached. `complete`: there are no others. `broken`: the first rule found not to hold."""

    parents: dict[State, tuple[State, str] | None]
    complete: bool
    broken: Broken | None

    def path(self, state: State) -> list[str]:
        """The steps by which a state was first reached."""
        return _path(self.parents, state)


def explore(
    initial: State,
    successors: Callable[[State], Iterable[Step[State]]],
    broken: Callable[[State], str | None],
    *,
    most_states: int,
) -> Explored[State]:
    """Visits states in order of distance until a rule breaks or there are no more, or more than `most_states`."""
    parents: dict[State, tuple[State, str] | None] = {initial: None}
    queue = deque([initial])
    while queue:
        state = queue.popleft()
        rule = broken(state)
        if rule is not None:
            return Explored(parents, False, Broken(rule, _path(parents, state)))
        if len(parents) > most_states:
            return Explored(parents, False, None)
        for label, following in successors(state):
            if following not in parents:
                parents[following] = state, label
                queue.append(following)
    return Explored(parents, True, None)


def stuck(
    explored: Explored[State],
    successors: Callable[[State], Iterable[Step[State]]],
    arrives: Callable[[str], bool],
) -> list[State]:
    """States, nearest first, from which no sequence of steps ends with one whose label `arrives`."""
    before: dict[State, list[State]] = {state: [] for state in explored.parents}
    able: set[State] = set()
    for state in explored.parents:
        for label, following in successors(state):
            if arrives(label):
                able.add(state)
            elif following != state:
                before[following].append(state)
    queue = deque(able)
    while queue:
        for earlier in before[queue.popleft()]:
            if earlier not in able:
                able.add(earlier)
                queue.append(earlier)
    return [state for state in explored.parents if state not in able]


def _path(parents: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps = []
    parent = parents[state]
    while parent is not None:
        steps.append(parent[1])
        parent = parents[parent[0]]
    return steps[::-1]
