"""What a node machine has to say and to do, in order, and to whom. Part of the node machine; pure.

Owns the actions of one event and the ranks as far as they can be spoken to. A rank that is away, or has said Hello and
is not in yet, is told nothing: all of it is repeated when it is welcomed.
"""

from __future__ import annotations

from typing import Any

from ckptd.core.types import Epoch
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Action, Send
from ckptd.protocol.members import Member, Members


class Voice:
    """See the module docstring. `coming`: ranks that have said Hello and are not in yet; whether they were before."""

    def __init__(self) -> None:
        self.members = Members()
        self.coming: dict[int, bool] = {}
        self._out: list[Action] = []

    def take(self) -> list[Action]:
        """The actions since the last call, in order."""
        out, self._out = self._out, []
        return out

    def do(self, *actions: Action) -> None:
        """Actions that are no messages."""
        self._out += actions

    def say(self, peer: int, message: m.Message, **descriptors: Any) -> None:
        """To a connection."""
        self._out.append(Send(peer, message, **descriptors))

    def refuse(self, peer: int, error: str, text: str, promised: Epoch | None = None) -> None:
        """To a connection, by the name of an error."""
        self.say(peer, m.Refuse(error, text[: m.MAX_TEXT], promised))

    def tell(self, rank: int, message: m.Message, **descriptors: Any) -> None:
        """To a rank, if it is in."""
        peer = self.members.peer(rank)
        if peer is not None and rank not in self.coming:
            self.say(peer, message, **descriptors)

    def broadcast(self, message: m.Message, **descriptors: Any) -> None:
        """To all ranks that are in."""
        for rank, _ in self.members.present():
            self.tell(rank, message, **descriptors)

    def listening(self) -> list[Member]:
        """The ranks that are in, in order."""
        return [member for rank, member in self.members.present() if rank not in self.coming]
