"""Where nodes stand beside the facts of snapshots: what the root needs to know of all to grant, survey, flush and end.

Plain data and how it is put together on the way up the tree: of what all must have the least, of what one suffices for
the most. Putting together twice, or in another order, gives the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from ckptd.core.types import SnapshotId

MAX_WISHES = 8
"""Stores that flushes are asked for at a time; others wait."""


class Wish(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Somebody waits for `snapshot`, or a newer one, to be durable in `store`. `after`: the newest flush that had ended
    when he asked, so that a wish that has been answered, or has failed, is not fulfilled again."""

    store: str
    snapshot: SnapshotId
    after: int


class Flush(msgspec.Struct, frozen=True, array_like=True):
    """Number `number` of the epoch: `snapshot`, of `step`, into `store`, where `keep` checkpoints remain."""

    number: int
    snapshot: SnapshotId
    step: int
    store: str
    keep: int | None


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a flush has ended: committed, or by an error."""

    flush: Flush
    error: str | None = None


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """Some node cannot write its part of flush `number`."""

    number: int
    error: str


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """What one node, or all in a subtree, have said.

    `boundary`: the furthest. `room`: snapshots that may be in the making at once; 0 where a rank is missing. `asked`:
    all ranks stand at this boundary and want it captured; `asking`: some rank waits in such a request. `cost`: of a
    capture to the rank that pays most, as a share of a step. `survey`: the newest generation of layouts that is wanted;
    `pieces`: that of which all have said what their states consist of. `resting`: some node has given protection all
    the CPU that it is to have for now. `written`: the newest flush of which all have written their files. `closed`:
    every rank has finished; `parted`: and has been told that all have.
    """

    boundary: int = -1
    room: int = 0
    asked: int | None = None
    asking: bool = False
    cost: float | None = None
    survey: int = 0
    pieces: int = 0
    written: int = 0
    failed: Failure | None = None
    wishes: tuple[Wish, ...] = ()
    closed: bool = False
    parted: bool = False
    resting: bool = False


def together(standings: Collection[Standing]) -> Standing:
    """What holds of all; of at least one."""
    asked = {standing.asked for standing in standings}
    costs = [standing.cost for standing in standings if standing.cost is not None]
    failed = [standing.failed for standing in standings if standing.failed is not None]
    return Standing(
        boundary=max(standing.boundary for standing in standings),
        room=min(standing.room for standing in standings),
        asked=asked.pop() if len(asked) == 1 else None,
        asking=any(standing.asking for standing in standings),
        cost=max(costs, default=None),
        survey=max(standing.survey for standing in standings),
        pieces=min(standing.pieces for standing in standings),
        resting=any(standing.resting for standing in standings),
        written=min(standing.written for standing in standings),
        failed=max(failed, key=lambda failure: (failure.number, failure.error), default=None),
        wishes=_newest(wish for standing in standings for wish in standing.wishes),
        closed=all(standing.closed for standing in standings),
        parted=all(standing.parted for standing in standings),
    )


def _newest(wishes: Iterable[Wish]) -> tuple[Wish, ...]:
    """Of each store the wish that was made last, for the newest snapshot."""
    found: dict[str, Wish] = {}
    for wish in wishes:
        known = found.get(wish.store)
        if known is None or (wish.after, wish.snapshot) > (known.after, known.snapshot):
            found[wish.store] = wish
    return tuple(found[store] for store in sorted(found))[:MAX_WISHES]
