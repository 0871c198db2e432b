"""What was announced, and whether it is true and stays so. Raises BrokenPromiseError.

- Sealed: every node captured the snapshot, at one step.
- Protected: every member holds its string and its parities, and goes on holding them until something newer is
  protected. A restart with at most m losses in each group restores it, or something newer of its branch.
- Sealed, without any loss: a restart restores it or something newer.
- What a restart restores is decoded from what is left, and is what was captured, byte by byte.
- Durable: COMMIT is in the store, and everything that it needs.
- A dead branch never wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from ckptd.core.errors import UnrecoverableError
from ckptd.core.lineage import EpochRecord, live
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import Choice
from ckptd.protocol.cluster.facts import Shape
from tests.simulate.node import Node
from tests.simulate.strings import Bytes, UnavailableError, read_string, striping_of

Nodes = dict[int, Node]


class BrokenPromiseError(AssertionError):
    """A promise was broken."""


class Store:
    """Checkpoints and epoch records."""

    def __init__(self) -> None:
        self.files: dict[SnapshotId, dict[int, Bytes]] = {}
        self.counts: dict[SnapshotId, int] = {}
        self.committed: set[SnapshotId] = set()
        self.records: list[EpochRecord] = []

    def write(self, snapshot: SnapshotId, string: int, count: int, data: Bytes) -> None:
        """A node's files."""
        self.files.setdefault(snapshot, {})[string] = data.copy()
        self.counts[snapshot] = count

    def commit(self, snapshot: SnapshotId) -> None:
        """COMMIT."""
        if len(self.files.get(snapshot, {})) != self.counts.get(snapshot):
            raise BrokenPromiseError(f"{snapshot} is committed without all files")
        self.committed.add(snapshot)


@dataclasses.dataclass(frozen=True)
class Announced:
    """A snapshot of an epoch, and which arena held which string; empty for one that was lost before."""

    snapshot: SnapshotId
    epoch: Epoch
    shape: Shape
    holders: tuple[str, ...]


class Oracle:
    """See the module docstring."""

    def __init__(self, nodes: Mapping[str, Node], store: Store) -> None:
        self.nodes, self.store = nodes, store
        self.truth: dict[SnapshotId, dict[int, tuple[int, Bytes]]] = {}
        self.sealed: Announced | None = None
        self.protected: Announced | None = None
        self.protections: dict[Epoch, int] = {}
        self.epochs: set[Epoch] = set()
        """Those that have begun anywhere. One that was only written down, and overtaken, has left no branch."""
        self.begun: Epoch | None = None
        """The newest epoch whose restore point is chosen: what older ones still say reaches nobody."""

    def captured(self, snapshot: SnapshotId, string: int, step: int, data: Bytes) -> None:
        """A node has captured its string."""
        if string in self.truth.setdefault(snapshot, {}):
            raise BrokenPromiseError(f"string {string} of {snapshot} is captured twice")
        self.truth[snapshot][string] = step, data.copy()

    def name(self, snapshot: SnapshotId) -> SnapshotId:
        """Of a grant, by the step that was captured."""
        return SnapshotId(snapshot.epoch, max(step for step, _ in self.truth[snapshot].values()))

    def durable(self, name: SnapshotId) -> None:
        """A daemon believes that a checkpoint exists."""
        if name not in self.store.committed:
            raise BrokenPromiseError(f"{name} is taken for durable and not committed")

    def announced(self, node: Node, announce: m.Announce) -> None:
        """A daemon has told its trainers."""
        snapshot = announce.snapshot
        if not self._is_fenced(node) and announce.level == Level.SEALED:
            found = self._checked(node, snapshot, announce.level)
            self.sealed = found if _is_news(found, self.sealed) else self.sealed
        unknown = self.protected is None or self.protected.snapshot < snapshot
        if announce.level == Level.PROTECTED and unknown and not self._is_fenced(node):
            raise BrokenPromiseError(f"{snapshot} is announced protected and was not written down first")

    def declared(self, node: Node, snapshot: SnapshotId) -> None:
        """A daemon has written down that a snapshot is protected, and will free what is older."""
        if self._is_fenced(node) or (self.protected is not None and self.protected.snapshot > snapshot):
            return
        found = self._checked(node, snapshot, Level.PROTECTED)
        if _is_news(found, self.protected):
            self.protected = found
            self.protections[found.epoch] = self.protections.get(found.epoch, 0) + 1
            self._check_all()

    def _is_fenced(self, node: Node) -> bool:
        """A newer epoch has begun: this daemon's trainers end, and nobody goes by what it says."""
        epoch = node.state.epoch
        return epoch is None or (self.begun is not None and epoch < self.begun)

    def _checked(self, node: Node, snapshot: SnapshotId, level: Level) -> Announced:
        membership = node.state.membership
        assert membership is not None
        steps = {step for step, _ in self.truth[snapshot].values()}
        if len(self.truth[snapshot]) != membership.shape.count or len(steps) != 1:
            raise BrokenPromiseError(f"{snapshot} is announced {level}, captured at steps {steps}")
        return Announced(snapshot, membership.epoch, membership.shape, membership.arenas)

    def check(self, node: Node) -> None:
        """After each change of what a node holds: what was announced protected is still there. Of two nodes that hold
        the same string, since one of them rebuilt it while the other was cut off, a Begin frees one."""
        found = self.protected
        if found is None or not node.alive or node.arena not in found.holders:
            return
        snapshot, string = found.snapshot, found.holders.index(node.arena)
        if not _has_both(found, node, string):
            heir = next((other for other in self.nodes.values() if _has_both(found, other, string)), None)
            if heir is None:
                raise BrokenPromiseError(f"{snapshot} is protected, and string {string} or its parity is freed")
            holders = (*found.holders[:string], heir.arena, *found.holders[string + 1 :])
            self.protected, node = dataclasses.replace(found, holders=holders), heir
        intact = (snapshot, "data") not in node.damaged
        if intact and node.data[snapshot].tobytes() != self.truth[snapshot][string][1].tobytes():
            raise BrokenPromiseError(f"{snapshot} is protected, and string {string} is overwritten")

    def _check_all(self) -> None:
        """What is taken for protected has changed."""
        for arena in () if self.protected is None else self.protected.holders:
            if arena in self.nodes:
                self.check(self.nodes[arena])

    def chosen(self, epoch: Epoch, choice: Choice, promised: Collection[str]) -> None:
        """A restart has chosen its restore point from those who promised. If it was overtaken, that is of no effect."""
        if self.begun is not None and epoch < self.begun:
            return
        point, name = choice.point, choice.name
        records = [record for record in self.store.records if record.epoch in self.epochs]
        if name is not None and live([name], records)[:1] != [name]:
            raise BrokenPromiseError(f"{name} is restored, of a dead branch")
        for found, is_due in ((self.protected, self._losses_are_covered), (self.sealed, self._has_no_loss)):
            if found is not None and (name is None or name < self.name(found.snapshot)) and is_due(found, promised):
                what = "protected" if found is self.protected else "sealed, and nothing is lost"
                raise BrokenPromiseError(f"{found.snapshot} was {what}; {name} is restored")
        if point is not None and choice.held:
            self._restore(point, choice)
        elif name is not None and name not in self.store.committed:
            raise BrokenPromiseError(f"{name} is restored from nowhere")

    def recorded(self, epoch: Epoch, choice: Choice, promises: Mapping[str, m.Promise]) -> None:
        """The choice holds: what is newer is on a dead branch now. What is kept as protected takes the place of what
        was announced, which is as old or older."""
        if self.begun is not None and epoch < self.begun:
            return
        point, name, kept = choice.point, choice.name, choice.protected
        self.begun = epoch
        if self.protected is not None and (name is None or self.name(self.protected.snapshot) > name):
            self.protected = None
        if self.sealed is not None and self.name(self.sealed.snapshot) != name:
            self.sealed = None  # newer: on a dead branch; older: freed, whatever becomes of what is restored
        known = self.protected
        if (
            known is not None
            and (kept is None or kept < known.snapshot)
            and not self._losses_are_covered(known, promises)
        ):
            self.protected = None  # more was lost or damaged than was promised; nobody has to keep what is left
        if point is not None and not choice.held:
            self.protected = self.sealed = None  # what is durable needs no memory
        if kept is not None and (self.protected is None or kept > self.protected.snapshot):
            held = [(arena, item) for arena, p in promises.items() for item in p.held if item.snapshot == kept]
            arenas = {item.string: arena for arena, item in held if item.data and item.parity}
            shape = held[0][1].shape
            self.protected = Announced(kept, kept.epoch, shape, tuple(arenas.get(n, "") for n in range(shape.count)))
        self._check_all()

    def _losses_are_covered(self, found: Announced, promised: Collection[str]) -> bool:
        name = self.name(found.snapshot)
        if live([name], self.store.records)[:1] != [name]:
            return False
        lost = [n for n, arena in enumerate(found.holders) if not self._is_whole(found, arena, promised)]
        return all(len(set(lost).intersection(group)) <= found.shape.parity for group in found.shape.groups)

    def _has_no_loss(self, found: Announced, promised: Collection[str]) -> bool:
        name = self.name(found.snapshot)
        if live([name], self.store.records)[:1] != [name]:
            return False
        return all(self._is_whole(found, arena, promised) for arena in found.holders)

    def _is_whole(self, found: Announced, arena: str, promised: Collection[str]) -> bool:
        node = self.nodes.get(arena)
        if node is None or arena not in promised or not node.alive:
            return False
        return all(snapshot != found.snapshot for snapshot, _ in node.damaged)

    def _restore(self, point: SnapshotId, choice: Choice) -> None:
        """Every string, from whatever has promised."""
        records: dict[int, bytes] = {}
        data: Nodes = {}
        both: Nodes = {}
        for arena, held in choice.held.items():
            node = self.nodes[arena]
            holding = node.state.find(point)
            if not node.alive or holding is None:
                continue  # lost since it promised
            records |= holding.records
            if held.data and (point, "data") not in node.damaged:
                data[held.string] = node
                if held.parity and (point, "parity") not in node.damaged:
                    both[held.string] = node
        shape = next(iter(choice.held.values())).shape
        for string in range(shape.count):
            if string not in data:
                self._decode(point, choice, string, records, both)
            elif data[string].data[point].tobytes() != self.truth[point][string][1].tobytes():
                raise BrokenPromiseError(f"string {string} of {point} is restored as something else")

    def _decode(self, point: SnapshotId, choice: Choice, string: int, records: dict[int, bytes], both: Nodes) -> None:
        shape = next(iter(choice.held.values())).shape
        group = set(shape.group_of(string))
        if len(group - both.keys()) > shape.parity:
            offered = {h.string for h in choice.held.values() if h.data and h.parity}
            if len(group - offered) > shape.parity and all(
                h.string != string or not h.data for h in choice.held.values()
            ):
                raise BrokenPromiseError(f"{point} is restored; of string {string} there is too little")
            return  # lost, or damaged, since it was offered
        try:
            found = read_string(
                striping_of(shape, string, records),
                string,
                group - both.keys(),
                lambda number, offset, size: both[number].data[point][offset : offset + size].copy(),
                lambda number, offset, size: both[number].parity[point][offset : offset + size].copy(),
            )
        except (UnavailableError, UnrecoverableError) as error:
            raise BrokenPromiseError(f"string {string} of {point} cannot be decoded: {error}") from error
        if found.tobytes() != self.truth[point][string][1].tobytes():
            raise BrokenPromiseError(f"string {string} of {point} is decoded wrongly")


def _has_both(found: Announced, node: Node, string: int) -> bool:
    """The node holds that string of a snapshot, and its parities."""
    holding = node.state.find(found.snapshot) if node.alive else None
    if holding is None or holding.string != string or found.snapshot not in node.data:
        return False
    return found.snapshot in node.parity or found.shape.parity == 0


def _is_news(found: Announced, known: Announced | None) -> bool:
    return known is None or (found.snapshot, found.epoch) > (known.snapshot, known.epoch)
