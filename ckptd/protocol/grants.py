"""What becomes of the job's grants at the ranks of one node: issued, used or missed, sealed or dead. Part of the node
machine; pure.

Owns the way from a Capture of the job to Captured or NotSealed of this node. Which step is granted, and what a verdict
means, is the job's (protocol/cluster).
"""

from __future__ import annotations

from collections.abc import Callable

from ckptd.protocol import messages as m
from ckptd.protocol import repeats
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.slots import Granted
from ckptd.protocol.state import NodeState
from ckptd.protocol.voice import Voice


class Grants:
    """See the module docstring. `relayout`: what ranks have said of their states does not hold any more."""

    def __init__(self, state: NodeState, job: MemberMachine, voice: Voice, relayout: Callable[[], None]) -> None:
        self._state, self._job, self._voice, self._relayout = state, job, voice, relayout

    def issue(self, capture: cluster.Capture) -> None:
        """Grants a snapshot to every rank of the node, if every rank has a free slot."""
        state = self._state
        assert state.epoch is not None
        slots: dict[int, int] = {}
        for rank in state.ranks:
            vacant = state.table.vacant(rank, state.layouts[rank], state.instances[rank])
            if not vacant:
                self._job.missed(capture.snapshot)
                return
            slots[rank] = vacant[0]
        number = capture.snapshot.step
        granted = Granted(state.epoch, number, capture.step, slots, dict(state.instances), compare=capture.compare)
        state.table.granted.append(granted)
        for rank in slots:
            self._voice.tell(rank, repeats.grant(granted, rank))

    def hear(self, rank: int, message: m.Captured | m.Missed) -> None:
        """How a rank has used a grant."""
        epoch = self._state.epoch
        granted = None if epoch is None else self._state.table.find(epoch, message.grant)
        if granted is None or granted.writers.get(rank) != self._state.instances[rank]:
            return
        if isinstance(message, m.Captured):
            if granted.slots.get(rank) == message.slot:
                self._captured(rank, granted, message)
            return
        first = rank not in granted.outcome and not granted.dead
        self._state.table.answer(granted, rank, None)
        if first:
            self._state.count(f"missed_{message.reason}")
            granted.late = message.reason == "late"
            if message.reason == "layout":
                self._relayout()

    def _captured(self, rank: int, granted: Granted, message: m.Captured) -> None:
        if not self._state.table.answer(granted, rank, message.step, message.replicas):
            self.differ()
        self._job.used(granted.name, message.step)

    def differ(self) -> None:
        """What ranks have in common turns out to differ: the layout is made anew, in which each keeps its own."""
        self._state.count("replicas_differ")
        self._relayout()

    def revoke(self, action: cluster.Revoke) -> None:
        """The job does not want it any more."""
        granted = self._state.table.find(action.snapshot.epoch, action.snapshot.step)
        if granted is not None:
            self._kill(granted)

    def kill_all(self) -> None:
        """None of those that are out can be used."""
        for granted in self._state.table.granted:
            self._kill(granted)

    def kill_unanswered(self) -> None:
        """A rank that has left or is dead never answers: what it was to capture is NotSealed."""
        state = self._state
        for granted in state.table.granted:
            if granted.dead or (granted.epoch == state.epoch and state.left.intersection(granted.silent)):
                self._kill(granted)

    def _kill(self, granted: Granted) -> None:
        """NotSealed: tells the writers that have not answered, and the job."""
        granted.dead = True
        if granted.told:
            return
        granted.told = True
        self._state.count("skipped")
        self._job.missed(granted.name, granted.late)
        for rank in granted.silent:
            self._voice.tell(rank, m.Revoke(granted.grant))

    def seal(self) -> None:
        """What every rank here has captured is sealed, as far as this node is concerned."""
        for granted in list(self._state.table.seal()):
            assert granted.step is not None
            if not self._job.captured(granted.name, granted.step, granted.replicas):
                self._state.table.free(granted.name)
