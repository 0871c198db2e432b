"""Messages between the daemons of a job, and what a member asks its own daemon to do (docs/protocol.md, section 11).

Decoding is strict, as in protocol/messages.py. All are idempotent; none depends on an order.
"""

from __future__ import annotations

import dataclasses

import msgspec

from ckptd.core.errors import FormatError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster.facts import Entry, Held, Membership, Part, Shape

LEAST_SLOTS = 2


class ClusterMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all; the class name is the tag on the wire."""

    epoch: Epoch


class Prepare(ClusterMessage, frozen=True):
    """Promise not to serve epochs below `epoch`, and freeze. Answer: Promise or Refuse."""


class Promise(ClusterMessage, frozen=True):
    """Frozen for `epoch`: what this arena holds, the newest snapshot it knows to be protected, the lineage."""

    arena: str
    held: tuple[Held, ...]
    protected: SnapshotId | None
    records: tuple[EpochRecord, ...]


class Refuse(ClusterMessage, frozen=True):
    """A number as high as that of `epoch` is promised already."""

    arena: str
    promised: Epoch


class Begin(ClusterMessage, frozen=True):
    """The epoch starts from `point` at `step`. `continued`: its strings are those of the members, and it is protected
    anew; until then it survives `tolerates` losses in a group, guests being asked too: `holders`, arena -> string.
    `protected` is kept beside it."""

    membership: Membership
    point: SnapshotId | None
    step: int
    continued: bool
    tolerates: int
    holders: dict[str, int]
    protected: SnapshotId | None


class Begun(ClusterMessage, frozen=True):
    """Answer to Begin: it is written down here."""

    arena: str


class Facts(ClusterMessage, frozen=True):
    """Up the tree: what all in the sender's subtree have posted, their furthest boundary and newest grant; `ready`:
    each of the `heard` members has a free slot. `encoding`, `flushing`, `ended`: what a root that starts again must
    know."""

    sender: int
    entries: tuple[Entry, ...]
    heard: int
    ready: bool
    boundary: int
    granted: int
    encoding: SnapshotId | None = None
    flushing: SnapshotId | None = None
    ended: SnapshotId | None = None


class Decided(ClusterMessage, frozen=True):
    """Down the tree: the verdict on each snapshot, open ones being grants; the newest protected one; what to encode and
    to write; the newest flush that has ended, and the newest durable snapshot."""

    sender: int
    verdicts: tuple[Entry, ...]
    protected: SnapshotId | None = None
    encoding: SnapshotId | None = None
    flushing: SnapshotId | None = None
    ended: SnapshotId | None = None
    durable: SnapshotId | None = None


class SealRecord(ClusterMessage, frozen=True):
    """To the members of the group: what the sender's string consists of, with checksums. Answer: Recorded."""

    sender: int
    snapshot: SnapshotId
    record: bytes


class Recorded(ClusterMessage, frozen=True):
    """The seal record is held here."""

    sender: int
    snapshot: SnapshotId


BetweenDaemons = Prepare | Promise | Refuse | Begin | Begun | Facts | Decided | SealRecord | Recorded

_DECODER = msgspec.msgpack.Decoder(BetweenDaemons)


def encode(message: BetweenDaemons) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> BetweenDaemons:
    """The inverse; FormatError for anything else."""
    try:
        found: BetweenDaemons = _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise FormatError(f"message between daemons: {error}; expected one of protocol 1") from error
    _check(found)
    return found


def _check(message: BetweenDaemons) -> None:
    """Numbers, epochs and groups are in range, so that whoever handles a message may compute with them."""
    message.epoch.check()
    match message:
        case Promise():
            _check_snapshots([message.protected, *(item.snapshot for item in message.held)])
            for item in message.held:
                _check_shape(item.shape, item.shape.count)
                _check_number(item.string, item.shape.count)
        case Begin():
            membership = message.membership
            _check_snapshots([message.point, message.protected])
            _check_shape(membership.shape, len(membership.arenas))
            if membership.slots < LEAST_SLOTS or membership.epoch != message.epoch:
                raise FormatError(
                    f"Begin: {membership.slots} slots of {membership.epoch}, expected {LEAST_SLOTS} or more"
                )
        case Facts():
            named = [message.encoding, message.flushing, message.ended]
            _check_snapshots([*named, *(entry.snapshot for entry in message.entries)])
            _check_number(message.heard)
            _check_number(message.granted)
        case Decided():
            named = [message.protected, message.encoding, message.flushing, message.ended, message.durable]
            _check_snapshots([*named, *(entry.snapshot for entry in message.verdicts)])
        case SealRecord() | Recorded():
            _check_snapshots([message.snapshot])
    if isinstance(message, Facts | Decided | SealRecord | Recorded):
        _check_number(message.sender)


def _check_snapshots(snapshots: list[SnapshotId | None]) -> None:
    for snapshot in snapshots:
        if snapshot is not None:
            snapshot.epoch.check()
            _check_number(snapshot.step)


def _check_number(number: int, limit: int = 10**18) -> None:
    if not 0 <= number < limit:
        raise FormatError(f"message between daemons: number {number}, expected 0 to {limit - 1}")


def _check_shape(shape: Shape, count: int) -> None:
    """Every number is in one group, and each group has more members than parities."""
    numbers = sorted(number for group in shape.groups for number in group)
    if numbers != list(range(count)) or not 0 <= shape.parity < min(map(len, shape.groups), default=0):
        raise FormatError(
            f"message between daemons: groups {shape.groups} with {shape.parity} parities, {count} members"
        )


@dataclasses.dataclass(frozen=True)
class Tell:
    """Send a message to an arena. It may be lost."""

    arena: str
    message: BetweenDaemons


@dataclasses.dataclass(frozen=True)
class Capture:
    """Grant the step of `snapshot` to the node's ranks, then say `captured` or `missed`."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Revoke:
    """The grant is dead: when the ranks have answered it, say `missed`."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Encode:
    """Make the parities of a snapshot in a parity set, then say `encoded` or `encoding_failed`."""

    snapshot: SnapshotId
    area: int


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """Get this member's string of a snapshot from its group, then say `rebuilt` or `rebuilding_failed`."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare what is held with its checksums, then say `verified`."""

    snapshot: SnapshotId
    part: Part


@dataclasses.dataclass(frozen=True)
class Write:
    """Write this node's files of a checkpoint and the list of them, then say `written` or `flush_failed`."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Commit:
    """Root: check the lists of all nodes, put COMMIT, then say `committed` or `flush_failed`."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Free:
    """Stop what reads or writes a part of a snapshot here, then forget it."""

    snapshot: SnapshotId
    part: Part


@dataclasses.dataclass(frozen=True)
class Announce:
    """Tell the trainers: the snapshot has reached a level."""

    snapshot: SnapshotId
    step: int
    level: Level


@dataclasses.dataclass(frozen=True)
class Leave:
    """This arena holds nothing that anybody needs, and has no number: the daemon may end."""


MemberAction = Tell | Capture | Revoke | Encode | Rebuild | Verify | Write | Commit | Free | Announce | Leave
