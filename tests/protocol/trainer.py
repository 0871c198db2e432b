"""A trainer's side of the protocol without torch, threads or memory: what trainer/capture.py does, as a state machine.

Owns what one process of a rank knows. `Memory` stands for a memfd: which snapshot of which rank its bytes are, and who
is writing to it. The simulation decides when the training thread runs, when a copy ends, when a slot is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol import messages as m

SLOT_BYTES = 1000


@dataclasses.dataclass(eq=False)
class Memory:
    """One memfd. `content`: what it holds whole; `common`: what it has in common with other ranks' memory, if they
    compare; `writer`: the process that is copying into it."""

    rank: int
    digest: str
    content: SnapshotId | None = None
    common: int | None = None
    writer: str | None = None


@dataclasses.dataclass
class Copy:
    """A capture under way."""

    grant: int
    slot: int
    step: int
    memory: Memory
    compare: bool


Say = Callable[[m.Message, Memory | None], None]


class Trainer:
    """One process of a rank. `say` puts a message on its connection, or drops it where there is none."""

    heeds_lateness = True

    def __init__(self, hello: m.Hello, say: Say) -> None:
        self.hello, self.say = hello, say
        self.epoch: Epoch = hello.epoch
        self.rank = hello.rank
        self.version = 0
        """Of the state's layout; the training script may change it."""
        self.common: int | None = 1
        """What this rank and others take for the same; None once they know that it is not."""
        self.compared = False
        self.step = hello.restore_point.step if hello.restore_point is not None else 0
        self.slots: dict[int, Memory] = {}
        self.making: list[tuple[str, int, Memory | None]] = []
        self.grants: dict[int, m.Grant] = {}
        self.granted = 0
        self.outcomes: dict[int, m.Captured | m.Missed] = {}
        self.copy: Copy | None = None
        self.survey: int | None = None
        self.pieces: tuple[int, int] | None = None
        self.layout: tuple[int, str] | None = None
        self.boundary: m.Boundary | None = None
        self.passed = -1
        self.requested: int | None = None
        self.standing: list[m.Message] = []
        self.sealed = self.durable = -1
        self.refused: m.Refuse | None = None
        self.closed = False
        self.drained = False

    # --- the training thread

    def ends_step(self, updated: bool) -> None:
        """A boundary. The window closes before the optimizer steps, so no copy is under way."""
        assert self.copy is None
        self.step += 1
        self.boundary = m.Boundary(self.step, 1.0)
        self.say(self.boundary, None)
        if updated:
            self.looks()

    def looks(self) -> None:
        """At a boundary, or while waiting in `snapshot`: answers a survey, uses a grant."""
        generation, self.survey = self.survey, None
        if generation is not None:
            self.pieces = (generation, self.version)
            if self.compared and self.common != 1:
                self.common = None
            self.say(m.Pieces(generation), None)
        grant = self._due()
        if grant is not None:
            granted = self.grants[grant]
            self._captures(grant, granted.slot, granted.compare)

    def _due(self) -> int | None:
        self.passed = max(self.passed, self.step)
        due = sorted(n for n, grant in self.grants.items() if grant.step <= self.step and n not in self.outcomes)
        for grant in due[:-1]:
            self.settle(m.Missed(grant, "revoked"))
        return due[-1] if due else None

    def _captures(self, grant: int, slot: int, compare: bool) -> None:
        memory = self.slots.get(slot)
        if memory is None or self.layout is None or self.layout[1] != self.digest:
            self.settle(m.Missed(grant, "layout"))
            return
        memory.content, memory.writer, memory.common = None, self.hello.instance, None
        self.copy = Copy(grant, slot, self.step, memory, compare)

    def copied(self, reason: m.Reason | None) -> None:
        """The copy under way is complete, or was given up."""
        copy, self.copy = self.copy, None
        assert copy is not None
        copy.memory.writer = None
        if reason is None:
            copy.memory.content = SnapshotId(self.epoch, copy.step)
            copy.memory.common = self.common if copy.compare else None
            self.compared = self.compared or copy.compare
            said = {} if copy.memory.common is None else {0: copy.memory.common}
            self.settle(m.Captured(copy.grant, copy.step, copy.slot, said))
        else:
            self.settle(m.Missed(copy.grant, reason))

    def settle(self, outcome: m.Captured | m.Missed) -> None:
        """The one outcome of a grant: remembered, said."""
        if outcome.grant not in self.outcomes:
            self.outcomes[outcome.grant] = outcome
            self.say(outcome, None)

    def requests(self) -> None:
        """`snapshot()`: every rank stands at this boundary."""
        if self.sealed < self.step:
            self.requested = self.step
            self.say(m.Request(self.step), None)

    def asks(self, message: m.Message) -> None:
        """Said now and after each reconnection, until it is answered."""
        self.standing.append(message)
        self.say(message, None)

    @property
    def digest(self) -> str:
        """Of the layout that the state has now."""
        return f"{self.rank}/{self.hello.world}/{self.version}"

    # --- the thread that makes slots

    def makes(self) -> None:
        """The next slot is mapped, and made if it is new."""
        assert self.layout is not None
        kind, number, memory = self.making.pop(0)
        for old in [n for n, held in self.slots.items() if held.digest != self.layout[1]]:
            del self.slots[old]
        if number in self.slots:
            return
        fresh = kind == "create"
        self.slots[number] = made = Memory(self.rank, self.layout[1]) if memory is None else memory
        self.say(m.Ready(number), made if fresh else None)

    # --- the session's thread

    def received(self, message: m.Message, memories: list[Memory]) -> None:
        """A message of the daemon."""
        match message:
            case m.Survey():
                self.survey = message.generation
            case m.Plan():
                if self.pieces is not None and self.pieces[0] == message.generation:
                    self.layout = (message.generation, f"{self.rank}/{self.hello.world}/{self.pieces[1]}")
                    self.say(m.Layout(message.generation, self.layout[1], SLOT_BYTES), None)
            case m.Allot():
                if self.layout is not None and self.layout[0] == message.generation:
                    reuse = zip(message.reuse, memories, strict=True)
                    self.making = [("reuse", number, memory) for number, memory in reuse]
                    self.making += [("create", number, None) for number in message.create]
            case m.Grant():
                self._granted(message)
            case m.Revoke():
                self._revoked(message.grant)
            case m.Welcome():
                self._rejoined(message)
            case m.Reached(step=step, level=Level.SEALED, grant=grant):
                self._sealed(step, grant)
            case m.Reached(step=step):
                self.durable = max(self.durable, step)
            case m.Refuse():
                self._answered(m.Flush, m.Terminating)
                self.refused = message
            case m.Drained():
                self.drained = True
                self._answered(m.Terminating)
            case m.Flushed():
                self._answered(m.Flush)
            case m.Closed():
                self.closed = True

    def repeat(self) -> list[m.Message]:
        """What the daemon may not have heard."""
        said: list[m.Message] = [] if self.boundary is None else [self.boundary]
        said += self.outcomes.values()
        if self.requested is not None:
            said.append(m.Request(self.requested))
        return said + self.standing

    def _granted(self, message: m.Grant) -> None:
        if self.copy is not None and self.copy.grant == message.grant:
            return
        known = self.outcomes.get(message.grant)
        self.grants[message.grant] = message
        self.granted = max(self.granted, message.grant)
        if known is not None:
            self.say(known, None)
        elif self.heeds_lateness and message.step <= self.passed and message.step != self.requested:
            self.settle(m.Missed(message.grant, "late"))

    def _revoked(self, grant: int) -> None:
        if self.copy is not None and self.copy.grant == grant:
            return
        if grant in self.outcomes:
            self.say(self.outcomes[grant], None)
        else:
            self.settle(m.Missed(grant, "revoked"))

    def _rejoined(self, message: m.Welcome) -> None:
        known = {*message.slots, *message.pending}
        for number in [n for n in self.slots if n not in known]:
            del self.slots[number]
        for number in [n for n in message.pending if n in self.slots]:
            self.say(m.Ready(number), self.slots[number])

    def _sealed(self, step: int, grant: int) -> None:
        self.sealed = max(self.sealed, step)
        if self.requested is not None and self.sealed >= self.requested:
            self.requested = None
        for number in [n for n in self.outcomes if n <= grant]:
            del self.outcomes[number]
            self.grants.pop(number, None)

    def _answered(self, *kinds: type[m.Message]) -> None:
        self.standing = [message for message in self.standing if not isinstance(message, kinds)]
