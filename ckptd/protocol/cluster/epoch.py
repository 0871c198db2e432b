"""How an epoch begins: what rank 0 asks and chooses, and what a member does when it is told. Pure.

Invariants
- Nothing is chosen before every node of the job has promised, and promising freezes: what an inventory lists is there
  until Begin.
- A dead branch never wins: only snapshots of the live lineage are chosen.
- Beside the restore point the newest snapshot is kept that may have been declared protected, known or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from ckptd.core.lineage import EpochRecord, live
from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Held, Membership, Shape, newer
from ckptd.protocol.cluster.state import ClusterState, Holding

MAX_RECORDS = 1000
"""Epochs that an arena remembers; the store has them all."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where an epoch begins. `held`: in memory, what the arenas have of `point`; empty if it is in the store only, and
    then `point` is named by its step. `tolerates`: how many more losses in a group leave it recoverable. `protected`:
    what is kept beside it."""

    point: SnapshotId | None
    step: int
    held: dict[str, Held]
    tolerates: int
    protected: SnapshotId | None

    @property
    def name(self) -> SnapshotId | None:
        """Of the point, by its step: as the store and the lineage know it."""
        return None if self.point is None else SnapshotId(self.point.epoch, self.step)

    @property
    def world(self) -> int:
        """Ranks that have captured the point, as far as it is in memory."""
        return max((item.world for item in self.held.values()), default=0)


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
    promises: Sequence[m.Promise],
    records: Iterable[EpochRecord],
    stored: Collection[SnapshotId] = (),
    wanted: Callable[[SnapshotId], bool] = lambda name: True,
    spoiled: Collection[SnapshotId] = (),
) -> Choice:
    """The restore point, from all that was promised, the lineage, and what is committed in the store. `wanted` narrows
    what may be restored; what is `spoiled` cannot be read from memory. Both by name."""
    held: dict[SnapshotId, dict[str, Held]] = {}
    for promise in promises:
        for item in promise.held:
            held.setdefault(item.snapshot, {})[promise.arena] = item
    names = {snapshot: SnapshotId(snapshot.epoch, _step_of(found)) for snapshot, found in held.items()}
    left = {s: tolerated(list(found.values())) for s, found in held.items() if names[s] not in spoiled}
    whole = {names[s]: s for s in held if left.get(s) is not None}
    lineage = {record.epoch: record for promise in promises for record in promise.records}
    lineage |= {record.epoch: record for record in records}
    alive = live({*whole, *stored}, lineage.values())
    name = next((s for s in alive if wanted(s)), None)
    if name is None or name not in whole:
        return Choice(name, 0 if name is None else name.step, {}, 0, None)
    point = whole[name]
    known = {promise.protected for promise in promises}
    kept = [
        whole[s]
        for s in alive
        if s <= name and s in whole and (whole[s] in known or may_be_protected(list(held[whole[s]].values())))
    ]
    return Choice(point, name.step, held[point], left[point] or 0, kept[0] if kept else None)


def _step_of(held: dict[str, Held]) -> int:
    """The step of a snapshot; the data tell, where members do not agree."""
    return next((item.step for item in held.values() if item.data), next(iter(held.values())).step)


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


def inviter(promises: Sequence[m.Promise], chosen: Choice) -> str | None:
    """The arena whose daemon asks earlier members that are no nodes of the job any more; None if it is not worth the
    time, since what is left without them is no older than what was protected."""
    newest = max((promise.began for promise in promises if promise.began is not None), default=None)
    there = [promise for promise in promises if promise.began == newest]
    if newest is None or len(there) >= there[0].members:
        return None
    protected = max((promise.protected for promise in promises if promise.protected is not None), default=None)
    if chosen.held and (protected is None or (chosen.point is not None and chosen.point >= protected)):
        return None
    return min(promise.arena for promise in there)


def beginning(
    epoch: Epoch, chosen: Choice, arenas: Sequence[str], guests: tuple[str, ...], shape: Shape, world: int = 1
) -> m.Begin:
    """What everybody is told of an epoch that starts from `chosen`."""
    order, continued = numbered(arenas, chosen.held, shape)
    holders = {arena: chosen.held[arena].string for arena in guests if arena in chosen.held}
    return m.Begin(
        epoch,
        Membership(epoch, order, guests, shape, world),
        chosen.point,
        chosen.step,
        continued,
        chosen.tolerates,
        holders,
        chosen.protected,
    )


# --- a member


def promise(state: ClusterState, epoch: Epoch) -> m.Promise | m.Refuse:
    """The answer to Prepare; from now on the state is frozen."""
    for known in (state.promised, state.epoch):
        if known is not None and epoch.number <= known.number and not (epoch == known and state.frozen):
            return m.Refuse(epoch, state.arena, known)
    state.promised = epoch
    held = tuple(item for holding in state.holdings if (item := holding.held()) is not None)
    members = 0 if state.membership is None else len(state.membership.arenas)
    return m.Promise(epoch, state.arena, held, state.protected, tuple(state.records), state.epoch, members)


def begin(state: ClusterState, message: m.Begin) -> list[m.Free]:
    """The epoch begins at this arena: what it neither restores nor keeps is freed."""
    membership = message.membership
    state.membership, state.promised = membership, membership.epoch
    state.number = membership.arenas.index(state.arena) if state.arena in membership.arenas else None
    state.point, state.point_step = message.point, message.step
    state.tolerates, state.holders = message.tolerates, message.holders
    state.protected, state.confirmed, state.granted = message.protected, False, 0
    state.continued = message.continued and state.number is not None
    state.records = [*state.records, EpochRecord(membership.epoch, state.restore_point)][-MAX_RECORDS:]
    goes_on = state.flushing is not None and state.flushing.snapshot == message.point and state.continued
    state.flush = msgspec.structs.replace(state.flushing, number=1) if goes_on and state.flushing else None
    state.last, state.written = None, 0
    if state.durable is not None and (state.restore_point is None or state.durable > state.restore_point):
        state.durable = None  # on a branch that is left
    freed: list[m.Free] = []
    for holding in list(state.holdings):
        kept = holding.snapshot in (message.point, message.protected)
        moved = state.continued and holding.snapshot == message.point and holding.string != state.number
        if not kept or moved:
            state.holdings.remove(holding)
            freed += [m.Free(holding.snapshot, "data"), m.Free(holding.snapshot, "parity")]
    if state.continued:
        _continue(state, message)
    return freed


def adopted(state: ClusterState, epoch: Epoch, name: SnapshotId | None, world: int, *, alone: bool) -> m.Begin:
    """What an arena takes an epoch for, that went on from `name`, when it comes too late for its Begin: as the only
    member if the job is `alone` on this node, else as none."""
    shape = Shape(((0,),), 0) if alone else Shape((), 0)
    arenas = (state.arena,) if alone else ()
    state.promised = epoch
    membership = Membership(epoch, arenas, (), shape, world)
    return m.Begin(epoch, membership, name, 0 if name is None else name.step, False, 0, {}, None)


def _continue(state: ClusterState, message: m.Begin) -> None:
    """The restore point becomes a snapshot of the new epoch: its facts are posted anew."""
    assert message.point is not None
    assert state.number is not None
    holding = state.find(message.point)
    if holding is None:
        holding = Holding(message.point, state.number, message.membership.shape, world=message.membership.world)
        state.holdings.append(holding)
    holding.step, holding.capturing = message.step, False
    holding.sealed, holding.parity = True if holding.data else None, None
    holding.late, holding.replicas, holding.agreed = False, {}, True


def newest_known(state: ClusterState, decided: m.Decided) -> SnapshotId | None:
    """The newest protected snapshot, as this arena knows."""
    return newer(state.protected, decided.protected)
