"""A snapshot in the memory of several nodes as a tier: each rank reads the slots of its own node, and hears what the
slots of the others hold.

Owns how ranks come to know that: of every slot one rank describes table, checksums and objects to all. What it looks
like is what `SnapshotReader` makes of all slots on one node, and on one node it is that. Where bytes are read and how
they get to other nodes is the exchange's matter (exchange.py): this module says who can read what.

Invariants: opening raises the same error on every rank; nothing is believed that was not compared with the checksums of
a slot by a rank of its node, and with that rank's digest by every other; a slot on several nodes holds the same on all,
and any copy of it serves, also where another's description is damaged; what every rank has captured for itself and
found alike is read in any slot that has it. Does not fetch slots from nodes without ranks:
every slot is on a node of the job by now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import (
    CkptdError,
    CorruptionError,
    DeadlineError,
    FormatError,
    NotFoundError,
    UnrecoverableError,
)
from ckptd.core.native import address_of, copy_bytes
from ckptd.core.types import SnapshotId
from ckptd.format.table import decode_table, encode_table
from ckptd.plan.exchange import Readers
from ckptd.plan.share import OBJECTS_FILE, holders, object_rows, share_objects, share_rows
from ckptd.tiers.arena import Slot, SnapshotReader
from ckptd.tiers.store.runs import in_place_order, run_starts
from ckptd.trainer.collective import Group, Message

MAX_DESCRIPTION_BYTES = 2**31
"""What all slots together may take to describe: tables, checksums and objects."""

_NAMED = 8
"""How many ranks a message names."""


class _Content(msgspec.Struct, array_like=True):
    """What is in a slot, but for the bytes of tensors: a table of its chunks with checksums, its packed objects."""

    table: bytes
    objects: dict[str, bytes]


class _Description(msgspec.Struct, array_like=True):
    """Of the slot of `rank`: size and SHA-256 of its encoded `_Content`, or what is wrong with it."""

    rank: int
    size: int = 0
    sha256: str = ""
    captured_at: float = 0.0
    problem: str = ""


class _Survey(msgspec.Struct, array_like=True):
    """Whose slots a rank can read; what they hold, of the one that speaks for its node."""

    held: list[int]
    described: list[_Description]


class _Place(NamedTuple):
    """Where the bytes of a row are: in whose slot, and there."""

    rank: int
    file: int
    offset: int


class _Found(NamedTuple):
    """A slot: who tells all what it holds, on which node; who can read it; its description."""

    speaker: int
    node: int
    readers: list[int]
    description: _Description


def open_memory(
    snapshot: SnapshotId, group: Group, nodes: Sequence[int], slots: Sequence[Slot], world: int
) -> SnapshotReader | NodeMemory:
    """The snapshot that `world` ranks have captured, from the `slots` on this rank's node; collective. `nodes`: the
    number of each present rank's node. Takes over the slots.

    Raises UnrecoverableError naming the ranks whose slots are nowhere, CorruptionError naming slot and node where no
    copy of one is whole.
    """
    try:
        if len(set(nodes)) > 1:
            return NodeMemory(snapshot, group, nodes, slots, world)
        made: list[SnapshotReader] = []

        def find() -> bytes:
            _check_complete([slot.geometry.rank for slot in slots], world, snapshot)
            made.append(SnapshotReader(snapshot, slots))
            return b""

        group.together(find)
        return made[0]
    except BaseException:
        for slot in slots:
            slot.close()
        raise


class NodeMemory:
    """See the module docstring; made by `open_memory`. Safe in threads."""

    parallel = 1

    def __init__(
        self, snapshot: SnapshotId, group: Group, nodes: Sequence[int], slots: Sequence[Slot], world: int
    ) -> None:
        self.snapshot = snapshot
        self._node = nodes[group.rank]
        self._slots = {slot.geometry.rank: slot for slot in slots}
        contents: dict[int, bytes] = {}

        def survey() -> bytes:
            speaks = nodes.index(self._node) == group.rank
            described = [self._described(rank, contents) for rank in sorted(self._slots)] if speaks else []
            return msgspec.msgpack.encode(_Survey(sorted(self._slots), described))

        surveys = [msgspec.msgpack.decode(data, type=_Survey) for data in group.together(survey)]
        found = _agreed(surveys, nodes, world, self.snapshot)
        told = _told(group, found, contents)
        group.together(lambda: self._adopt(found, told, group))
        self._captured_at = max(slot.description.captured_at for slot in found)

    def _described(self, rank: int, contents: dict[int, bytes]) -> _Description:
        """The description of one of this node's slots, whose content is kept in `contents`."""
        slot = self._slots[rank]
        try:
            state = slot.state()
            if state.snapshot != self.snapshot:
                raise CorruptionError(f"slot of rank {rank}: holds no whole {self.snapshot}")
            content = msgspec.msgpack.encode(_Content(encode_table(slot.catalog()), slot.objects()))
        except CkptdError as error:
            return _Description(rank, problem=str(error))
        contents[rank] = content
        return _Description(rank, len(content), hashlib.sha256(content).hexdigest(), state.captured_at)

    def _adopt(self, found: Sequence[_Found], told: memoryview, group: Group) -> bytes:
        """Makes one snapshot of all slots, as `SnapshotReader` does, from what was told of them."""
        catalogs: list[Catalog] = []
        objects: list[Mapping[str, bytes]] = []
        for slot, content in zip(found, _parts(told, [slot.description.size for slot in found]), strict=True):
            rank = slot.description.rank
            if hashlib.sha256(content).hexdigest() != slot.description.sha256:
                raise CorruptionError(f"slot of rank {rank} on node {slot.node}: what was told of it arrived damaged")
            try:
                decoded = msgspec.msgpack.decode(content, type=_Content)
                catalogs.append(decode_table(decoded.table))
            except (msgspec.MsgspecError, FormatError) as error:
                raise FormatError(f"slot of rank {rank} on node {slot.node}: {error}") from None
            objects.append(decoded.objects)
        self._shared, own = share_objects(objects)
        rows, self._own_objects = object_rows(own, writer=len(found))
        self._catalog = Catalog.merge([*share_rows(catalogs), rows])
        self._readers, self._nearer = _readers(self._catalog, catalogs, found, group)
        return b""

    def catalog(self) -> Catalog:
        """All chunks of the snapshot; `writer` is the rank that captured each."""
        return self._catalog

    def objects(self) -> dict[str, bytes]:
        """path -> encoded object, as rank 0 has it; a rank's own are tensors of the catalog."""
        return self._shared

    def readers(self) -> Readers:
        """Which ranks have the slot of each row on their node."""
        return self._readers

    @property
    def captured_at(self) -> float:
        """When the last rank had captured it, in seconds since 1970."""
        return self._captured_at

    def read(self, row: int, into: memoryview) -> None:
        """The raw bytes of one row of `catalog()`, verified. Raises CorruptionError naming tensor, slot and node."""
        catalog = self._catalog
        written = _Place(int(catalog.writer[row]), int(catalog.file[row]), int(catalog.file_offset[row]))
        rank, file, offset = self._nearer.get(row, written)
        if file == OBJECTS_FILE:
            into[:] = self._own_objects[offset : offset + len(into)]
            return
        slot = self._slots.get(rank)
        if slot is None:
            raise NotFoundError(f"{self._named(row)}: the slot of rank {rank} is not on node {self._node}")
        try:
            slot.read(offset, int(catalog.crc[row]), into, file)
        except CorruptionError as error:
            raise CorruptionError(f"{self._named(row)}, on node {self._node}: {error}") from None

    def runs(self, rows: npt.ArrayLike) -> list[list[int]]:
        """`rows`, but for those without bytes, in order of place: neighbours together."""
        order = in_place_order(self._catalog, rows)
        return [run.tolist() for run in np.split(order, run_starts(self._catalog, order)[1:])] if len(order) else []

    def expect(self, rows: Sequence[int]) -> None:
        """Nothing is further away than memory."""

    def read_run(self, rows: Sequence[int], into: Sequence[memoryview]) -> None:
        """`read` of each row into its buffer."""
        for row, target in zip(rows, into, strict=True):
            self.read(row, target)

    def stored_bytes(self, rows: Sequence[int]) -> int:
        """Bytes that `fetch` gives for a run: nothing is compressed."""
        return int(self._catalog.raw[rows].sum())

    def fetch(self, rows: Sequence[int], stored: memoryview) -> None:
        """A run as it is sent: its rows one after the other. Verified, so that an error names the node that has it."""
        for row, part in zip(rows, _parts(stored, self._catalog.raw[rows].tolist()), strict=True):
            self.read(row, part)

    def decode(self, rows: Sequence[int], stored: memoryview, into: Sequence[memoryview]) -> None:
        """Takes apart and verifies a run that was fetched, here or by another rank."""
        parts = _parts(stored, self._catalog.raw[rows].tolist())
        for row, part, target in zip(rows, parts, into, strict=True):
            expected, crc = int(self._catalog.crc[row]), copy_bytes(address_of(part), target)
            if crc != expected:
                raise CorruptionError(
                    f"{self._named(row)}: CRC32C {crc:08x}, expected {expected:08x}; it changed on its way"
                )

    def _named(self, row: int) -> str:
        """The tensor of a row, for messages."""
        return f"{self._catalog.tensors[self._catalog.tensor[row]].key!r} in {self.snapshot}"

    def close(self) -> None:
        """Closes the slots."""
        for slot in self._slots.values():
            slot.close()
        self._slots = {}


def _agreed(surveys: Sequence[_Survey], nodes: Sequence[int], world: int, snapshot: SnapshotId) -> list[_Found]:
    """The slots by rank; every rank concludes the same, or raises the same error."""
    holding: dict[tuple[int, int], list[int]] = {}
    for reader, survey in enumerate(surveys):
        for rank in survey.held:
            holding.setdefault((nodes[reader], rank), []).append(reader)
    copies: dict[int, list[_Found]] = {}
    for speaker, survey in enumerate(surveys):
        for description in survey.described:
            node, rank = nodes[speaker], description.rank
            copies.setdefault(rank, []).append(_Found(speaker, node, holding[node, rank], description))
    _check_complete(list(copies), world, snapshot)
    return [_one(copies[rank]) for rank in range(world)]


def _check_complete(ranks: Sequence[int], world: int, snapshot: SnapshotId) -> None:
    """UnrecoverableError where slots are on no node, FormatError where there are more than can be."""
    missing = sorted(set(range(world)).difference(ranks))
    if missing:
        named = ", ".join(map(str, missing[:_NAMED])) + (" ..." if len(missing) > _NAMED else "")
        raise UnrecoverableError(
            f"{snapshot}: slots of {len(missing)} of {world} ranks are on no node of the job: those of ranks {named}"
        )
    if len(set(ranks)) > world:
        raise FormatError(f"{snapshot}: {world} ranks captured it; found a slot of rank {max(ranks)}")


def _one(copies: Sequence[_Found]) -> _Found:
    """One slot of its copies on several nodes: all that are whole can be read, the first describes."""
    whole = [copy for copy in copies if not copy.description.problem]
    if not whole:
        raise CorruptionError("; ".join(f"node {copy.node}: {copy.description.problem}" for copy in copies))
    first = whole[0]
    for copy in whole[1:]:
        if copy.description.sha256 != first.description.sha256:
            raise CorruptionError(
                f"slot of rank {first.description.rank}: nodes {first.node} and {copy.node} hold different ones"
            )
    return first._replace(readers=sorted(reader for copy in whole for reader in copy.readers))


def _readers(
    catalog: Catalog, catalogs: Sequence[Catalog], found: Sequence[_Found], group: Group
) -> tuple[Readers, dict[int, _Place]]:
    """Which ranks can read each row of `catalog`, which is made of `catalogs`; where this rank finds those that it can
    read in another slot than they are listed in, since what that slot's rank had for itself was the same."""
    place = catalog.writer.astype(np.int64)
    sets = [slot.readers for slot in found] + [list(range(group.size))]
    known: dict[tuple[int, ...], int] = {}
    nearer: dict[int, _Place] = {}
    for key, alike in holders(catalogs).items():
        rows = np.arange(len(catalog))[catalog.rows(key).start : catalog.rows(key).stop]
        rows = rows[catalog.rank[rows] == ALL_RANKS]
        ranks = tuple(sorted({reader for position, _ in alike for reader in found[position].readers}))
        place[rows] = known.setdefault(ranks, len(sets) + len(known))
        if group.rank in sets[catalog.writer[rows[0]]]:
            continue
        for position, own in alike:
            held = catalogs[position]
            if group.rank in found[position].readers:
                for row, there in zip(rows.tolist(), own.tolist(), strict=True):
                    nearer[row] = _Place(position, int(held.file[there]), int(held.file_offset[there]))
                break
    return Readers(place, [*sets, *known]), nearer


def _told(group: Group, found: Sequence[_Found], contents: Mapping[int, bytes]) -> memoryview:
    """The contents of all slots, by rank, one after the other: each is sent to rank 0, which tells all."""
    sizes = [slot.description.size for slot in found]
    if sum(sizes) > MAX_DESCRIPTION_BYTES:
        raise FormatError(
            f"the tables and objects of {len(found)} slots are {sum(sizes)} bytes; expected at most "
            f"{MAX_DESCRIPTION_BYTES}"
        )
    sent, received = [], []
    whole = memoryview(bytearray(sum(sizes) if group.rank == 0 else 0))
    places = _parts(whole, sizes)
    for slot in found:
        rank = slot.description.rank
        if group.rank == 0:
            place = next(places)
            if slot.speaker == 0:
                place[:] = contents[rank]
            else:
                received.append(Message(slot.speaker, rank, place))
        elif slot.speaker == group.rank:
            sent.append(Message(0, rank, memoryview(bytearray(contents[rank]))))

    lost: DeadlineError | None = None
    try:
        group.swap(sent, received)
    except DeadlineError as error:  # those that have nothing to send hear of it now, not while they wait for rank 0
        lost = error
    group.agree(lost).result()
    return memoryview(group.from_first(lambda: bytes(whole)))


def _parts(data: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """`data` cut into pieces of these sizes."""
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size
