"""The part of a node's state that outlives its daemon: plain data in the ledger of the arena."""

from __future__ import annotations

from typing import Any

import msgspec

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.messages import Policy
from ckptd.protocol.slots import SlotTable


class NodeState(msgspec.Struct):
    """See docs/protocol.md. `layouts` and `sizes` are per rank; `processes`: instance -> (pid, start time)."""

    job: str
    promised: Epoch | None = None
    epoch: Epoch | None = None
    world: int = 0
    policy: Policy | None = None
    restore_point: SnapshotId | None = None
    records: list[EpochRecord] = []
    table: SlotTable = msgspec.field(default_factory=SlotTable)
    layouts: dict[int, str] = {}
    sizes: dict[int, int] = {}
    generation: int = 0
    surveying: bool = False
    durable: SnapshotId | None = None
    processes: dict[str, tuple[int, int]] = {}
    counters: dict[str, int] = {}
    last_error: str | None = None


def describe(state: NodeState) -> dict[str, Any]:
    """What can be told from the state alone; JSON-able."""
    busy = state.table.busy()
    held = {slot: s.snapshot.step for s in state.table.sealed for slot in s.slots.values()}

    def use(slot: int, ready: bool) -> str:
        return "held" if slot in held else "granted" if slot in busy else "free" if ready else "creating"

    newest = state.table.newest()
    sealed = None if newest is None else newest.snapshot.step
    captured = [g.step for g in state.table.granted if g.step is not None]
    return {
        "job": state.job,
        "epoch": None if state.epoch is None else str(state.epoch),
        "promised": None if state.promised is None else str(state.promised),
        "store": state.policy.store if state.policy else None,
        "world": state.world,
        "newest": {
            "captured": max(captured, default=sealed),
            "sealed": sealed,
            "protected": None,
            "durable": None if state.durable is None else state.durable.step,
        },
        "slots": [
            {"rank": s.rank, "slot": s.slot, "state": use(s.slot, s.ready), "step": held.get(s.slot), "bytes": s.size}
            for s in state.table.slots
        ],
        "memory_bytes": sum(slot.size for slot in state.table.slots),
        "counters": dict(state.counters),
        "last_error": state.last_error,
    }
