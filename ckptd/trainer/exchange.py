"""Loading by several ranks together: each byte is read once where reading is dear, and passed on to whoever wants it.

Of a store any rank can read any byte, and each is read once by one of them. Of the memory of several nodes
(`PartedTier`) a rank reads for itself whatever it can, which is cheap, and asks the others for the rest.

Every rank says which rows it wants; all compute one schedule (exchange_schedule.py) and carry it out in rounds. In step
s of a job on one node a rank

    decodes   its units of round s from the store, into one third of memory that the ranks of its node share
              (exchange_staging.py)
    awaits    that all ranks have done step s-1
    copies    into its targets what the others decoded in step s-1, out of another third
    says      that it has done step s

and in between reads what it alone wants, straight into the targets. On several nodes a step is longer: a rank

    fetches   what is stored of its units of round s that other nodes want, from the store
    awaits    that all ranks have done step s-1
    swaps     what was fetched in step s-1: one message per unit and node, as stored, over gloo
    decodes   its units of round s-1; straight into the targets what nobody else on its node wants
    copies    what the others decoded in step s-1, of round s-2
    says      that it has done step s

Nobody can wait for ever. What a rank says (`Group.agree`) it says whatever went wrong on it, because within a step it
waits for nothing but its own threads, the word of others on the step before, and messages that their senders have in
hand: they were fetched in that step. So a failure of one rank is raised on all before the next step ends. A rank that
dies closes its connections, which ends the wait of all others; one that hangs, the timeout of the group does. A third
is written anew in step s after it was copied from in step s-2, which all had done when step s-1 went on.

Bytes are verified where they are decoded, against the CRC-32C of the checkpoint: what came over a network too, since it
travels as stored. Between ranks of a node they then pass through the node's memory, and are trusted as memory is.

Memory beyond the targets: ROOM_BYTES (or one chunk) for each thread, three times, shared; on several nodes up to twice
as much for messages; and what threads decode into (loading.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.errors import DeadlineError, FormatError
from ckptd.plan.exchange import Readers
from ckptd.trainer.collective import Agreement, Group, Message
from ckptd.trainer.exchange_schedule import Schedule, Unit, make_schedule
from ckptd.trainer.exchange_staging import Staging
from ckptd.trainer.loading import Filling, RunReader, packed, threads_for

Ints = npt.NDArray[np.int64]
T = TypeVar("T")

ROOM_BYTES = 8 * 1024 * 1024
"""What one thread of a rank decodes for others in a round, so that most of it is still in cache when they copy it; a
unit that is larger, up to a chunk of 16 MiB, makes it larger."""

_THIRDS = 3


@runtime_checkable
class SharedTier(RunReader, Protocol):
    """A tier that ranks read together: a run can be fetched as it is stored by one rank and decoded by another."""

    def stored_bytes(self, rows: Sequence[int]) -> int: ...

    def fetch(self, rows: Sequence[int], stored: memoryview) -> None: ...

    def decode(self, rows: Sequence[int], stored: memoryview, into: Sequence[memoryview]) -> None: ...


@runtime_checkable
class PartedTier(SharedTier, Protocol):
    """A shared tier of which each rank can read a part only, cheaply."""

    def readers(self) -> Readers: ...


class _Answer(msgspec.Struct, array_like=True):
    """What a rank asks for, as first rows and lengths of runs of rows; whose memory it can open; its threads; the bytes
    that it reads for itself, if it does not ask for all it wants."""

    rows: bytes
    opened: list[int]
    threads: int
    own_bytes: int


class Exchange:
    """One load by all ranks of a group. Made, and `run`, by every rank; then closed. Raises the same error on every
    rank; nothing is written into targets before `run`."""

    def __init__(self, group: Group, tier: SharedTier, filling: Filling) -> None:
        self._group = group
        self._tier = tier
        self._filling = filling
        self._staging = Staging(group.rank)
        self._threads = 1
        self._own = np.zeros(0, np.int64)
        try:
            self._schedule = self._plan()
            self._share_memory()
        except BaseException:
            self._staging.close()
            raise

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees shared memory."""
        self._staging.close()

    def run(self) -> None:
        """Fills all targets."""
        with ThreadPoolExecutor(self._threads, "ckptd-load") as pool:
            run = _Run(self._group, self._tier, self._filling, self._schedule, self._staging, pool, self._threads)
            run.steps(np.concatenate([self._own, self._schedule.alone[self._group.rank]]))

    def _plan(self) -> Schedule:
        offers = self._group.together(self._staging.offer)
        readers = self._tier.readers() if isinstance(self._tier, PartedTier) else None
        catalog, asked = self._filling.catalog, self._filling.rows
        if readers is not None:
            able = np.array([self._group.rank in ranks for ranks in readers.ranks], bool)[readers.place[asked]]
            self._own, asked = asked[able], asked[~able]

        def answer() -> bytes:
            opened = self._staging.open(offers)
            threads, own_bytes = threads_for(self._tier, len(opened)), int(catalog.raw[self._own].sum())
            return msgspec.msgpack.encode(_Answer(_encoded(asked), opened, threads, own_bytes))

        answers = self._group.together(answer)
        found = [msgspec.msgpack.decode(data, type=_Answer) for data in answers]
        rows = [_decoded(answer.rows) for answer in found]
        if any(len(held) and not 0 <= held[0] <= held[-1] < len(catalog) for held in rows):
            raise FormatError("the ranks have opened different checkpoints; give every rank the same path")
        self._threads = found[self._group.rank].threads
        room = ROOM_BYTES * max(answer.threads for answer in found)
        nodes, load = _nodes([answer.opened for answer in found]), np.array([answer.own_bytes for answer in found])
        return make_schedule(catalog, rows, nodes, room, readers, load)

    def _share_memory(self) -> None:
        """Memory for _THIRDS rounds on every rank that decodes for others of its node."""
        sharing = self._schedule.staging()
        if sharing:
            self._group.together(lambda: self._allocated(self._group.rank in sharing))

    def _allocated(self, needed: bool) -> bytes:
        if needed:
            self._staging.allocate(_THIRDS * self._schedule.room)
        return b""


class _Run:
    """The steps of one rank."""

    def __init__(
        self,
        group: Group,
        tier: SharedTier,
        filling: Filling,
        schedule: Schedule,
        staging: Staging,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self._group = group
        self._tier = tier
        self._filling = filling
        self._schedule = schedule
        self._staging = staging
        self._pool = pool
        self._threads = threads
        self._rank = group.rank
        self._node = schedule.nodes[group.rank]
        self._lag = int(schedule.spans_nodes)
        self._stored: dict[int, memoryview] = {}
        self._alone: list[Future[None]] = []
        self._over = False

    def steps(self, alone: Ints) -> None:
        """All rounds, and the rows that this rank reads `alone`, of which a share is begun with each step."""
        runs: list[list[int]] = []
        count = len(self._schedule.rounds) + self._lag + 1
        agreement = self._group.agree(_failure(lambda: runs.extend(self._tier.runs(alone))))
        share = math.ceil(len(runs) / count)
        try:
            for step in range(count):
                work: list[Future[None]] = []
                failure = _failure(functools.partial(self._begin, step, work))
                try:
                    self._heard(agreement, step)
                    failure = failure or _failure(functools.partial(self._go_on, step, work))
                finally:
                    wait(work)
                self._alone += self._spread(
                    functools.partial(self._filling.read, self._tier), runs[step * share : (step + 1) * share]
                )
                if step == count - 1 and failure is None:
                    failure = _failure(lambda: _finish(self._alone))
                agreement = self._group.agree(failure)
                if failure is not None:
                    break
            agreement.result()
        finally:
            self._over = True

    def _heard(self, agreement: Agreement, step: int) -> None:
        """All have done the step before. A rank that is lost may have told some of us and not others, and these are
        already waiting for what we have for them in this step, and for us to take what they have for us."""
        try:
            agreement.result()
        except DeadlineError as lost:
            sent, received = self._messages(step - self._lag)
            self._group.farewell(sent, received, lost)
            raise

    def _begin(self, step: int, work: list[Future[None]]) -> None:
        """What of a step need not wait for others; it is added to `work`."""
        for unit in self._fetched(step + 1) if self._lag else self._decoded(step + 1):
            self._tier.expect(unit.rows)
        if self._lag:
            work += self._spread(self._fetch, self._fetched(step))
        else:
            work += self._spread(lambda unit: self._decode(unit, step), self._decoded(step))

    def _go_on(self, step: int, work: list[Future[None]]) -> None:
        """The rest of it, once all have done the step before, up to its end; adds to `work` what it begins."""
        number = step - self._lag
        work += self._spread(lambda unit: self._copy(unit, number - 1), self._copied(number - 1))
        if self._lag:
            self._swap(number)
            work += self._spread(lambda unit: self._decode(unit, number), self._decoded(number))
        _finish(work)
        _finish([future for future in self._alone if future.done()])
        for unit in self._round(number):
            self._stored.pop(unit.number, None)

    def _spread(self, do: Callable[[T], None], items: Sequence[T]) -> list[Future[None]]:
        """Begins to do it with each of the items, as many at a time as there are threads, until this run is over."""
        remaining = iter(items)  # of a list: threads may share it

        def drain() -> None:
            for item in remaining:
                if self._over:
                    return
                do(item)

        return [self._pool.submit(drain) for _ in range(min(self._threads, len(items)))]

    # --- what this rank does of a round

    def _round(self, number: int) -> list[Unit]:
        rounds = self._schedule.rounds
        return rounds[number] if 0 <= number < len(rounds) else []

    def _fetched(self, number: int) -> list[Unit]:
        return [unit for unit in self._round(number) if unit.reader == self._rank and unit.targets]

    def _decoded(self, number: int) -> list[Unit]:
        return [unit for unit in self._round(number) if self._decoder(unit) == self._rank]

    def _copied(self, number: int) -> list[Unit]:
        return [
            unit for unit in self._round(number) if self._rank in unit.wanting and self._decoder(unit) != self._rank
        ]

    def _decoder(self, unit: Unit) -> int | None:
        """Who decodes it on this node."""
        place = unit.places.get(self._node)
        return None if place is None else place.decoder

    # --- doing it

    def _fetch(self, unit: Unit) -> None:
        stored = np.empty(self._tier.stored_bytes(unit.rows), np.uint8).data
        self._tier.fetch(unit.rows, stored)
        self._stored[unit.number] = stored

    def _swap(self, number: int) -> None:
        """Sends what was fetched, as it is stored, to the decoders on other nodes, and receives as one of them."""
        self._group.swap(*self._messages(number))

    def _messages(self, number: int) -> tuple[list[Message], list[Message]]:
        """What this rank sends in a round, and what it receives."""
        sent, received = [], []
        for unit in self._round(number):
            if unit.reader == self._rank:
                sent += [Message(rank, unit.number, self._stored[unit.number]) for rank in unit.targets]
            elif self._rank in unit.targets:
                stored = np.empty(self._tier.stored_bytes(unit.rows), np.uint8).data
                self._stored[unit.number] = stored
                received.append(Message(unit.reader, unit.number, stored))
        return sent, received

    def _decode(self, unit: Unit, number: int) -> None:
        """Into shared memory and from there into the own targets, or straight into these."""
        stored = self._stored.get(unit.number)

        def get(into: Sequence[memoryview]) -> None:
            if stored is None:
                self._tier.read_run(unit.rows, into)
            else:
                self._tier.decode(unit.rows, stored, into)

        if not self._schedule.staged(unit, self._node):
            self._filling.receive(unit.rows, get)
            return
        starts = self._starts(unit, number)
        raw = self._filling.catalog.raw[unit.rows].tolist()
        get([self._staging.memory(self._rank, *span) for span in zip(starts.tolist(), raw, strict=True)])
        self._copy(unit, number)

    def _copy(self, unit: Unit, number: int) -> None:
        """Out of the memory of the unit's decoder on this node."""
        decoder = unit.places[self._node].decoder
        self._filling.place(unit.rows, self._staging.address(decoder) + self._starts(unit, number))

    def _starts(self, unit: Unit, number: int) -> Ints:
        """Where each row of a unit is in its decoder's memory; the round says in which third."""
        first = number % _THIRDS * self._schedule.room + unit.places[self._node].offset
        return first + np.array(packed(self._filling.catalog.raw[unit.rows].tolist())[0], np.int64)


def _failure(work: Callable[[], None]) -> Exception | None:
    """Does it; what it raised."""
    try:
        work()
    except Exception as error:  # every rank must hear of it before it goes on
        return error
    return None


def _finish(work: Sequence[Future[None]]) -> None:
    """Waits for all of it; raises what the first that failed has raised."""
    wait(work)
    for future in work:
        future.result()


def _nodes(opened: Sequence[Sequence[int]]) -> list[int]:
    """A number of the node of each rank. Ranks are on one node if all of them can open the memory of all."""
    return [
        min(members) if all(opened[member] == members for member in members) else rank
        for rank, members in enumerate(opened)
    ]


def _encoded(rows: Ints) -> bytes:
    """Ascending rows as runs: pairs of first row and length."""
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    lengths = np.diff(np.append(first, len(rows)))
    return np.stack([rows[first], lengths], axis=1).astype("<u4").tobytes()


def _decoded(data: bytes) -> Ints:
    first, length = np.frombuffer(data, "<u4").astype(np.int64).reshape(-1, 2).T
    before = np.cumsum(length) - length
    rows: Ints = np.arange(int(length.sum()), dtype=np.int64) + np.repeat(first - before, length)
    return rows
