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
from ckptd.protocol.cluster.standing import Flush, Outcome, Standing, Wish


class ClusterMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all; the class name is the tag on the wire."""

    epoch: Epoch


class Prepare(ClusterMessage, frozen=True):
    """Promise not to serve epochs below `epoch`, and freeze. Answer: Promise or Refuse."""


class Promise(ClusterMessage, frozen=True):
    """Frozen for `epoch`: what this arena holds, the newest snapshot it knows to be protected, the lineage; the epoch
    that has begun here, of so many `members`."""

    arena: str
    held: tuple[Held, ...]
    protected: SnapshotId | None
    records: tuple[EpochRecord, ...]
    began: Epoch | None = None
    members: int = 0


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
    """Up the tree: what all in the sender's subtree have posted, where the `heard` members stand, and their newest
    grant; `encoding`, `flush`, `last`: what a root that starts again must know."""

    sender: int
    entries: tuple[Entry, ...]
    heard: int
    standing: Standing
    granted: int
    encoding: SnapshotId | None = None
    flush: Flush | None = None
    last: Outcome | None = None


class Decided(ClusterMessage, frozen=True):
    """Down the tree: the verdict on each snapshot, open ones being grants; the newest protected one; what to encode;
    the generation of layouts to survey, and the one to `plan`, of which all pieces are there; the newest flush, and the
    last one that has ended; `closed`: all ranks have finished and everything is durable; `over`: what is not listed up
    to this snapshot is freed, and nobody speaks of it any more."""

    sender: int
    verdicts: tuple[Entry, ...]
    protected: SnapshotId | None = None
    encoding: SnapshotId | None = None
    survey: int = 0
    plan: int = 0
    flush: Flush | None = None
    last: Outcome | None = None
    closed: bool = False
    over: SnapshotId | None = None

    def ends(self, snapshot: SnapshotId) -> bool:
        """Nobody needs a snapshot of the epoch any more."""
        listed = any(verdict.snapshot == snapshot for verdict in self.verdicts)
        return self.over is not None and snapshot <= self.over and not listed


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
    check(found)
    return found


def check(message: BetweenDaemons) -> None:
    """Raises FormatError unless numbers, epochs and groups are in range: whoever handles it may compute with them."""
    message.epoch.check()
    match message:
        case Promise():
            _check_snapshots([message.protected, *(item.snapshot for item in message.held)])
            for item in message.held:
                check_shape(item.shape, item.shape.count)
                _check_number(item.string, item.shape.count)
        case Begin():
            membership = message.membership
            _check_snapshots([message.point, message.protected])
            _check_number(message.step)
            _check_number(membership.world)
            check_shape(membership.shape, len(membership.arenas))
            if membership.epoch != message.epoch:
                raise FormatError(f"Begin of {message.epoch}: its membership is of {membership.epoch}")
        case Facts():
            _check_entries(message.entries, message.encoding)
            _check_flushes(message.flush, message.last, message.standing.wishes)
            _check_number(message.heard)
            _check_number(message.granted)
        case Decided():
            _check_entries(message.verdicts, message.encoding, message.protected, message.over)
            _check_flushes(message.flush, message.last)
        case SealRecord() | Recorded():
            _check_snapshots([message.snapshot])
    if isinstance(message, Facts | Decided | SealRecord | Recorded):
        _check_number(message.sender)


def _check_entries(entries: tuple[Entry, ...], *named: SnapshotId | None) -> None:
    _check_snapshots([*named, *(entry.snapshot for entry in entries)])


def _check_flushes(flush: Flush | None, last: Outcome | None, wishes: tuple[Wish, ...] = ()) -> None:
    flushes = [found for found in (flush, None if last is None else last.flush) if found is not None]
    _check_snapshots([*(found.snapshot for found in flushes), *(wish.snapshot for wish in wishes)])
    for found in flushes:
        _check_number(found.number)
        _check_number(found.step)


def _check_snapshots(snapshots: list[SnapshotId | None]) -> None:
    for snapshot in snapshots:
        if snapshot is not None:
            snapshot.epoch.check()
            _check_number(snapshot.step)


def _check_number(number: int, limit: int = 10**18) -> None:
    if not 0 <= number < limit:
        raise FormatError(f"message between daemons: number {number}, expected 0 to {limit - 1}")


def check_shape(shape: Shape, count: int) -> None:
    """Raises FormatError unless every number is in one group, and each group has more members than parities."""
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
    """Grant `snapshot` to the node's ranks, to be used from the boundary of `step` on (`asked`: at that boundary, where
    they wait); then say `captured` or `missed`. `compare`: with what they hold in common."""

    snapshot: SnapshotId
    step: int
    asked: bool
    compare: bool


@dataclasses.dataclass(frozen=True)
class Revoke:
    """The grant is dead: say `missed`, unless that has been said."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Describe:
    """Make the seal record of this member's string of a snapshot, then say `described`."""

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

    flush: Flush


@dataclasses.dataclass(frozen=True)
class Commit:
    """Root: check the lists of all nodes, put COMMIT, then say `committed` or `flush_failed`."""

    flush: Flush


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
class FlushEnded:
    """Tell those who wait that a flush has committed, or failed."""

    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Differ:
    """What should have been the same on several ranks was not the same in this snapshot: layouts are made anew."""

    snapshot: SnapshotId


@dataclasses.dataclass(frozen=True)
class Survey:
    """Ask the ranks what their states consist of, for layouts of this generation."""

    generation: int


@dataclasses.dataclass(frozen=True)
class Gather:
    """What the ranks of all nodes have said for this generation is to be had: let the node's ranks plan."""

    generation: int


@dataclasses.dataclass(frozen=True)
class Disband:
    """Every rank of the job has finished, everything is durable, and all below in the tree know it."""


@dataclasses.dataclass(frozen=True)
class Leave:
    """This arena holds nothing that anybody needs, and has no number: the daemon may end."""


MemberAction = (
    Tell
    | Capture
    | Revoke
    | Describe
    | Encode
    | Rebuild
    | Verify
    | Write
    | Commit
    | Free
    | Announce
    | FlushEnded
    | Differ
    | Survey
    | Gather
    | Disband
    | Leave
)
