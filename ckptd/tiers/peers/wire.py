"""What daemons say to each other over Flight: headers, tickets, limits, and errors as the other side gets them.

    every call   headers: protocol, job (digest), epoch, node, token; checked before the request is looked at
    do_get       ticket -> record batches of one uint8 column, a piece each, with the CRC-32C of each as metadata
    do_action    kind and body -> one body; both bounded

Invariants: decoding is strict (the bytes must be those that encoding would give) and everything in a ticket is in range
before anything is allocated for it. An error arrives as the class it was raised as, never one of another library.
"""

from __future__ import annotations

import hmac
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import msgspec
import pyarrow as pa
import pyarrow.flight as flight

from ckptd.core import errors
from ckptd.core.errors import CkptdError, ConfigError, DaemonError, DeadlineError, FormatError, VersionError
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.protocol.messages import PROTOCOL
from ckptd.tiers.peers.identity import TOKEN_BYTES, Credentials

CALL_BYTES = 4 * PIECE_BYTES
"""The most that one do_get gives. Bounds what a pause or a cancellation waits for; more does not make it faster."""

BATCH_BYTES = PIECE_BYTES
"""What crosses the network at a time, with a CRC-32C. A piece, so that checksums that are known of pieces can be sent
as they are."""

MOST_TICKET_BYTES = 1024
MOST_MESSAGE_BYTES = 16 * 1024 * 1024
MOST_STRING_BYTES = 2**50
_MOST_ERROR_CHARACTERS = 2000

SCHEMA = pa.schema([("bytes", pa.uint8())])
CRC_BYTES = 4
CHECKSUMS = b"crc32c"
"""In the schema's metadata: the checksums of all batches, where they were taken before the first was sent."""

What = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._/-]{0,127}$")]
"""What of a snapshot: `string`, `parity`, `table/3` ... The daemon that registers it decides."""

Kind = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z][A-Za-z0-9]{0,63}$")]


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Bytes [offset, offset + length) of something that a node holds of a snapshot. Batches count from `offset`.

    The epoch of the request is in the headers; that of the snapshot may be an older one.
    """

    snapshot: SnapshotId
    what: What
    offset: Annotated[int, msgspec.Meta(ge=0, lt=MOST_STRING_BYTES)]
    length: Annotated[int, msgspec.Meta(ge=1, le=CALL_BYTES)]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> Ticket:
        """Raises FormatError for anything but what `encode` gives."""
        if len(raw) > MOST_TICKET_BYTES:
            raise FormatError(f"ticket of {len(raw)} bytes, expected at most {MOST_TICKET_BYTES}")
        try:
            found = msgspec.msgpack.decode(raw, type=cls)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise FormatError(f"ticket: {error}") from None
        found.snapshot.epoch.check()
        if not 0 <= found.snapshot.step < 10**18 or found.encode() != raw:
            raise FormatError("ticket: out of range, or not spelt as this version spells it")
        return found


def check_kind(kind: str) -> str:
    """Itself, if it can name a message; raises FormatError."""
    try:
        return msgspec.convert(kind, Kind)
    except msgspec.ValidationError:
        raise FormatError(f"message {kind[:80]!r}: expected a name of up to 64 letters and digits") from None


# --- who asks


def headers(credentials: Credentials) -> list[tuple[bytes, bytes]]:
    """What every call of a node carries."""
    return [
        (b"ckptd-protocol", str(PROTOCOL).encode()),
        (b"ckptd-job", credentials.job.digest.encode()),
        (b"ckptd-epoch", str(credentials.epoch).encode()),
        (b"ckptd-node", urllib.parse.quote(credentials.node, safe="").encode()),
        (b"ckptd-token", credentials.token.hex().encode()),
    ]


def check_headers(found: Mapping[str, Sequence[str]], own: Credentials, members: Collection[str]) -> str:
    """The node that calls. Raises VersionError for another protocol, ConfigError for another job, a stranger or a wrong
    token, DaemonError for another epoch. The token comes last; nothing that the earlier answers tell is a secret."""
    given = {name: _single(found, f"ckptd-{name}") for name in ("protocol", "job", "epoch", "node", "token")}
    if given["protocol"] != str(PROTOCOL):
        raise VersionError(
            f"refused: the call is of protocol {given['protocol'][:40]!r}, this node speaks {PROTOCOL}; install one "
            "version of ckptd on all nodes"
        )
    if given["job"] != own.job.digest:
        raise ConfigError(f"refused: the call is of another job (digest {given['job'][:40]!r}), not {own.job.name!r}")
    if given["epoch"] != str(own.epoch):
        raise DaemonError(f"refused: the call is of epoch {given['epoch'][:40]!r}, this node is in {own.epoch}")
    node = urllib.parse.unquote(given["node"])
    if node not in members:
        raise ConfigError(f"refused: node {node[:200]!r} is not a member of epoch {own.epoch}")
    expected = own.token.hex().encode()
    if len(given["token"]) != 2 * TOKEN_BYTES or not hmac.compare_digest(given["token"].encode(), expected):
        raise ConfigError(f"refused: node {node[:200]!r} has another token than epoch {own.epoch}")
    return node


def _single(found: Mapping[str, Sequence[str]], name: str) -> str:
    values = found.get(name, ())
    return str(values[0]) if len(values) == 1 and isinstance(values[0], str) else ""


# --- errors


def for_client(error: CkptdError) -> flight.FlightError:
    """An error as Flight carries it: text for people, and the name of its class."""
    text, name = str(error)[:_MOST_ERROR_CHARACTERS], type(error).__name__.encode()
    return flight.FlightServerError(text, name)


def from_server(error: Exception, peer: str, deadline_s: float) -> CkptdError:
    """What a failed call means: what the peer raised, or what happened on the way."""
    text = " ".join(str(error).split())[:_MOST_ERROR_CHARACTERS]
    if isinstance(error, flight.FlightTimedOutError):
        return DeadlineError(f"{peer} did not answer within {deadline_s:g} s; it is stopped, busy or cut off")
    if isinstance(error, flight.FlightCancelledError):
        return DaemonError(f"{peer}: the call was cancelled: {text}")
    named = getattr(errors, (getattr(error, "extra_info", None) or b"").decode("ascii", "replace"), None)
    if isinstance(named, type) and issubclass(named, CkptdError) and named is not CkptdError:
        return named(f"{peer}: {text.partition('. Detail: ')[0]}")
    if "certificate verify failed" in text or "is not in peer certificate" in text:
        return ConfigError(
            f"{peer} shows another certificate than it announced, or one of another authority (tls_dir): it is another "
            "daemon that has this address, or not all nodes have certificates of one site"
        )
    if "Ssl handshake failed" in text or "Socket closed" in text:
        return DaemonError(f"{peer} closed the connection: it went away, or does not accept this node's certificate")
    if isinstance(error, flight.FlightUnavailableError):
        return DaemonError(f"{peer} cannot be reached, or went away: {text}")
    return DaemonError(f"{peer}: {text}")
