"""Messages between trainers, tools and the daemon of one node: one msgpack object a packet (docs/protocol.md).

Every message is idempotent and may be repeated after a reconnection; descriptors travel beside the packet. Decoding is
strict: unknown tags, missing fields, wrong types and values out of range raise FormatError, so that whoever handles a
message may compute with what is in it. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ckptd.core.errors import FormatError
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.facts import Shape

PROTOCOL = 1
"""Version of this protocol; a Hello or Prepare with another one is refused."""

MAX_MESSAGE = 16 * 1024 * 1024
"""Bytes. The largest tells a node of a job of ten thousand of the others."""

MAX_TEXT = 2000
"""Characters of a text for people; longer ones are cut, so that errors do not fill messages."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=10**18)]
"""Steps, numbers of slots, ranks, generations: sums of two fit 64 bits."""

Positive = Annotated[int, msgspec.Meta(ge=1, lt=10**18)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Instance = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Digest = Annotated[str, msgspec.Meta(max_length=100)]
SlotBytes = Annotated[int, msgspec.Meta(ge=1, le=2**45)]
FrozenBytes = Annotated[int, msgspec.Meta(ge=0, le=2**45)]
Checksum = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Replicas = Annotated[dict[Checksum, Checksum], msgspec.Meta(max_length=1024)]
"""Checksum of a list of ranks -> of all they hold in common."""


Reason = Literal["late", "layout", "mutated", "revoked", "stall", "failed"]
"""Why a grant is missed: it came after its step; the state has another layout now; a source changed during the copy;
the daemon took it back; capturing would hold the loop too long; an error that the trainer has logged."""


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag on the wire."""


def _check_snapshot(snapshot: SnapshotId | None) -> None:
    if snapshot is not None:
        snapshot.epoch.check()
        if not 0 <= snapshot.step < 10**18:
            raise FormatError(f"step {snapshot.step}: out of range")


# --- trainer or tool -> daemon


class Policy(msgspec.Struct, frozen=True):
    """What the daemon must know of the job's options. Times in seconds. At most one of `flush_*` is set."""

    store: Name | None
    snapshot_steps: Positive | None
    flush_steps: Positive | None
    flush_s: Annotated[float, msgspec.Meta(gt=0)] | None
    keep: Positive | None
    overhead_budget: Annotated[float, msgspec.Meta(gt=0, le=1)]
    memory_bytes: Positive | None
    linger_s: Seconds
    protection_bandwidth: Positive | None = None
    flush_bandwidth: Positive | None = None
    trace: Name | None = None


class Prepare(Message, frozen=True):
    """For rank 0: promise not to serve epochs below `epoch`. Answer: Promise or Refuse. In a job on several nodes,
    listen to the others at `address` (host, or host and port), by the certificates in `tls_dir` if there are own."""

    protocol: int
    job: Name
    epoch: Epoch
    address: Text = ""
    tls_dir: Text = ""

    def __post_init__(self) -> None:
        self.epoch.check()


class Begin(Message, frozen=True):
    """For rank 0: the epoch begins as `begin` says; `ranks` of the job are on this node. Where the members are is in
    the descriptor beside, if there are several. Answer: Begun or Refuse."""

    begin: cluster.Begin
    ranks: list[Count]
    policy: Policy

    def __post_init__(self) -> None:
        cluster.check(self.begin)


class Meet(Message, frozen=True):
    """For rank 0, once the epoch has begun everywhere: see whether the nodes that this one works with can be talked to.
    Answer: Met or Refuse."""


class Invite(Message, frozen=True):
    """For rank 0: have the other members of this node's epoch promise `epoch`, as far as they answer: all but `arenas`,
    and those on `nodes`. Answer: Invited."""

    epoch: Epoch
    arenas: list[str]
    nodes: list[str]

    def __post_init__(self) -> None:
        self.epoch.check()


class Usher(Message, frozen=True):
    """For rank 0: tell the guests that this node has invited how the epoch begins; where everybody is, is in the
    descriptor beside. Answer: Met."""

    begin: cluster.Begin

    def __post_init__(self) -> None:
        cluster.check(self.begin)


class Borrow(Message, frozen=True):
    """A rank wants `strings` of the snapshot of a grant, as it was captured on nodes of another number or by others, to
    restore from: this node makes them anew, for all its ranks once. `held`: arena -> the string that it holds, whether
    whole, and whether with its parities. Answer: Lent or Refuse."""

    snapshot: SnapshotId
    step: Count
    shape: Shape
    strings: list[Count]
    held: dict[str, tuple[Count, bool, bool]]

    def __post_init__(self) -> None:
        _check_snapshot(self.snapshot)
        cluster.check_shape(self.shape, self.shape.count)
        for string in (*self.strings, *(string for string, _, _ in self.held.values())):
            if string >= self.shape.count:
                raise FormatError(f"string {string} of {self.shape.count}")


class Hello(Message, frozen=True):
    """A rank joins, or rejoins after a lost connection. Answer: Welcome or Refuse.

    `world`, `ranks` (those of this node), `restore_point`, `policy` and `granted`, the newest grant that the rank has
    heard of, let a daemon that lost its memory take the job over.
    """

    protocol: int
    job: Name
    epoch: Epoch
    rank: Count
    world: Positive
    ranks: list[Count]
    instance: Instance
    restore_point: SnapshotId | None
    policy: Policy
    granted: Count = 0

    def __post_init__(self) -> None:
        self.epoch.check()
        _check_snapshot(self.restore_point)


class Pieces(Message, frozen=True):
    """Answer to Survey: what the rank's state consists of, as bytes in the descriptor beside."""

    generation: Count


class Layout(Message, frozen=True):
    """What a slot of this rank must hold from now on, and what its slots share: frozen tensors. Answered, once every
    rank has said it, by Allot or Refuse."""

    generation: Count
    digest: Digest
    slot_bytes: SlotBytes
    frozen_bytes: FrozenBytes = 0


class Ready(Message, frozen=True):
    """A slot is allocated and populated; its descriptors travel beside unless the daemon has them already."""

    slot: Count


class Boundary(Message, frozen=True):
    """The rank has completed `step`. `step_s`: what a step takes, captures excluded; `cost_s`: what a capture costs the
    loop, by recent ones: the training thread's waiting and the slow-down of the step beside it. None: not known yet."""

    step: Count
    step_s: Seconds
    cost_s: Seconds | None = None


class Captured(Message, frozen=True):
    """Grant `grant` was used: `step` is in `slot`, checksums and all. `replicas`, if the grant asks for it: checksums
    that every rank that holds the same must find."""

    grant: Count
    step: Count
    slot: Count
    replicas: Replicas = {}


class Missed(Message, frozen=True):
    """Grant `grant` will never be used."""

    grant: Count
    reason: Reason


class Request(Message, frozen=True):
    """The rank stands at the boundary of `step` and wants it captured now; granted when every rank asks."""

    step: Count


class Flush(Message, frozen=True):
    """Make the newest sealed snapshot durable now; `to` another store than the job's. Answer: Flushed or Refuse."""

    to: Name | None = None


class Terminating(Message, frozen=True):
    """The rank got SIGTERM. Answer: Drained, when the newest sealed snapshot is durable or nobody needs to wait."""


class Close(Message, frozen=True):
    """The rank has finished cleanly; when all have, the job is closed."""


class Leave(Message, frozen=True):
    """The rank ends by an exception: no snapshot in flight of it will complete."""


class Status(Message, frozen=True):
    """Answer: Report."""


class Stop(Message, frozen=True):
    """Frees everything and ends the daemon. Answer: Stopped."""


# --- daemon -> trainer or tool


class Promise(Message, frozen=True):
    """What this node holds, and the lineage it knows; how others find it, if there are others."""

    promise: cluster.Promise
    contact: bytes = b""

    def __post_init__(self) -> None:
        cluster.check(self.promise)


class Invited(Message, frozen=True):
    """Answer to Invite: what guests have promised, how others find each of them, and how they find this node."""

    promises: list[cluster.Promise]
    contacts: list[bytes]
    contact: bytes

    def __post_init__(self) -> None:
        for promise in self.promises:
            cluster.check(promise)
        if len(self.promises) != len(self.contacts):
            raise FormatError(f"{len(self.promises)} promises of {len(self.contacts)} guests")


class Refuse(Message, frozen=True):
    """The request cannot be met. `error` names a class of ckptd.core.errors."""

    error: str
    message: str
    promised: Epoch | None = None


class Begun(Message, frozen=True):
    """The epoch's record is in the arena and, if there is a store, durable there."""


class Met(Message, frozen=True):
    """They can."""


class SlotInfo(msgspec.Struct, frozen=True):
    """One slot as the daemon knows it."""

    slot: int
    rank: int
    digest: str
    size: int
    frozen_bytes: int = 0


class Lent(Message, frozen=True):
    """Answer to Borrow: slots to restore from, with descriptors as beside Welcome."""

    restore: list[SlotInfo]


class Welcome(Message, frozen=True):
    """The rank is in. `slots` of it are ready, `pending` ones are not. `restore` lists the slots of the restore point,
    whose read-only descriptors travel beside: of the slot, then of its frozen region where it has one."""

    pid: int
    slots: list[int]
    pending: list[int]
    restore: list[SlotInfo]


class Survey(Message, frozen=True):
    """Say at the next boundary what your state consists of. Answer: Pieces."""

    generation: int


class Plan(Message, frozen=True):
    """Every rank's Pieces, in the descriptor beside. Answer: Layout."""

    generation: int


class Allot(Message, frozen=True):
    """Slots for the layout of `generation`: those to reuse (descriptors beside: of the slot, then of its frozen region
    where the layout has one) and numbers of those to create."""

    generation: int
    reuse: list[int]
    create: list[int]


class Grant(Message, frozen=True):
    """Grant number `grant`: capture at the first boundary from `step` on at which an optimizer has stepped, into
    `slot`. `compare`: and tell the checksums of what other ranks hold too."""

    grant: int
    step: int
    slot: int
    compare: bool = False


class Revoke(Message, frozen=True):
    """The snapshot of grant `grant` is NotSealed: answer Missed unless captured, and forget it."""

    grant: int


class Reached(Message, frozen=True):
    """`step` has reached `level`; all earlier sealed steps of the epoch are superseded, and grants up to `grant`."""

    step: int
    level: Level
    grant: int = 0


class FlushFailed(Message, frozen=True):
    """Making `step` durable failed; memory keeps it."""

    step: int
    message: str


class Flushed(Message, frozen=True):
    """Answer to Flush: the durable step (None: nothing sealed)."""

    step: int | None


class Drained(Message, frozen=True):
    """Answer to Terminating."""

    step: int | None


class Report(Message, frozen=True):
    """Answer to Status: a JSON-able picture of the daemon."""

    report: dict[str, Any]


class Stopped(Message, frozen=True):
    """Answer to Stop, sent before the daemon ends."""


class Closed(Message, frozen=True):
    """Every rank has closed and all is flushed; the daemon ends."""


ToDaemon = (
    Prepare
    | Begin
    | Meet
    | Invite
    | Usher
    | Borrow
    | Hello
    | Pieces
    | Layout
    | Ready
    | Boundary
    | Captured
    | Missed
    | Request
    | Flush
    | Terminating
    | Close
    | Leave
    | Status
    | Stop
)
FromDaemon = (
    Promise
    | Invited
    | Refuse
    | Begun
    | Met
    | Lent
    | Welcome
    | Survey
    | Plan
    | Allot
    | Grant
    | Revoke
    | Reached
    | FlushFailed
    | Flushed
    | Drained
    | Report
    | Stopped
    | Closed
)

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Literal["to", "from"], msgspec.msgpack.Decoder[Any]] = {
    "to": msgspec.msgpack.Decoder(ToDaemon),
    "from": msgspec.msgpack.Decoder(FromDaemon),
}


def encode(message: Message) -> bytes:
    """Its bytes; raises FormatError where they would be more than MAX_MESSAGE."""
    encoded = _encoder.encode(message)
    if len(encoded) > MAX_MESSAGE:
        raise FormatError(f"{type(message).__name__}: {len(encoded)} bytes, expected at most {MAX_MESSAGE}")
    return encoded


def decode(encoded: bytes, direction: Literal["to", "from"]) -> Any:
    """The message `to` or `from` the daemon; raises FormatError."""
    if len(encoded) > MAX_MESSAGE:
        raise FormatError(f"message of {len(encoded)} bytes, expected at most {MAX_MESSAGE}")
    try:
        return _decoders[direction].decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise FormatError(f"message of {len(encoded)} bytes: {error}") from None
