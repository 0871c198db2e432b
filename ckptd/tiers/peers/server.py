"""The daemon's answers to its peers: pieces of registered sources, and small messages.

Invariants:
- Before a request is looked at, the caller has shown a certificate that is trusted (TLS) and the token of the epoch.
- All answers together use at most `buffers` buffers of one batch each, allocated when first needed and used again: a
  batch is copied out of its source once, its checksum taken from the copy, and the copy is what is sent.
- A server is of one epoch; the next epoch has its own.

It sets no limits of its own to the time that a call takes, since Flight cannot end a call from this side: a caller that
stops reading keeps one buffer until the deadline that it gave.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.flight as flight

from ckptd.core.errors import CkptdError, ConfigError, DaemonError, FormatError
from ckptd.tiers.peers.address import Listener, join_address
from ckptd.tiers.peers.identity import Announcement, Credentials
from ckptd.tiers.peers.sources import Registered, Sources
from ckptd.tiers.peers.wire import (
    BATCH_BYTES,
    CHECKSUMS,
    CRC_BYTES,
    MOST_MESSAGE_BYTES,
    SCHEMA,
    Ticket,
    check_headers,
    check_kind,
    for_client,
)

BUFFERS = 8
MOST_CALLS = 256
"""At once; each has a thread of Flight's. More are refused."""

BUFFER_WAIT_S = 10.0

Answer = Callable[[str, str, bytes], bytes]
"""(node that asks, kind, body) -> body. Runs on Flight's threads, several at once; may raise a CkptdError."""


class PeerServer:
    """Serves `sources` and `answer` at a reserved address to the members of an epoch, from construction to `close`."""

    def __init__(
        self,
        credentials: Credentials,
        listener: Listener,
        members: Sequence[Announcement],
        sources: Sources,
        answer: Answer | None = None,
        *,
        buffers: int = BUFFERS,
        most_calls: int = MOST_CALLS,
    ) -> None:
        guard = _Guard(credentials, frozenset(member.node for member in members))
        identity = credentials.identity
        security: dict[str, Any] = {}
        if identity is not None:
            security = {
                "tls_certificates": [(identity.certificate, identity.key)],
                "verify_client": True,
                "root_certificates": credentials.trusted_clients(members),
            }
        scheme = "grpc" if identity is None else "grpc+tls"
        place = join_address(listener.host, listener.port)
        try:
            self._service = _Service(
                f"{scheme}://{place}",
                guard,
                sources,
                answer,
                _Buffers(buffers),
                threading.Semaphore(most_calls),
                security,
            )
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{place}: the server for other nodes does not start: {error}") from None
        finally:
            listener.release()
        self.host, self.port = listener.host, listener.port

    def close(self, deadline_s: float = 10.0) -> bool:
        """Ends serving; batches under way are the last. False where a caller that stopped reading holds a call even
        after the deadline; it is then left to end with that caller."""
        self._service.closing.set()
        # Not `shutdown`: after that one Flight waits for the callers once more when the process ends.
        ending = threading.Thread(
            target=self._service.__exit__, args=(None, None, None), name="peers-shutdown", daemon=True
        )
        ending.start()
        ending.join(deadline_s)
        if ending.is_alive():
            # Its destructor would wait for that caller as well.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._service))
        return not ending.is_alive()


class _Guard(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Looks at the headers of every call before Flight hands it on."""

    def __init__(self, credentials: Credentials, members: frozenset[str]) -> None:
        self._credentials, self._members = credentials, members

    def start_call(self, info: Any, headers: Any) -> _Caller:
        """As Flight calls it."""
        try:
            return _Caller(check_headers(headers, self._credentials, self._members))
        except CkptdError as error:
            raise flight.FlightUnauthenticatedError(str(error), type(error).__name__.encode()) from None


class _Caller(flight.ServerMiddleware):  # type: ignore[misc]
    """The node that a call comes from."""

    def __init__(self, node: str) -> None:
        self.node = node


class _Buffers:
    """At most `count` buffers of a batch. Each comes back when Flight lets go of what was sent from it."""

    def __init__(self, count: int) -> None:
        self._left = threading.Semaphore(count)
        self._idle: list[npt.NDArray[np.uint8]] = []

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes until the array, and all that refers to it, is gone. Raises DaemonError if none comes free."""
        if not self._left.acquire(timeout=BUFFER_WAIT_S):
            raise DaemonError(f"busy: all buffers were in use for {BUFFER_WAIT_S:g} s; ask again")
        try:
            whole = self._idle.pop()
        except IndexError:
            whole = np.empty(BATCH_BYTES, np.uint8)
        part = whole[:size]
        weakref.finalize(part, self._give, whole).atexit = False
        return part

    def _give(self, whole: npt.NDArray[np.uint8]) -> None:
        self._idle.append(whole)
        self._left.release()


class _Service(flight.FlightServerBase):  # type: ignore[misc]
    """Flight's view of the server; its methods run on threads of Flight's."""

    def __init__(
        self,
        location: str,
        guard: _Guard,
        sources: Sources,
        answer: Answer | None,
        buffers: _Buffers,
        calls: threading.Semaphore,
        security: dict[str, Any],
    ) -> None:
        self.closing = threading.Event()
        self._sources, self._answer, self._buffers, self._calls = sources, answer, buffers, calls
        super().__init__(location, middleware={"guard": guard}, **security)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """The bytes that a ticket asks for."""
        try:
            wanted = Ticket.decode(ticket.ticket)
            registered = self._sources.find(wanted.snapshot, wanted.what)
            registered.check(wanted.offset, wanted.length)
            mapped = self._mapped(registered, wanted.offset, wanted.length)
        except CkptdError as error:
            raise for_client(error) from None
        except OSError as error:
            raise for_client(DaemonError(f"{registered.label}: cannot be mapped: {error}")) from None
        if mapped is not None:
            return mapped
        return flight.GeneratorStream(SCHEMA, self._batches(context, registered, wanted.offset, wanted.length))

    def _mapped(self, registered: Registered, offset: int, length: int) -> Any:
        """All batches as they lie in memory, for Flight to send by itself; None for what has to be copied."""
        mapping = registered.map(offset, length)
        if mapping is None:
            return None
        if not self._calls.acquire(blocking=False):
            raise DaemonError("busy: too many calls at once; ask again")
        weakref.finalize(mapping.obj, self._calls.release).atexit = False
        parts = [mapping[start : start + BATCH_BYTES] for start in range(0, length, BATCH_BYTES)]
        crc = [registered.checksum(offset + index * BATCH_BYTES, part) for index, part in enumerate(parts)]
        schema = SCHEMA.with_metadata({CHECKSUMS: b"".join(one.to_bytes(CRC_BYTES, "little") for one in crc)})
        batches = [_batch(pa.py_buffer(part), schema) for part in parts]
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches))

    def _batches(self, context: Any, registered: Registered, offset: int, length: int) -> Iterator[tuple[Any, bytes]]:
        # The call is counted in here: Flight may drop a generator that it has not started.
        if not self._calls.acquire(blocking=False):
            raise for_client(DaemonError("busy: too many calls at once; ask again"))
        try:
            for start in range(offset, offset + length, BATCH_BYTES):
                if context.is_cancelled():
                    return
                if self.closing.is_set():
                    raise DaemonError("is closing")
                size = min(BATCH_BYTES, offset + length - start)
                yield self._copied(registered, start, size)
        except CkptdError as error:
            raise for_client(error) from None
        except OSError as error:
            raise for_client(DaemonError(f"{registered.label}: cannot be read: {error}")) from None
        finally:
            self._calls.release()

    def _copied(self, registered: Registered, offset: int, size: int) -> tuple[Any, bytes]:
        """A batch of what cannot be mapped. Nothing here may refer to the buffer afterwards."""
        copy = self._buffers.take(size)
        crc = registered.read(offset, copy.data)
        return _batch(pa.py_buffer(copy), SCHEMA), crc.to_bytes(CRC_BYTES, "little")

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """The answer to a message."""
        if not self._calls.acquire(blocking=False):
            raise for_client(DaemonError("busy: too many calls at once; ask again"))
        try:
            return [self._answered(context.get_middleware("guard").node, action)]
        except CkptdError as error:
            raise for_client(error) from None
        finally:
            self._calls.release()

    def _answered(self, node: str, action: Any) -> bytes:
        kind, body = check_kind(action.type), action.body
        size = 0 if body is None else body.size
        if size > MOST_MESSAGE_BYTES:
            raise FormatError(f"message {kind} of {size} bytes, expected at most {MOST_MESSAGE_BYTES}")
        if self._answer is None or self.closing.is_set():
            raise DaemonError(f"does not answer messages now ({kind})")
        answer = self._answer(node, kind, b"" if body is None else body.to_pybytes())
        if len(answer) > MOST_MESSAGE_BYTES:
            raise FormatError(f"answer to {kind} of {len(answer)} bytes, expected at most {MOST_MESSAGE_BYTES}")
        return answer


def _batch(data: Any, schema: Any) -> Any:
    """Bytes as they are sent."""
    column = pa.Array.from_buffers(schema.field(0).type, data.size, [None, data], null_count=0)
    return pa.RecordBatch.from_arrays([column], schema=schema)
