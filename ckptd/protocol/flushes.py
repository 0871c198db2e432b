"""What to write into which store next, and who waits for it. Part of the node machine; pure.

Owns the flush that runs, the requests, and the memory of a failure. One flush runs at a time, always of the newest
sealed snapshot. Requests are answered by the first flush that reaches their target; they are not persisted, since
whoever asked asks again after a lost connection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ckptd.core.types import SnapshotId
from ckptd.protocol.actions import StartFlush
from ckptd.protocol.messages import Message
from ckptd.protocol.slots import Sealed


@dataclasses.dataclass(frozen=True)
class Request:
    """A connection that waits for `target` to be durable in `store`; `answer` makes its reply of the durable step."""

    peer: int
    target: SnapshotId
    store: str
    answer: Callable[[int | None], Message]


class Flushes:
    """See the module docstring."""

    def __init__(self) -> None:
        self.running: StartFlush | None = None
        self.requests: list[Request] = []
        self.failed: tuple[SnapshotId, str] | None = None
        """The newest failure of a flush into the job's own store, until somebody asks again."""

    def ask(self, request: Request) -> None:
        """Somebody wants a snapshot durable: what failed before is tried again."""
        self.requests.append(request)
        self.failed = None

    def gone(self, peer: int) -> None:
        """Nobody waits at that connection any more."""
        self.requests = [request for request in self.requests if request.peer != peer]

    def retarget(self, target: SnapshotId | None) -> list[Request]:
        """A newer epoch has begun from `target`: whoever waits for something else waits for that. Where there is
        nothing, those who waited are returned, removed."""
        if target is None:
            return self._take(lambda request: True)
        self.requests = [dataclasses.replace(request, target=target) for request in self.requests]
        return []

    def start(self, newest: Sealed, own: str | None, due: bool, keep: int | None) -> StartFlush | None:
        """The flush to begin now, if any: for the oldest request, else into the job's `own` store where it is `due`."""
        if self.running is not None:
            return None
        store = self.requests[0].store if self.requests else own if due else None
        if store is None:
            return None
        slots = tuple(newest.slots[rank] for rank in sorted(newest.slots))
        self.running = StartFlush(newest.snapshot, slots, store, keep if store == own else None)
        return self.running

    def ended(self, snapshot: SnapshotId, store: str, live: bool) -> list[Request]:
        """The running flush has committed or failed: the requests that this settles, removed. One of a snapshot that is
        not `live` any more, since a restart went back to before it, settles nothing."""
        self.running = None
        return self._take(lambda request: live and request.store == store and request.target <= snapshot)

    def _take(self, wanted: Callable[[Request], bool]) -> list[Request]:
        taken = [request for request in self.requests if wanted(request)]
        self.requests = [request for request in self.requests if request not in taken]
        return taken
