"""Slots and the snapshots in them: which slot is free, granted, held or quarantined. Pure bookkeeping.

Rules (docs/protocol.md, "Slots"):
- A slot is handed out only when free: mapped by the process that will write it, in no sealed snapshot that is kept, in
  no granted snapshot.
- A granted snapshot ends in exactly one way: every writer captured the same step (sealed), or it is dead. A dead one
  keeps the slots of those writers that have not answered yet, since they may still be writing, until they answer or
  their process has ended (quarantine).
- What is sealed here stays until the member machine frees it.
- Where ranks say what they hold in common, they say the same, or the snapshot is dead.
- Numbers of slots and, within an epoch, of grants are never used twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from ckptd.core.types import Epoch, SnapshotId


class Slot(msgspec.Struct):
    """One memory slot of a rank. `ready`: allocated, and its descriptor is here. `owner`: the trainer process that has
    it mapped for writing. `surplus`: given to nobody any more, and dropped once idle. `frozen_bytes`: of the region it
    shares with the other slots of its rank and digest."""

    slot: int
    rank: int
    digest: str
    size: int
    frozen_bytes: int = 0
    ready: bool = False
    owner: str | None = None
    surplus: bool = False


class Granted(msgspec.Struct):
    """A snapshot in the making: grant number `grant`, to be used from the boundary of `at` on. `outcome`: rank ->
    captured or not. `dead`: it will never be sealed; `told`: so its writers were told; `late`: since it came too late.
    `compare`: the ranks say what they hold in common, and `replicas` is what has been said."""

    epoch: Epoch
    grant: int
    at: int
    slots: dict[int, int]
    writers: dict[int, str]
    step: int | None = None
    outcome: dict[int, bool] = {}
    dead: bool = False
    told: bool = False
    late: bool = False
    compare: bool = False
    replicas: dict[int, int] = {}

    @property
    def name(self) -> SnapshotId:
        """As the daemons of the job know it."""
        return SnapshotId(self.epoch, self.grant)

    @property
    def complete(self) -> bool:
        """Every writer has captured the same step."""
        return not self.dead and len(self.outcome) == len(self.writers) and all(self.outcome.values())

    @property
    def silent(self) -> list[int]:
        """Ranks that have not answered: their slots may still be written to."""
        return [rank for rank in self.writers if rank not in self.outcome]


class Sealed(msgspec.Struct, frozen=True):
    """A snapshot that every rank of the node has captured: rank -> slot. Daemons know it by its `grant`, slots and
    stores by its step (`snapshot`)."""

    snapshot: SnapshotId
    grant: SnapshotId
    slots: dict[int, int]


def memory_bytes(slots: Iterable[Slot]) -> int:
    """What slots take together, each frozen region once."""
    held = list(slots)
    return sum(slot.size for slot in held) + sum({(s.rank, s.digest): s.frozen_bytes for s in held}.values())


class SlotTable(msgspec.Struct):
    """All slots of a node, and what is in them. Plain data: it is what survives the daemon. `numbered`: the last number
    given; an arena that takes the place of a lost one starts where no trainer can know a number."""

    slots: list[Slot] = []
    granted: list[Granted] = []
    sealed: list[Sealed] = []
    numbered: int = 0

    def create(self, rank: int, digest: str, size: int, frozen_bytes: int = 0) -> Slot:
        """A new slot, not ready yet."""
        self.numbered += 1
        self.slots.append(Slot(self.numbered, rank, digest, size, frozen_bytes))
        return self.slots[-1]

    def get(self, number: int) -> Slot | None:
        """The slot of that number."""
        return next((slot for slot in self.slots if slot.slot == number), None)

    def matching(self, rank: int, digest: str, size: int, epoch: Epoch) -> list[Slot]:
        """Slots of a rank that fit a layout, ready or in the making, whatever is in them; quarantined ones last."""
        quarantined = self.quarantined(epoch)
        found = [s for s in self.slots if (s.rank, s.digest, s.size, s.surplus) == (rank, digest, size, False)]
        return sorted(found, key=lambda slot: slot.slot in quarantined)

    def quarantined(self, epoch: Epoch) -> set[int]:
        """Slots that a process of another epoch may still be writing to; nobody knows for how long."""
        return {g.slots[rank] for g in self.granted if g.epoch != epoch for rank in g.silent}

    def busy(self) -> set[int]:
        """Slots that hold something or may be written to."""
        used = {slot for sealed in self.sealed for slot in sealed.slots.values()}
        for granted in self.granted:
            ranks = granted.silent if granted.dead else granted.slots
            used |= {granted.slots[rank] for rank in ranks}
        return used

    def vacant(self, rank: int, digest: str, owner: str) -> list[int]:
        """Slots that a rank's process has mapped and that may be granted for a layout."""
        busy = self.busy()
        return [
            s.slot
            for s in self.slots
            if (s.ready, s.rank, s.digest, s.owner, s.surplus) == (True, rank, digest, owner, False)
            and s.slot not in busy
        ]

    def find(self, epoch: Epoch, grant: int) -> Granted | None:
        """The snapshot granted under that number."""
        return next((g for g in self.granted if g.epoch == epoch and g.grant == grant), None)

    def holding(self, grant: SnapshotId) -> Sealed | None:
        """The sealed snapshot of that grant."""
        return next((s for s in self.sealed if s.grant == grant), None)

    def answer(self, granted: Granted, rank: int, step: int | None, replicas: Mapping[int, int] | None = None) -> bool:
        """A writer's outcome: the step it captured, or None. Outcomes never change. Whether the `replicas` agree with
        those of the ranks before it."""
        if rank not in granted.writers or rank in granted.outcome:
            return True
        agree = all(granted.replicas.setdefault(name, said) == said for name, said in (replicas or {}).items())
        granted.outcome[rank] = step is not None
        if step is None or not agree or (granted.step is not None and granted.step != step):
            granted.dead = True
        elif granted.step is None:
            granted.step = step
        return agree

    def writer_ended(self, instance: str) -> None:
        """The process of `instance` is gone: what it had not answered is missed."""
        for granted in self.granted:
            for rank in [r for r in granted.silent if granted.writers[r] == instance]:
                self.answer(granted, rank, None)

    def seal(self) -> Iterator[Granted]:
        """Moves complete snapshots to the sealed ones and yields them; forgets dead ones that all have answered."""
        for granted in list(self.granted):
            if granted.complete and granted.step is not None:
                self.granted.remove(granted)
                self.sealed.append(Sealed(SnapshotId(granted.epoch, granted.step), granted.name, granted.slots))
                yield granted
            elif granted.dead and not granted.silent:
                self.granted.remove(granted)

    def free(self, grant: SnapshotId) -> None:
        """What the slots of a snapshot hold is needed no more."""
        self.sealed = [s for s in self.sealed if s.grant != grant]

    def retire(self, layouts: Mapping[int, str]) -> list[Slot]:
        """Removes idle slots that are surplus or fit no rank's current layout, and returns them."""
        busy = self.busy()
        gone = [s for s in self.slots if s.slot not in busy and (s.surplus or layouts.get(s.rank) != s.digest)]
        self.slots = [s for s in self.slots if s not in gone]
        return gone
