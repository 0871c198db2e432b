"""The rules by which snapshots are sealed, protected, freed and restored, as steps between states, for unbounded runs.

Everything that is random in the world is a step that may or may not happen. Why so few states stand for all runs:
- Facts are permanent and may arrive at any time or never, and a node may act on a decision at any time or never. So a
  decision counts as announced as soon as its facts are posted, and messages need no states.
- Freed at once, everywhere, is what no rule needs: what is older than the newest protected snapshot, was missed by a
  node, or is superseded. To keep it longer forbids captures, and lets a restart find only what an earlier one would
  have found. `lazy` leaves that out: each node frees in a step of its own, data and parity apart.
- So snapshots need no numbers, and runs no bound.
- A node that is lost was silent before, so a loss is part of the restart that finds it; and in each state each rule is
  checked for every loss that is covered. One that has promised a new epoch takes no further step; so Prepare,
  inventory and choice are one step. Begin on some nodes leaves more than on all; so it is part of that step.

Rules that only this check showed to be needed:
- Begin pins the newest protected snapshot beside a restore point that is not protected ('unpinned'), and that one then
  gets its parity in the new epoch (`resume`), or two slots would be held for ever.
- After a restart a group may lack data or parity on at most m nodes; not: parity on every survivor ('strict').
- Parity is given up only of what something newer, sealed by all, follows ('hasty'): before that nothing could follow
  where two slots are full. What follows then frees it, data and parity (`supersede`), or three slots would fill up too.

Not modelled: bytes, clocks, flushes and other pins, groups that change, members that were cut off and come back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from tests.models.state import (
    DATA,
    DROPPED,
    FREED,
    GONE,
    HELD,
    KEPT,
    LOST,
    MISSED,
    NEVER,
    NONE,
    NOWHERE,
    OPEN,
    PARITY,
    Cells,
    Group,
    State,
    canonical,
    cell_of,
    columns_of,
    common,
    given_up,
    has_parity,
    is_empty,
    losses,
    missed,
    newest_sealed,
    nodes_of,
    put,
    recoverable,
    recoverable_after,
    with_node,
    without,
)

PROTECTED = "is protected"

MUTATIONS = {
    "group": "a node frees what is older than a sealed snapshot as soon as its own group has protected that",
    "abort": "parity that is not complete at the deadline frees the data",
    "forgetful": "a root that restarts empty takes for missed what it has not heard of",
    "thaw": "the inventory is taken before the nodes promise and freeze",
    "seal": "a newer sealed snapshot frees the protected one",
    "overwrite": "the next parity is written over that of the newest protected snapshot",
    "unpinned": "Begin keeps the restore point alone, even if that is not protected and an older one is",
    "strict": "a restart wants parity from every survivor, also from one that replaced a lost node",
}
"""Rules left out or made worse. The check must find a counterexample to each."""


@dataclasses.dataclass(frozen=True)
class Model:
    """`groups` groups of k + m nodes, with so many slots and sets of parity each, and the rules that can be varied.

    `hasty`: parity is given up of whatever is sealed. `supersede`: a newer sealed snapshot frees one whose parity was
    given up. `resume`: what is restored but was not protected yet is protected in the new epoch. `lazy`: nothing is
    freed at once; at most `most_columns` snapshots are then in memory together.
    """

    data: int
    parity: int
    groups: int = 1
    slots: int = 2
    parity_sets: int = 2
    hasty: bool = False
    supersede: bool = True
    resume: bool = True
    lazy: bool = False
    most_columns: int = 99
    mutation: str | None = None

    def initial(self) -> State:
        """Nothing captured yet."""
        return State(NOWHERE, NOWHERE, NOWHERE, (Group(0, ((),) * (self.data + self.parity)),) * self.groups)

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """All steps: what nodes do in an epoch, and restarts."""
        yield from self.epoch_steps(state)
        yield from self._restarts(state)

    def epoch_steps(self, state: State) -> Iterator[tuple[str, State]]:
        """The steps that need no restart. A label that ends with PROTECTED: a snapshot became so. Nodes are named by
        their place in the state, which is sorted: it changes with what they hold."""
        for at, group in enumerate(state.groups):
            for index, cells in enumerate(group.nodes):
                if index and group.nodes[index - 1] == cells:
                    continue  # as its neighbour
                for label, changed in self._node_steps(state, group, cells):
                    yield self._settled(f"node {at}.{index} {label}", with_node(state, at, index, changed))

    def broken(self, state: State) -> str | None:
        """Which rule does not hold in a state, if any."""
        if state.chosen == GONE:
            return "the chosen restore point was freed before Begin"
        if state.protected != NOWHERE:
            masks = (recoverable_after(group, self.parity, self._strict) for group in state.groups)
            least = max(state.protected, 0)
            if any(common(choice) >> least == 0 for choice in itertools.product(*masks)):
                return "the newest protected snapshot is lost with no more losses than promised"
        if state.protected >= 0:
            cells = [node[state.protected] for node in nodes_of(state)]
            if any(cell & DATA == FREED or cell & PARITY == DROPPED for cell in cells):
                return "something of the newest protected snapshot was freed"
        whole = common(recoverable(group.nodes, (), self.parity, self._strict) for group in state.groups)
        if whole.bit_length() - 1 < newest_sealed(state):
            return "the newest sealed snapshot is lost with no loss at all"
        return None

    @property
    def _strict(self) -> bool:
        return self.mutation == "strict"

    # ---- what a node does in an epoch

    def _node_steps(self, state: State, group: Group, cells: Cells) -> Iterator[tuple[str, Cells]]:
        following = cells.index(NONE) if NONE in cells else len(cells)
        room = sum(cell & DATA == HELD for cell in cells) < self.slots
        if room and following < self.most_columns:
            yield f"seals {following}", put(cells, following, HELD)
        if following < columns_of(state):
            yield f"misses {following}", put(cells, following, MISSED | NEVER)
        for column, cell in enumerate(cells):
            if room and column == state.restored and cell & DATA == LOST:
                yield f"rebuilds {column}", put(cells, column, HELD | cell & PARITY)
            encodes = column > state.protected and (self.resume or column != state.restored)
            if cell == HELD | OPEN and encodes:
                yield from self._parity_steps(state, group, cells, column)
        if self.lazy:
            yield from self._free_steps(state, cells)
        if self.mutation in ("group", "abort", "forgetful", "seal"):
            yield from self._wrong_frees(state, group, cells)

    def _parity_steps(self, state: State, group: Group, cells: Cells, column: int) -> Iterator[tuple[str, Cells]]:
        if column < newest_sealed(state) or self.hasty or self.mutation == "abort":
            yield f"gives up parity of {column}", put(cells, column, HELD | NEVER)
        if any(cell_of(other, column) & DATA != HELD for other in group.nodes):
            return
        if sum(other & PARITY == KEPT for other in cells) < self.parity_sets:
            yield f"completes parity of {column}", put(cells, column, HELD | KEPT)
        if self.mutation == "overwrite" and state.protected >= 0 and cells[state.protected] & PARITY == KEPT:
            overwritten = put(cells, state.protected, cells[state.protected] & DATA | DROPPED)
            yield f"completes parity of {column} over older", put(overwritten, column, HELD | KEPT)

    def _free_steps(self, state: State, cells: Cells) -> Iterator[tuple[str, Cells]]:
        """What a node may free, in a step of its own."""
        for column, cell in enumerate(cells):
            if cell & DATA == HELD and self._is_free(state, column):
                yield f"frees data of {column}", put(cells, column, FREED | cell & PARITY)
            if cell & PARITY == KEPT and self._is_free(state, column):
                yield f"frees parity of {column}", put(cells, column, cell & DATA | DROPPED)

    def _is_free(self, state: State, column: int) -> bool:
        """True if nobody needs a snapshot any more."""
        if column == state.protected:
            return False
        superseded = self.supersede and column in given_up(state) and column < newest_sealed(state)
        return column < state.protected or column in missed(state) or superseded

    def _wrong_frees(self, state: State, group: Group, cells: Cells) -> Iterator[tuple[str, Cells]]:
        sealed = newest_sealed(state)
        in_group = max(
            (c for c in range(len(cells)) if all(has_parity(cell_of(node, c)) for node in group.nodes)), default=0
        )
        for column, cell in enumerate(cells):
            wrongly = {
                "group": column < min(in_group, sealed),
                "abort": column in given_up(state),
                "forgetful": True,
                "seal": column < sealed,
            }
            if cell & DATA == HELD and wrongly[str(self.mutation)]:
                yield f"frees {column} wrongly", put(cells, column, FREED | cell & PARITY)

    # ---- what follows at once

    def _settled(self, label: str, state: State) -> tuple[str, State]:
        """The state after a step, and with everything freed that may be (`lazy`: forgotten, once all have freed it)."""
        for column in range(columns_of(state) - 1, max(state.protected, -1), -1):
            if all(has_parity(cell_of(cells, column)) for cells in nodes_of(state)):
                label = f"{label}: {column} {PROTECTED}"
                restored = state.restored if state.restored > column else NOWHERE
                groups = tuple(group._replace(lost=0) for group in state.groups)
                state = state._replace(protected=column, restored=restored, groups=groups)
                break
        for column in range(columns_of(state) - 1, -1, -1):
            if not self.lazy:
                state = self._freed(state, column)
            elif self._is_free(state, column) and self._forgotten(state, column):
                state = without(state, column)
        rebuilt = 0 <= state.restored == state.protected and not _lacks_data(state, state.restored)
        if rebuilt or state.restored == GONE:
            state = state._replace(restored=NOWHERE)
        return label, canonical(state)

    def _freed(self, state: State, column: int) -> State:
        """The state with a snapshot freed by all, if it may be; else, if its parity is given up, with that known."""
        if self._is_free(state, column):
            return without(state, column)
        if column <= state.protected or column not in given_up(state):
            return state
        groups = []
        for group in state.groups:
            nodes = []
            for cells in group.nodes:
                cell = cell_of(cells, column)
                kept = cell == NONE or cell & PARITY == KEPT
                nodes.append(cells if kept else put(cells, column, cell & DATA | NEVER))
            groups.append(group._replace(nodes=tuple(nodes)))
        return state._replace(groups=tuple(groups))

    def _forgotten(self, state: State, column: int) -> bool:
        """True if all nodes are done with a snapshot."""
        cells = [cell_of(node, column) for node in nodes_of(state)]
        return all(map(is_empty, cells)) and (NONE not in cells or column < state.protected)

    # ---- restarts

    def _restarts(self, state: State) -> Iterator[tuple[str, State]]:
        """Nodes are lost, all others promise, the newest recoverable snapshot is restored, lost nodes are replaced."""
        promised = state.protected != NOWHERE
        choices = []
        for group in state.groups:
            covered = losses(len(group.nodes), self.parity - (group.lost if promised else 0))
            alike = {tuple(group.nodes[index] for index in gone): gone for gone in covered}
            choices.append(list(alike.values()))
        for lost in itertools.product(*choices):
            names = ", ".join(f"{at}.{index}" for at, gone in enumerate(lost) for index in gone) or "any loss"
            pairs = zip(state.groups, lost, strict=True)
            mask = common(recoverable(group.nodes, gone, self.parity, self._strict) for group, gone in pairs)
            if mask == 0:
                if not promised:
                    yield f"restart from nothing without {names}", self.initial()
                continue
            point = mask.bit_length() - 1
            if self.mutation == "thaw" and state.chosen == NOWHERE:
                yield f"the inventory without {names} chooses {point}", state._replace(chosen=point)
            yield f"restart from {point} without {names}", self._begun(state, lost, point)

    def _begun(self, state: State, lost: tuple[tuple[int, ...], ...], point: int) -> State:
        """The state in which an epoch begins that restores a column: all else is freed, but for the protected one."""
        keeps_protected = 0 <= state.protected < point and self.mutation != "unpinned"
        kept = [state.protected, point] if keeps_protected else [point]
        was_protected = point == state.protected
        promised = state.protected != NOWHERE
        groups = []
        for group, gone in zip(state.groups, lost, strict=True):
            nodes = []
            for index, cells in enumerate(group.nodes):
                begun = [cell_of(cells, column) for column in kept]
                if index in gone:
                    begun = [LOST | OPEN] * len(kept)
                elif not was_protected:
                    begun[-1] = _begun_cell(begun[-1])
                nodes.append(tuple(begun))
            groups.append(Group(group.lost + len(gone) if promised else 0, tuple(nodes)))
        protected = 0 if was_protected or keeps_protected else GONE if promised else NOWHERE
        return self._settled("", State(protected, len(kept) - 1, NOWHERE, tuple(groups)))[1]


def _lacks_data(state: State, column: int) -> bool:
    """True if a node that replaced a lost one has not rebuilt a snapshot yet."""
    return any(cells[column] & DATA != HELD for cells in nodes_of(state))


def _begun_cell(cell: int) -> int:
    """A cell of a restore point that is not protected, in its new epoch: facts are posted anew."""
    return (HELD if cell & DATA == HELD else LOST) | (KEPT if cell & PARITY == KEPT else OPEN)
