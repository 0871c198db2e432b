"""Who reads what of a checkpoint when several ranks want the same chunks, and in which round it is passed on. Pure.

What one rank alone wants is left to it. Everything else is cut into units: runs of neighbouring chunks that the same
ranks want (tiers/store/runs.py), so that one request reads a unit and one message carries it. Of each unit one rank is
the reader, which alone reads it from the store; and on every node where it is wanted one rank is the decoder, which
decodes it into memory that its node shares. The reader is the decoder of its own node.

Where not every rank can read everything (the memory of several nodes) ranks ask for what they cannot read themselves,
and for nothing else: all of it is units, and the reader of one is a rank that can read it and has no use for it.

Units are taken in rounds. Invariants: every rank computes the same schedule from the same question; in one round no
rank has more than `room` bytes of units to read or decode; those that it decodes have each a part of its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.plan.exchange import Readers, plan_exchange
from ckptd.tiers.store.runs import in_place_order, run_starts
from ckptd.trainer.loading import ALIGNMENT_BYTES

Ints = npt.NDArray[np.int64]


class Place(NamedTuple):
    """The decoder of a unit on one node, and where in its memory of the round it has room for the unit."""

    decoder: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rows that are read, sent and decoded together. `wanting`: the ranks, ascending; `places`: by node."""

    number: int
    rows: list[int]
    size: int
    reader: int
    wanting: list[int]
    places: dict[int, Place]

    @property
    def targets(self) -> list[int]:
        """The decoders to which the reader sends it."""
        return [place.decoder for place in self.places.values() if place.decoder != self.reader]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`rounds` of units in one order; `room`: bytes that a decoder needs in a round at most; `nodes`: that of each
    rank; `alone`: for each rank the rows that nobody else wants."""

    rounds: list[list[Unit]]
    room: int
    nodes: list[int]
    alone: list[Ints]

    @property
    def spans_nodes(self) -> bool:
        """Whether any unit is wanted on another node than its reader's."""
        return any(unit.targets for units in self.rounds for unit in units)

    def staged(self, unit: Unit, node: int) -> bool:
        """Whether others of a node than its decoder there want it, so that it is decoded into shared memory."""
        decoder = unit.places[node].decoder
        return any(self.nodes[rank] == node and rank != decoder for rank in unit.wanting)

    def staging(self) -> set[int]:
        """The ranks that decode something into shared memory."""
        return {
            place.decoder
            for units in self.rounds
            for unit in units
            for node, place in unit.places.items()
            if self.staged(unit, node)
        }


def make_schedule(
    catalog: Catalog,
    wanted: Sequence[Ints],
    nodes: Sequence[int],
    room: int,
    readers: Readers | None = None,
    load: Ints | None = None,
) -> Schedule:
    """The schedule for ranks that want these rows, each once, and lie on these nodes. `room`: bytes that a rank may
    have in one round, if no single unit is larger. `readers`: who can read what; then what ranks read for themselves is
    not among `wanted`, but counted in `load` (bytes of each rank)."""
    times = np.zeros(len(catalog), np.int32)
    kind = np.zeros(len(catalog), np.int64)
    for rank, rows in enumerate(wanted):
        times[rows] += 1
        kind[rows] ^= _mixed(rank)
    order = in_place_order(catalog, np.flatnonzero(times > (1 if readers is None else 0)))
    kind = kind[order]
    if readers is not None:  # rows of a unit are read by one rank
        kind = np.unique(kind, return_inverse=True)[1] * len(readers.ranks) + readers.place[order]
    starts = run_starts(catalog, order, kind)
    unit_of = np.full(len(catalog), -1, np.int64)
    unit_of[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    padded = -(-catalog.raw[order] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    sizes = np.add.reduceat(padded, starts) if len(starts) else np.zeros(0, np.int64)
    each = [np.unique(unit_of[rows][unit_of[rows] >= 0]) for rows in wanted]
    if readers is None:
        alone = [rows[times[rows] == 1] for rows in wanted]
        own = np.array([catalog.raw[rows].sum() for rows in alone], np.int64)
        plan = plan_exchange(sizes, each, nodes, load=own)
    else:
        alone = [np.zeros(0, np.int64) for _ in wanted]
        plan = plan_exchange(
            sizes, each, nodes, load=load, readers=readers._replace(place=readers.place[order[starts]])
        )
    wanting = _by_unit(each, len(starts))
    rows_of = [run.tolist() for run in np.split(order, starts[1:])] if len(starts) else []
    room = max(room, int(sizes.max(initial=0)))
    packer = _Packer(list(nodes), room)
    for number in _sequence(sizes, plan.reader).tolist():
        packer.add(number, rows_of[number], int(sizes[number]), int(plan.reader[number]), wanting[number])
    return Schedule(packer.rounds, packer.most, list(nodes), alone)


class _Packer:
    """Puts units into rounds, in the order in which they come."""

    def __init__(self, nodes: list[int], room: int) -> None:
        self._nodes = nodes
        self._room = room
        self._used: dict[int, int] = {}
        self._turns: dict[int, int] = {}
        self.rounds: list[list[Unit]] = []
        self.most = 0

    def add(self, number: int, rows: list[int], size: int, reader: int, wanting: list[int]) -> None:
        decoders = self._decoders(reader, wanting)
        busy = {reader, *decoders.values()}
        if not self.rounds or any(self._used.get(rank, 0) + size > self._room for rank in busy):
            self.rounds.append([])
            self._used = {}
        places = {node: Place(rank, self._used.get(rank, 0)) for node, rank in decoders.items()}
        for rank in busy:
            self._used[rank] = self._used.get(rank, 0) + size
            self.most = max(self.most, self._used[rank])
        self.rounds[-1].append(Unit(number, rows, size, reader, wanting, places))

    def _decoders(self, reader: int, wanting: list[int]) -> dict[int, int]:
        """Node -> rank; on other nodes than the reader's those who want it take turns."""
        on_node: dict[int, list[int]] = {}
        for rank in wanting:
            on_node.setdefault(self._nodes[rank], []).append(rank)
        decoders = {}
        for node, ranks in on_node.items():
            if node == self._nodes[reader]:
                decoders[node] = reader
            else:
                self._turns[node] = turn = self._turns.get(node, -1) + 1
                decoders[node] = ranks[turn % len(ranks)]
        return decoders


def _by_unit(each: Sequence[Ints], units: int) -> list[list[int]]:
    """The ranks that want each unit, ascending, from the units that each rank wants."""
    ranks = np.repeat(np.arange(len(each)), [len(units_of) for units_of in each])
    unit = np.concatenate([np.zeros(0, np.int64), *each])
    order = np.argsort(unit, kind="stable")
    bounds = np.searchsorted(unit[order], np.arange(1, units))
    return [found.tolist() for found in np.split(ranks[order], bounds)] if units else []


def _sequence(sizes: Ints, readers: Ints) -> Ints:
    """All units, so that each reader takes its own in order of place and all readers advance alike in bytes."""
    if not len(sizes):
        return sizes
    by_reader = np.argsort(readers, kind="stable")
    ends = np.cumsum(sizes[by_reader])
    first = np.flatnonzero(np.diff(readers[by_reader], prepend=-1))
    before = np.repeat(np.append(0, ends[first[1:] - 1]), np.diff(np.append(first, len(by_reader))))
    progress = np.empty(len(sizes), np.int64)
    progress[by_reader] = ends - before
    return np.argsort(progress, kind="stable")


def _mixed(rank: int) -> np.int64:
    """A number for a rank such that sets of ranks have, but for chance, different sums: the finaliser of splitmix64.
    Where chance has it, a unit holds rows that not all of its ranks want, and they leave them out.
    """
    value = (rank + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return np.uint64(value ^ value >> 31).astype(np.int64)
