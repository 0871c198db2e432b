"""What rank 0 of a simulated job says at its start: trainer/start.py without ranks and connections."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import Choice, beginning, choose
from ckptd.protocol.cluster.facts import Shape


class Launch:
    """Begins an epoch for `arenas`, the nodes of the job, with earlier members (`guests`) as far as they answer.

    Events: `heard` a message, `expire` (guests have had their time), `recorded`. `take()`: what to send and `record`.
    """

    def __init__(
        self,
        arenas: Sequence[str],
        guests: Sequence[str],
        shape: Shape,
        nonce: str,
        *,
        number: int = 1,
        records: Sequence[EpochRecord] = (),
        stored: Collection[SnapshotId] = (),
    ) -> None:
        self.arenas, self.shape = tuple(arenas), shape
        self.epoch = Epoch(number, nonce)
        self.choice: Choice | None = None
        self.record: EpochRecord | None = None
        """To be written into the store before anything begins."""
        self.begun: set[str] = set()
        self.promises: dict[str, m.Promise] = {}
        self._guests = tuple(guests)
        self._records, self._stored = records, stored
        self._expired = False
        self._begin: m.Begin | None = None

    @property
    def done(self) -> bool:
        """Every node of the job has begun."""
        return self._begin is not None and self.begun.issuperset(self.arenas)

    def heard(self, message: m.Promise | m.Refuse | m.Begun) -> None:
        """An answer. One to an earlier number says nothing: a late refusal of it would raise the number for ever."""
        if message.epoch != self.epoch:
            return
        if isinstance(message, m.Begun):
            self.begun.add(message.arena)
        elif self.choice is None and isinstance(message, m.Promise):
            self.promises[message.arena] = message
        elif self.choice is None and isinstance(message, m.Refuse) and message.promised.number >= self.epoch.number:
            self.epoch = Epoch(message.promised.number + 1, self.epoch.nonce)
            self.promises.clear()
        self._choose()

    def expire(self) -> None:
        """Guests that have not answered count as lost."""
        self._expired = True
        self._choose()

    def recorded(self) -> None:
        """The record is durable, or there is no store."""
        assert self.choice is not None
        guests = tuple(arena for arena in self.promises if arena not in self.arenas)
        self._begin = beginning(self.epoch, self.choice, self.arenas, guests, self.shape)

    def messages(self) -> list[tuple[str, m.ClusterMessage]]:
        """What those who have not answered are to be told, as often as it takes."""
        if self._begin is not None:
            waiting = [*self.arenas, *self._begin.membership.guests]
            return [(arena, self._begin) for arena in waiting if arena not in self.begun]
        if self.choice is not None:
            return []
        everyone = [*self.arenas, *self._guests]
        return [(arena, m.Prepare(self.epoch)) for arena in everyone if arena not in self.promises]

    def _choose(self) -> None:
        answered = self.promises.keys()
        if self.choice is not None or not answered >= set(self.arenas):
            return
        if self._expired or answered >= set(self._guests):
            self.choice = choose(list(self.promises.values()), self._records, self._stored)
            self.record = EpochRecord(self.epoch, self.choice.name)
