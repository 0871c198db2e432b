"""Collective operations of ckptd: a gloo group of its own over the ranks of torch.distributed.

Owns the group and the wire form of what it carries: encoded bytes, never pickle. Apart from the job's groups, so that
its order of collectives cannot mix with the training's. Creating a group is collective (every rank, same order), thus
one is kept per process and world. One process without a process group is a world of one.

Invariant of `together` and `agree`: either they return on every rank, or they raise the same error on every rank; a
failure on one rank never leaves the others waiting for longer than the timeout.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ckptd.core import errors
from ckptd.core.config import World
from ckptd.core.errors import CkptdError, ConfigError, DeadlineError, StoreError

TIMEOUT_S = 1800.0
"""How long a rank waits for the others in one operation; a write of its part may lie between two of them."""


_HEAD_BYTES = 512
"""What a rank gathers in one exchange; longer values take a second one."""


class _Answer(msgspec.Struct, array_like=True):
    """What one rank says in `together`: its result, or the name and message of its error."""

    value: bytes = b""
    error: str = ""
    message: str = ""


class Message(NamedTuple):
    """Bytes that go to, or come from, another rank. `tag` is the same on both sides and tells messages apart."""

    rank: int
    tag: int
    data: memoryview


class Group:
    """The ranks of the job, `rank` being this process's of `size`. Made by `world`."""

    def __init__(self, handle: dist.ProcessGroup | None) -> None:
        self._handle = handle
        self.rank = 0 if handle is None else dist.get_rank(handle)
        self.size = 1 if handle is None else dist.get_world_size(handle)
        self._unfinished: list[object] = []

    def all_gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, by rank."""
        if self._handle is None:
            return [data]
        try:
            return self._all_gather(data)
        except RuntimeError as error:
            raise self._lost(error) from error

    def broadcast(self, data: bytes | None) -> bytes:
        """What rank 0 gave; the others give None."""
        if self._handle is None:
            assert data is not None, "rank 0 broadcasts something"
            return data
        try:
            return self._broadcast(data)
        except RuntimeError as error:
            raise self._lost(error) from error

    def barrier(self) -> None:
        """Returns once every rank has come."""
        self.all_gather(b"")

    def together(self, work: Callable[[], bytes]) -> list[bytes]:
        """Does `work` on every rank and returns all results by rank; where any rank's failed, every rank raises the
        error of the lowest of them. Errors that are not ckptd's become StoreError (OSError) or stay what they are on
        their own rank and are ConfigError elsewhere."""
        failure: Exception | None = None
        try:
            answer = _Answer(work())
        except Exception as error:  # every rank must hear of it before it goes on
            failure = error
            answer = _spoken(error)
        gathered = self.all_gather(msgspec.msgpack.encode(answer))
        answers = [msgspec.msgpack.decode(data, type=_Answer) for data in gathered]
        for rank, other in enumerate(answers):
            if not other.error:
                continue
            if rank == self.rank and failure is not None and not isinstance(failure, OSError):
                raise failure
            where = f"rank {rank}: " if self.size > 1 else ""
            raise _error_type(other.error)(where + other.message) from failure
        return [other.value for other in answers]

    def agree(self, failure: Exception | None) -> Agreement:
        """Asks whether any rank brings a failure; the answer is waited for in `Agreement.result`, before the next
        exchange. For frequent use: costs one small message to and from each rank, so that each hears of the death of
        any other through its own connection."""
        if self._handle is None:
            return Agreement(self, failure, None, None)
        mine = torch.full((self.size,), int(failure is not None), dtype=torch.int64)
        theirs = torch.empty_like(mine)
        try:
            work = dist.all_to_all_single(theirs, mine, group=self._handle, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from (failure or error)
        return Agreement(self, failure, theirs, work)

    def swap(self, sent: Sequence[Message], received: Sequence[Message]) -> None:
        """Sends and receives all at once; returns when all have arrived. The other ranks do their side at the same
        time. No order among the messages can block, since every receiver is ready before anybody waits. Where one of
        them is dead, the others get their messages all the same: they may not have heard of it yet."""
        if self._handle is None or not (sent or received):
            return
        failures: list[RuntimeError] = []
        for work in self._exchanged(sent, received, failures):
            with _noting(failures):
                work.wait()
        if failures:
            raise self._lost(failures[0]) from failures[0]

    def farewell(self, sent: Sequence[Message], received: Sequence[Message], failure: Exception) -> None:
        """For a rank that leaves because another is lost: those that have not heard of it yet get what this rank has
        for them in their next `swap`, are rid of what they have for it, and hear of its failure in the `agree` after
        that. Waits for nothing; what is on its way is kept alive."""
        if self._handle is not None:
            self._unfinished += [(sent, received, self._exchanged(sent, received, []))]
            with contextlib.suppress(CkptdError):
                self._unfinished += [self.agree(failure)]

    def _exchanged(
        self, sent: Sequence[Message], received: Sequence[Message], failures: list[RuntimeError]
    ) -> list[dist.Work]:
        """Begins to receive, then to send."""
        works = []
        for message, begin in [*((m, dist.irecv) for m in received), *((m, dist.isend) for m in sent)]:
            with _noting(failures):
                other = self._global(message.rank)
                work = begin(_tensor(message.data), other, group=self._handle, tag=message.tag)
                works += [] if work is None else [work]
        return works

    def _global(self, rank: int) -> int:
        assert self._handle is not None
        return dist.get_global_rank(self._handle, rank)

    def from_first(self, work: Callable[[], bytes]) -> bytes:
        """Does `work` on rank 0; what it gave there, on every rank, or its error as from `together`."""
        if self.rank != 0:
            answer = msgspec.msgpack.decode(self.broadcast(None), type=_Answer)
            if answer.error:
                raise _error_type(answer.error)(f"rank 0: {answer.message}")
            return answer.value
        failure: Exception | None = None
        try:
            answer = _Answer(work())
        except Exception as error:  # every rank must hear of it before it goes on
            failure = error
            answer = _spoken(error)
        self.broadcast(msgspec.msgpack.encode(answer))
        if failure is not None:
            raise failure
        return answer.value

    def _all_gather(self, data: bytes) -> list[bytes]:
        """Lengths with what fits beside them; a second exchange only where something is longer."""
        head = np.zeros(_HEAD_BYTES, np.uint8)
        head[:8].view("<u8")[0] = len(data)
        head[8 : 8 + len(data)] = np.frombuffer(data[: _HEAD_BYTES - 8], np.uint8)
        heads = self._gathered(head)
        lengths = [int(found[:8].view("<u8")[0]) for found in heads]
        longest = max(lengths)
        if longest <= _HEAD_BYTES - 8:
            return [found[8 : 8 + length].tobytes() for found, length in zip(heads, lengths, strict=True)]
        mine = np.zeros(longest, np.uint8)
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        return [found[:length].tobytes() for found, length in zip(self._gathered(mine), lengths, strict=True)]

    def _gathered(self, mine: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """Arrays of one length of all ranks."""
        received = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(received, torch.from_numpy(mine), group=self._handle)
        return [value.numpy() for value in received]

    def _broadcast(self, data: bytes | None) -> bytes:
        assert self._handle is not None
        source = self._global(0)
        length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
        dist.broadcast(length, source, group=self._handle)
        if not int(length):
            return b""
        value = torch.empty(int(length), dtype=torch.uint8)
        if data is not None:
            value = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(value, source, group=self._handle)
        return value.numpy().tobytes()

    def _lost(self, error: RuntimeError) -> DeadlineError:
        return DeadlineError(
            f"rank {self.rank} of {self.size}: another rank did not take part in an exchange of ckptd; it has died, "
            f"hangs, or called something else. gloo says: {error}"
        )


class Agreement:
    """What `Group.agree` asked."""

    def __init__(
        self, group: Group, failure: Exception | None, theirs: torch.Tensor | None, work: dist.Work | None
    ) -> None:
        self._group = group
        self._failure = failure
        self._theirs = theirs
        self._work = work

    def result(self) -> None:
        """Returns if no rank brought a failure; raises on every rank, as `together` does, if any has."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self._group._lost(error) from (self._failure or error)
        if self._failure is not None or (self._theirs is not None and bool(self._theirs.any())):
            self._group.together(lambda: _raised(self._failure))


def _raised(failure: Exception | None) -> bytes:
    if failure is not None:
        raise failure
    return b""


@contextlib.contextmanager
def _noting(failures: list[RuntimeError]) -> Iterator[None]:
    """What gloo raises is noted, so that the rest is done."""
    try:
        yield
    except RuntimeError as error:
        failures.append(error)


def _tensor(data: memoryview) -> torch.Tensor:
    """Writable bytes as a tensor on the same memory."""
    return torch.from_numpy(np.frombuffer(data, np.uint8))


def _spoken(error: Exception) -> _Answer:
    if isinstance(error, CkptdError):
        return _Answer(error=type(error).__name__, message=str(error))
    named = StoreError if isinstance(error, OSError) else ConfigError
    return _Answer(error=named.__name__, message=f"{type(error).__name__}: {error}")


def _error_type(name: str) -> type[CkptdError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, CkptdError) else StoreError


_kept: tuple[object, Group] | None = None


def world(timeout_s: float = TIMEOUT_S) -> Group:
    """The group of all ranks. Collective on its first use in a process group: every rank calls it.

    Raises ConfigError where WORLD_SIZE says that there are other ranks and torch.distributed is not initialised.
    """
    global _kept
    if not (dist.is_available() and dist.is_initialized()):
        size = World.from_environment().size
        if size > 1:
            raise ConfigError(
                f"WORLD_SIZE={size} but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first, or unset WORLD_SIZE if this process is on its own"
            )
        return Group(None)
    default = dist.group.WORLD
    if _kept is None or _kept[0] is not default:
        timeout = datetime.timedelta(seconds=timeout_s)
        _kept = default, Group(dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None)
    return _kept[1]
