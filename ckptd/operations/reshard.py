"""Resharding: one checkpoint written anew, its chunks laid out for another mesh. No torch.

Owns the whole run: plan, check, parts, COMMIT. Invariants: values, objects, step and job are the source's; the source
is only read; the target does not exist before its COMMIT; killed anywhere and run again, the same checkpoint comes
out, and parts that were finished are not written again. For that the epoch's nonce in the target is derived from the
source and the layout: the same run has the same name, any other another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ckptd.core import native
from ckptd.core.catalog import Catalog
from ckptd.core.errors import ConfigError, StoreError
from ckptd.core.types import Epoch, SnapshotId, itemsize
from ckptd.operations.recut import DEFAULT_MEMORY, Assembler, Room, Slots
from ckptd.plan.layout import Layout, Placed, rank_elements
from ckptd.plan.recut import (
    PART_BYTES,
    PART_CHUNKS,
    PART_PIECES,
    Assembly,
    PartPlan,
    Unit,
    assembly_of,
    parts_of,
    placeable,
    units_of,
)
from ckptd.plan.share import Read
from ckptd.tiers.store import Part, PartWriter, Store, StoredCheckpoint, names
from ckptd.tiers.store.resumable import discard_journal, find_by_nonce, resume

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Origin(NamedTuple):
    """Where chunks come from: their catalog, a function that reads one, a name for messages, and what tells this origin
    from all others (bytes of any length)."""

    catalog: Catalog
    read: Read
    name: str
    fingerprint: bytes


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """One part of the plan: which stage of each mesh dimension it is of (-1: all; None: carried over), what it holds,
    and how many source chunks are decoded for it."""

    writer: int
    stage: tuple[int, ...] | None
    tensors: int
    chunks: int
    bytes: int
    decodes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What resharding would do. `bytes` are those of distinct chunks, before compression; `decodes` counts decoded
    source chunks, `most_decodes` those of the chunk that is decoded most often; `rank_bytes` are the least and the
    most that a rank of the mesh will load of the tensors; `unused` names rules that matched nothing."""

    mesh: str
    ranks: int
    tensors: int
    source_chunks: int
    chunks: int
    bytes: int
    decodes: int
    most_decodes: int
    rank_bytes: tuple[int, int]
    parts: list[PartSummary]
    unused: list[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where the new checkpoint is; `existed`: an earlier run had committed it; `reused`: parts of earlier runs."""

    location: str
    id: SnapshotId
    existed: bool
    reused: int
    plan: Plan


class _Written(NamedTuple):
    """A part that is durable; `fresh` if it was written now."""

    part: Part
    raw: int
    fresh: bool


class Recutting:
    """An origin, a layout, and room to work in: the plan, and the parts one by one."""

    def __init__(self, origin: Origin, layout: Layout, room: Room) -> None:
        self._origin = origin
        self._layout = layout
        self._room = room
        placed, self._unused = layout.place(placeable(origin.catalog))
        self._rank_bytes = _rank_bytes(placed, layout)
        self._units = units_of(origin.catalog, placed, layout.mesh)
        self._parts = list(parts_of(self._units, origin.catalog, layout.mesh))
        self._slots = Slots(room.slot_bytes)

    @property
    def nonce(self) -> str:
        """16 hex digits that are those of this origin and layout alone."""
        given = (repr(self._layout), PART_BYTES, PART_CHUNKS, PART_PIECES, self._origin.fingerprint)
        return hashlib.sha256(msgspec.msgpack.encode(given)).hexdigest()[:16]

    @property
    def raw(self) -> int:
        """Bytes of all distinct chunks."""
        return sum(part.raw for part in self._parts)

    def plan(self) -> Plan:
        """Plans every part. FormatError where the origin lacks elements: nothing was written yet."""
        counts = np.zeros(len(self._origin.catalog), np.int32)
        parts = []
        for part in self._parts:
            decoded = self._assembly(part).decodes()
            np.add.at(counts, decoded, 1)
            parts.append(_summary(part, self._units, len(decoded)))
        return Plan(
            mesh=str(self._layout.mesh),
            ranks=self._layout.mesh.ranks,
            tensors=len({info.key for unit in self._units for info in unit.infos}),
            source_chunks=len(self._origin.catalog),
            chunks=sum(part.rows for part in self._parts),
            bytes=self.raw,
            decodes=int(counts.sum()),
            most_decodes=int(counts.max(initial=0)),
            rank_bytes=self._rank_bytes,
            parts=parts,
            unused=self._unused,
        )

    def write(self, part_writer: Callable[[int], PartWriter], finished: Mapping[int, Part]) -> Iterator[_Written]:
        """Writes the parts that are not in `finished`, one after the other."""
        for part in self._parts:
            done = finished.get(part.writer)
            if done is not None:
                yield _Written(done, part.raw, fresh=False)
                continue
            assembly = self._assembly(part)
            assembler = Assembler(assembly, self._origin.catalog, self._origin.read, self._slots)
            written = part_writer(part.writer).write(
                assembly.catalog, _checksumming(assembly, assembler), threads=self._room.threads
            )
            yield _Written(written, part.raw, fresh=True)

    def _assembly(self, part: PartPlan) -> Assembly:
        origin = self._origin
        return assembly_of(part, self._units, origin.catalog, self._layout.mesh, self._room.slot_bytes, origin.name)


def plan_reshard(checkpoint: StoredCheckpoint, layout: Layout, *, memory: int = DEFAULT_MEMORY) -> Plan:
    """What `reshard` of an open checkpoint would do."""
    return Recutting(origin_of(checkpoint), layout, Room.of(memory)).plan()


def reshard(
    checkpoint: StoredCheckpoint,
    target: str,
    layout: Layout,
    *,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Outcome:
    """Writes `checkpoint` into the store `target`, made if it is not there, with the chunks of `layout`.

    Memory stays below `memory` and what a catalog takes. StoreError if the store has this step from elsewhere;
    ConfigError, FormatError, CorruptionError as found.
    """
    recutting = Recutting(origin_of(checkpoint), layout, Room.of(memory))
    return write_checkpoint(
        recutting, target, checkpoint.id.step, checkpoint.job, checkpoint.objects(), progress=progress
    )


def origin_of(checkpoint: StoredCheckpoint) -> Origin:
    """A checkpoint as the origin of another."""
    fingerprint = b"checkpoint" + msgspec.msgpack.encode(checkpoint.commit)
    return Origin(checkpoint.catalog(), checkpoint.read, checkpoint.location, fingerprint)


def write_checkpoint(
    recutting: Recutting,
    target: str,
    step: int,
    job: str,
    objects: Mapping[str, bytes],
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Writes what `recutting` gives, and `objects`, as the checkpoint of `step` of the store `target`."""
    plan = recutting.plan()
    store = Store.open(target, create=True)
    identity, committed = _name(store, step, recutting.nonce)
    if committed:
        store.committed(identity)  # makes sure that it is durable
        discard_journal(store, identity.epoch.nonce)
        return Outcome(store.reader(identity).location, identity, True, len(plan.parts), plan)
    report = _Report(progress, plan.bytes)
    with resume(store, identity, job) as sitting:
        reused = len(sitting.finished)
        parts = []
        for written in recutting.write(sitting.writer.part, dict(sitting.finished)):
            if written.fresh:
                sitting.record(written.part)
            parts.append(written.part)
            report.add(written.raw)
        sitting.writer.commit(parts, objects)
    return Outcome(store.reader(identity).location, identity, False, reused, plan)


def _name(store: Store, step: int, nonce: str) -> tuple[SnapshotId, bool]:
    """(the name of the checkpoint, whether it is committed): that of an earlier run, or one of a new epoch."""
    if names.parse_checkpoint(store.uri.partition("?")[0].rpartition("/")[2]) is not None:
        raise ConfigError(f"{store.uri}: is the directory of a checkpoint; expected a store to write one into")
    found, committed = find_by_nonce(store, nonce)
    if found is not None:
        return found, committed
    existing = store.checkpoints()
    taken = [identity for identity in existing if identity.step == step]
    if taken:
        raise StoreError(f"{store.uri}: {taken[0]} is committed there already; choose another store")
    numbers = [identity.epoch.number for identity in existing] + [record.epoch.number for record in store.records()]
    return SnapshotId(Epoch(max(numbers, default=0) + 1, nonce), step), False


class _Report:
    """Adds up what was written."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._done = 0
        self._total = total

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _checksumming(assembly: Assembly, assembler: Assembler) -> Read:
    """`read` for the writer of a part: assembles a row's chunk, and fills in the checksum of it and of its ties."""
    catalog = assembly.catalog
    chunk_of = catalog.file_offset
    order = np.argsort(chunk_of, kind="stable")
    starts = np.searchsorted(chunk_of[order], np.arange(len(assembly.straight) + 1))

    def read(row: int, into: memoryview) -> None:
        chunk = int(chunk_of[row])
        assembler.read(chunk, into)
        catalog.crc[order[starts[chunk] : starts[chunk + 1]]] = native.crc32c(into)

    return read


def _summary(part: PartPlan, units: Sequence[Unit], decodes: int) -> PartSummary:
    tensors = {info.key for span in part.spans for info in units[span.unit].infos}
    carried = all(units[span.unit].placed is None for span in part.spans)
    return PartSummary(part.writer, None if carried else part.stage, len(tensors), part.rows, part.raw, decodes)


def _rank_bytes(placed: Sequence[Placed], layout: Layout) -> tuple[int, int]:
    """The least and the most bytes that a rank of the mesh holds."""
    held = np.zeros(layout.mesh.sizes, np.int64)
    for one in placed:
        held += rank_elements(one, layout.mesh) * itemsize(one.info.dtype)
    return int(held.min()), int(held.max())
