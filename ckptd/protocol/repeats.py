"""What a node tells a rank that joins or comes back: all that it may have missed, from the persisted state alone."""

from __future__ import annotations

from ckptd.core.types import Level
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Send
from ckptd.protocol.state import NodeState


def welcome(state: NodeState, peer: int, rank: int) -> Send:
    """The slots that are here, and the descriptors of the restore point as long as it is held."""
    point = None if state.restore_point is None else state.table.holding(state.restore_point)
    readable = () if point is None else tuple(point.slots[r] for r in sorted(point.slots))
    slots = [slot for number in readable if (slot := state.table.get(number)) is not None]
    restore = [m.SlotInfo(s.slot, s.rank, s.digest, s.size, s.frozen_bytes) for s in slots]
    owned = [slot for slot in state.table.slots if slot.rank == rank]
    ready = [slot.slot for slot in owned if slot.ready]
    pending = [slot.slot for slot in owned if not slot.ready]
    return Send(peer, m.Welcome(0, ready, pending, restore), readable=readable)


def allotted(state: NodeState, peer: int, rank: int) -> Send | None:
    """The rank's Allot again, if it may not have been heard or carried out."""
    fitting = [slot for slot in state.table.slots if slot.rank == rank and not slot.surplus]
    if all(slot.ready and slot.owner == state.instances[rank] for slot in fitting):
        return None
    reuse = tuple(slot.slot for slot in fitting if slot.ready)
    create = [slot.slot for slot in fitting if not slot.ready]
    return Send(peer, m.Allot(state.generation, list(reuse), create), slots=reuse)


def news(state: NodeState, rank: int) -> list[m.Message]:
    """Grants that the rank has not answered, and the levels reached."""
    found: list[m.Message] = [
        m.Revoke(granted.grant) if granted.dead else m.Grant(granted.grant, granted.slots[rank], granted.compare)
        for granted in state.table.granted
        if granted.epoch == state.epoch and rank in granted.silent
    ]
    newest = state.table.newest(state.epoch)
    if newest is not None:
        found.append(m.Reached(newest.snapshot.step, Level.SEALED))
    if state.durable is not None and state.durable.epoch == state.epoch:
        found.append(m.Reached(state.durable.step, Level.DURABLE))
    return found
