"""How the ranks of a node come to have slots: what their states consist of, a layout for each, memory for all. Part of
the node machine; pure.

Owns the rounds of asking, by generation. On several nodes the newest generation that any of them wants is that of all,
and layouts are planned when the pieces of all are there; both is the root's to say (`Survey`, `Gather`).
"""

from __future__ import annotations

from ckptd.protocol import messages as m
from ckptd.protocol import repeats
from ckptd.protocol.actions import Drop
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.layouts import allot
from ckptd.protocol.state import NodeState
from ckptd.protocol.voice import Voice


class Surveys:
    """See the module docstring."""

    def __init__(self, state: NodeState, voice: Voice) -> None:
        self._state, self._voice = state, voice
        self._planned = False

    def start(self, generation: int) -> None:
        """The layout is unknown or has changed: every rank is asked for its pieces."""
        self._state.generation = generation
        self._state.surveying, self._planned = True, False
        self._voice.members.forget_layouts()
        self._voice.broadcast(m.Survey(generation))

    def repeat(self, peer: int, rank: int, returns: bool) -> bool:
        """What a rank may have missed of a survey, or of what came out of it. False: it has to be asked anew."""
        state, member = self._state, self._voice.members[rank]
        if not state.surveying and len(state.layouts) < len(state.ranks):
            return False
        if state.surveying and not member.pieces:
            self._voice.say(peer, m.Survey(state.generation))
        elif state.surveying and self._planned and member.layout is None:
            self._voice.say(peer, m.Plan(state.generation), pieces=True)
        elif not state.surveying and returns:
            again = repeats.allotted(state, peer, rank)
            if again is not None:
                self._voice.do(again)
            for slot in state.table.slots:  # its Ready may be lost; what it has not mapped yet it misses as "layout"
                if slot.rank == rank and slot.ready:
                    slot.owner = state.instances[rank]
        return True

    @property
    def pieces(self) -> int:
        """The newest generation of which all ranks of the node have said what their states consist of."""
        state, members = self._state, self._voice.members
        missing = state.surveying and not all(rank in members and members[rank].pieces for rank in state.ranks)
        return state.generation - 1 if missing else state.generation

    def gather(self, action: cluster.Gather) -> None:
        """The pieces of all ranks of the job are there. Those of other nodes are fetched first."""
        if action.generation != self._state.generation or not self._state.surveying or self._planned:
            return
        if len(self._state.ranks) < self._state.world:
            self._voice.do(action)
        else:
            self.gathered(action.generation)

    def gathered(self, generation: int) -> None:
        """The pieces of all ranks of the job are here."""
        if generation == self._state.generation and self._state.surveying and not self._planned:
            self._planned = True
            self._voice.broadcast(m.Plan(generation), pieces=True)

    def plan(self, available_bytes: int, limit: str) -> None:
        """Layouts of all -> slots for all; idle ones that fit nobody make room first."""
        state, members = self._state, self._voice.members
        layouts = [members[rank].layout if rank in members else None for rank in state.ranks]
        known = [layout for layout in layouts if layout is not None]
        if not state.surveying or not known or len(known) < len(layouts):
            return
        made = allot(state, known, available_bytes, limit)
        self._voice.do(*(Drop(slot) for slot in made.dropped))
        state.surveying = self._planned = False
        state.last_error = made.complaint or state.last_error
        if made.allotments is None:
            assert made.complaint is not None
            self._voice.broadcast(m.Refuse("ConfigError", made.complaint))
            return
        for rank, (reuse, create) in zip(state.ranks, made.allotments, strict=True):
            self._voice.tell(rank, m.Allot(state.generation, reuse, create), slots=tuple(reuse))
