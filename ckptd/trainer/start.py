"""Starting an epoch: which number, from which snapshot, with which daemons. Collective.

Rank 0 speaks for all (docs/protocol.md, "Epochs"): it takes a number above every number known, has the daemon of each
node promise it, chooses the newest live snapshot in memory and store, has the epoch begin, and tells the others; then
every rank says Hello. What rank 0 says to a node's daemon the first rank of that node passes on. Killed anywhere, the
next start does the same again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import msgspec

from ckptd.core.config import Options
from ckptd.core.errors import (
    CkptdError,
    ConfigError,
    DaemonError,
    FormatError,
    NotFoundError,
    StoreError,
    UnrecoverableError,
)
from ckptd.core.lineage import EpochRecord, live
from ckptd.core.types import Epoch, SnapshotId
from ckptd.daemon.address import Address
from ckptd.daemon.client import refusal, request
from ckptd.daemon.launch import reach
from ckptd.daemon.others import packed_directory
from ckptd.daemon.session import PATIENCE_S
from ckptd.daemon.wire import ask, in_memory
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import epoch as cluster
from ckptd.protocol.cluster import messages as between
from ckptd.tiers.arena import Slot
from ckptd.tiers.peers import listening_address, new_token
from ckptd.tiers.peers.address import join_address
from ckptd.tiers.store import Store, not_shared, sees_token
from ckptd.trainer.collective import Group
from ckptd.trainer.places import Places

log = logging.getLogger("ckptd")

ATTEMPTS = 5
BEGIN_S = 120.0
HELLO_S = 30.0
GUESTS_S = 30.0
BORROW_S = 600.0
"""What is made anew from other nodes' memory takes its time, and Hello waits for it."""

MEMORY, STORE, NOTHING = "memory", "store", "none"


class Choice(msgspec.Struct, frozen=True):
    """What an epoch starts from. `source` is MEMORY, STORE or NOTHING (then `snapshot` is None); `durable`: it is in
    the store; `world`: ranks that have captured what is in memory."""

    epoch: Epoch
    snapshot: SnapshotId | None
    source: str
    durable: bool = False
    world: int = 0


class Entry(NamedTuple):
    """A rank that is in: its connection, its Hello, and the slots of the restore point that its node holds (read-only,
    in rank order). Seconds: until the epoch had begun everywhere, and from then until all ranks had their memory, what
    was lost of it made anew."""

    choice: Choice
    connection: socket.socket
    hello: m.Hello
    restore: list[Slot]
    begin_s: float
    memory_s: float


Wanted = Callable[[SnapshotId], bool]


class _Begun(msgspec.Struct, frozen=True):
    """What rank 0 has decided."""

    choice: Choice
    begin: between.Begin
    directory: bytes
    borrowed: dict[str, m.Borrow]
    """Arena -> what of the restore point its node has to make anew."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Who starts, and how. `wanted` narrows what may be restored, `excluded` names (snapshot, source) pairs that proved
    unreadable."""

    address: Address
    group: Group
    places: Places
    options: Options
    policy: m.Policy
    wanted: Wanted
    excluded: Collection[tuple[SnapshotId, str]] = ()

    def enter(self) -> Entry:
        """Begins an epoch and joins it. Raises ConfigError, NotFoundError, StoreError, DaemonError, the same on every
        rank."""
        started = time.perf_counter()
        choice, borrowed = self._begin()
        begun = time.perf_counter()
        hello = m.Hello(
            m.PROTOCOL,
            self.address.job.name,
            choice.epoch,
            self.group.rank,
            self.group.size,
            self.places.ranks_here,
            f"{os.getpid()}-{secrets.token_hex(8)}",
            choice.snapshot,
            self.policy,
        )
        joined: list[tuple[socket.socket, list[Slot]]] = []

        def join() -> bytes:
            joined.append(_hello(self.address, hello))
            if borrowed is not None:
                joined[0][1].extend(_borrow(self.address, borrowed))
            return b""

        try:
            self.group.together(join)
        except UnrecoverableError as error:
            for connection, slots in joined:
                connection.close()
                for slot in slots:
                    slot.close()
            if choice.snapshot is None or choice.source != MEMORY:
                raise
            log.error("%s in memory cannot be restored, trying the next: %s", choice.snapshot, error)
            excluded = [*self.excluded, (choice.snapshot, MEMORY)]
            return dataclasses.replace(self, excluded=excluded).enter()
        connection, slots = joined[0]
        return Entry(choice, connection, hello, slots, begun - started, time.perf_counter() - begun)

    def _begin(self) -> tuple[Choice, m.Borrow | None]:
        """A daemon that is just leaving, or one that promised a higher number, is asked again: all are."""
        least = 1
        failure: DaemonError | None = None
        for _ in range(ATTEMPTS):
            try:
                begun, promised = self._attempt(least)
            except DaemonError as error:  # the same on every rank
                failure = error
                time.sleep(0.1)
                continue
            if begun is not None:
                return begun
            least = promised + 1
        raise failure or DaemonError(f"job {self.address.job.name!r}: other launches of it keep starting")

    def _attempt(self, least: int) -> tuple[tuple[Choice, m.Borrow | None] | None, int]:
        """The choice, and what this node has to borrow, once the epoch has begun everywhere; else the number that is
        promised already."""
        surroundings = _Surroundings()
        encoded = self.group.from_first(lambda: msgspec.msgpack.encode(self._number(least, surroundings)))
        epoch = msgspec.msgpack.decode(encoded, type=Epoch)
        self._check_shared(epoch.nonce)
        with contextlib.ExitStack() as held:
            connection: list[socket.socket] = []

            def prepare() -> bytes:
                if not self.places.leads:
                    return b""
                connection.append(held.enter_context(reach(self.address)))
                message = m.Prepare(m.PROTOCOL, self.address.job.name, epoch, *self._listening())
                answer, _ = ask(connection[0], message, HELLO_S)
                if isinstance(answer, m.Refuse) and answer.promised is None:
                    raise refusal(answer)
                return m.encode(answer)

            answers = [m.decode(answer, "from") for answer in self.group.together(prepare) if answer]
            refused = [answer.promised for answer in answers if isinstance(answer, m.Refuse)]
            if refused:
                return None, max(epoch.number for epoch in refused if epoch is not None)
            arenas = [answer.promise.arena for answer in answers]
            own = arenas[self.places.node_of[self.group.rank]]
            inviter = self.group.from_first(lambda: self._inviter(answers, surroundings).encode()).decode()

            def invite() -> bytes:
                if not connection or own != inviter:
                    return b""
                return m.encode(request(connection[0], m.Invite(epoch, arenas, list(self.places.nodes)), GUESTS_S))

            invited = [m.decode(said, "from") for said in self.group.together(invite) if said] if inviter else []
            decide = lambda: msgspec.msgpack.encode(self._decide(epoch, answers, inviter, invited, surroundings))  # noqa: E731
            begun = msgspec.msgpack.decode(self.group.from_first(decide), type=_Begun)

            def usher() -> bytes:
                if connection and own == inviter:
                    with _beside(begun.directory) as beside:
                        request(connection[0], m.Usher(begun.begin), GUESTS_S, beside)
                return b""

            def begin() -> bytes:
                if connection:
                    message = m.Begin(begun.begin, self.places.ranks_here, self.policy)
                    with _beside(begun.directory) as beside:
                        request(connection[0], message, BEGIN_S, beside)
                return b""

            def meet() -> bytes:
                if connection:
                    request(connection[0], m.Meet(), BEGIN_S)
                return b""

            if begun.begin.membership.guests:
                self.group.together(usher)
            self.group.together(begin)
            if len(self.places.nodes) > 1:
                self.group.together(meet)
        return (begun.choice, begun.borrowed.get(own)), 0

    def _check_shared(self, nonce: str) -> None:
        """Raises ConfigError where the store of another node is not the one in which rank 0 has left a token."""
        store = self.policy.store
        if store is None or len(self.places.nodes) == 1:
            return
        try:
            answers = self.group.together(lambda: b"" if not self.places.leads or sees_token(store, nonce) else b"no")
        finally:
            if self.group.rank == 0:
                with contextlib.suppress(CkptdError):
                    Store.open(store).remove_token(nonce)
        blind = {self.places.nodes[self.places.node_of[rank]] for rank, answer in enumerate(answers) if answer}
        if blind:
            raise not_shared(store, blind)

    def _listening(self) -> tuple[str, str]:
        """Where this node's daemon is to listen to others, if there are others. Raises ConfigError."""
        if len(self.places.nodes) == 1:
            return "", ""
        return join_address(*listening_address()), self.options.tls_dir or ""

    def _number(self, least: int, found: _Surroundings) -> Epoch:
        """Rank 0: an epoch above all that the store knows, and at least `least`."""
        store = None if self.policy.store is None else _writable(self.policy.store)
        if store is not None:
            found.stored, found.records = store.checkpoints(), store.records()
            found.damaged = [] if self.options.resume == "never" else store.damaged()
        known = [r.epoch.number for r in found.records] + [s.epoch.number for s in found.stored]
        epoch = Epoch(max([least, *(number + 1 for number in known)]), secrets.token_hex(8))
        if store is not None and len(self.places.nodes) > 1:
            store.leave_token(epoch.nonce)
        return epoch

    def _inviter(self, answers: Sequence[m.Promise], found: _Surroundings) -> str:
        """Rank 0: the arena whose daemon is to ask earlier members; "" for none."""
        promises = [answer.promise for answer in answers]
        chosen = _newest(promises, found, self.wanted, self.excluded)
        return (self.options.resume != "never" and cluster.inviter(promises, chosen)) or ""

    def _decide(
        self,
        epoch: Epoch,
        answers: Sequence[m.Promise],
        inviter: str,
        invited: Sequence[m.Message],
        found: _Surroundings,
    ) -> _Begun:
        """Rank 0: the restore point, and how the epoch begins from it."""
        contacts = {answer.promise.arena: answer.contact for answer in answers}
        promises, guests = [answer.promise for answer in answers], []
        for said in invited:
            assert isinstance(said, m.Invited)
            guests = said.promises
            contacts |= {inviter: said.contact, **{p.arena: c for p, c in zip(guests, said.contacts, strict=True)}}
        chosen, choice = _choose(epoch, [*promises, *guests], found, self.options, self.wanted, self.excluded)
        _mind_damage(choice, found.damaged)
        arenas = [promise.arena for promise in promises]
        if len(set(arenas)) < len(arenas):
            raise ConfigError("two nodes of the job are served by one daemon: give each its own CKPTD_RUNTIME_DIR")
        names = tuple(promise.arena for promise in guests)
        begin = cluster.beginning(epoch, chosen, arenas, names, self.places.shape, self.group.size)
        borrowed = {} if begin.continued else _orphans(chosen, arenas)
        everybody = begin.membership.everybody
        directory = b"" if len(everybody) == 1 else packed_directory(new_token(), [contacts[x] for x in everybody])
        return _Begun(choice, begin, directory, borrowed)


def _orphans(chosen: cluster.Choice, arenas: Sequence[str]) -> dict[str, m.Borrow]:
    """The strings of the restore point that no node of the job holds whole, dealt out to all of them."""
    if not chosen.held or chosen.point is None:
        return {}
    shape = next(iter(chosen.held.values())).shape
    held = {arena: (item.string, item.data, item.parity) for arena, item in chosen.held.items()}
    whole = {chosen.held[arena].string for arena in arenas if arena in chosen.held and chosen.held[arena].data}
    lacking = [string for string in range(shape.count) if string not in whole]
    dealt = {arena: lacking[place :: len(arenas)] for place, arena in enumerate(arenas)}
    return {
        arena: m.Borrow(chosen.point, chosen.step, shape, strings, held) for arena, strings in dealt.items() if strings
    }


@contextlib.contextmanager
def _beside(content: bytes) -> Iterator[list[int]]:
    """`content`, to send beside a message; nothing for nothing."""
    if not content:
        yield []
        return
    with in_memory(content) as descriptor:
        yield [descriptor]


@dataclasses.dataclass
class _Surroundings:
    """What rank 0 has found in the store."""

    stored: list[SnapshotId] = dataclasses.field(default_factory=list)
    records: list[EpochRecord] = dataclasses.field(default_factory=list)
    damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)


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


def _durable(found: _Surroundings, excluded: Collection[tuple[SnapshotId, str]]) -> set[SnapshotId]:
    return {snapshot for snapshot in found.stored if (snapshot, STORE) not in excluded}


def _newest(
    promises: Sequence[between.Promise],
    found: _Surroundings,
    wanted: Wanted,
    excluded: Collection[tuple[SnapshotId, str]],
) -> cluster.Choice:
    """The newest live snapshot that is wanted, wherever it is."""
    spoiled = {snapshot for snapshot, source in excluded if source == MEMORY}
    return cluster.choose(promises, found.records, _durable(found, excluded), wanted, spoiled)


def _choose(
    epoch: Epoch,
    promises: Sequence[between.Promise],
    found: _Surroundings,
    options: Options,
    wanted: Wanted,
    excluded: Collection[tuple[SnapshotId, str]],
) -> tuple[cluster.Choice, Choice]:
    """The newest live snapshot that is wanted, in memory if it is there."""
    if options.resume == "never":
        return cluster.Choice(None, 0, {}, 0, None), Choice(epoch, None, NOTHING)
    chosen, durable = _newest(promises, found, wanted, excluded), _durable(found, excluded)
    name, lost = chosen.name, _lost(promises, found.records, wanted)
    if name is not None:
        if lost is not None and not chosen.held:
            log.error("%s; the newest checkpoint is %s", lost, name)
        return chosen, Choice(epoch, name, MEMORY if chosen.held else STORE, name in durable, chosen.world)
    if lost is not None:
        raise UnrecoverableError(f"{lost}; bring one of them back, or start with resume='never' to begin anew")
    if excluded:
        raise UnrecoverableError(
            "no snapshot that was announced safe can be read: "
            + "; ".join(f"{snapshot} in {source}" for snapshot, source in excluded)
            + "; start with resume='never' to begin anew"
        )
    if options.resume != "auto":
        what = "any snapshot" if options.resume == "must" else f"step {options.resume}"
        memory = {SnapshotId(held.snapshot.epoch, held.step) for promise in promises for held in promise.held}
        raise NotFoundError(
            f"resume={options.resume!r}: {what} is neither in memory ({len(memory)} there) nor in the store "
            f"({len(durable)} there)"
        )
    return chosen, Choice(epoch, None, NOTHING)


def _lost(promises: Sequence[between.Promise], records: Sequence[EpochRecord], wanted: Wanted) -> str | None:
    """What is gone of the newest snapshot that was protected, where that is more than it survives."""
    known = max((promise.protected for promise in promises if promise.protected is not None), default=None)
    held = [item for promise in promises for item in promise.held if item.snapshot == known]
    if known is None or not held or cluster.tolerated(held) is not None:
        return None
    shape, name = held[0].shape, SnapshotId(known.epoch, held[0].step)
    lineage = [*records, *(record for promise in promises for record in promise.records)]
    if not shape.parity or not wanted(name) or name not in live({name}, lineage):
        return None
    both = {item.string for item in held if item.data and item.parity}
    gone = [(group, sorted(set(group) - both)) for group in shape.groups]
    text = "; ".join(
        f"of nodes {', '.join(map(str, group))} as they were then, {', '.join(map(str, numbers))} have lost their data "
        f"or parities, and {shape.parity} may be lost"
        for group, numbers in gone
        if len(numbers) > shape.parity
    )
    return f"{name} was protected and is lost from memory: {text}"


def _hello(address: Address, hello: m.Hello) -> tuple[socket.socket, list[Slot]]:
    """Joins; a daemon that is killed meanwhile is started again by its keeper, and Hello may be repeated."""
    until = time.monotonic() + HELLO_S
    while True:
        connection = reach(address, patience_s=PATIENCE_S)
        try:
            answer, descriptors = ask(connection, hello, HELLO_S if len(hello.ranks) == hello.world else BORROW_S)
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


def _borrow(address: Address, wanted: m.Borrow) -> list[Slot]:
    """Slots of the restore point that the node's daemon makes anew from what other nodes hold. Raises
    UnrecoverableError; DaemonError where they cannot be reached."""
    with reach(address) as connection:
        answer, descriptors = ask(connection, wanted, BORROW_S)
    if isinstance(answer, m.Refuse):
        kind = DaemonError if answer.error == DaemonError.__name__ else UnrecoverableError
        raise kind(f"strings {wanted.strings} cannot be made anew: {answer.message}")
    assert isinstance(answer, m.Lent)
    return [Slot.open(*taken) for taken in _taken(descriptors, answer.restore)]


def _taken(descriptors: list[int], slots: list[m.SlotInfo]) -> Iterator[list[int]]:
    """What belongs to each of the slots: its descriptor, and that of its frozen region."""
    rest = iter(descriptors)
    for slot in slots:
        yield list(itertools.islice(rest, 2 if slot.frozen_bytes else 1))
