"""The arena of one daemon: descriptors of all memory that is to outlive it, and the keeper that holds them too.

Owns slots, parity areas and the two ledgers of this node; what they mean is decided elsewhere. A daemon that is started
by the keeper is handed everything that the one before had given it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Sequence

import msgspec

from ckptd.core.errors import FormatError
from ckptd.core.types import SnapshotId
from ckptd.daemon.address import Address
from ckptd.daemon.launch import start_keeper
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.slots import SlotTable
from ckptd.protocol.state import NodeState, recover
from ckptd.tiers.arena import Ledger, Slot
from ckptd.tiers.protection import ParityArea

log = logging.getLogger("ckptd.daemon")

LEAVE_S = 10.0
"""How long the keeper may take to end."""


class Keeper:
    """This side of the channel to the keeper; starts another one when it is killed."""

    def __init__(self, address: Address, descriptor: int | None, kept: Callable[[], dict[str, int]]) -> None:
        self._address = address
        self._kept = kept
        self._process: subprocess.Popen[bytes] | None = None
        self._channel = socket.socket(fileno=descriptor) if descriptor is not None else self._adopt()

    def _adopt(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = start_keeper(self._address, adopt=theirs)
        theirs.close()
        return ours

    def handed_over(self) -> dict[str, int]:
        """What the keeper kept for us: name -> descriptor. Called once, at the start."""
        found: dict[str, int] = {}
        while True:
            packet, descriptors, _, _ = socket.recv_fds(self._channel, 4096, 1, socket.MSG_CMSG_CLOEXEC)
            if packet[:1] != b"K" or not descriptors:
                return found
            found[packet[1:].decode()] = descriptors[0]

    def fileno(self) -> int:
        return self._channel.fileno()

    def keep(self, name: str, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            socket.send_fds(self._channel, [b"K" + name.encode()], [descriptor])

    def drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(b"D" + name.encode())

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(b"X")
        self._channel.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=LEAVE_S)

    def replace(self) -> None:
        """The keeper is dead: another one takes everything over."""
        log.warning("the keeper was killed; starting another")
        self._channel.close()
        if self._process is not None:
            self._process.poll()
        self._channel = self._adopt()
        for name, descriptor in self._kept().items():
            self.keep(name, descriptor)


class Arena:
    """See the module docstring."""

    def __init__(self, address: Address, keeper: int | None) -> None:
        """`keeper`: the channel to the keeper that has started this daemon, if one has."""
        self.keeper = Keeper(address, keeper, self._kept)
        kept = self.keeper.handed_over() if keeper is not None else {}
        fresh = [name for name in ("ledger", "network") if name not in kept]
        self.ledger, self.network = (
            Ledger(kept.pop(name)) if name in kept else Ledger.create(name) for name in ("ledger", "network")
        )
        self.slots: dict[int, Slot] = {}
        self.areas: dict[int, ParityArea] = {}
        for name in list(kept):
            kind, _, number = name.partition("/")
            if kind == "slot":
                self._open_slot(int(number), kept.pop(name), kept.pop(f"frozen/{number}", None))
            elif kind == "parity":
                self._open_area(int(number), kept.pop(name))
        close_all(list(kept.values()))
        for name in fresh:
            self.keeper.keep(name, self._kept()[name])

    def recover(self, job: str) -> NodeState:
        """The state of the daemon before, as far as its memory came over; else a new one."""
        payload = self.ledger.read()
        table = SlotTable(numbered=secrets.randbelow(10**9) * 1000)
        self._state = NodeState(job, ClusterState(secrets.token_hex(8)), table=table)
        if payload is not None:
            try:
                self._state = msgspec.msgpack.decode(payload, type=NodeState)
            except msgspec.MsgspecError as error:
                log.error("the ledger of the daemon before cannot be read, its snapshots are lost: %s", error)
        for number in recover(self._state, self.slots, {area: self._content(area) for area in self.areas}):
            self.drop(number)
        if payload is not None:
            log.info("took over %d slots, epoch %s", len(self.slots), self._state.epoch)
        return self._state

    @property
    def parity_bytes(self) -> int:
        """Memory of the parity areas."""
        return sum(area.memory_bytes for area in self.areas.values())

    def slots_of(self, snapshot: SnapshotId) -> list[Slot]:
        """Of a grant that is held here, by rank."""
        sealed = self._state.table.holding(snapshot)
        return [] if sealed is None else [self.slots[number] for _, number in sorted(sealed.slots.items())]

    def take_over(self, number: int, slot: Slot) -> None:
        """Keeps a slot."""
        self.slots[number] = slot
        for name, descriptor in zip(_names(number), slot.descriptors, strict=False):
            self.keeper.keep(name, descriptor)

    def drop(self, number: int) -> None:
        """Lets go of a slot."""
        slot = self.slots.pop(number, None)
        if slot is not None:
            for name, _ in zip(_names(number), slot.descriptors, strict=False):
                self.keeper.drop(name)
            slot.close()

    def keep_area(self, number: int, area: ParityArea) -> None:
        """Keeps a parity area in the place of another."""
        old = self.areas.get(number)
        self.areas[number] = area
        self.keeper.keep(f"parity/{number}", area.descriptor)
        if old is not None and old is not area:
            old.close()

    def _content(self, number: int) -> SnapshotId | None:
        try:
            return self.areas[number].state().snapshot
        except FormatError as error:
            log.error("parity area %d: %s", number, error)
            return None

    def _open_slot(self, number: int, descriptor: int, region: int | None) -> None:
        """One that does not describe itself any more is lost."""
        try:
            self.slots[number] = Slot.open(descriptor, region)
        except FormatError as error:
            log.error("slot %d is lost: %s", number, error)
            close_all([descriptor] if region is None else [descriptor, region])
            for name in _names(number):
                self.keeper.drop(name)

    def _open_area(self, number: int, descriptor: int) -> None:
        try:
            self.areas[number] = ParityArea.open(descriptor)
        except FormatError as error:
            log.error("parity area %d is lost: %s", number, error)
            os.close(descriptor)
            self.keeper.drop(f"parity/{number}")

    def _kept(self) -> dict[str, int]:
        found = {"ledger": self.ledger.descriptor, "network": self.network.descriptor}
        for number, slot in self.slots.items():
            found |= zip(_names(number), slot.descriptors, strict=False)
        return found | {f"parity/{number}": area.descriptor for number, area in self.areas.items()}


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def _names(number: int) -> list[str]:
    """Of a slot's descriptors, as the keeper knows them."""
    return [f"slot/{number}", f"frozen/{number}"]
