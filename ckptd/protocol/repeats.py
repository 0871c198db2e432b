"""What a node tells a rank that joins or comes back: all that it may have missed, from the persisted state alone."""

from __future__ import annotations

from ckptd.core.types import Level
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Send
from ckptd.protocol.slots import Granted
from ckptd.protocol.state import NodeState


def welcome(state: NodeState, peer: int, rank: int) -> Send:
    """The slots that are here, and the descriptors of the restore point as long as it is held."""
    point = None if state.cluster.point is None else state.table.holding(state.cluster.point)
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
    """Grants that the rank has not answered, the levels reached, and the failure of the last flush."""
    found: list[m.Message] = [
        m.Revoke(granted.grant) if granted.dead else grant(granted, rank)
        for granted in state.table.granted
        if granted.epoch == state.epoch and rank in granted.silent
    ]
    newest, durable, last = state.cluster.newest, state.cluster.durable, state.cluster.last
    if newest is not None and newest.snapshot.epoch == state.epoch:
        found.append(m.Reached(newest.step or 0, Level.SEALED, newest.snapshot.step))
    if state.cluster.confirmed and (step := state.cluster.protected_step) is not None:
        found.append(m.Reached(step, Level.PROTECTED))
    if durable is not None and durable.epoch == state.epoch:
        found.append(m.Reached(durable.step, Level.DURABLE))
    own = last is not None and (last.flush.store, last.flush.snapshot.epoch) == (state.own_store, state.epoch)
    if last is not None and last.error is not None and own:
        found.append(m.FlushFailed(last.flush.step, last.error))
    return found


def grant(granted: Granted, rank: int) -> m.Grant:
    """What a rank is told of a snapshot that it is to capture."""
    return m.Grant(granted.grant, granted.at, granted.slots[rank], granted.compare)
