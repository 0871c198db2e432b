"""How an epoch begins: what rank 0 asks and chooses, and what a member does when it is told. Pure.

Invariants
- Nothing is chosen before every node of the job has promised, and promising freezes: what an inventory lists is there
  until Begin.
- A dead branch never wins: only snapshots of the live lineage are chosen.
- Beside the restore point the newest snapshot is kept that may have been declared protected, known or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from ckptd.core.lineage import EpochRecord, live
from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Held, Membership, Shape, newer
from ckptd.protocol.cluster.state import ClusterState, Holding

MAX_RECORDS = 1000
"""Epochs that an arena remembers; the store has them all."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where an epoch begins. `held`: in memory, what the arenas have of `point`; empty if it is in the store only.
    `tolerates`: how many more losses in a group leave it recoverable. `protected`: what is kept beside it."""

    point: SnapshotId | None
    step: int
    held: dict[str, Held]
    tolerates: int
    protected: SnapshotId | None


def tolerated(held: Collection[Held]) -> int | None:
    """How many more losses in each group a snapshot survives, from what is at hand of it; None: it is lost.

    In each group no string may lack its data, or at most m may lack data or parity: a stripe lacks no more positions
    than that. All must be of one step.
    """
    shapes = {h.shape for h in held}
    if len(shapes) != 1 or len({h.step for h in held if h.data}) != 1:
        return None
    (shape,) = shapes
    data = {h.string for h in held if h.data}
    both = {h.string for h in held if h.data and h.parity}
    left = shape.parity
    for group in shape.groups:
        lacking = sum(number not in both for number in group)
        if lacking > shape.parity and any(number not in data for number in group):
            return None
        left = min(left, max(shape.parity - lacking, 0))
    return left


def may_be_protected(held: Collection[Held]) -> bool:
    """Everyone reached that has some of a snapshot has posted Parity: the root may have declared it, and be lost."""
    return all(h.posted for h in held)


def choose(
    promises: Sequence[m.Promise], records: Iterable[EpochRecord], stored: Collection[SnapshotId] = ()
) -> Choice:
    """The restore point, from all that was promised, the lineage, and what is committed in the store."""
    held: dict[SnapshotId, dict[str, Held]] = {}
    for promise in promises:
        for item in promise.held:
            held.setdefault(item.snapshot, {})[promise.arena] = item
    lineage = {record for promise in promises for record in promise.records} | set(records)
    alive = live({*held, *stored}, lineage)
    left = {s: tolerated(list(found.values())) for s, found in held.items()}
    point = next((s for s in alive if left.get(s) is not None or s in stored), None)
    if point is None or left.get(point) is None:
        return Choice(point, 0 if point is None else point.step, {}, 0, None)
    known = {promise.protected for promise in promises}
    kept = [
        s
        for s in alive
        if s <= point and left.get(s) is not None and (s in known or may_be_protected(list(held[s].values())))
    ]
    step = next(h.step for h in held[point].values() if h.data)
    return Choice(point, step, held[point], left[point] or 0, kept[0] if kept else None)


def numbered(arenas: Sequence[str], held: dict[str, Held], shape: Shape) -> tuple[tuple[str, ...], bool]:
    """Arenas in the order of their numbers, and whether the restore point goes on in them: who holds string i of it is
    member i, if there are as many; the others fill the gaps."""
    shapes = {item.shape for item in held.values()}
    if shapes != {shape}:
        return tuple(arenas), False
    places: list[str | None] = [None] * shape.count
    for arena in sorted(arenas, key=lambda name: _worth(held.get(name)), reverse=True):
        if arena in held and places[held[arena].string] is None:
            places[held[arena].string] = arena
    others = (arena for arena in arenas if arena not in places)
    return tuple(arena if arena is not None else next(others) for arena in places), True


def _worth(item: Held | None) -> int:
    """Of two that hold the same string the one with its parities stays: the other one's copy is freed."""
    return 0 if item is None or not item.data else 2 if item.parity else 1


# --- rank 0


class Launch:
    """Begins an epoch for `arenas`, the nodes of the job, with earlier members (`guests`) as far as they answer.

    Events: `heard` a message, `expire` (guests have had their time), `recorded`. `take()`: what to send and `record`.
    """

    def __init__(
        self,
        arenas: Sequence[str],
        guests: Sequence[str],
        shape: Shape,
        slots: int,
        nonce: str,
        *,
        number: int = 1,
        records: Sequence[EpochRecord] = (),
        stored: Collection[SnapshotId] = (),
    ) -> None:
        self.arenas, self.shape = tuple(arenas), shape
        self.epoch = Epoch(number, nonce)
        self.choice: Choice | None = None
        self.record: EpochRecord | None = None
        """To be written into the store before anything begins."""
        self.begun: set[str] = set()
        self.promises: dict[str, m.Promise] = {}
        self._guests, self._slots = tuple(guests), slots
        self._records, self._stored = records, stored
        self._expired = False
        self._begin: m.Begin | None = None

    @property
    def done(self) -> bool:
        """Every node of the job has begun."""
        return self._begin is not None and self.begun.issuperset(self.arenas)

    def heard(self, message: m.Promise | m.Refuse | m.Begun) -> None:
        """An answer. One to an earlier number says nothing: a late refusal of it would raise the number for ever."""
        if message.epoch != self.epoch:
            return
        if isinstance(message, m.Begun):
            self.begun.add(message.arena)
        elif self.choice is None and isinstance(message, m.Promise):
            self.promises[message.arena] = message
        elif self.choice is None and isinstance(message, m.Refuse) and message.promised >= self.epoch:
            self.epoch = Epoch(message.promised.number + 1, self.epoch.nonce)
            self.promises.clear()
        self._choose()

    def expire(self) -> None:
        """Guests that have not answered count as lost."""
        self._expired = True
        self._choose()

    def recorded(self) -> None:
        """The record is durable, or there is no store."""
        assert self.choice is not None
        order, continued = numbered(self.arenas, self.choice.held, self.shape)
        guests = tuple(arena for arena in self.promises if arena not in self.arenas)
        membership = Membership(self.epoch, order, guests, self.shape, self._slots)
        chosen = self.choice
        holders = {arena: chosen.held[arena].string for arena in guests if arena in chosen.held}
        self._begin = m.Begin(
            self.epoch,
            membership,
            chosen.point,
            chosen.step,
            continued,
            chosen.tolerates,
            holders,
            chosen.protected,
        )

    def messages(self) -> list[tuple[str, m.ClusterMessage]]:
        """What those who have not answered are to be told, as often as it takes."""
        if self._begin is not None:
            waiting = [*self.arenas, *self._begin.membership.guests]
            return [(arena, self._begin) for arena in waiting if arena not in self.begun]
        if self.choice is not None:
            return []
        everyone = [*self.arenas, *self._guests]
        return [(arena, m.Prepare(self.epoch)) for arena in everyone if arena not in self.promises]

    def _choose(self) -> None:
        answered = self.promises.keys()
        if self.choice is not None or not answered >= set(self.arenas):
            return
        if self._expired or answered >= set(self._guests):
            self.choice = choose(list(self.promises.values()), self._records, self._stored)
            self.record = EpochRecord(self.epoch, self.choice.point)


# --- a member


def promise(state: ClusterState, epoch: Epoch) -> m.Promise | m.Refuse:
    """The answer to Prepare; from now on the state is frozen."""
    if state.promised is not None and epoch < state.promised:
        return m.Refuse(epoch, state.arena, state.promised)
    if state.epoch is not None and epoch <= state.epoch:
        return m.Refuse(epoch, state.arena, state.epoch)
    state.promised = epoch
    held = tuple(item for holding in state.holdings if (item := holding.held()) is not None)
    return m.Promise(epoch, state.arena, held, state.protected, tuple(state.records))


def begin(state: ClusterState, message: m.Begin) -> list[m.Free]:
    """The epoch begins at this arena: what it neither restores nor keeps is freed."""
    membership = message.membership
    state.membership, state.promised = membership, membership.epoch
    state.number = membership.arenas.index(state.arena) if state.arena in membership.arenas else None
    state.point, state.tolerates, state.holders = message.point, message.tolerates, message.holders
    state.protected, state.confirmed, state.granted = message.protected, False, 0
    state.continued = message.continued and state.number is not None
    state.records = [*state.records, EpochRecord(membership.epoch, message.point)][-MAX_RECORDS:]
    freed: list[m.Free] = []
    for holding in list(state.holdings):
        kept = holding.snapshot in (message.point, message.protected) and not holding.freed
        moved = state.continued and holding.snapshot == message.point and holding.string != state.number
        if not kept or moved:
            state.holdings.remove(holding)
            freed += [m.Free(holding.snapshot, "data"), m.Free(holding.snapshot, "parity")]
    if state.continued:
        _continue(state, message)
    return freed


def _continue(state: ClusterState, message: m.Begin) -> None:
    """The restore point becomes a snapshot of the new epoch: its facts are posted anew."""
    assert message.point is not None
    assert state.number is not None
    holding = state.find(message.point)
    if holding is None:
        holding = Holding(message.point, state.number, message.membership.shape)
        state.holdings.append(holding)
    holding.step, holding.capturing = message.step, False
    holding.sealed, holding.parity = True if holding.data else None, None
    holding.written = holding.late = False


def newest_known(state: ClusterState, decided: m.Decided) -> SnapshotId | None:
    """The newest protected snapshot, as this arena knows."""
    return newer(state.protected, decided.protected)
