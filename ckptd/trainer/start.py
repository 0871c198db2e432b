"""Starting an epoch: which number, from which snapshot, with which daemon. Collective.

Rank 0 speaks for all (docs/protocol.md, "Epoch"): it takes a number above every number known, has the daemon promise
it, chooses the newest live snapshot in memory and store, begins the epoch, and tells the others; then every rank says
Hello. Killed anywhere, the next start does the same again.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import msgspec

from ckptd.core.config import Options, World, node_name
from ckptd.core.errors import ConfigError, DaemonError, FormatError, NotFoundError, StoreError, UnrecoverableError
from ckptd.core.lineage import EpochRecord, live
from ckptd.core.types import Epoch, SnapshotId
from ckptd.daemon.address import Address
from ckptd.daemon.client import refusal, request
from ckptd.daemon.launch import reach
from ckptd.daemon.session import PATIENCE_S
from ckptd.daemon.wire import ask
from ckptd.protocol import messages as m
from ckptd.tiers.arena import Slot
from ckptd.tiers.store import Store
from ckptd.trainer.collective import Group

log = logging.getLogger("ckptd")

ATTEMPTS = 5
BEGIN_S = 120.0
HELLO_S = 30.0

MEMORY, STORE, NOTHING = "memory", "store", "none"


class Choice(msgspec.Struct, frozen=True):
    """What an epoch starts from. `source` is MEMORY, STORE or NOTHING (then `snapshot` is None); `durable`: it is in
    the store."""

    epoch: Epoch
    snapshot: SnapshotId | None
    source: str
    durable: bool = False


class Entry(NamedTuple):
    """A rank that is in: its connection, its Hello, and the slots of the restore point (read-only, in rank order)."""

    choice: Choice
    connection: socket.socket
    hello: m.Hello
    restore: list[Slot]


Wanted = Callable[[SnapshotId], bool]


def check_nodes(group: Group, world: World) -> None:
    """Raises ConfigError on every rank where the job spans nodes: their memory is not protected by each other yet."""
    names = [name.decode() for name in group.all_gather(node_name().encode())]
    if len(set(names)) > 1 or world.local_size != world.size:
        nodes = ", ".join(sorted(set(names)))
        raise ConfigError(
            f"the job's {world.size} ranks run on several nodes ({nodes}; {world.local_size} ranks on this one); "
            "this version of ckptd serves jobs on one node"
        )


def enter(
    address: Address,
    group: Group,
    options: Options,
    policy: m.Policy,
    wanted: Wanted,
    excluded: Collection[tuple[SnapshotId, str]],
) -> Entry:
    """Begins an epoch and joins it. `wanted` narrows what may be restored, `excluded` names (snapshot, source) pairs
    that proved unreadable. Raises ConfigError, NotFoundError, StoreError, DaemonError, the same on every rank."""
    encoded = group.together(
        lambda: (
            msgspec.msgpack.encode(_begin(address, group.size, options, policy, wanted, excluded))
            if group.rank == 0
            else b""
        )
    )
    choice = msgspec.msgpack.decode(encoded[0], type=Choice)
    hello = m.Hello(
        m.PROTOCOL,
        address.job.name,
        choice.epoch,
        group.rank,
        group.size,
        f"{os.getpid()}-{secrets.token_hex(8)}",
        choice.snapshot,
        policy,
    )
    joined: list[tuple[socket.socket, list[Slot]]] = []

    def join() -> bytes:
        joined.append(_hello(address, hello))
        return b""

    group.together(join)
    connection, slots = joined[0]
    return Entry(choice, connection, hello, slots)


def _begin(
    address: Address,
    world: int,
    options: Options,
    policy: m.Policy,
    wanted: Wanted,
    excluded: Collection[tuple[SnapshotId, str]],
) -> Choice:
    """Rank 0's part. A daemon that is just leaving, or one that promised a higher number, is asked again."""
    least = 1
    failure: DaemonError | None = None
    for _ in range(ATTEMPTS):
        store = None if policy.store is None else _writable(policy.store)
        stored = [] if store is None else store.checkpoints()
        records = [] if store is None else store.records()
        damaged = [] if store is None or options.resume == "never" else store.damaged()
        known = [r.epoch.number for r in records] + [s.epoch.number for s in stored]
        epoch = Epoch(max([least, *(number + 1 for number in known)]), secrets.token_hex(8))
        try:
            with reach(address) as connection:
                answer, _ = ask(connection, m.Prepare(m.PROTOCOL, address.job.name, epoch), HELLO_S)
                if isinstance(answer, m.Refuse):
                    if answer.promised is None:
                        raise refusal(answer)
                    least = answer.promised.number + 1
                    continue
                choice = _choose(epoch, answer, stored, records, options, wanted, excluded)
                _mind_damage(choice, damaged)
                begin = m.Begin(epoch, choice.snapshot, world, policy)
                request(connection, begin, BEGIN_S)
                return choice
        except DaemonError as error:
            failure = error
            time.sleep(0.1)
    raise failure or DaemonError(f"job {address.job.name!r}: other launches of it keep starting on this node")


def _writable(uri: str) -> Store:
    """The store, proven to take files before anything depends on it. Raises StoreError."""
    try:
        store = Store.open(uri, create=True)
    except (FormatError, NotFoundError) as error:
        raise StoreError(f"the store cannot be made: {error}") from error
    store.probe()
    return store


def _mind_damage(choice: Choice, damaged: Collection[tuple[str, str]]) -> None:
    """A checkpoint that exists and cannot be read is not passed over in silence; UnrecoverableError if it is all."""
    if not damaged:
        return
    found = "; ".join(f"{name}: {reason}" for name, reason in damaged)
    if choice.snapshot is None:
        raise UnrecoverableError(
            f"no readable checkpoint is left; found {found}. Upgrade ckptd if they are of a newer version, restore the "
            "files, or start anew with resume='never'"
        )
    log.error("passed over unreadable checkpoints: %s", found)


def _choose(
    epoch: Epoch,
    promise: m.Promise,
    stored: Collection[SnapshotId],
    records: Collection[EpochRecord],
    options: Options,
    wanted: Wanted,
    excluded: Collection[tuple[SnapshotId, str]],
) -> Choice:
    """The newest live snapshot that is wanted, in memory if it is there."""
    if options.resume == "never":
        return Choice(epoch, None, NOTHING)
    memory = {s for s in promise.snapshots if (s, MEMORY) not in excluded}
    durable = {s for s in stored if (s, STORE) not in excluded}
    lineage = {record.epoch: record for record in [*promise.records, *records]}
    found = next((s for s in live(memory | durable, lineage.values()) if wanted(s)), None)
    if found is not None:
        return Choice(epoch, found, MEMORY if found in memory else STORE, found in durable)
    if excluded:
        raise UnrecoverableError(
            "no snapshot that was announced safe can be read: "
            + "; ".join(f"{snapshot} in {source}" for snapshot, source in excluded)
            + "; start with resume='never' to begin anew"
        )
    if options.resume != "auto":
        what = "any snapshot" if options.resume == "must" else f"step {options.resume}"
        raise NotFoundError(
            f"resume={options.resume!r}: {what} is neither in memory ({len(memory)} there) nor in the store "
            f"({len(durable)} there)"
        )
    return Choice(epoch, None, NOTHING)


def _hello(address: Address, hello: m.Hello) -> tuple[socket.socket, list[Slot]]:
    """Joins; a daemon that is killed meanwhile is started again by its keeper, and Hello may be repeated."""
    until = time.monotonic() + HELLO_S
    while True:
        connection = reach(address, patience_s=PATIENCE_S)
        try:
            answer, descriptors = ask(connection, hello, HELLO_S)
            break
        except DaemonError:
            connection.close()
            if time.monotonic() >= until:
                raise
    if isinstance(answer, m.Refuse):
        connection.close()
        raise refusal(answer)
    assert isinstance(answer, m.Welcome)
    return connection, [Slot.open(*taken) for taken in _taken(descriptors, answer.restore)]


def _taken(descriptors: list[int], slots: list[m.SlotInfo]) -> Iterator[list[int]]:
    """What belongs to each of the slots: its descriptor, and that of its frozen region."""
    rest = iter(descriptors)
    for slot in slots:
        yield list(itertools.islice(rest, 2 if slot.frozen_bytes else 1))
