"""How long nobody has been here, and when that is too long. Arithmetic on times that are given; no clock of its own."""

from __future__ import annotations

from ckptd.protocol.state import NodeState

IDLE_S = 60.0
"""A daemon that no epoch has begun on leaves after this time."""

JOIN_S = 5.0
"""How long an epoch that is promised, or has no rank yet, is waited for at the least."""


class Quiet:
    """The time since somebody was here last; it begins with the daemon."""

    def __init__(self, now_s: float) -> None:
        self._since_s: float | None = now_s

    def end(self) -> None:
        """Somebody is here."""
        self._since_s = None

    def lasted_s(self, now_s: float) -> float | None:
        """So far; None while somebody is here."""
        return None if self._since_s is None else now_s - self._since_s

    def too_long_s(self, state: NodeState, now_s: float) -> float | None:
        """Nobody is here: the time that the daemon should have waited, once it has."""
        self._since_s = now_s if self._since_s is None else self._since_s
        linger_s = IDLE_S if state.policy is None else state.policy.linger_s
        if state.frozen or not state.instances:
            linger_s = max(linger_s, JOIN_S)
        return linger_s if now_s - self._since_s >= linger_s else None
