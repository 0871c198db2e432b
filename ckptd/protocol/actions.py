"""What the node machine asks its surroundings to do. Data only."""

from __future__ import annotations

import dataclasses

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.protocol.messages import Message


@dataclasses.dataclass(frozen=True)
class Send:
    """A message to a connection; beside it read-write (`slots`) or read-only (`readable`, `pieces`) descriptors."""

    peer: int
    message: Message
    slots: tuple[int, ...] = ()
    readable: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Disconnect:
    """Close a connection: its holder is fenced off."""

    peer: int


@dataclasses.dataclass(frozen=True)
class WriteRecord:
    """Write the epoch record into the store, then tell the machine (`recorded`)."""

    peer: int
    store: str
    record: EpochRecord


@dataclasses.dataclass(frozen=True)
class StartFlush:
    """Write a snapshot from its slots (rank order) into a store, then tell the machine (`flush_done`/`_failed`)."""

    snapshot: SnapshotId
    slots: tuple[int, ...]
    store: str
    keep: int | None


@dataclasses.dataclass(frozen=True)
class Drop:
    """Forget the descriptor of a slot: its memory is free once every mapping is gone."""

    slot: int


@dataclasses.dataclass(frozen=True)
class Exit:
    """End the daemon and free everything."""

    reason: str


Action = Send | Disconnect | WriteRecord | StartFlush | Drop | Exit
