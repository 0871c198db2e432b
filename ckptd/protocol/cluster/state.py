"""What a member of a job keeps of protection across the death of its daemon: plain data in the ledger of its arena.

Written before any action that follows from it, as NodeState is. What is not here is said again by others.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster.facts import Entry, Held, Membership, Part, Shape
from ckptd.protocol.cluster.standing import Flush, Outcome

PARITY_SETS = 2


class Holding(msgspec.Struct):
    """A snapshot that this arena has to do with, of `world` ranks. `capturing`: some may be writing. `data`: its string
    is whole here. `area`: its parity set; `encoded`: the parities in it are complete. `sealed`, `parity`: the facts as
    posted in this epoch; `agreed`: all have posted Sealed. `replicas`: what its ranks say they have in common with
    others, until all have. `records`: number -> seal record of each member of the group, its own too."""

    snapshot: SnapshotId
    string: int
    shape: Shape
    step: int | None = None
    world: int = 1
    capturing: bool = False
    data: bool = False
    area: int | None = None
    encoded: bool = False
    sealed: bool | None = None
    parity: bool | None = None
    agreed: bool = False
    late: bool = False
    replicas: dict[int, int] = {}
    records: dict[int, bytes] = {}

    def entry(self) -> Entry:
        """Its facts."""
        return Entry(self.snapshot, self.step, self.sealed, self.parity, self.late, replicas=self.replicas)

    @property
    def name(self) -> SnapshotId | None:
        """What people and stores call it: by the step that was captured."""
        return None if self.step is None else SnapshotId(self.snapshot.epoch, self.step)

    def held(self) -> Held | None:
        """What an inventory says of it; None if there is nothing to say."""
        if not (self.data or self.encoded) or self.step is None:
            return None
        return Held(
            self.snapshot,
            self.string,
            self.shape,
            self.step,
            self.data,
            self.encoded or (self.data and self.shape.parity == 0),
            self.parity is True,
            self.world,
        )


class ClusterState(msgspec.Struct):
    """`point`: the restore point of the epoch, of `point_step`, `continued` if its facts are posted anew; until one is
    protected it `tolerates` so many losses in a group, and guests are asked for it (`holders`, arena -> string).
    `protected`: the newest snapshot known, or taken, to be protected; `confirmed` since then. `granted`: the
    newest grant. `flush`: the newest flush of the epoch, `last`: the last one that has ended, `written`: the last one
    that this node has written its files of. `durable`: what is newest in the job's store, of the live branch."""

    arena: str
    promised: Epoch | None = None
    membership: Membership | None = None
    number: int | None = None
    point: SnapshotId | None = None
    point_step: int = 0
    continued: bool = False
    tolerates: int = 0
    holders: dict[str, int] = {}
    protected: SnapshotId | None = None
    confirmed: bool = False
    granted: int = 0
    flush: Flush | None = None
    last: Outcome | None = None
    written: int = 0
    durable: SnapshotId | None = None
    holdings: list[Holding] = []
    records: list[EpochRecord] = []

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that has begun here."""
        return None if self.membership is None else self.membership.epoch

    @property
    def frozen(self) -> bool:
        """A newer epoch is promised and has not begun: nothing is posted, decided, encoded or freed."""
        return self.membership is None or (self.promised or self.membership.epoch) > self.membership.epoch

    @property
    def point_level(self) -> Level | None:
        """How safe the restore point is in memory, until this epoch has protected something: protected only if it still
        survives as many losses as are promised. None: there is none, or something is protected."""
        if self.membership is None or self.point is None or self.confirmed:
            return None
        return Level.PROTECTED if self.tolerates == self.membership.shape.parity else Level.SEALED

    @property
    def newest(self) -> Holding | None:
        """The newest snapshot that is known to be sealed by all: of this epoch, or what it goes on from."""
        found = [h for h in self.holdings if h.agreed and self.is_current(h.snapshot)]
        return max(found, key=lambda holding: holding.snapshot, default=None)

    @property
    def protected_step(self) -> int | None:
        """Of the newest snapshot that is known to be protected against losses, as far as it is held here."""
        if self.membership is None or self.membership.shape.parity == 0 or self.protected is None:
            return None
        holding = self.find(self.protected)
        return None if holding is None else holding.step

    @property
    def ended(self) -> int:
        """The number of the last flush that has ended."""
        return 0 if self.last is None else self.last.flush.number

    @property
    def flushing(self) -> Flush | None:
        """The flush under way."""
        return self.flush if self.flush is not None and self.flush.number > self.ended else None

    def find(self, snapshot: SnapshotId) -> Holding | None:
        """What is held of a snapshot."""
        return next((holding for holding in self.holdings if holding.snapshot == snapshot), None)

    def is_current(self, snapshot: SnapshotId) -> bool:
        """Facts about it are posted in this epoch."""
        return snapshot.epoch == self.epoch or (self.continued and snapshot == self.point)

    @property
    def restore_point(self) -> SnapshotId | None:
        """What the epoch goes on from, by its name."""
        return None if self.point is None else SnapshotId(self.point.epoch, self.point_step)

    def free_area(self) -> int | None:
        """A parity set that holds nothing."""
        assert self.membership is not None
        used = {h.area for h in self.holdings if h.shape == self.membership.shape}
        return next((area for area in range(PARITY_SETS) if area not in used), None)


def recover(
    state: ClusterState, data: Collection[SnapshotId], parity: Collection[SnapshotId]
) -> list[tuple[SnapshotId, Part]]:
    """Makes the state of a daemon's predecessor true where only these strings and parities came over. Returns those of
    them that it does not know: the predecessor was killed before it could free them."""
    for holding in state.holdings:
        holding.data = holding.data and holding.snapshot in data
        holding.encoded = holding.encoded and holding.snapshot in parity
    known = {h.snapshot for h in state.holdings}
    areas = {h.snapshot for h in state.holdings if h.area is not None}
    strings: list[tuple[SnapshotId, Part]] = [(snapshot, "data") for snapshot in data if snapshot not in known]
    return strings + [(snapshot, "parity") for snapshot in parity if snapshot not in areas]
