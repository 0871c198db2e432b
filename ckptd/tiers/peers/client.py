"""One peer, as a client sees it: pulls of verified pieces into the caller's memory, and messages.

Invariants:
- Every call has a deadline. What waits before a call (the throttle) does not count.
- A batch (a piece) is copied into the caller's buffer and its checksum taken of what arrived, in one pass. A wrong
  one is asked for once more; then CorruptionError. After any error the contents of the buffer are undefined.
- At most `streams` pulls at once, each on a connection of its own, and of each at most about two batches in memory.
  Messages have a connection for themselves.
- A connection on which a call was not answered in time is not used again: if the network was cut, TCP would go on
  waiting for as long again after it is whole.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.flight as flight

from ckptd.core.errors import CkptdError, CorruptionError, DaemonError, DeadlineError, FormatError
from ckptd.core.native import copy_bytes
from ckptd.core.types import SnapshotId
from ckptd.tiers.peers.address import join_address
from ckptd.tiers.peers.identity import Announcement, Credentials
from ckptd.tiers.peers.wire import (
    BATCH_BYTES,
    CALL_BYTES,
    CHECKSUMS,
    CRC_BYTES,
    MOST_MESSAGE_BYTES,
    SCHEMA,
    Ticket,
    check_kind,
    from_server,
    headers,
)
from ckptd.tiers.throttle import Throttle

DEADLINE_S = 30.0
STREAMS = 2
Checksums = npt.NDArray[np.uint32]

_ROOM_BYTES = 64 * 1024
"""For what Flight puts around a batch, or a message."""

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # else all clients of a peer share one connection
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Cancellation:
    """Ends the pulls that it was given to: at the next batch, at the latest with the deadline of the call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Callable[[], None]] = set()
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Idempotent."""
        with self._lock:
            self._cancelled = True
            for stop in self._running:
                stop()

    @contextlib.contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Calls `stop` if it is cancelled meanwhile, or was before."""
        with self._lock:
            if self._cancelled:
                stop()
            self._running.add(stop)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(stop)


class Peer:
    """Another daemon of the job in this epoch. Its methods may be called by several threads."""

    def __init__(
        self,
        credentials: Credentials,
        announcement: Announcement,
        *,
        throttle: Throttle | None = None,
        streams: int = STREAMS,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.node = announcement.node
        self.deadline_s = deadline_s
        self._place = join_address(announcement.host, announcement.port)
        self._label = f"node {announcement.node} at {self._place}"
        self._headers = headers(credentials)
        self._throttle = throttle or Throttle()
        self._security: dict[str, Any] = {}
        self._scheme = "grpc"
        if credentials.identity is not None:
            if not announcement.certificate:
                raise FormatError(f"{self._label}: announced no certificate, expected one")
            self._scheme = "grpc+tls"
            self._security = {
                "tls_root_certs": credentials.trusted_server(announcement),
                "cert_chain": credentials.identity.certificate,
                "private_key": credentials.identity.key,
                "override_hostname": announcement.server_name,
            }
        self._closed = False
        self._opening = threading.Lock()
        self._messages: Any = None
        self._connections: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(streams):
            self._connections.put(None)

    def ask(self, kind: str, body: bytes, deadline_s: float | None = None) -> bytes:
        """The peer's answer to a message. Raises what the peer raised, DeadlineError, DaemonError, ConfigError."""
        check_kind(kind)
        if len(body) > MOST_MESSAGE_BYTES:
            raise FormatError(f"message {kind} of {len(body)} bytes, expected at most {MOST_MESSAGE_BYTES}")
        limit = self.deadline_s if deadline_s is None else deadline_s
        with self._message_connection() as client, self._errors(limit):
            results = client.do_action((kind, body), self._call_options(limit))
            found: list[bytes] = [result.body.to_pybytes() for result in results]
        if len(found) != 1 or len(found[0]) > MOST_MESSAGE_BYTES:
            raise FormatError(f"{self._label}: its answer to {kind} is not one message")
        return found[0]

    def pull(
        self,
        snapshot: SnapshotId,
        what: str,
        offset: int,
        into: memoryview,
        *,
        crc: Checksums | None = None,
        deadline_s: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Fills `into` with bytes [offset, offset + len(into)) of what the peer holds, and `crc` with the CRC-32C of
        each BATCH_BYTES of them.

        `deadline_s` is for each call, of at most CALL_BYTES. Raises DeadlineError, CorruptionError, what the peer
        raised (NotFoundError, FormatError ...), and DaemonError where it is gone or the pull is cancelled.
        """
        limit = self.deadline_s if deadline_s is None else deadline_s
        stop = cancellation or Cancellation()
        target = into.cast("B")
        for start in range(0, len(target), CALL_BYTES):
            part = target[start : start + CALL_BYTES]
            sums = np.zeros(-(-len(part) // BATCH_BYTES), np.uint32) if crc is None else crc[start // BATCH_BYTES :]
            for at in self._call(Ticket(snapshot, what, offset + start, len(part)), part, sums, limit, stop):
                size = min(BATCH_BYTES, len(part) - at)
                again = Ticket(snapshot, what, offset + start + at, size)
                if self._call(again, part[at : at + size], sums[at // BATCH_BYTES :], limit, stop):
                    raise CorruptionError(
                        f"{self._label}: {what} of {snapshot}, {size} bytes at {offset + start + at}: the checksum was "
                        "wrong twice on arrival; memory or network of one of the two nodes is damaged"
                    )

    def close(self) -> None:
        """Closes the connections; what is in progress ends by itself, and its connection with it. Idempotent."""
        self._closed = True
        with self._opening:
            idle, self._messages = [self._messages], None
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._connections.get_nowait())
        for client in idle:
            if client is not None:
                client.close()

    def _call(self, ticket: Ticket, into: memoryview, crc: Checksums, limit: float, stop: Cancellation) -> list[int]:
        """One do_get; the places in `into` of batches whose checksum was wrong."""
        with stop.stopping(self._throttle.wake):
            if not self._throttle.admit(ticket.length, lambda: stop.cancelled):
                raise self._cancelled(ticket)
        with self._connection(limit) as client:
            before = time.thread_time()
            try:
                with self._errors(limit):
                    reader = client.do_get(flight.Ticket(ticket.encode()), self._call_options(limit))
                    with stop.stopping(reader.cancel):
                        return self._receive(reader, into, crc)
            except CkptdError:
                if stop.cancelled:
                    raise self._cancelled(ticket) from None
                raise
            finally:
                self._throttle.spent(time.thread_time() - before)

    def _receive(self, reader: Any, into: memoryview, crc: Checksums) -> list[int]:
        """All batches of a stream, and their checksums, into their places. Raises FormatError for anything else."""
        if reader.schema != SCHEMA:
            raise FormatError(f"{self._label}: expected one column of bytes, found {str(reader.schema)[:200]!r}")
        checksums = (reader.schema.metadata or {}).get(CHECKSUMS)
        wrong, at = [], 0
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                break
            size = min(BATCH_BYTES, len(into) - at)
            if checksums is not None:
                sent = checksums[at // BATCH_BYTES * CRC_BYTES :][:CRC_BYTES]
            else:
                sent = b"" if chunk.app_metadata is None else chunk.app_metadata.to_pybytes()
            if chunk.data is None or chunk.data.num_rows != size or size == 0 or len(sent) != CRC_BYTES:
                raise FormatError(f"{self._label}: expected {size} bytes with their checksum, found another")
            chunk.data.validate()
            column = chunk.data.column(0)
            if column.null_count or column.buffers()[1] is None:
                raise FormatError(f"{self._label}: expected {size} bytes, found missing ones")
            address = column.buffers()[1].address + column.offset
            found = crc[at // BATCH_BYTES] = copy_bytes(address, into[at : at + size])
            if found != int.from_bytes(sent, "little"):
                wrong.append(at)
            at += size
        if at != len(into):
            raise FormatError(f"{self._label}: sent {at} bytes, expected {len(into)}")
        return wrong

    @contextlib.contextmanager
    def _connection(self, limit: float) -> Iterator[Any]:
        """A connection for one call. Made when first needed; most calls that fail give it back all the same."""
        try:
            client = self._connections.get(timeout=limit)
        except queue.Empty:
            raise DeadlineError(f"{self._label}: all connections were busy for {limit:g} s") from None
        try:
            if client is None:
                client = self._connect(BATCH_BYTES)
            yield client
        except DeadlineError:
            client.close()
            client = None
            raise
        finally:
            if self._closed and client is not None:
                client.close()
            self._connections.put(None if self._closed else client)

    @contextlib.contextmanager
    def _message_connection(self) -> Iterator[Any]:
        """The one that messages share: they do not wait behind pieces."""
        with self._opening:
            if self._messages is None:
                self._messages = self._connect(MOST_MESSAGE_BYTES)
            client = self._messages
        try:
            yield client
        except DeadlineError:
            with self._opening:
                if self._messages is client:
                    self._messages = None  # not closed: others may wait for answers on it; it ends with the last
            raise

    def _connect(self, most_bytes: int) -> Any:
        """A connection that takes in no more than so many bytes at a time."""
        if self._closed:
            raise DaemonError(f"{self._label}: this node has closed its connections to it")
        options = [("grpc.max_receive_message_length", most_bytes + _ROOM_BYTES), *_OPTIONS]
        return flight.FlightClient(f"{self._scheme}://{self._place}", generic_options=options, **self._security)

    @contextlib.contextmanager
    def _errors(self, limit: float) -> Iterator[None]:
        """Flight's errors as ours."""
        try:
            yield
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            if isinstance(error, CkptdError):
                raise
            raise from_server(error, self._label, limit) from None

    def _call_options(self, limit: float) -> Any:
        return flight.FlightCallOptions(timeout=max(limit, 0.001), headers=self._headers)

    def _cancelled(self, ticket: Ticket) -> DaemonError:
        return DaemonError(f"{self._label}: the pull of {ticket.what} of {ticket.snapshot} was cancelled")
