"""A group of nodes in this process for the tests of protection: real slots, real servers, one Protector each."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType

import numpy as np

from ckptd.core.catalog import Catalog
from ckptd.core.native import address_of, crc32c
from ckptd.core.types import Epoch, SnapshotId
from ckptd.plan.stripe import Group
from ckptd.tiers.arena import Slot, identity, layout
from ckptd.tiers.peers import Cancellation, Peer, Peers, Throttle
from ckptd.tiers.protection import Holders, ParityArea, Protector, SealedGroup, SealRecord
from tests.peers.nodes import WAIT_S, Credentials, Node, credentials, in_thread

SNAPSHOT = SnapshotId(Epoch(6, "fedcba9876543210"), 40)
CHUNK = 3 * 2**20 + 12345
"""Of no relation to pieces."""


def _catalog(size: int, name: str) -> tuple[Catalog, list[tuple[int, int]]]:
    """One tensor of bytes in chunks, the last shorter; at least one."""
    places = [(start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)] or [(0, 0)]
    catalog = Catalog.build(
        [(name, "uint8", (size,))],
        [0] * len(places),
        [[start] for start, _ in places],
        [[part] for _, part in places],
        file_offset=[start for start, _ in places],
    )
    return catalog, places


def _fill(slot: Slot, data: np.ndarray, places: list[tuple[int, int]], snapshot: SnapshotId | None) -> np.ndarray:
    if len(data):
        ctypes.memmove(slot.map(), address_of(data), len(data))
    crcs = np.array([crc32c(data[start : start + size]) for start, size in places], np.uint32)
    slot.begin()
    slot.commit(snapshot, crcs, b"")
    slot.unmap()
    return crcs


def make_region(rank: int, size: int, seed: int) -> Slot:
    """A frozen region of a rank, with random bytes."""
    catalog, places = _catalog(size, "frozen")
    geometry, table = layout(rank, catalog, 0)
    region = Slot.create(geometry, table)
    _fill(region, np.random.default_rng(seed).integers(0, 256, size, np.uint8), places, None)
    return region


def make_slot(
    rank: int, size: int, seed: int = 0, *, region: Slot | None = None, snapshot: SnapshotId = SNAPSHOT
) -> Slot:
    """A slot that holds a snapshot of random bytes as a trainer leaves it."""
    catalog, places = _catalog(size, "model/weight")
    frozen = "" if region is None else identity(region.geometry, region.catalog().crc)
    geometry, table = layout(rank, catalog, 100, frozen)
    slot = Slot.create(geometry, table, region)
    _fill(slot, np.random.default_rng(seed).integers(0, 256, size, np.uint8), places, snapshot)
    return slot


def images(slots: Sequence[Slot]) -> list[bytes]:
    """All bytes of slots and regions."""
    found = []
    for slot in slots:
        for memory in (slot, slot.region):
            if memory is not None:
                found.append(_image(memory))
    return found


def _image(slot: Slot) -> bytes:
    return os.pread(slot.descriptor, slot.geometry.size, 0)


class Member:
    """One node: its slots, server, Protector, parity area."""

    def __init__(self, number: int, size: int, others: list[Credentials]) -> None:
        self.number = number
        self.name = f"n{number}"
        self.node = Node(self.name, others, tls=False)
        self.slots = [make_slot(2 * number, size, number)] if size else []
        self.area: ParityArea | None = None
        self.throttle = Throttle()
        self.peers = Peers({})
        self.protector = Protector(self.name, {}, self.peers, self.node.sources, self.throttle)

    def join(self, members: Sequence[Member], patience_s: float, deadline_s: float) -> None:
        own = self.node.credentials
        self.peers = Peers(
            {
                other.name: Peer(own, other.node.announcement, throttle=self.throttle, deadline_s=deadline_s)
                for other in members
                if other is not self
            }
        )
        names = {other.number: other.name for other in members}
        self.protector = Protector(
            self.name, names, self.peers, self.node.sources, self.throttle, patience_s=patience_s
        )

    def close(self) -> None:
        self.protector.close()
        self.peers.close()
        self.node.__exit__(None, None, None)
        for slot in self.slots:
            slot.close()
        if self.area is not None:
            self.area.close()


class Cluster:
    """k + m members with strings of about the given sizes (0: no slot, an empty string)."""

    def __init__(
        self,
        k: int,
        m: int,
        sizes: Sequence[int],
        *,
        patience_s: float = WAIT_S,
        deadline_s: float = WAIT_S,
    ) -> None:
        assert len(sizes) == k + m
        everyone = [credentials(f"n{number}", tls=False) for number in range(k + m)]
        self.group = Group(tuple(range(k + m)), m)
        self.members = [
            Member(number, size, [one for one in everyone if one.node != f"n{number}"])
            for number, size in enumerate(sizes)
        ]
        for member in self.members:
            member.join(self.members, patience_s, deadline_s)
        self.records: dict[int, SealRecord] = {}

    @property
    def sealed(self) -> SealedGroup:
        return SealedGroup(SNAPSHOT, self.group, self.records)

    def seal(self) -> SealedGroup:
        """Every member's seal record is everywhere, and every string can be pulled."""
        for member in self.members:
            record = member.protector.describe(SNAPSHOT, member.slots)
            self.records[member.number] = SealRecord.decode(record.encode())
            member.protector.give_string(SNAPSHOT, member.slots, record)
        for member in self.members:
            member.area = ParityArea.create(self.sealed.striping.parity_bytes)
        return self.sealed

    def encode(self, numbers: Collection[int] | None = None) -> None:
        """All members at once; raises the first error."""
        chosen = [member for member in self.members if numbers is None or member.number in numbers]
        for end in [start_encoding(self, member) for member in chosen]:
            error = end()
            if error is not None:
                raise error

    def holders(self, lost: Collection[int] = ()) -> Holders:
        left = {member.number: [member.name] for member in self.members if member.number not in lost}
        return Holders(left, left)

    def check_rebuild(self, by: int, number: int, holders: Holders) -> None:
        """`by` gets the string of `number` again, bit for bit."""
        slots = self.members[by].protector.rebuild(self.sealed, number, holders)
        try:
            assert images(slots) == images(self.members[number].slots)
            assert [slot.state().snapshot for slot in slots] == [SNAPSHOT] * len(slots)
            for slot in slots:
                slot.catalog()
        finally:
            for slot in slots:
                slot.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        for member in self.members:
            member.close()


def start_encoding(
    cluster: Cluster, member: Member, cancellation: Cancellation | None = None
) -> Callable[[], BaseException | None]:
    """In a thread; what is returned waits for its end and gives the error."""
    assert member.area is not None
    area = member.area
    return in_thread(lambda: member.protector.encode(cluster.sealed, member.number, area, cancellation))


@contextlib.contextmanager
def protected(k: int, m: int, sizes: Sequence[int], **options: float) -> Iterator[Cluster]:
    """A group whose parities are complete."""
    with Cluster(k, m, sizes, **options) as cluster:
        cluster.seal()
        cluster.encode()
        yield cluster
