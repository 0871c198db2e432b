"""Snapshot memory of a rank: what of the state it captures, and the slots to capture it into.

Owns the way from a survey to slots: pieces of this rank -> the plan for all ranks -> chunks, frozen region, slots.
Two threads meet here: the training thread surveys, captures and compares; the session's thread plans and takes over
slots. Slots are made in a third, since populating memory takes time. Knows nothing of grants (capture.py).

Invariants
- Chunks are captured only by the layout they were planned for: `jobs` gives none where the state has another one.
- What is frozen is watched: once it changes, it is captured like everything else, in a new layout.
- Replicas that turn out to differ are each rank's own in the layouts that follow.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ckptd.core.box import Box, cut
from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, DaemonError
from ckptd.core.native import crc32c
from ckptd.core.types import itemsize
from ckptd.format.objects import pack_table
from ckptd.plan import replicas
from ckptd.plan.save import Piece, place, plan_save
from ckptd.plan.share import with_aliases
from ckptd.protocol import messages as m
from ckptd.tiers.arena import Geometry, Slot, layout
from ckptd.trainer.copying import CopyJobs
from ckptd.trainer.device import HOST, devices_of, pin, unpin
from ckptd.trainer.frozen import Frozen
from ckptd.trainer.saving import pieces_of
from ckptd.trainer.state import AppState
from ckptd.trainer.state_tensors import Source

log = logging.getLogger("ckptd.capture")

OBJECTS_ROOM = 64 * 1024
NAMED = 5
"""Tensors that a message names."""


class Holdings(msgspec.Struct, frozen=True):
    """What a rank tells the others of its state: its pieces, second keys of tied tensors, labels of what is known to
    differ, and what it found when `compared` was captured: a checksum for each label of what ranks have in common."""

    pieces: list[Piece]
    aliases: dict[str, str]
    differing: frozenset[str]
    compared: int | None
    checksums: dict[str, int]


class Layout(NamedTuple):
    """What slots hold at present: what it was planned from, where each chunk goes, what other ranks hold too; `device`:
    a CUDA device that copies into them, if any."""

    generation: int
    pieces: list[Piece]
    aliases: dict[str, str]
    catalog: Catalog
    frozen_keys: frozenset[str]
    frozen: Frozen | None
    common: dict[replicas.Holders, list[Piece]]
    geometry: Geometry
    table: bytes
    device: int | None


class _Surveyed(NamedTuple):
    """What this rank has answered to a survey."""

    generation: int
    pieces: list[Piece]
    sources: Sequence[Source]
    frozen_keys: frozenset[str]


class SnapshotMemory:
    """See the module docstring."""

    def __init__(
        self,
        state: AppState,
        rank: int,
        threads: int,
        say: Callable[[m.Message, list[int] | None], None],
        fail: Callable[[CkptdError], None],
    ) -> None:
        """`fail` hears why there are no slots for the state."""
        self._state, self._rank, self._threads, self._say, self._fail = state, rank, threads, say, fail
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._maker: threading.Thread | None = None
        self._surveyed: _Surveyed | None = None
        self._layout: Layout | None = None
        self._jobs: CopyJobs | None = None
        self._comparing: tuple[CopyJobs, CopyJobs] | None = None
        self._slots: dict[int, Slot] = {}
        self._retired: list[Slot] = []
        self._region: Slot | None = None
        self._region_of = ""
        self._objects_room = OBJECTS_ROOM
        self._written: set[str] = set()
        self._thawed: set[str] = set()
        self._differing: frozenset[str] = frozenset()
        self._compared: int | None = None
        self._checksums: dict[str, int] = {}
        self._closed = False

    # --- the training thread

    def survey(self, generation: int) -> None:
        """Tells the daemon what the state consists of. Raises what reading the state raises."""
        sources = self._state.sources()
        self._surveyed = _Surveyed(generation, pieces_of(sources), sources, self._frozen_keys())
        found = (self._differing, self._compared, self._checksums)
        holdings = Holdings(self._surveyed.pieces, self._state.aliases(), *found)
        self._objects_room = max(self._objects_room, 2 * len(pack_table(self._state.objects())) + OBJECTS_ROOM)
        descriptor = os.memfd_create("ckptd-pieces", os.MFD_CLOEXEC)
        os.write(descriptor, msgspec.msgpack.encode(holdings))
        self._say(m.Pieces(generation), [descriptor])

    def jobs(self, audit: bool) -> CopyJobs | None:
        """The copies that capture the state as it is now; None where it has another layout than the slots. `audit`:
        frozen tensors are read, to prove that they are what they were."""
        made = self._layout
        if made is None:
            return None
        if self._jobs is None or not self._state.unchanged() or not self._jobs.refresh():
            sources = self._state.sources()
            if pieces_of(sources) != made.pieces or self._frozen_keys() != made.frozen_keys:
                return None
            self._jobs = CopyJobs(made.catalog, sources, made.aliases)
            self._jobs.copy_eagerly(self._written)
        changed = [] if made.frozen is None else made.frozen.changed(self._jobs.sources, audit)
        if changed:
            log.info("%s need no gradient and change all the same: captured with every snapshot", _some(changed))
            self._thawed.update(changed)
            return None
        return self._jobs

    def slot(self, number: int) -> Slot | None:
        """A slot that is ready for the present layout."""
        slot, made = self._slots.get(number), self._layout
        return slot if slot is not None and made is not None and slot.geometry == made.geometry else None

    def compare(self, jobs: CopyJobs, step: int) -> dict[int, int]:
        """A checksum for each set of ranks of what they hold in common, as it is at `step`."""
        common = {} if self._layout is None else self._layout.common
        if not common:
            return {}
        pieces = [piece for held in common.values() for piece in held]
        if self._comparing is None or self._comparing[0] is not jobs:
            self._comparing = (jobs, CopyJobs(_catalog_of(pieces), jobs.sources, {}))
        comparing = self._comparing[1]
        comparing.refresh()
        crcs = np.zeros(len(comparing.catalog), np.uint32)
        comparing.checksum(comparing.rows, crcs, self._threads)
        order = np.argsort(comparing.catalog.file, kind="stable")
        ends = np.cumsum(np.bincount(comparing.catalog.file, minlength=len(pieces)))
        parts = np.split(crcs[order], ends[:-1])
        found = {replicas.label(piece): crc32c(part.tobytes()) for piece, part in zip(pieces, parts, strict=True)}
        self._compared, self._checksums = step, found
        return replicas.digests(common, found)

    def written_in_window(self, keys: Collection[str]) -> None:
        """Somebody writes to these tensors while they are copied: from now on they are copied before."""
        self._written.update(keys)
        if self._jobs is not None:
            self._jobs.copy_eagerly(self._written)

    def release(self, in_use: Collection[Slot]) -> None:
        """Lets go of slots of older layouts, but for those that are being captured into."""
        with self._lock:
            retired = [slot for slot in self._retired if slot not in in_use]
            self._retired = [slot for slot in self._retired if slot in in_use]
        for slot in retired:
            _let_go(slot)

    def close(self) -> None:
        """Lets go of all slots, once the one in the making is made: the end of the interpreter must not meet it."""
        self._closed = True
        if self._maker is not None:
            self._maker.join()
        with self._lock:
            held = [*self._slots.values(), *self._retired]
            region, self._slots, self._retired, self._region = self._region, {}, [], None
        for slot in held:
            _let_go(slot)
        if region is not None:
            region.close()

    # --- the session's thread

    def plan(self, generation: int, descriptors: Sequence[int]) -> None:
        """Every rank's pieces are here: decide what this rank captures and ask for slots."""
        held = _read_holdings(descriptors[0])
        surveyed = self._surveyed
        if surveyed is None or surveyed.generation != generation or held[self._rank].pieces != surveyed.pieces:
            return
        keys = {piece.key for holdings in held for piece in holdings.pieces}
        aliases = {k: v for holdings in reversed(held) for k, v in holdings.aliases.items() if k not in keys}
        self._differing = differing = self._known_to_differ(held)
        pieces = [replicas.as_own(holdings.pieces, differing) for holdings in held]
        every = replicas.held_in_common(pieces, differing)
        common = {ranks: pieces for ranks, pieces in every.items() if self._rank in ranks}
        catalog = plan_save(pieces)[self._rank]
        catalog, frozen = self._set_apart(catalog, surveyed, aliases)
        catalog = with_aliases(catalog, aliases)
        identity = "" if frozen is None else frozen.identity
        geometry, table = layout(self._rank, catalog, self._objects_room, identity)
        device = max(devices_of([source.tensor for source in surveyed.sources]), default=HOST)
        with self._lock:
            self._layout = Layout(
                generation,
                surveyed.pieces,
                aliases,
                catalog,
                surveyed.frozen_keys,
                frozen,
                common,
                geometry,
                table,
                device if device >= 0 else None,
            )
            self._jobs = self._comparing = None
        self._say(m.Layout(generation, geometry.digest, geometry.size, 0 if frozen is None else frozen.size), None)

    def allot(self, message: m.Allot, descriptors: list[int]) -> None:
        """Takes over slots that are there and makes the others."""
        made = self._layout
        if made is None or made.generation != message.generation:
            _close_all(descriptors)
            return
        arguments = (made, message, descriptors)
        self._maker = threading.Thread(target=self._make, args=arguments, name="ckptd-slots", daemon=True)
        self._maker.start()

    def welcomed(self, ready: Collection[int], pending: Collection[int]) -> None:
        """Back with a daemon. Slots that it has no number for went with its predecessor: it surveys anew. Those that it
        has not heard of being ready are offered again."""
        with self._lock:
            known = {*ready, *pending}
            self._retired += [self._slots.pop(number) for number in list(self._slots) if number not in known]
            again = [(number, self._slots[number]) for number in pending if number in self._slots]
        for number, slot in again:
            self._say(m.Ready(number), [os.dup(descriptor) for descriptor in slot.descriptors])

    # --- inside

    def _frozen_keys(self) -> frozenset[str]:
        return self._state.frozen() - self._thawed

    def _known_to_differ(self, held: Sequence[Holdings]) -> frozenset[str]:
        """What any rank knows to differ, and what does at the step that all have compared last: the same on all ranks,
        whichever surveys they took part in."""
        known = frozenset().union(*(holdings.differing for holdings in held))
        if held[0].compared is None or len({holdings.compared for holdings in held}) > 1:
            return known
        found = replicas.differing([holdings.checksums for holdings in held]) - known
        if found and self._rank == 0:
            log.warning(
                "%s should be the same on several ranks and are not (compared at step %d): whole tensors are captured "
                "from each rank from now on, of shards one rank's",
                _some(found),
                held[0].compared,
            )
        return known | found

    def _set_apart(
        self, catalog: Catalog, surveyed: _Surveyed, aliases: Mapping[str, str]
    ) -> tuple[Catalog, Frozen | None]:
        """The chunks that change, and those that do not, each with places of their own."""
        keys = surveyed.frozen_keys
        still = np.array([info.key in keys for info in catalog.tensors], np.bool_)[catalog.tensor]
        if not still.any():
            return catalog, None
        moving, resting = (_placed(catalog.select(np.flatnonzero(rows))) for rows in (~still, still))
        resting = with_aliases(resting, aliases)
        return moving, Frozen(resting, surveyed.sources, dict(aliases), self._rank, self._threads)

    def _make(self, made: Layout, message: m.Allot, descriptors: list[int]) -> None:
        try:
            with self._making:
                with self._lock:
                    old = [number for number, slot in self._slots.items() if slot.geometry != made.geometry]
                    self._retired += [self._slots.pop(number) for number in old]
                each = 1 if made.frozen is None else 2
                for index, number in enumerate(message.reuse):
                    slot = Slot.open(*descriptors[each * index : each * (index + 1)])
                    slot.mend(made.table)  # what damaged a snapshot in memory must not damage the next one there
                    self._hold_region(made, slot.region)
                    self._ready(made, number, slot, fresh=False)
                for number in message.create:
                    if number not in self._slots and not self._closed:
                        self._hold_region(made, None)
                        self._ready(made, number, Slot.create(made.geometry, made.table, self._region), fresh=True)
        except (CkptdError, OSError, ValueError) as error:
            self._fail(error if isinstance(error, CkptdError) else DaemonError(f"snapshot memory: {error}"))

    def _hold_region(self, made: Layout, old: Slot | None) -> None:
        """Holds the layout's frozen region, if any: that of a slot which is taken over, or a new one."""
        wanted = "" if made.frozen is None else made.frozen.identity
        if wanted == self._region_of:
            return
        if self._region is not None:
            self._region.close()
        self._region, self._region_of = None, wanted
        if made.frozen is not None:
            self._region = made.frozen.region(None if old is None else old.duplicate())

    def _ready(self, made: Layout, number: int, slot: Slot, fresh: bool) -> None:
        if number in self._slots:
            slot.close()
        else:
            address = slot.map()
            if made.device is not None:
                pin(made.device, address, slot.geometry.size - slot.geometry.data_offset)
            with self._lock:
                if self._closed:
                    _let_go(slot)
                    return
                self._slots[number] = slot
        self._say(m.Ready(number), [os.dup(descriptor) for descriptor in slot.descriptors] if fresh else None)


def _let_go(slot: Slot) -> None:
    """Of a slot that is mapped."""
    unpin(slot.map())
    slot.close()


def _read_holdings(descriptor: int) -> list[Holdings]:
    """Of every rank, in rank order."""
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    said = msgspec.msgpack.decode(data, type=list[bytes])
    return [msgspec.msgpack.decode(each, type=Holdings) for each in said]


def _placed(catalog: Catalog) -> Catalog:
    offsets, _ = place(catalog.raw)
    return catalog.replaced(file_offset=offsets)


def _catalog_of(pieces: Sequence[Piece]) -> Catalog:
    """The chunks of pieces; `file` says of which. They have no place: each is one of its own."""
    infos = {piece.key: (piece.key, piece.dtype, piece.shape) for piece in pieces}
    index = {key: number for number, key in enumerate(infos)}
    chunks = [
        (index[piece.key], number, box)
        for number, piece in enumerate(pieces)
        for box in cut(Box(piece.offsets, piece.sizes), itemsize(piece.dtype))
    ]
    width = max((len(piece.shape) for piece in pieces), default=0)
    offsets, sizes = np.zeros((len(chunks), width), np.int64), np.ones((len(chunks), width), np.int64)
    for row, (_, _, box) in enumerate(chunks):
        offsets[row, : len(box.offsets)] = box.offsets
        sizes[row, : len(box.sizes)] = box.sizes
    return Catalog.build(
        infos.values(),
        [tensor for tensor, _, _ in chunks],
        offsets,
        sizes,
        file=[number for _, number, _ in chunks],
        file_offset=np.arange(len(chunks)),
    )


def _some(keys: Collection[str]) -> str:
    named = sorted(keys)
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
