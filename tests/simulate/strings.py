"""Real bytes of a simulated job: strings that nodes capture, seal records, parities, and what is decoded from them.

Tiny strings of different sizes in tiny pieces, placed by plan/stripe and computed by core/native: a restore really
decodes, and what comes out is compared byte by byte.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ckptd.core import native
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import Group, Read, Striping
from ckptd.protocol.cluster.facts import Shape

NOTHING = np.zeros(0, np.uint8)
PIECE_BYTES = 3
MOST_BYTES = 13

Bytes = npt.NDArray[np.uint8]
Fetch = Callable[[int, int, int], Bytes]
"""node, offset, size -> bytes of that node's string, or of its parity area."""


class UnavailableError(Exception):
    """Bytes that are needed cannot be had now."""


def content(seed: int, snapshot: SnapshotId, string: int, step: int) -> Bytes:
    """What a node captures: different for every snapshot, string and step."""
    source = random.Random(f"{seed} {snapshot} {string} {step}")
    size = random.Random(f"{seed} {string}").randint(0, MOST_BYTES)
    return np.frombuffer(source.randbytes(size), np.uint8).copy()


def record_of(data: Bytes) -> bytes:
    """A seal record: size and checksum."""
    return struct.pack("<II", len(data), native.crc32c(data) if len(data) else 0)


def agrees(data: Bytes, record: bytes) -> bool:
    """True if the bytes are those of the record."""
    return record_of(data) == record


def striping_of(shape: Shape, string: int, records: Mapping[int, bytes]) -> Striping:
    """The stripes of the group that a string is in; UnavailableError where a record is missing."""
    group = shape.group_of(string)
    if not set(group) <= records.keys():
        raise UnavailableError(f"seal records of {set(group) - records.keys()}")
    sizes = tuple(struct.unpack("<II", records[number])[0] for number in group)
    return Striping(Group(group, shape.parity), sizes, PIECE_BYTES)


def parity_area(striping: Striping) -> Bytes:
    """Room for a member's parities."""
    return np.zeros(max(striping.parity_bytes, 1), np.uint8)


def encode_stripe(striping: Striping, encoder: int, fetch: Fetch, areas: Mapping[int, Bytes]) -> None:
    """Encodes the stripe of an encoder from what it can fetch, into the parity areas that are given."""
    for row in striping.encoding(encoder):
        sources = [fetch(s.node, s.offset, s.size) if s.size else NOTHING for s in row.sources]
        targets = [np.zeros(row.length, np.uint8) for _ in row.parities]
        native.erasure_encode(*_arrays(sources), *_arrays(targets)[:1], np.array([row.length], np.int64))
        for place, made in zip(row.parities, targets, strict=True):
            if place.node in areas:
                areas[place.node][place.offset : place.offset + place.size] = made[: place.size]


def read_string(striping: Striping, string: int, lost: set[int], data: Fetch, parity: Fetch) -> Bytes:
    """A whole string; `lost` members give nothing. UnrecoverableError where too many are lost."""
    parts = [_read(striping, read, data, parity) for read in striping.rebuild(string, lost)]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def _read(striping: Striping, read: Read, data: Fetch, parity: Fetch) -> Bytes:
    k = striping.group.data_count
    sources = [
        (data if s.position < k else parity)(s.node, s.offset, s.size) if s.size else NOTHING for s in read.sources
    ]
    positions = [source.position for source in read.sources]
    if positions == [read.position]:
        return sources[0]
    target = np.zeros(read.size, np.uint8)
    native.erasure_decode(
        positions, [read.position], *_arrays(sources), *_arrays([target])[:1], np.array([read.size], np.int64)
    )
    return target


def _arrays(buffers: list[Bytes]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """One row: addresses and sizes."""
    addresses = np.array([[native.address_of(b) if len(b) else _NOWHERE for b in buffers]], np.uint64)
    return addresses, np.array([[len(b) for b in buffers]], np.int64)


_EMPTY = np.zeros(1, np.uint8)
_NOWHERE = native.address_of(_EMPTY)
