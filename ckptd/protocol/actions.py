"""What the node machine asks its surroundings to do, its member machine (protocol/cluster) included. Data only."""

from __future__ import annotations

import dataclasses

from ckptd.core.lineage import EpochRecord
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.messages import Message


@dataclasses.dataclass(frozen=True)
class Send:
    """A message to a connection; beside it descriptors of slots, read-write (`slots`) or read-only (`readable`), or one
    of what all ranks have said that their states consist of (`pieces`)."""

    peer: int
    message: Message
    slots: tuple[int, ...] = ()
    readable: tuple[int, ...] = ()
    pieces: bool = False


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
class Drop:
    """Forget the descriptor of a slot: its memory is free once every mapping is gone."""

    slot: int


@dataclasses.dataclass(frozen=True)
class Exit:
    """End the daemon and free everything."""

    reason: str


Work = (
    cluster.Tell
    | cluster.Describe
    | cluster.Encode
    | cluster.Rebuild
    | cluster.Verify
    | cluster.Write
    | cluster.Commit
    | cluster.Free
    | cluster.Gather
)
"""Of the member machine's actions those that are not the node machine's to carry out."""

Action = Send | Disconnect | WriteRecord | Drop | Exit | Work
