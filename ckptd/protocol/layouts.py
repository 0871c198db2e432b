"""How many slots each rank gets, which it keeps and which it makes. Pure bookkeeping on the slot table.

A rank has `WITH_STORE` slots where snapshots are flushed while newer ones are captured, `LEAST` otherwise or where
memory is short. Slots of an earlier process that fit the layout are kept, with what is in them. Those that a process of
another epoch may still write to are left to it, and dropped when it ends, unless memory does not allow for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ckptd.core.types import Epoch
from ckptd.protocol.messages import Layout
from ckptd.protocol.slots import Slot, SlotTable

WITH_STORE, LEAST = 3, 2


class Allotment(NamedTuple):
    """The slots of one rank: numbers of those to keep and of those to make."""

    reuse: list[int]
    create: list[int]


def allot(
    table: SlotTable, epoch: Epoch, layouts: Sequence[Layout], wanted: int, available_bytes: int
) -> list[Allotment] | None:
    """One allotment a rank, all of as many slots as memory allows from `wanted` down to LEAST; None: too little."""
    fitting = [table.matching(rank, lay.digest, lay.slot_bytes, epoch) for rank, lay in enumerate(layouts)]
    quarantined = table.quarantined(epoch)
    sound = [[slot for slot in slots if slot.slot not in quarantined] for slots in fitting]
    for held in (sound, fitting):
        for count in range(wanted, LEAST - 1, -1):
            if missing_bytes(held, layouts, count) <= available_bytes:
                return [_allot(table, rank, lay, held[rank], count) for rank, lay in enumerate(layouts)]
    return None


def missing_bytes(held: Sequence[Sequence[Slot]], layouts: Sequence[Layout], count: int) -> int:
    """Bytes to allocate for `count` slots a rank."""
    return sum(max(0, count - len(old)) * lay.slot_bytes for old, lay in zip(held, layouts, strict=True))


def _allot(table: SlotTable, rank: int, layout: Layout, held: list[Slot], count: int) -> Allotment:
    kept = held[:count]
    made = [table.create(rank, layout.digest, layout.slot_bytes) for _ in range(count - len(kept))]
    for slot in table.slots:
        if slot.rank == rank:
            slot.surplus = slot not in kept and slot not in made
    reuse = [slot.slot for slot in kept if slot.ready]
    return Allotment(reuse, [slot.slot for slot in [*kept, *made] if not slot.ready])
