"""What a daemon gives to its peers: sources of bytes, registered under a snapshot and a name.

Invariants:
- Who verifies a checksum copies the bytes out first. Here that is who receives them: what is sent is either a copy in a
  buffer that nobody else writes, or the memory itself, mapped for the call; what changes after its checksum was taken
  arrives wrong, and is refused there.
- After `withdraw` has returned no read begins, and those in progress, of one batch each, have ended: the memory may be
  written again. What is mapped may still be on its way; see above.
- Sources are read by descriptor. No more is mapped than is being sent (wire.CALL_BYTES a call).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckptd.core.errors import CorruptionError, FormatError, NotFoundError
from ckptd.core.native import address_of, copy_bytes, crc32c, crc32c_combine
from ckptd.core.types import SnapshotId
from ckptd.tiers.arena import Slot


class Source(Protocol):
    """`size` bytes that can be read at any offset."""

    size: int

    def read(self, offset: int, into: memoryview) -> int:
        """Copies bytes out; the CRC-32C of the copy. Raises CorruptionError if it is known to be another."""

    def close(self) -> None:
        """Lets go of the memory. Idempotent."""


@dataclasses.dataclass(frozen=True)
class Fragments:
    """The CRC-32C of each fragment that a string is cut into: i is [offsets[i], offsets[i + 1])."""

    offsets: npt.NDArray[np.int64]
    crc: npt.NDArray[np.uint32]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.crc) + 1 or self.offsets[0] != 0 or np.any(np.diff(self.offsets) <= 0):
            raise FormatError("fragments: expected ascending offsets from 0, one more than checksums")

    def known(self, offset: int, size: int) -> int | None:
        """The CRC-32C that a range should have, where it is one fragment."""
        fragment = int(np.searchsorted(self.offsets, offset))
        if (
            fragment < len(self.crc)
            and self.offsets[fragment] == offset
            and self.offsets[fragment + 1] == offset + size
        ):
            return int(self.crc[fragment])
        return None

    def verify(self, offset: int, copy: memoryview) -> int:
        """The CRC-32C of a copy of the bytes from `offset` on. Raises CorruptionError where a whole fragment in it is
        not what it should be; parts of fragments at both ends cannot be judged."""
        end = offset + len(copy)
        first = int(np.searchsorted(self.offsets, offset, side="left"))
        last = int(np.searchsorted(self.offsets, end, side="right")) - 1
        inner = [int(at) for at in self.offsets[first : last + 1]] if first <= last else []
        total = 0
        for start, stop in itertools.pairwise(sorted({offset, *inner, end})):
            found = crc32c(copy[start - offset : stop - offset])
            total = crc32c_combine(total, found, stop - start)
            fragment = bisect.bisect_left(inner, start) + first
            if start in inner and stop in inner and found != self.crc[fragment]:
                raise CorruptionError(
                    f"bytes [{start}, {stop}): CRC32C {found:08x}, expected {int(self.crc[fragment]):08x}"
                )
        return total


@dataclasses.dataclass(frozen=True)
class Extent:
    """`size` bytes at `offset` of a descriptor."""

    descriptor: int
    offset: int
    size: int


def memories_of(slots: Sequence[Slot]) -> list[Slot]:
    """The memfds that make up a node's string (docs/erasure.md, section 1): its slots, ranks ascending, then the frozen
    regions that they share, each once."""
    ordered = sorted(slots, key=lambda slot: slot.geometry.rank)
    regions: list[Slot] = []
    for region in (slot.region for slot in ordered if slot.region is not None):
        if not any(os.path.sameopenfile(region.descriptor, other.descriptor) for other in regions):
            regions.append(region)
    return ordered + regions


def string_of(slots: Sequence[Slot]) -> list[Extent]:
    """The node's slots as one string: whole images, so that who has the string has the slots."""
    return [Extent(memory.descriptor, 0, memory.geometry.size) for memory in memories_of(slots)]


class Extents:
    """Ranges of descriptors one after the other, as one string of `size` bytes. Has descriptors of its own."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        kept = [extent for extent in extents if extent.size]
        self._starts = list(itertools.accumulate((extent.size for extent in kept), initial=0))
        self.size = self._starts[-1]
        self._extents = [dataclasses.replace(extent, descriptor=os.dup(extent.descriptor)) for extent in kept]

    def copy(self, offset: int, into: memoryview) -> None:
        """Copies bytes out. Raises CorruptionError where the memory is shorter than the extents say."""
        for descriptor, at, done, size in self._parts(offset, len(into)):
            while size:
                count = os.preadv(descriptor, [into[done : done + size]], at)
                if count == 0:
                    raise CorruptionError(
                        f"bytes from {offset + done} on: the memory ends there, expected {self.size} bytes"
                    )
                at, done, size = at + count, done + count, size - count

    def write(self, offset: int, data: memoryview) -> None:
        """Copies bytes in."""
        for descriptor, at, done, size in self._parts(offset, len(data)):
            while size:
                count = os.pwritev(descriptor, [data[done : done + size]], at)
                at, done, size = at + count, done + count, size - count

    def map(self, offset: int, size: int) -> memoryview | None:
        """The bytes themselves, to read only, mapped while the view lives; None where they lie in several extents."""
        parts = list(self._parts(offset, size))
        if len(parts) != 1:
            return None
        descriptor, at, _, _ = parts[0]
        before = at % mmap.ALLOCATIONGRANULARITY
        if os.fstat(descriptor).st_size < at + size:
            return None
        mapping = mmap.mmap(descriptor, before + size, prot=mmap.PROT_READ, offset=at - before)
        return memoryview(mapping)[before:]

    def close(self) -> None:
        """Idempotent."""
        while self._extents:
            os.close(self._extents.pop().descriptor)

    def _parts(self, offset: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """(descriptor, offset in it, offset in the range, bytes) of each extent that a range touches."""
        done = 0
        index = bisect.bisect_right(self._starts, offset) - 1
        while done < size:
            extent, inside = self._extents[index], offset + done - self._starts[index]
            part = min(extent.size - inside, size - done)
            yield extent.descriptor, extent.offset + inside, done, part
            done, index = done + part, index + 1


class DescriptorSource:
    """Extents one after the other as one string, read by descriptors of its own."""

    def __init__(self, extents: Sequence[Extent], fragments: Fragments | None = None) -> None:
        size = sum(extent.size for extent in extents)
        if fragments is not None and fragments.offsets[-1] != size:
            raise FormatError(f"fragments of {fragments.offsets[-1]} bytes for a string of {size}")
        self.size = size
        self._fragments = fragments
        self._extents = Extents(extents)

    def read(self, offset: int, into: memoryview) -> int:
        """As in `Source`. Also CorruptionError where the memory is shorter than the extents say."""
        self._extents.copy(offset, into)
        return crc32c(into) if self._fragments is None else self._fragments.verify(offset, into)

    def map(self, offset: int, size: int) -> memoryview | None:
        """As in `Extents`."""
        return self._extents.map(offset, size)

    def checksum(self, offset: int, mapped: memoryview) -> int:
        """The CRC-32C that goes with bytes that `map` gave: where it is known what they should be, that. They are not
        read here then; who receives them sees whether they are."""
        known = None if self._fragments is None else self._fragments.known(offset, len(mapped))
        return crc32c(mapped) if known is None else known

    def close(self) -> None:
        """As in `Source`."""
        self._extents.close()


class MemorySource:
    """Memory of this process: a parity buffer, a table, a record."""

    def __init__(self, memory: bytes | bytearray | memoryview, fragments: Fragments | None = None) -> None:
        view = memoryview(memory).cast("B")
        self._memory: memoryview | None = view
        self.size = len(view)
        self._address = address_of(view) if self.size else 0
        self._fragments = fragments

    def read(self, offset: int, into: memoryview) -> int:
        """As in `Source`."""
        copy_bytes(self._address + offset, into, False)
        return crc32c(into) if self._fragments is None else self._fragments.verify(offset, into)

    def close(self) -> None:
        """As in `Source`."""
        if self._memory is not None:
            self._memory.release()
            self._memory = None


class Registered:
    """A source while it is registered: `read` until it is withdrawn."""

    def __init__(self, label: str, source: Source) -> None:
        self.label = label
        self.size = source.size
        self._source = source
        self._idle = threading.Condition()
        self._reading = 0
        self._withdrawn = False

    def check(self, offset: int, length: int) -> None:
        """Raises FormatError for a range outside the source."""
        if offset < 0 or length < 1 or offset + length > self.size:
            raise FormatError(f"{self.label}: [{offset}, {offset + length}): expected a range of its {self.size} bytes")

    def read(self, offset: int, into: memoryview) -> int:
        """As in `Source`; raises NotFoundError once it is withdrawn."""
        with self._in_use():
            return self._source.read(offset, into)

    def map(self, offset: int, size: int) -> memoryview | None:
        """The bytes themselves where the source can show them; see `checksum`."""
        with self._in_use():
            return self._source.map(offset, size) if isinstance(self._source, DescriptorSource) else None

    def checksum(self, offset: int, mapped: memoryview) -> int:
        """As in `DescriptorSource`; raises NotFoundError once it is withdrawn."""
        with self._in_use():
            assert isinstance(self._source, DescriptorSource)
            return self._source.checksum(offset, mapped)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._withdrawn:
                raise NotFoundError(f"{self.label}: is no longer held here; a newer snapshot has taken its place")
            self._reading += 1
        try:
            yield
        except CorruptionError as error:
            raise CorruptionError(f"{self.label}: {error}") from None
        finally:
            with self._idle:
                self._reading -= 1
                self._idle.notify_all()

    def withdraw(self) -> None:
        """Waits for reads in progress, lets none begin, and closes the source."""
        with self._idle:
            self._withdrawn = True
            self._idle.wait_for(lambda: self._reading == 0)
        self._source.close()


class Sources:
    """All that this daemon gives, by snapshot and name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[SnapshotId, str], Registered] = {}

    def register(self, snapshot: SnapshotId, what: str, source: Source) -> None:
        """Takes a source over. ValueError if there is one of that name."""
        with self._lock:
            if (snapshot, what) in self._held:
                raise ValueError(f"{what} of {snapshot} is registered already")
            self._held[snapshot, what] = Registered(f"{what} of {snapshot}", source)

    def find(self, snapshot: SnapshotId, what: str) -> Registered:
        """Raises NotFoundError."""
        with self._lock:
            found = self._held.get((snapshot, what))
        if found is None:
            raise NotFoundError(f"{what} of {snapshot}: is not held here")
        return found

    def withdraw(self, snapshot: SnapshotId, what: str | None = None) -> None:
        """Gives one name, or everything of a snapshot, no longer; see the invariants. Idempotent."""
        with self._lock:
            names = [key for key in self._held if key[0] == snapshot and what in (None, key[1])]
            gone = [self._held.pop(key) for key in names]
        for registered in gone:
            registered.withdraw()

    def close(self) -> None:
        """Withdraws everything."""
        with self._lock:
            gone, self._held = list(self._held.values()), {}
        for registered in gone:
            registered.withdraw()
