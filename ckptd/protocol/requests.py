"""Who waits at this node for something to be durable, and what the root is asked for. Part of the node machine; pure.

Owns the requests. They are answered by the first flush that reaches their target; they are not persisted, since whoever
asked asks again after a lost connection. What a node wants by itself when it ends is asked for once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ckptd.core.types import SnapshotId
from ckptd.protocol.cluster.standing import Outcome, Wish
from ckptd.protocol.messages import Message


@dataclasses.dataclass(frozen=True)
class Request:
    """A connection that waits for grant `target`, or a newer one, to be durable in `store`; `answer` makes its reply of
    the durable step."""

    peer: int
    target: SnapshotId
    store: str
    answer: Callable[[int | None], Message]


class Requests:
    """See the module docstring."""

    def __init__(self) -> None:
        self._waiting: list[Request] = []
        self._wishes: dict[str, Wish] = {}
        self._own: Wish | None = None

    @property
    def open(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    def wishes(self) -> tuple[Wish, ...]:
        """What the root is asked for."""
        return tuple(self._wishes[store] for store in sorted(self._wishes))

    def ask(self, request: Request, ended: int) -> None:
        """Somebody wants a snapshot durable; `ended`: the last flush that has, which therefore is not the answer."""
        self._waiting.append(request)
        self._wish(request, ended)

    def want(self, target: SnapshotId, store: str, last: Outcome | None) -> bool:
        """The node itself does. Whether that is still open: a flush that fails is not tried again for it."""
        ended = 0 if last is None else last.flush.number
        if self._own is None or (self._own.store, self._own.snapshot) != (store, target):
            self._own = Wish(store, target, ended)
        elif last is not None and ended > self._own.after:
            if last.flush.store == store and last.flush.snapshot >= target:
                return False
            self._own = Wish(store, target, ended)
        self._wishes.setdefault(store, self._own)
        return True

    def gone(self, peer: int) -> None:
        """Nobody waits at that connection any more."""
        self._take(lambda request: request.peer == peer)

    def retarget(self, target: SnapshotId | None) -> list[Request]:
        """A newer epoch has begun from `target`: whoever waits for something else waits for that. Where there is
        nothing, those who waited are returned, removed."""
        self._own = None
        if target is None:
            return self._take(lambda request: True)
        self._waiting = [dataclasses.replace(request, target=target) for request in self._waiting]
        self._again(0)
        return []

    def ended(self, outcome: Outcome) -> list[Request]:
        """A flush has committed or failed: the requests that this settles, removed."""
        flush = outcome.flush
        settled = self._take(lambda request: request.store == flush.store and request.target <= flush.snapshot)
        self._again(flush.number)
        return settled

    def _wish(self, request: Request, ended: int) -> None:
        known = self._wishes.get(request.store)
        if known is None or (ended, request.target) > (known.after, known.snapshot):
            self._wishes[request.store] = Wish(request.store, request.target, ended)

    def _again(self, ended: int) -> None:
        """Of the wishes those remain that somebody still waits for."""
        self._wishes = {}
        for request in self._waiting:
            self._wish(request, ended)

    def _take(self, wanted: Callable[[Request], bool]) -> list[Request]:
        taken = [request for request in self._waiting if wanted(request)]
        self._waiting = [request for request in self._waiting if request not in taken]
        if taken:
            kept = {store: wish.after for store, wish in self._wishes.items()}
            self._wishes = {}
            for request in self._waiting:
                self._wish(request, kept[request.store])
        return taken
