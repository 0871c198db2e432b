"""The arena: snapshot memory in memfds that outlive the processes that write them.

A slot is one memfd of one rank with room for one snapshot of that rank, and describes itself:

    page 0   geometry: rank, layout digest, where the parts lie; written once, checksummed
    page 1-2 two state records, written in turn, checksummed: which snapshot the slot holds (or that it is
             being written); the valid record with the higher sequence number counts, so a torn write loses nothing
    table    the catalog of the rank's chunks (format/table.py), which the layout digest covers; then CRCs, objects, and
             the data from a page on

What never changes (frozen tensors) lies once in a region that the slots of a rank share: one more memfd of the same
form, whose `identity` - of its table and its checksums - is part of the layout digest of each of them.

The trainer writes, the daemon and other readers only read, by descriptor; what they verify is what they took, copied
out or on its way into a file. Sealed against shrinking and growing, so that a reader never meets SIGBUS.
The ledger is one more memfd, written by the daemon alone: its NodeState, twice, in turn.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CorruptionError, DaemonError, FormatError
from ckptd.core.native import address_of, copy_bytes, crc32c, populate
from ckptd.core.types import SnapshotId
from ckptd.format.objects import unpack_table
from ckptd.format.table import decode_table, encode_table
from ckptd.plan.share import OBJECTS_FILE, View, object_rows, share_objects, share_rows
from ckptd.tiers.memory import HUGE_PAGE, is_sealed, sealed_memory

PAGE = 4096
MAPPED_BYTES = 256 * 1024
"""From this size on a chunk is mapped to be read: the kernel copies at half the rate of a copy out of huge pages."""

FROZEN_FILE = 2
"""`file` column of rows whose bytes lie in the frozen region (0: in the slot; OBJECTS_FILE: objects)."""

MAX_SLOT_BYTES = 2**45
_RECORD = struct.Struct("<8sQII")  # magic, sequence, payload bytes, CRC32C of magic..bytes and payload
_GEOMETRY, _STATE, _LEDGER = b"CKPTGEO1", b"CKPTSTA1", b"CKPTLED1"


class Geometry(msgspec.Struct, frozen=True):
    """Where the parts of a slot lie; offsets and sizes in bytes. `frozen`: identity of its frozen region, if any."""

    rank: int
    digest: str
    table_offset: int
    table_bytes: int
    crc_offset: int
    chunks: int
    objects_offset: int
    objects_bytes: int
    data_offset: int
    data_bytes: int
    frozen: str = ""

    @property
    def size(self) -> int:
        """Bytes of the whole slot."""
        return aligned(self.data_offset + max(self.data_bytes, 1))

    def check(self) -> Geometry:
        """Itself, if the parts follow each other; raises FormatError."""
        ends = (
            3 * PAGE,
            self.table_offset,
            self.table_offset + self.table_bytes,
            self.crc_offset,
            self.crc_offset + 4 * self.chunks,
            self.objects_offset,
            self.objects_offset + self.objects_bytes,
            self.data_offset,
            self.data_offset + self.data_bytes,
            MAX_SLOT_BYTES,
        )
        if list(ends) != sorted(ends) or self.rank < 0 or self.data_offset % PAGE:
            raise FormatError("slot: its parts overlap")
        return self


class State(msgspec.Struct, frozen=True):
    """What a slot holds; `snapshot` None: nothing whole. `captured_at`: seconds since 1970, for people only."""

    snapshot: SnapshotId | None = None
    captured_at: float = 0.0
    objects_bytes: int = 0
    objects_crc: int = 0
    crcs_crc: int = 0


def layout(rank: int, catalog: Catalog, objects_bytes: int, frozen: str = "") -> tuple[Geometry, bytes]:
    """Geometry and table of slots for the chunks of `catalog` (file_offset = offset in the data), beside the frozen
    region of that identity."""
    table = encode_table(catalog)
    data_bytes = int((catalog.file_offset + catalog.raw).max(initial=0))
    crc_offset = 3 * PAGE + aligned(len(table))
    objects_offset = crc_offset + aligned(4 * len(catalog))
    data_offset = objects_offset + aligned(objects_bytes)
    return Geometry(
        rank,
        _digest(rank, objects_bytes, table, frozen),
        3 * PAGE,
        len(table),
        crc_offset,
        len(catalog),
        objects_offset,
        objects_bytes,
        data_offset,
        data_bytes,
        frozen,
    ), table


def identity(geometry: Geometry, crcs: npt.NDArray[np.uint32]) -> str:
    """What a frozen region holds, in a name: its layout and the checksums of its chunks."""
    return hashlib.sha256(geometry.digest.encode() + crcs.astype("<u4").tobytes()).hexdigest()


class Slot:
    """One slot, or a frozen region. Owns its descriptor, and that of the `region` it shares with others, if any.
    `create`d and written by a trainer, `open`ed by readers."""

    def __init__(self, descriptor: int, geometry: Geometry, region: Slot | None = None) -> None:
        self.descriptor = descriptor
        self.geometry = geometry
        self.region = region
        self._mapping: mmap.mmap | None = None
        self._catalog: Catalog | None = None

    @classmethod
    def create(cls, geometry: Geometry, table: bytes, region: Slot | None = None) -> Slot:
        """A new slot, all its memory allocated, beside `region`. Raises ConfigError where memory is short."""
        descriptor = sealed_memory(f"ckptd-slot-{geometry.rank}", geometry.size)
        try:
            write_record(descriptor, 0, _GEOMETRY, 1, msgspec.msgpack.encode(geometry))
            os.pwrite(descriptor, table, geometry.table_offset)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, geometry, None if region is None else region.duplicate())

    @classmethod
    def open(cls, descriptor: int, region: int | None = None) -> Slot:
        """A slot from descriptors that somebody else made: its own, and its frozen region's. Raises FormatError; closes
        nothing."""
        found = cls(descriptor, cls._described(descriptor))
        if bool(found.geometry.frozen) != (region is not None):
            raise FormatError("slot: a frozen region beside a slot that has none, or the other way round")
        if region is not None:
            found.region = cls(region, cls._described(region))
        return found

    @staticmethod
    def _described(descriptor: int) -> Geometry:
        """The geometry that a slot has of itself."""
        try:
            sealed = is_sealed(descriptor)
        except OSError as error:
            raise FormatError(f"slot: the descriptor is not a memfd ({error.strerror})") from None
        if not sealed:
            raise FormatError("slot: not sealed against shrinking and growing")
        found = read_record(descriptor, 0, _GEOMETRY, PAGE)
        if found is None:
            raise FormatError("slot: no valid geometry")
        try:
            geometry = msgspec.msgpack.decode(found[1], type=Geometry).check()
        except msgspec.MsgspecError as error:
            raise FormatError(f"slot: geometry: {error}") from None
        if os.fstat(descriptor).st_size != geometry.size:
            raise FormatError(f"slot: {os.fstat(descriptor).st_size} bytes, its geometry says {geometry.size}")
        return geometry

    def duplicate(self) -> Slot:
        """The same slot by descriptors of its own."""
        region = None if self.region is None else self.region.duplicate()
        return Slot(os.dup(self.descriptor), self.geometry, region)

    @property
    def descriptors(self) -> list[int]:
        """As `open` takes them."""
        return [self.descriptor] if self.region is None else [self.descriptor, self.region.descriptor]

    @property
    def frozen_bytes(self) -> int:
        """Of the region that it shares."""
        return 0 if self.region is None else self.region.geometry.size

    def mend(self, table: bytes | None = None) -> bool:
        """Writes the geometry, and the table where it is known, anew if they are damaged; whether they were."""
        known = msgspec.msgpack.encode(self.geometry)
        damaged = read_record(self.descriptor, 0, _GEOMETRY, PAGE) != (1, known)
        if damaged:
            write_record(self.descriptor, 0, _GEOMETRY, 1, known)
        if self.region is not None and self.region.mend():
            damaged = True
        if table is not None and os.pread(self.descriptor, len(table), self.geometry.table_offset) != table:
            os.pwrite(self.descriptor, table, self.geometry.table_offset)
            damaged = True
        return damaged

    # --- writing (trainer)

    def map(self) -> int:
        """Maps the data for writing, populates it, and returns its address. Kept out of forked children."""
        if self._mapping is None:
            size = self.geometry.size - self.geometry.data_offset
            mapping = mmap.mmap(self.descriptor, size, offset=self.geometry.data_offset)
            mapping.madvise(mmap.MADV_DONTFORK)
            populate(address_of(mapping), size, write=True)
            self._mapping = mapping
        return address_of(self._mapping)

    def begin(self) -> None:
        """From here on the slot holds nothing whole."""
        self._write_state(State())

    def unmap(self) -> None:
        """Undoes `map`."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def commit(self, snapshot: SnapshotId | None, crcs: npt.NDArray[np.uint32], objects: bytes) -> None:
        """The slot holds `snapshot` (None: it is a frozen region): one CRC32C per chunk and the packed objects."""
        if len(crcs) != self.geometry.chunks or len(objects) > self.geometry.objects_bytes:
            raise ValueError("slot: what is committed does not fit its layout")
        raw = crcs.astype("<u4").tobytes()
        os.pwrite(self.descriptor, raw, self.geometry.crc_offset)
        os.pwrite(self.descriptor, objects, self.geometry.objects_offset)
        self._write_state(State(snapshot, time.time(), len(objects), crc32c(objects), crc32c(raw)))

    # --- reading

    def state(self) -> State:
        """What the slot holds now."""
        found = self._newest_state()
        try:
            return State() if found is None else msgspec.msgpack.decode(found[1], type=State)
        except msgspec.MsgspecError as error:
            raise CorruptionError(f"slot of rank {self.geometry.rank}: state: {error}") from None

    def catalog(self) -> Catalog:
        """The chunks of the snapshot in the slot and its region, with their CRCs. Raises CorruptionError."""
        if self.region is None:
            return self._own_catalog()
        frozen = self.region._own_catalog()
        if identity(self.region.geometry, frozen.crc) != self.geometry.frozen:
            raise CorruptionError(f"slot of rank {self.geometry.rank}: its frozen region is another, or damaged")
        return Catalog.merge([self._own_catalog(), frozen.replaced(file=np.full(len(frozen), FROZEN_FILE))])

    def _own_catalog(self) -> Catalog:
        if self._catalog is None:
            table = os.pread(self.descriptor, self.geometry.table_bytes, self.geometry.table_offset)
            geometry = self.geometry
            if _digest(geometry.rank, geometry.objects_bytes, table, geometry.frozen) != geometry.digest:
                raise CorruptionError(f"slot of rank {self.geometry.rank}: its table of chunks is damaged")
            self._catalog = decode_table(table)
            if len(self._catalog) != self.geometry.chunks:
                raise CorruptionError(f"slot of rank {self.geometry.rank}: its table has another number of chunks")
        raw = os.pread(self.descriptor, 4 * self.geometry.chunks, self.geometry.crc_offset)
        if crc32c(raw) != self.state().crcs_crc:
            raise CorruptionError(f"slot of rank {self.geometry.rank}: the list of checksums is damaged")
        return self._catalog.replaced(crc=np.frombuffer(raw, "<u4"))

    def objects(self) -> dict[str, bytes]:
        """path -> encoded object. Raises CorruptionError."""
        state = self.state()
        size = min(state.objects_bytes, self.geometry.objects_bytes)
        packed = os.pread(self.descriptor, size, self.geometry.objects_offset)
        if crc32c(packed) != state.objects_crc:
            raise CorruptionError(f"slot of rank {self.geometry.rank}: its objects are damaged")
        return unpack_table(packed) if packed else {}

    def read(self, offset: int, crc: int, into: memoryview, file: int = 0) -> None:
        """Copies a chunk from `offset` of the data, its own or the region's, and verifies the copy. Raises
        CorruptionError."""
        if file == FROZEN_FILE and self.region is not None:
            self.region.read(offset, crc, into)
            return
        found = self._copy(self._place(offset, len(into)), into)
        if found != crc:
            raise CorruptionError(
                f"slot of rank {self.geometry.rank}: chunk at {offset}: CRC32C {found:08x}, expected {crc:08x}"
            )

    def view(self, offset: int, buffer: memoryview, file: int = 0) -> memoryview:
        """A chunk of as many bytes as `buffer`, from `offset` of the data, its own or the region's: where it is, or
        copied to `buffer`. Not verified."""
        if file == FROZEN_FILE and self.region is not None:
            return self.region.view(offset, buffer)
        at = self._place(offset, len(buffer))
        if len(buffer) >= MAPPED_BYTES:
            return self._mapped(at, len(buffer))
        self._pread(at, buffer)
        return buffer

    def _place(self, offset: int, size: int) -> int:
        """Where in the memfd a chunk is."""
        if offset < 0 or offset + size > self.geometry.data_bytes:
            raise FormatError(f"slot of rank {self.geometry.rank}: a chunk lies outside its data")
        return self.geometry.data_offset + offset

    def _mapped(self, at: int, size: int) -> memoryview:
        """Bytes of the memfd where they are, mapped for as long as the view lives. Maps no more than them, in whole
        huge pages: a process that maps arenas whole is the first that the kernel kills where memory is short."""
        first, end = at // HUGE_PAGE * HUGE_PAGE, -(-(at + size) // HUGE_PAGE) * HUGE_PAGE
        length = min(end, self.geometry.size) - first
        return memoryview(mmap.mmap(self.descriptor, length, access=mmap.ACCESS_READ, offset=first))[at - first :][
            :size
        ]

    def _pread(self, at: int, into: memoryview) -> None:
        if os.preadv(self.descriptor, [into], at) != len(into):
            raise CorruptionError(f"slot of rank {self.geometry.rank}: short read")

    def _copy(self, at: int, into: memoryview) -> int:
        """Copies bytes out; the CRC-32C of the copy."""
        if len(into) < MAPPED_BYTES:
            self._pread(at, into)
            return crc32c(into)
        mapped = self._mapped(at, len(into))
        return copy_bytes(address_of(mapped), into)

    def close(self) -> None:
        """Unmaps and closes; the memory lives as long as somebody else holds the memfd. Idempotent."""
        self.unmap()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if self.region is not None:
            self.region.close()

    def _newest_state(self) -> tuple[int, bytes] | None:
        records = [read_record(self.descriptor, page * PAGE, _STATE, PAGE) for page in (1, 2)]
        return max((r for r in records if r is not None), default=None)

    def _write_state(self, state: State) -> None:
        newest = self._newest_state()
        sequence = 1 if newest is None else newest[0] + 1
        write_record(self.descriptor, PAGE * (1 + sequence % 2), _STATE, sequence, msgspec.msgpack.encode(state))


class SnapshotReader:
    """A snapshot in memory as a tier: the slots of ranks of one node, read by descriptor.

    It looks like a stored checkpoint: what these ranks have in common appears once (plan/share.py). Where other nodes
    hold more ranks, that is for whoever knows of all to say: `rows_of_ranks` and `objects_of_ranks` leave it open.
    """

    def __init__(self, snapshot: SnapshotId, slots: Sequence[Slot]) -> None:
        """Takes over the slots. Raises CorruptionError where one does not hold `snapshot` whole, or none is here."""
        self.snapshot = snapshot
        self._slots = {slot.geometry.rank: slot for slot in slots}
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    def _read_tables(self) -> None:
        if not self._slots:
            raise CorruptionError(f"{self.snapshot}: its memory is lost")
        for rank in self.ranks:
            if self._slots[rank].state().snapshot != self.snapshot:
                raise CorruptionError(f"slot of rank {rank}: holds no whole {self.snapshot}")
        self._tables = [self._slots[rank].catalog() for rank in self.ranks]
        self._objects = {rank: self._slots[rank].objects() for rank in self.ranks}
        self._shared, own = share_objects(list(self._objects.values()))
        own = {(path, self.ranks[position]): value for (path, position), value in own.items()}
        rows, content = object_rows(own, writer=self.ranks[-1] + 1)
        self._catalog = Catalog.merge([*share_rows(self._tables), rows])
        self._content = content

    @property
    def ranks(self) -> list[int]:
        """Whose slots these are, rising."""
        return sorted(self._slots)

    def catalog(self) -> Catalog:
        """All chunks of the snapshot; `writer` is the rank that captured each."""
        return self._catalog

    def objects(self) -> dict[str, bytes]:
        """path -> encoded object, as the lowest rank has it; another rank's own are tensors of the catalog."""
        return self._shared

    def read(self, row: int, into: memoryview) -> None:
        """The raw bytes of one row of `catalog()`, verified. Raises CorruptionError naming the tensor."""
        catalog = self._catalog
        offset, crc, file = int(catalog.file_offset[row]), int(catalog.crc[row]), int(catalog.file[row])
        try:
            if file == OBJECTS_FILE:
                into[:] = self._content[offset : offset + len(into)]
            else:
                self._slots[int(catalog.writer[row])].read(offset, crc, into, file)
        except CorruptionError as error:
            key = catalog.tensors[catalog.tensor[row]].key
            raise CorruptionError(f"{key} in {self.snapshot}: {error}") from None

    def view(self, row: int, buffer: memoryview) -> memoryview:
        """The raw bytes of one row of `catalog()`, as a `View` gives them."""
        return self.viewing(self._catalog, self._content)(row, buffer)

    def rows_of_ranks(self) -> Catalog:
        """All chunks as captured: `rank` says whose own value each is, of those that not all ranks have alike."""
        return Catalog.merge(self._tables)

    def objects_of_ranks(self) -> dict[int, dict[str, bytes]]:
        """rank -> path -> encoded object, as each has it."""
        return self._objects

    def viewing(self, catalog: Catalog, objects: bytes) -> View:
        """The rows of another catalog, made of these chunks and of rows of `objects` (`object_rows`)."""

        def view(row: int, buffer: memoryview) -> memoryview:
            offset = int(catalog.file_offset[row])
            if catalog.file[row] == OBJECTS_FILE:
                return memoryview(objects)[offset : offset + len(buffer)]
            return self._slots[int(catalog.writer[row])].view(offset, buffer, int(catalog.file[row]))

        return view

    @property
    def captured_at(self) -> float:
        """When the last rank had captured it, in seconds since 1970."""
        return max(slot.state().captured_at for slot in self._slots.values())

    def close(self) -> None:
        """Closes the slots."""
        for slot in self._slots.values():
            slot.close()
        self._slots = {}


class Ledger:
    """The daemon's own state in memory that a keeper holds. Two copies, written in turn."""

    HALF = 64 * 1024 * 1024
    """Room for the seal records of a group of seven nodes with a terabyte of state each; pages come when written."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._sequence = 0
        self._last: bytes | None = None

    @classmethod
    def create(cls, name: str = "ledger") -> Ledger:
        """An empty ledger."""
        descriptor = os.memfd_create(f"ckptd-{name}", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, 2 * cls.HALF)
        return cls(descriptor)

    def write(self, payload: bytes) -> None:
        """Replaces the state; does nothing if it has not changed. Raises DaemonError for one that has no room."""
        if len(payload) > self.HALF - _RECORD.size:
            raise DaemonError(f"ledger: the daemon's state takes {len(payload)} bytes, expected at most {self.HALF}")
        if payload != self._last:
            self._sequence += 1
            write_record(self.descriptor, self.HALF * (self._sequence % 2), _LEDGER, self._sequence, payload)
            self._last = payload

    def read(self) -> bytes | None:
        """The newest whole state."""
        halves = [read_record(self.descriptor, half * self.HALF, _LEDGER, self.HALF) for half in (0, 1)]
        newest = max((half for half in halves if half is not None), default=None)
        if newest is None:
            return None
        self._sequence, self._last = newest
        return newest[1]


def _digest(rank: int, objects_bytes: int, table: bytes, frozen: str) -> str:
    """What names a layout; the geometry has it, so that a damaged table is found."""
    return hashlib.sha256(b"%d/%d/%s/" % (rank, objects_bytes, frozen.encode()) + table).hexdigest()[:32]


def aligned(size: int) -> int:
    """Whole pages."""
    return -(-size // PAGE) * PAGE


def write_record(descriptor: int, offset: int, magic: bytes, sequence: int, payload: bytes) -> None:
    """Writes a record that a reader recognises only if it is whole; of two in turn, one always is."""
    head = struct.pack("<8sQI", magic, sequence, len(payload))
    checksum = crc32c(payload, crc32c(head))
    os.pwrite(descriptor, head + struct.pack("<I", checksum) + payload, offset)


def read_record(descriptor: int, offset: int, magic: bytes, room: int) -> tuple[int, bytes] | None:
    """Sequence number and payload of a whole record; None for anything else."""
    head = os.pread(descriptor, _RECORD.size, offset)
    if len(head) < _RECORD.size:
        return None
    found, sequence, size, checksum = _RECORD.unpack(head)
    if found != magic or size > room - _RECORD.size:
        return None
    payload = os.pread(descriptor, size, offset + _RECORD.size)
    if crc32c(payload, crc32c(head[:-4])) != checksum:
        return None
    return sequence, payload
