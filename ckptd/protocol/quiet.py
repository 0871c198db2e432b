"""How long nobody has been here, or has answered, and when that is too long. Arithmetic on times that are given; no
clock of its own."""

from __future__ import annotations

from ckptd.protocol.state import NodeState

IDLE_S = 60.0
"""A daemon that no epoch has begun on leaves after this time."""

JOIN_S = 5.0
"""How long an epoch that is promised, or has no rank yet, is waited for at the least."""


PART_S = 10.0
"""How long a node of a job that has closed waits for others to have heard of it."""

WAIT_S = 60.0
"""How long a node that would leave waits for what other nodes have to do with it."""


class Quiet:
    """The time since somebody was here last; it begins with the daemon."""

    def __init__(self, now_s: float) -> None:
        self._since_s: float | None = now_s
        self._closed_s: float | None = None
        self._waiting_s: float | None = None

    def end(self) -> None:
        """Somebody is here."""
        self._since_s = None

    def lasted_s(self, now_s: float) -> float | None:
        """So far; None while somebody is here."""
        return None if self._since_s is None else now_s - self._since_s

    def parted(self, closed: bool, now_s: float) -> bool:
        """The job has closed, long enough ago: who has not said that he knows may be gone already."""
        self._closed_s = None if not closed else now_s if self._closed_s is None else self._closed_s
        return self._closed_s is not None and now_s - self._closed_s >= PART_S

    def waited(self, now_s: float) -> bool:
        """The node waits for others; whether it has done so for too long."""
        self._waiting_s = now_s if self._waiting_s is None else self._waiting_s
        return now_s - self._waiting_s >= WAIT_S

    def end_waiting(self) -> None:
        """It does not any more."""
        self._waiting_s = None

    def too_long_s(self, state: NodeState, now_s: float) -> float | None:
        """Nobody is here: the time that the daemon should have waited, once it has."""
        self._since_s = now_s if self._since_s is None else self._since_s
        linger_s = IDLE_S if state.policy is None else state.policy.linger_s
        if state.ranks and len(state.closed) == len(state.ranks):
            linger_s = min(linger_s, WAIT_S)  # other nodes may have gone without saying that all have finished
        if state.frozen or not state.instances:
            linger_s = max(linger_s, JOIN_S)
        return linger_s if now_s - self._since_s >= linger_s else None
