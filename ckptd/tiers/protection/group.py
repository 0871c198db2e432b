"""A snapshot of a group: the seal records of its members, the stripes that follow from them, and verified pulls.

Owns which bytes of whom are asked for, by which name, and how what arrives is judged. Names: `string`, and `parity/t`.

Invariant: nothing of a string is taken for good that differs from the seal record of its owner, whoever gave it and
whatever the transfer's own checksum says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from ckptd.core.errors import CkptdError, CorruptionError, UnrecoverableError
from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import PIECE_BYTES, Group, Source, Striping
from ckptd.tiers.peers import Cancellation, Peers, Pull, Sources
from ckptd.tiers.protection.record import SealRecord
from ckptd.tiers.protection.work import Bytes


@dataclasses.dataclass(frozen=True)
class SealedGroup:
    """A snapshot, a group of member numbers and the seal record of each.

    Raises UnrecoverableError where a record is missing: nothing of the group can be told from anything else then.
    """

    snapshot: SnapshotId
    group: Group
    records: Mapping[int, SealRecord]

    def __post_init__(self) -> None:
        missing = [number for number in self.group.nodes if number not in self.records]
        if missing:
            raise UnrecoverableError(
                f"{self.snapshot}: the seal records of members {', '.join(map(str, missing))} are missing, expected "
                f"those of {', '.join(map(str, self.group.nodes))}; get them from any member of the group"
            )

    @cached_property
    def striping(self) -> Striping:
        """The stripes of the group."""
        return Striping(self.group, tuple(self.records[number].size for number in self.group.nodes))


@dataclasses.dataclass(frozen=True)
class Holders:
    """Who has what of a snapshot: member number -> names of the nodes that hold its string whole, and its parities."""

    strings: Mapping[int, Sequence[str]]
    parities: Mapping[int, Sequence[str]]


class SourceError(Exception):
    """One source of several failed. `node`: who was asked; `place`: of whom, and whether for the string."""

    def __init__(self, node: str, place: tuple[int, bool], error: Exception) -> None:
        super().__init__(f"{node}: {error}")
        self.node, self.place, self.error = node, place, error


class Fetcher:
    """Sources of rows into buffers: from other nodes, and from this one where it holds them itself."""

    def __init__(self, own: str, peers: Peers, sources: Sources) -> None:
        self.own, self.peers, self._sources = own, peers, sources

    def fetch(
        self,
        sealed: SealedGroup,
        wanted: Sequence[tuple[str, Source]],
        buffers: Sequence[Bytes],
        cancellation: Cancellation,
    ) -> list[Bytes]:
        """What each node gives of its source, in the beginning of each buffer. Whole pieces are asked for, since only
        they can be judged. Raises SourceError for the first that fails or is not what it should be."""
        sources: dict[tuple[str, str], Source] = {}
        pulls = []
        for (node, source), buffer in zip(wanted, buffers, strict=True):
            if source.size:
                pulls.append(_pull(sealed, node, source, buffer))
                sources[node, pulls[-1].what] = source
        failure = self._pull(pulls, cancellation)
        if failure is not None:
            pull, error = failure
            raise SourceError(pull.node, _place(sealed, sources[pull.node, pull.what]), error)
        for pull in pulls:
            _judge(sealed, pull, sources[pull.node, pull.what])
        return [buffer[: source.size] for (_, source), buffer in zip(wanted, buffers, strict=True)]

    def _pull(self, pulls: Sequence[Pull], cancellation: Cancellation) -> tuple[Pull, Exception] | None:
        """The first failure."""
        for pull in pulls:
            if pull.node == self.own:
                try:
                    self._read(pull)
                except CkptdError as error:
                    return pull, error
        return self.peers.try_pull([pull for pull in pulls if pull.node != self.own], cancellation=cancellation)

    def _read(self, pull: Pull) -> None:
        """The same from here."""
        registered = self._sources.find(pull.snapshot, pull.what)
        registered.check(pull.offset, len(pull.into))
        assert pull.crc is not None
        for index, start in enumerate(range(0, len(pull.into), PIECE_BYTES)):
            pull.crc[index] = registered.read(pull.offset + start, pull.into[start : start + PIECE_BYTES])


def _place(sealed: SealedGroup, source: Source) -> tuple[int, bool]:
    return source.node, source.position < sealed.group.data_count


def _pull(sealed: SealedGroup, node: str, source: Source, buffer: Bytes) -> Pull:
    """Whole pieces of a source."""
    striping = sealed.striping
    if source.position < sealed.group.data_count:
        what, offset, whole = "string", source.offset, sealed.records[source.node].size
    else:
        parity = source.position - sealed.group.data_count
        n, member = len(sealed.group.nodes), sealed.group.nodes.index(source.node)
        what, offset = f"parity/{parity}", source.offset - parity * striping.segment_bytes
        whole = striping.length((member - parity) % n)
    size = min(-(-(offset + source.size) // PIECE_BYTES) * PIECE_BYTES, whole) - offset
    crc = np.zeros(-(-size // PIECE_BYTES), np.uint32)
    return Pull(node, sealed.snapshot, what, offset, buffer[:size].data, crc)


def _judge(sealed: SealedGroup, pull: Pull, source: Source) -> None:
    """Compares the pieces of a string with the seal record; those of a parity came with the checksums of its area."""
    if source.position >= sealed.group.data_count:
        return
    assert pull.crc is not None
    first, found = pull.offset // PIECE_BYTES, pull.crc
    expected = sealed.records[source.node].crc[first : first + len(found)]
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        piece = int(wrong[0])
        error = CorruptionError(
            f"node {pull.node}: string {source.node} of {sealed.snapshot}, piece {first + piece}: "
            f"CRC32C {found[piece]:08x}, its seal record says {expected[piece]:08x}; that memory has changed since"
        )
        raise SourceError(pull.node, (source.node, True), error)
