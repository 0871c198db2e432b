"""Memory that the ranks of one node share while they load: each rank writes its own, the others read it.

Owns an anonymous memory file (memfd) per rank. Others open it through /proc/<pid>/fd, which the kernel allows to
processes of one user that see each other; it has no name, so nothing is left behind whoever is killed, and it is not
subject to the size of /dev/shm. Where ranks do not see each other (containers of their own), `open` leaves them out,
and the network is used. Invariants: memory is allocated and sealed before anybody maps it, so no access is a SIGBUS;
a rank maps the memory of others read-only.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Sequence

import msgspec

from ckptd.core.config import node_name
from ckptd.core.native import address_of, populate
from ckptd.tiers.memory import allocate
from ckptd.trainer.loading import memory_at


class _Offer(msgspec.Struct, array_like=True):
    """Where a rank's memory is, and what it begins with until it is used, by which it is recognised."""

    node: str
    process: int
    descriptor: int
    nonce: bytes


class Staging:
    """This rank's memory, and that of others on its node. In order: `offer`, `open`, `allocate`, then `memory` and
    `address`, which are safe in threads; `close`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._descriptor = -1
        self._lock = threading.Lock()
        self._opened: dict[int, int] = {}
        self._mapped: dict[int, mmap.mmap] = {}

    def offer(self) -> bytes:
        """Makes it, still empty; what other ranks need in order to open it."""
        nonce = secrets.token_bytes(16)
        self._descriptor = os.memfd_create("ckptd-exchange", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._descriptor, 0o600)
        os.write(self._descriptor, nonce)
        return msgspec.msgpack.encode(_Offer(node_name(), os.getpid(), self._descriptor, nonce))

    def open(self, offers: Sequence[bytes]) -> list[int]:
        """Opens the memory of every rank on this node, by rank; returns those ranks, its own among them."""
        found = [self._rank]
        for rank, data in enumerate(offers):
            offer = msgspec.msgpack.decode(data, type=_Offer)
            if rank == self._rank or offer.node != node_name():
                continue
            with contextlib.suppress(OSError):
                # In another PID namespace this is something else, and opening a pipe would wait.
                path, flags = f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(path, flags)
                self._opened[rank] = descriptor
                if os.pread(descriptor, len(offer.nonce), 0) == offer.nonce:
                    found.append(rank)
        return sorted(found)

    def allocate(self, size: int) -> None:
        """Backs this rank's memory. Raises ConfigError where memory is short."""
        os.ftruncate(self._descriptor, size)
        allocate(self._descriptor, size)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapping = self._map(self._rank, self._descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
        with contextlib.suppress(OSError):  # an old kernel: pages are mapped one by one, when they are touched
            populate(address_of(mapping), size)

    def _map(self, rank: int, descriptor: int, access: int) -> mmap.mmap:
        mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=access)
        mapping.madvise(mmap.MADV_DONTFORK)
        self._mapped[rank] = mapping
        return mapping

    def memory(self, rank: int, offset: int, size: int) -> memoryview:
        """Part of the memory of a rank that has allocated it; only one's own may be written."""
        return memory_at(self.address(rank) + offset, size)

    def address(self, rank: int) -> int:
        """Where the memory of a rank that has allocated it is mapped."""
        with self._lock:
            return address_of(self._mapped.get(rank) or self._map(rank, self._opened[rank], mmap.PROT_READ))

    def close(self) -> None:
        """Gives everything back; what `memory` and `address` gave must not be used any more. Idempotent."""
        for mapping in self._mapped.values():
            mapping.close()
        for descriptor in (*self._opened.values(), self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._mapped, self._opened, self._descriptor = {}, {}, -1
