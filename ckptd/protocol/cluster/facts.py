"""Facts of a snapshot as members post them, their conjunction, and the tree that they travel on. Plain data.

Invariants
- A fact, once posted, is permanent within its epoch; merging what was heard twice, late or in another order gives the
  same as hearing it once.
- What has not been heard is unknown (None), and never counts as no.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from ckptd.core.types import Epoch, SnapshotId

FAN_OUT = 16
Part = Literal["data", "parity"]


class Shape(msgspec.Struct, frozen=True, array_like=True):
    """Groups of member numbers, and the parities of each: where segments and parities lie follows from it."""

    groups: tuple[tuple[int, ...], ...]
    parity: int

    @property
    def count(self) -> int:
        """How many members, hence strings, there are."""
        return sum(map(len, self.groups))

    def group_of(self, number: int) -> tuple[int, ...]:
        """The group that a member is in."""
        return next(group for group in self.groups if number in group)


class Membership(msgspec.Struct, frozen=True):
    """Who takes part in an epoch: the arena of each number, and arenas without one that still hold something. `world`:
    ranks of the job."""

    epoch: Epoch
    arenas: tuple[str, ...]
    guests: tuple[str, ...]
    shape: Shape
    world: int = 1

    @property
    def everybody(self) -> tuple[str, ...]:
        """Members in the order of their numbers, then guests."""
        return self.arenas + self.guests


class Held(msgspec.Struct, frozen=True):
    """What an arena holds of a snapshot: string number `string` of that shape. `parity`: its parities are complete;
    `posted`: and it has said so, which may have made the snapshot protected. `world`: ranks that have captured it."""

    snapshot: SnapshotId
    string: int
    shape: Shape
    step: int
    data: bool
    parity: bool
    posted: bool
    world: int = 1


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """The facts of a snapshot, of one member or of all in a subtree: True and False are facts, None is unknown.

    Of an open grant: it is to be used from the boundary of its number on, or if it was asked for, `at` that boundary;
    `compare`: ranks say what they hold in common, `replicas`. `late`: a grant came after its step, or after a later
    grant. `differ`: what should have been the same on several ranks was not.
    """

    snapshot: SnapshotId
    step: int | None = None
    sealed: bool | None = None
    parity: bool | None = None
    late: bool = False
    at: int | None = None
    compare: bool = False
    replicas: dict[int, int] = {}
    differ: bool = False

    @property
    def protected(self) -> bool:
        """Sealed and Parity by all that this speaks for."""
        return self.sealed is True and self.parity is True

    @property
    def wanted_step(self) -> int:
        """The first boundary at which an open grant is to be used."""
        return self.snapshot.step if self.at is None else self.at


def parent_of(number: int, fan_out: int = FAN_OUT) -> int | None:
    """Where a member's facts go; None for the root."""
    return None if number == 0 else (number - 1) // fan_out


def children_of(number: int, count: int, fan_out: int = FAN_OUT) -> range:
    """Whose facts a member collects."""
    return range(min(fan_out * number + 1, count), min(fan_out * number + fan_out + 1, count))


def conjunction(snapshot: SnapshotId, entries: Iterable[Entry | None]) -> Entry:
    """What holds of all; one that says nothing (None) knows nothing. Different steps are no snapshot, nor is one in
    which ranks hold different things in common."""
    found = list(entries)
    known = [entry for entry in found if entry is not None]
    sealed: bool | None = None if len(known) < len(found) else True
    parity: bool | None = sealed
    replicas: dict[int, int] = {}
    for entry in known:
        sealed, parity = both(sealed, entry.sealed), both(parity, entry.parity)
        replicas |= entry.replicas
    steps = {entry.step for entry in known if entry.step is not None}
    differ = any(replicas[name] != said for entry in known for name, said in entry.replicas.items())
    if len(steps) > 1 or differ:
        sealed = False
    return Entry(
        snapshot,
        min(steps, default=None),
        sealed,
        parity,
        late=any(entry.late for entry in known),
        replicas=replicas,
        differ=differ or any(entry.differ for entry in known),
    )


def both(first: bool | None, second: bool | None) -> bool | None:
    """Of two facts: no, as soon as one is no; yes, when both are."""
    if first is False or second is False:
        return False
    return None if first is None or second is None else True


def merged(old: Entry | None, new: Entry) -> Entry:
    """What is known after `new` was heard as well."""
    if old is None:
        return new
    return Entry(
        new.snapshot,
        step=new.step if old.step is None else old.step,
        sealed=_either(old.sealed, new.sealed),
        parity=_either(old.parity, new.parity),
        late=old.late or new.late,
        at=new.at if old.at is None else old.at,
        compare=old.compare or new.compare,
        replicas={**old.replicas, **new.replicas} if old.replicas or new.replicas else {},
        differ=old.differ or new.differ,
    )


def newer(first: SnapshotId | None, second: SnapshotId | None) -> SnapshotId | None:
    """The newer of two, of which either may be none."""
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


def _either(old: bool | None, new: bool | None) -> bool | None:
    """A subtree's no may follow its yes, since steps disagreed further up; never the other way round."""
    return False if False in (old, new) else old if new is None else new
