"""The ranks of the current epoch as far as this daemon process has heard of them. Not persisted: they come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ckptd.protocol.messages import Layout

MAX_RANKS = 120
"""Ranks of one node: a Welcome passes two descriptors for each, and the kernel passes 253 at a time."""


@dataclasses.dataclass
class Member:
    """A rank: its connection, where it stands, what a capture costs it as a share of a step, what it said of its layout
    in the survey under way."""

    peer: int | None = None
    boundary: int = -1
    cost: float | None = None
    wants: int | None = None
    pieces: bool = False
    layout: Layout | None = None


class Members(dict[int, Member]):
    """rank -> Member."""

    def of(self, peer: int) -> tuple[int, Member] | None:
        """The rank at a connection."""
        return next(((rank, member) for rank, member in self.items() if member.peer == peer), None)

    def present(self) -> Iterator[tuple[int, Member]]:
        """Those that are connected, in rank order."""
        return ((rank, member) for rank, member in sorted(self.items()) if member.peer is not None)

    def peer(self, rank: int) -> int | None:
        """The connection of a rank."""
        return self[rank].peer if rank in self else None

    def forget_layouts(self) -> None:
        """A new survey begins."""
        for member in self.values():
            member.pieces, member.layout = False, None

    def satisfied(self, step: int) -> None:
        """Requests for a snapshot up to `step` are met."""
        for member in self.values():
            if member.wants is not None and member.wants <= step:
                member.wants = None


def complaint_of(world: int, ranks: list[int]) -> str | None:
    """What is wrong with the ranks of a node."""
    if not 0 < len(ranks) <= MAX_RANKS:
        return f"{len(ranks)} ranks on one node; 1 to {MAX_RANKS} are served"
    if ranks != sorted(set(ranks)) or ranks[-1] >= world:
        return f"ranks {ranks} of {world}: expected some of the job's, each once, in order"
    return None
