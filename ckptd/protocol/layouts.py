"""How many slots each rank gets, which it keeps and which it makes. Pure bookkeeping on the state of a node.

A rank has `LEAST` slots, one more where snapshots are flushed while newer ones are captured, and one more where they
are encoded meanwhile; fewer where memory is short. Slots of an earlier process that fit the layout are kept, with what
is in them. Those that a process of another epoch may still write to are left to it, and dropped when it ends, unless
memory does not allow for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ckptd.core.types import Epoch
from ckptd.protocol.cluster.state import PARITY_SETS
from ckptd.protocol.messages import Layout
from ckptd.protocol.slots import Slot, SlotTable, memory_bytes
from ckptd.protocol.state import NodeState

LEAST = 2
"""One holds the newest snapshot, one takes the next."""


class Allotment(NamedTuple):
    """The slots of one rank: numbers of those to keep and of those to make."""

    reuse: list[int]
    create: list[int]


class Allotments(NamedTuple):
    """What each rank gets, None where memory does not suffice; the slots that go; what is to be said of it."""

    allotments: list[Allotment] | None
    dropped: list[int]
    complaint: str | None


def allot(state: NodeState, layouts: Sequence[Layout], available_bytes: int, limit: str) -> Allotments:
    """Makes `layouts`, one a rank, those of the node, of which new slots may take `available_bytes` (because of
    `limit`) and what idle ones leave that fit nobody."""
    assert state.epoch is not None, "ranks of an epoch have answered"
    state.layouts = {rank: layout.digest for rank, layout in zip(state.ranks, layouts, strict=True)}
    gone = state.table.retire(state.layouts)
    mapped, left = set(state.instances.values()), state.table.slots
    freed = [slot for slot in gone if slot.ready and slot.owner not in mapped]
    room = available_bytes + memory_bytes([*left, *freed]) - memory_bytes(left) - parity_bytes(state, layouts)
    wanted = LEAST + (state.own_store is not None) + (state.parity > 0)
    found = distribute(state.table, state.epoch, state.ranks, layouts, wanted, room)
    complaint = None
    if found is None:
        state.layouts = {}
        complaint = (
            f"snapshot memory: {LEAST} slots for {len(state.ranks)} ranks need "
            f"{missing_bytes([[] for _ in layouts], layouts, LEAST)} bytes, {max(0, room)} are available on this "
            f"node beside snapshots and parities ({limit}); free memory, raise the limit, or use fewer bytes"
        )
    elif found and (made := len(found[0].reuse) + len(found[0].create)) < wanted:
        complaint = f"memory for {made} slots a rank instead of {wanted}: a flush or encoding stops snapshots"
    return Allotments(found, [slot.slot for slot in gone], complaint)


def parity_bytes(state: NodeState, layouts: Sequence[Layout]) -> int:
    """What the parities of other nodes' strings take here, if these are as long as this node's."""
    number, membership = state.cluster.number, state.cluster.membership
    if number is None or membership is None or not membership.shape.parity:
        return 0
    parity, members = membership.shape.parity, len(membership.shape.group_of(number))
    size = sum(layout.slot_bytes + layout.frozen_bytes for layout in layouts)
    return PARITY_SETS * parity * -(-size // (members - parity))


def distribute(
    table: SlotTable,
    epoch: Epoch,
    ranks: Sequence[int],
    layouts: Sequence[Layout],
    wanted: int,
    available_bytes: int,
) -> list[Allotment] | None:
    """One allotment a rank, all of as many slots as memory allows from `wanted` down to LEAST; None: too little."""
    pairs = list(zip(ranks, layouts, strict=True))
    fitting = [table.matching(rank, lay.digest, lay.slot_bytes, epoch) for rank, lay in pairs]
    quarantined = table.quarantined(epoch)
    sound = [[slot for slot in slots if slot.slot not in quarantined] for slots in fitting]
    for held in (sound, fitting):
        for count in range(wanted, LEAST - 1, -1):
            if missing_bytes(held, layouts, count) <= available_bytes:
                return [_allot(table, rank, lay, old, count) for (rank, lay), old in zip(pairs, held, strict=True)]
    return None


def missing_bytes(held: Sequence[Sequence[Slot]], layouts: Sequence[Layout], count: int) -> int:
    """Bytes to allocate for `count` slots a rank, and for the frozen region of ranks that have none yet."""
    return sum(
        max(0, count - len(old)) * lay.slot_bytes + (0 if any(slot.ready for slot in old) else lay.frozen_bytes)
        for old, lay in zip(held, layouts, strict=True)
    )


def _allot(table: SlotTable, rank: int, layout: Layout, held: list[Slot], count: int) -> Allotment:
    kept = held[:count]
    missing = count - len(kept)
    made = [table.create(rank, layout.digest, layout.slot_bytes, layout.frozen_bytes) for _ in range(missing)]
    for slot in table.slots:
        if slot.rank == rank:
            slot.surplus = slot not in kept and slot not in made
    reuse = [slot.slot for slot in kept if slot.ready]
    return Allotment(reuse, [slot.slot for slot in [*kept, *made] if not slot.ready])
