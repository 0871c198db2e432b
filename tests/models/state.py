"""A state of the model: what the nodes of all groups hold of each snapshot, and what they have posted about it.

Columns are the snapshots that matter, oldest first; a node is a tuple with a cell for each. States are canonical: nodes
sorted within their group, groups sorted, nothing noted of snapshots that a node has not begun.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

# Data in a cell: none yet; held, freed (Sealed posted); lost with the node that this one replaces; NotSealed posted.
DATA = 28
NONE, HELD, FREED, LOST, MISSED = 0, 4, 8, 12, 16
# Parity in a cell: undecided; held, freed (Parity posted); NoParity posted, or heard of.
PARITY = 3
OPEN, KEPT, DROPPED, NEVER = 0, 1, 2, 3

NOWHERE, GONE = -1, -2

Cells = tuple[int, ...]


class Group(NamedTuple):
    """`lost`: how many nodes were lost since the newest protected snapshot became so. `nodes`: as they are now."""

    lost: int
    nodes: tuple[Cells, ...]


class State(NamedTuple):
    """`protected`: column of the newest protected snapshot. `restored`: of the restore point of this epoch, until a
    newer one is protected. `chosen`: of what an inventory has chosen. NOWHERE: none; GONE: no longer there."""

    protected: int
    restored: int
    chosen: int
    groups: tuple[Group, ...]


# ---- cells


def cell_of(cells: Cells, column: int) -> int:
    """A node's cell for a column."""
    return cells[column] if column < len(cells) else NONE


def put(cells: Cells, column: int, cell: int) -> Cells:
    """Cells with one changed, or appended."""
    return (*cells[:column], cell, *cells[column + 1 :])


def is_sealed(cell: int) -> bool:
    """True if the node has posted Sealed."""
    return cell & DATA in (HELD, FREED)


def has_parity(cell: int) -> bool:
    """True if the node has posted Sealed and Parity."""
    return is_sealed(cell) and cell & PARITY in (KEPT, DROPPED)


def is_empty(cell: int) -> bool:
    """True if the node holds nothing of the snapshot."""
    return cell & DATA != HELD and cell & PARITY != KEPT


# ---- columns


def nodes_of(state: State) -> Iterable[Cells]:
    """All nodes of all groups."""
    return [cells for group in state.groups for cells in group.nodes]


@lru_cache(maxsize=4096)
def columns_of(state: State) -> int:
    """How many columns there are."""
    return max(map(len, nodes_of(state)))


@lru_cache(maxsize=4096)
def given_up(state: State) -> frozenset[int]:
    """Columns of which a node has posted NoParity."""
    return frozenset(c for cells in nodes_of(state) for c, cell in enumerate(cells) if cell & PARITY == NEVER)


@lru_cache(maxsize=4096)
def missed(state: State) -> frozenset[int]:
    """Columns of which a node has posted NotSealed."""
    return frozenset(c for cells in nodes_of(state) for c, cell in enumerate(cells) if cell & DATA == MISSED)


@lru_cache(maxsize=4096)
def newest_sealed(state: State) -> int:
    """The newest column that all nodes have sealed, or that was restored or protected; NOWHERE if none."""
    for column in range(columns_of(state) - 1, -1, -1):
        if column in (state.restored, state.protected):
            return column
        if all(is_sealed(cell_of(cells, column)) for cells in nodes_of(state)):
            return column
    return NOWHERE


# ---- what can be recovered


@functools.cache
def recoverable(nodes: tuple[Cells, ...], gone: tuple[int, ...], parity: int, strict: bool) -> int:
    """Bit c: a group can give back column c without the nodes `gone`.

    That is so if none lacks data, or at most m lack data or parity: a stripe lacks no more positions than that.
    `strict` (a rule that was tried): at most m lack data, and every other one has parity.
    """
    mask = 0
    for column in range(max(map(len, nodes))):
        cells = [NONE if index in gone else cell_of(node, column) for index, node in enumerate(nodes)]
        no_data = sum(cell & DATA != HELD for cell in cells)
        lacking = sum(cell & DATA != HELD or cell & PARITY != KEPT for cell in cells)
        if no_data == 0 or (lacking <= parity and not (strict and lacking > no_data)):
            mask |= 1 << column
    return mask


@functools.cache
def losses(count: int, most: int) -> tuple[tuple[int, ...], ...]:
    """All ways to lose at most so many of a group's nodes."""
    return tuple(gone for size in range(most + 1) for gone in itertools.combinations(range(count), size))


@functools.cache
def recoverable_after(group: Group, parity: int, strict: bool) -> frozenset[int]:
    """What a group can give back, as masks, after any loss that the promise still covers."""
    covered = losses(len(group.nodes), parity - group.lost)
    return frozenset(recoverable(group.nodes, gone, parity, strict) for gone in covered)


def common(masks: Iterable[int]) -> int:
    """What all groups can give back."""
    return functools.reduce(operator.and_, masks)


# ---- changed states


def with_node(state: State, at: int, index: int, cells: Cells) -> State:
    """The state with one node's cells changed."""
    group = state.groups[at]
    changed = group._replace(nodes=(*group.nodes[:index], cells, *group.nodes[index + 1 :]))
    return state._replace(groups=(*state.groups[:at], changed, *state.groups[at + 1 :]))


def without(state: State, column: int) -> State:
    """The state after a snapshot is forgotten by all."""
    groups = tuple(
        group._replace(nodes=tuple((*cells[:column], *cells[column + 1 :]) for cells in group.nodes))
        for group in state.groups
    )
    protected, restored, chosen = (_moved(place, column) for place in state[:3])
    return State(protected, restored, chosen, groups)


def _moved(place: int, column: int) -> int:
    """Where a column is after another, or itself, has gone."""
    return GONE if place == column else place - (place > column)


def canonical(state: State) -> State:
    """The one of all states that differ in names alone."""
    groups = (Group(group.lost, tuple(sorted(map(_trimmed, group.nodes)))) for group in state.groups)
    return state._replace(groups=tuple(sorted(groups)))


def _trimmed(cells: Cells) -> Cells:
    while cells and cells[-1] == NONE:
        cells = cells[:-1]
    return cells
