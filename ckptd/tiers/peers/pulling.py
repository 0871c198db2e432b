"""Pulls from several peers at once, on a bounded number of threads.

Invariants: the first failure ends all pulls of the same call, and is what is raised; no call returns while one of its
pulls may still write into the caller's memory. Long pulls are cut into calls and the calls of all peers are
interleaved, so that no peer is asked for everything at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.errors import NotFoundError
from ckptd.core.types import SnapshotId
from ckptd.tiers.memory import keep_freed_memory
from ckptd.tiers.peers.client import Cancellation, Peer
from ckptd.tiers.peers.wire import BATCH_BYTES, CALL_BYTES

__all__ = ["Cancellation", "Peers", "Pull", "interleave"]


@dataclasses.dataclass(frozen=True)
class Pull:
    """Bytes of what a node holds of a snapshot, and where they go; `into` is contiguous and writable. `crc`, if given,
    receives the CRC-32C of each BATCH_BYTES that arrived, counted from `offset`."""

    node: str
    snapshot: SnapshotId
    what: str
    offset: int
    into: memoryview = dataclasses.field(repr=False)
    crc: npt.NDArray[np.uint32] | None = dataclasses.field(default=None, repr=False)

    def parts(self) -> Iterator[Pull]:
        """The same in pulls of at most CALL_BYTES."""
        target = self.into.cast("B")
        for start in range(0, len(target), CALL_BYTES):
            first, last = start // BATCH_BYTES, (start + CALL_BYTES) // BATCH_BYTES
            crc = None if self.crc is None else self.crc[first:last]
            part = target[start : start + CALL_BYTES]
            yield dataclasses.replace(self, offset=self.offset + start, into=part, crc=crc)


def interleave(pulls: Sequence[Pull]) -> Iterator[Pull]:
    """The same bytes in pulls of at most CALL_BYTES, in turns over the nodes, in order for each node."""
    by_node: dict[str, list[Pull]] = {}
    for pull in pulls:
        by_node.setdefault(pull.node, []).extend(pull.parts())
    for turn in itertools.zip_longest(*by_node.values()):
        yield from (pull for pull in turn if pull is not None)


class Peers:
    """The other nodes of the epoch, and the threads that pull from them. Changes how malloc of this process works."""

    def __init__(self, peers: Mapping[str, Peer], *, streams: int = 4) -> None:
        keep_freed_memory()
        self._peers = dict(peers)
        self._threads = concurrent.futures.ThreadPoolExecutor(streams, thread_name_prefix="peers-pull")

    def __getitem__(self, node: str) -> Peer:
        """Raises NotFoundError."""
        try:
            return self._peers[node]
        except KeyError:
            raise NotFoundError(f"node {node!r}: is not a member of this epoch") from None

    def pull(
        self,
        pulls: Sequence[Pull],
        *,
        deadline_s: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Does all pulls, or raises the first error. The deadline is for each call, as in `Peer.pull`."""
        failure = self.try_pull(pulls, deadline_s=deadline_s, cancellation=cancellation)
        if failure is not None:
            raise failure[1]

    def try_pull(
        self,
        pulls: Sequence[Pull],
        *,
        deadline_s: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> tuple[Pull, Exception] | None:
        """Does all pulls; or the first error, and the pull (or the part of one) that it was."""
        stop = Cancellation()  # not the caller's: a failure ends these pulls and no others
        failures: list[tuple[Pull, Exception]] = []

        def one(pull: Pull) -> None:
            if failures:
                return
            try:
                self[pull.node].pull(
                    pull.snapshot,
                    pull.what,
                    pull.offset,
                    pull.into,
                    crc=pull.crc,
                    deadline_s=deadline_s,
                    cancellation=stop,
                )
            except Exception as error:
                failures.append((pull, error))
                stop.cancel()

        with contextlib.nullcontext() if cancellation is None else cancellation.stopping(stop.cancel):
            concurrent.futures.wait([self._threads.submit(one, pull) for pull in interleave(pulls)])
        return failures[0] if failures else None

    def close(self) -> None:
        """Closes all connections; pulls in progress end by themselves, as soon as they are cancelled or fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for peer in self._peers.values():
            peer.close()
