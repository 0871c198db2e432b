"""A snapshot in the memory of several nodes as a tier: each rank reads the slots of its own node, and hears what the
slots of the others hold.

Owns how ranks come to know that: one rank of each node tells all what is in its slots (tables, checksums, objects), of
a slot on several nodes one of them; those of a node in one table, since they name the same tensors. What it looks like
is what `SnapshotReader` makes of all slots on one node, and on one node it is that. Where bytes are read and how they
get to other nodes is the exchange's matter (exchange.py): this module says who can read what.

Invariants: opening raises the same error on every rank; nothing is believed that was not compared with the checksums of
a slot by a rank of its node, and with that rank's digest by every other; a slot on several nodes holds the same on all,
and any copy of it serves, also where another is damaged; what ranks have captured each for itself and alike is read in
any slot that has it. Does not fetch slots from nodes without ranks: every slot is on a node of the job by now.
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

MAX_TOLD_BYTES = 2**31
"""What all slots together may take to tell: tables, checksums and objects."""

_NAMED = 8
"""How many ranks a message names."""


class _Description(msgspec.Struct, array_like=True):
    """The slot of `rank`: a digest of all that is in it but the bytes of tensors; or what is wrong with it."""

    rank: int
    digest: str = ""
    captured_at: float = 0.0
    problem: str = ""


class _Survey(msgspec.Struct, array_like=True):
    """Whose slots a rank can read; what they hold, of the one that speaks for its node."""

    held: list[int]
    described: list[_Description]


class _Contents(msgspec.Struct, array_like=True):
    """What is in some slots but the bytes of tensors: one table of all their chunks, the objects of each rank."""

    table: bytes
    objects: dict[int, dict[str, bytes]]


class _Parcel(msgspec.Struct, array_like=True):
    """Size and SHA-256 of the encoded `_Contents` that a rank tells, if it tells any."""

    size: int = 0
    sha256: str = ""


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
        read: dict[int, tuple[Catalog, dict[str, bytes]]] = {}

        def survey() -> bytes:
            speaks = nodes.index(self._node) == group.rank
            described = [self._described(rank, read) for rank in sorted(self._slots)] if speaks else []
            return msgspec.msgpack.encode(_Survey(sorted(self._slots), described))

        surveys = [msgspec.msgpack.decode(data, type=_Survey) for data in group.together(survey)]
        found = _agreed(surveys, nodes, world, self.snapshot)
        contents: list[bytes] = []

        def announce() -> bytes:
            contents.append(_packed([slot.description.rank for slot in found if slot.speaker == group.rank], read))
            return msgspec.msgpack.encode(_Parcel(len(contents[0]), hashlib.sha256(contents[0]).hexdigest()))

        parcels = [msgspec.msgpack.decode(data, type=_Parcel) for data in group.together(announce)]
        told = _told(group, parcels, contents[0])
        group.together(lambda: self._adopt(found, parcels, told, group))
        self._captured_at = max(slot.description.captured_at for slot in found)

    def _described(self, rank: int, read: dict[int, tuple[Catalog, dict[str, bytes]]]) -> _Description:
        """The description of one of this node's slots; what is in it goes into `read`."""
        slot = self._slots[rank]
        try:
            state = slot.state()
            if state.snapshot != self.snapshot:
                raise CorruptionError(f"slot of rank {rank}: holds no whole {self.snapshot}")
            catalog, objects = read[rank] = slot.catalog(), slot.objects()
        except CkptdError as error:
            return _Description(rank, problem=str(error))
        digest = hashlib.sha256(slot.geometry.digest.encode() + catalog.crc.tobytes())
        digest.update(msgspec.msgpack.encode(objects))
        return _Description(rank, digest.hexdigest(), state.captured_at)

    def _adopt(self, found: Sequence[_Found], parcels: Sequence[_Parcel], told: memoryview, group: Group) -> bytes:
        """Makes one snapshot of all slots, as `SnapshotReader` does, from what was told of them."""
        catalogs: list[Catalog] = []
        objects: dict[int, dict[str, bytes]] = {}
        for speaker, content in enumerate(_parts(told, [parcel.size for parcel in parcels])):
            slots = [slot for slot in found if slot.speaker == speaker]
            if not slots:
                continue
            named = f"slots of ranks {_some([slot.description.rank for slot in slots])}, told by node {slots[0].node}"
            if hashlib.sha256(content).hexdigest() != parcels[speaker].sha256:
                raise CorruptionError(f"{named}: what is in them arrived damaged")
            try:
                decoded = msgspec.msgpack.decode(content, type=_Contents)
                catalogs.append(decode_table(decoded.table))
            except (msgspec.MsgspecError, FormatError) as error:
                raise FormatError(f"{named}: {error}") from None
            objects |= decoded.objects
        self._shared, own = share_objects([objects[slot.description.rank] for slot in found])
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
        raise UnrecoverableError(
            f"{snapshot}: slots of {len(missing)} of {world} ranks are on no node of the job: those of ranks "
            f"{_some(missing)}"
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
        if copy.description.digest != first.description.digest:
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
        rows = np.array(catalog.rows(key))
        rows = rows[catalog.rank[rows] == ALL_RANKS]
        slots = [found[catalogs[position].writer[own[0]]] for position, own in alike]
        ranks = tuple(sorted({reader for slot in slots for reader in slot.readers}))
        place[rows] = known.setdefault(ranks, len(sets) + len(known))
        if group.rank in ranks and group.rank not in sets[catalog.writer[rows[0]]]:
            position, own = next(held for held, slot in zip(alike, slots, strict=True) if group.rank in slot.readers)
            near = catalogs[position]
            columns = (column[own].tolist() for column in (near.writer, near.file, near.file_offset))
            nearer |= dict(zip(rows.tolist(), map(_Place, *columns), strict=True))
    return Readers(place, [*sets, *known]), nearer


def _packed(ranks: Sequence[int], read: Mapping[int, tuple[Catalog, dict[str, bytes]]]) -> bytes:
    """The encoded contents of the slots of these ranks; of none, nothing."""
    if not ranks:
        return b""
    table = encode_table(Catalog.merge([read[rank][0] for rank in ranks]))
    return msgspec.msgpack.encode(_Contents(table, {rank: read[rank][1] for rank in ranks}))


def _told(group: Group, parcels: Sequence[_Parcel], mine: bytes) -> memoryview:
    """The contents of all slots, by who tells them, one after the other: each is sent to rank 0, which tells all."""
    sizes = [parcel.size for parcel in parcels]
    if sum(sizes) > MAX_TOLD_BYTES:
        raise FormatError(f"tables and objects of all slots are {sum(sizes)} bytes; expected at most {MAX_TOLD_BYTES}")
    whole = memoryview(bytearray(sum(sizes) if group.rank == 0 else 0))
    sent: list[Message] = []
    received: list[Message] = []
    if group.rank == 0:
        whole[: len(mine)] = mine
        places = enumerate(_parts(whole, sizes))
        received = [Message(rank, rank, place) for rank, place in places if rank and len(place)]
    elif mine:
        sent = [Message(0, group.rank, memoryview(bytearray(mine)))]
    lost: DeadlineError | None = None
    try:
        group.swap(sent, received)
    except DeadlineError as error:  # those that have nothing to send hear of it now, not while they wait for rank 0
        lost = error
    group.agree(lost).result()
    return memoryview(group.from_first(lambda: bytes(whole)))


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:_NAMED])) + (" ..." if len(ranks) > _NAMED else "")


def _parts(data: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """`data` cut into pieces of these sizes."""
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size
