"""One checkpoint written by several nodes and committed by one of them (docs/format.md, section 9).

Each node writes its files on its own, whenever it is told to, and then a list of them, in the directory `written` of
the checkpoint. The root commits from the lists alone: what they name is read as a reader would, and refused where it is
not one whole checkpoint. Writer k is node k of `parts`. Writer parts + k has what differs between ranks: only the root
can say what of it is stored in vain, so the root writes that manifest. Writer 2 * parts is the root's, for objects that
differ.

Invariants: a list is only there while all that it names is durable, and nobody touches what a list names; lists are
removed (`Store.sweep`) after COMMIT has come, so that who finds neither knows that a node has yet to write. Both halves
can be done again at any time, by other processes: the same bytes come out.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, NotFoundError, StoreError
from ckptd.core.types import SnapshotId
from ckptd.format.commit import MAX_WRITERS, Commit, ObjectsFile, Part
from ckptd.format.manifest import from_parquet, to_parquet
from ckptd.plan.share import object_rows, share_objects, share_stored
from ckptd.plan.whole import missing, repeated
from ckptd.tiers.store import names
from ckptd.tiers.store.journal import Journal
from ckptd.tiers.store.pipeline import Read
from ckptd.tiers.store.reader import StoredCheckpoint, has_length
from ckptd.tiers.store.store import Store
from ckptd.tiers.store.writer import CheckpointWriter, discard_files, discard_unfinished, settle_files

_SHOWN = 5


class Contribution(NamedTuple):
    """What one node has of a snapshot: `rows`, stored as they are; `own` rows, each of one rank, and `objects` (rank ->
    path -> value), of which the root decides."""

    ranks: list[int]
    rows: Catalog
    read: Read
    own: Catalog
    read_own: Read
    objects: dict[int, dict[str, bytes]]


class _Own(msgspec.Struct, array_like=True):
    """Data files of what differs between ranks, and the manifest of all that is in them."""

    manifest: bytes
    rows: int
    data: list[int]


class _List(msgspec.Struct):
    """What one node says that it has written. `objects`: rank -> path -> number of a value."""

    snapshot: SnapshotId
    job: str
    node: str
    part: int
    parts: int
    ranks: list[int]
    shared: Part
    own: _Own | None
    values: list[bytes]
    objects: dict[int, dict[str, int]]

    @property
    def data(self) -> list[tuple[int, int, int]]:
        """(writer, file, length) of all data files."""
        own = [] if self.own is None else self.own.data
        return [
            *((self.part, number, length) for number, length in enumerate(self.shared.data)),
            *((self.parts + self.part, number, length) for number, length in enumerate(own)),
        ]


class NodeWriter:
    """What node `part` of `parts` writes of a checkpoint; `node` names it in messages."""

    def __init__(self, store: Store, identity: SnapshotId, job: str, node: str, part: int, parts: int) -> None:
        if not 0 <= part < parts <= (MAX_WRITERS - 1) // 2:
            raise ValueError(f"part {part} of {parts}")
        self._store = store
        self._back_end = store.back_end
        self._identity = identity
        self._job = job
        self._node = node
        self._part, self._parts = part, parts
        self._directory = names.checkpoint(identity)
        self._journal = Journal(self._back_end, names.lists(self._directory))

    def is_done(self) -> bool:
        """Whether nothing is left to write: this node's list is there and holds, or else COMMIT is."""
        return self._is_listed() or self._store.exists(self._identity)

    def write(self, given: Contribution, *, threads: int, cancelled: Callable[[], bool]) -> None:
        """Writes everything anew, durably, then the list. StoreError, CorruptionError; what was written is then
        removed, as far as it can be."""
        writer = self._store.writer(self._identity, self._job, joined=True)  # refuses what is in doubt
        try:
            self._write(writer, given, threads, cancelled)
        except BaseException:
            with contextlib.suppress(Exception):
                if self._journal.get(self._part) is None:  # else another node has taken this one's place
                    self._discard()
            raise

    def _write(
        self, writer: CheckpointWriter, given: Contribution, threads: int, cancelled: Callable[[], bool]
    ) -> None:
        for path in ((self._directory,), *names.folders(self._directory)):
            self._back_end.make_directory(path, exist_ok=True)
        self._discard()
        main, own = writer.part(self._part), None
        shared = main.write_manifest(*main.write_data(given.rows, given.read, threads=threads, cancelled=cancelled))
        if len(given.own):
            rows, lengths = writer.part(self._parts + self._part).write_data(
                given.own, given.read_own, threads=threads, cancelled=cancelled
            )
            own = _Own(to_parquet(rows), len(rows), lengths)
        settle_files(self._back_end, self._directory)
        self._settle_directories()
        self._journal.put(self._part, self._encoded(given, shared, own))

    def _settle_directories(self) -> None:
        """If this fails it has failed for good: who writes again must not find them."""
        try:
            self._back_end.settle((self._directory,))
            self._back_end.settle(())
        except CkptdError:
            self._back_end.remove_tree((self._directory,))
            raise

    def _discard(self) -> None:
        """Removes what this node wrote: first the list, durably."""
        self._journal.discard(self._part)
        mine = (self._part, self._parts + self._part)
        discard_files(self._back_end, self._directory, lambda path: names.writer_of(path) in mine)

    def _encoded(self, given: Contribution, shared: Part, own: _Own | None) -> bytes:
        numbers: dict[bytes, int] = {}
        objects = {
            rank: {path: numbers.setdefault(value, len(numbers)) for path, value in values.items()}
            for rank, values in given.objects.items()
        }
        who = (self._identity, self._job, self._node, self._part, self._parts)
        return msgspec.msgpack.encode(_List(*who, given.ranks, shared, own, list(numbers), objects))

    def _is_listed(self) -> bool:
        listed = _read_list(self._journal, self._part)
        if listed is None or (listed.node, listed.parts) != (self._node, self._parts):
            return False
        try:
            manifest = names.manifest_part(self._directory, self._part)
            return has_length(self._back_end, manifest, listed.shared.size) and all(
                has_length(self._back_end, names.data_file(self._directory, writer, number), length)
                for writer, number, length in listed.data
            )
        except NotFoundError:
            return False


def commit(store: Store, identity: SnapshotId, job: str, parts: int, still: Callable[[], None] = lambda: None) -> None:
    """Puts COMMIT of what `parts` nodes have written. StoreError, naming the node, where it cannot be a whole
    checkpoint; `still` is asked last and raises if it must not be one."""
    _Root(store, identity, job, parts).commit(still)


def _read_list(journal: Journal, part: int) -> _List | None:
    payload = journal.get(part)
    if payload is None:
        return None
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.msgpack.decode(payload, type=_List)
    return None


class _Root:
    """One attempt to commit."""

    def __init__(self, store: Store, identity: SnapshotId, job: str, parts: int) -> None:
        self._store = store
        self._back_end = store.back_end
        self._identity = identity
        self._job = job
        self._directory = names.checkpoint(identity)
        self._described = self._back_end.describe((self._directory,))
        self._lists = self._read_lists(parts)
        self._nodes = {number + k * parts: found.node for number, found in enumerate(self._lists) for k in (0, 1)}
        self._nodes[2 * parts] = self._lists[0].node

    def commit(self, still: Callable[[], None]) -> None:
        self._check_ranks()
        writer = self._store.writer(self._identity, self._job, joined=True)
        self._discard_earlier()
        parts = [found.shared for found in self._lists]
        parts += self._own_parts(writer)
        shared, differing = self._objects(writer)
        parts += differing
        if len(parts) > len(self._lists):
            settle_files(self._back_end, self._directory)
        self._check_whole(parts)
        still()
        writer.commit(parts, shared)

    def _read_lists(self, parts: int) -> list[_List]:
        journal = Journal(self._back_end, names.lists(self._directory))
        found = []
        for part in range(parts):
            listed = _read_list(journal, part)
            if listed is None:
                raise StoreError(
                    f"{self._described}: node number {part} of {parts} has left no list of what it wrote, or a damaged "
                    "one; it must write again"
                )
            says = (listed.snapshot, listed.job, listed.part, listed.parts)
            if says != (self._identity, self._job, part, parts):
                raise self._refusal(
                    listed.node, f"lists part {says[2]} of {says[3]} of {says[0]} of job {says[1]!r}, as number {part}"
                )
            found.append(listed)
        return found

    def _refusal(self, node: str, problem: str) -> StoreError:
        return StoreError(f"{self._described}: node {node}: {problem}; nothing is committed, write it again")

    def _check_ranks(self) -> None:
        """Every rank once: from 0, without gaps."""
        listed = Counter(rank for found in self._lists for rank in found.ranks)
        for rank, count in listed.items():
            if count > 1:
                holders = " and ".join(found.node for found in self._lists if rank in found.ranks)
                raise self._refusal(holders, f"rank {rank} is listed {count} times")
        absent = sorted(set(range(max(listed, default=0) + 1)) - set(listed))
        if absent:
            lists = "; ".join(f"{found.node}: {found.ranks}" for found in self._lists[:_SHOWN])
            raise StoreError(f"{self._described}: ranks {absent} are in no list ({lists}); nothing is committed")

    def _discard_earlier(self) -> None:
        """What a root that was killed has left. Nobody else writes these names."""
        parts = len(self._lists)
        discard_unfinished(self._back_end, self._directory)

        def is_mine(path: tuple[str, ...]) -> bool:
            writer = names.writer_of(path) or 0
            return writer == 2 * parts or (parts <= writer < 2 * parts and names.MANIFEST in path)

        discard_files(self._back_end, self._directory, is_mine)

    def _own_parts(self, writer: CheckpointWriter) -> list[Part]:
        """Manifests of what differs between ranks, but for writers of which nothing is needed."""
        stored, lengths = [], []
        for found in self._lists:
            if found.own is not None:
                try:
                    stored.append(from_parquet(found.own.manifest, found.own.rows))
                except CkptdError as error:
                    raise self._refusal(found.node, str(error)) from None
                lengths.append((len(self._lists) + found.part, found.own.data))
        needed = zip(share_stored(stored), lengths, strict=True)
        return [writer.part(number).write_manifest(rows, data) for rows, (number, data) in needed if len(rows)]

    def _objects(self, writer: CheckpointWriter) -> tuple[dict[str, bytes], list[Part]]:
        """(objects that all ranks share, the part of those that differ)."""
        of_rank: dict[int, dict[str, bytes]] = {}
        for found in self._lists:
            for rank in found.ranks:
                numbers = found.objects.get(rank, {})
                of_rank[rank] = {path: found.values[number] for path, number in numbers.items()}
        shared, own = share_objects([of_rank[rank] for rank in sorted(of_rank)])
        if not own:
            return shared, []
        rows, content = object_rows(own, writer=2 * len(self._lists))

        def read(row: int, into: memoryview) -> None:
            start = int(rows.file_offset[row])
            into[:] = content[start : start + len(into)]

        part = writer.part(2 * len(self._lists))
        return shared, [part.write_manifest(*part.write_data(rows, read))]

    def _check_whole(self, parts: Sequence[Part]) -> None:
        """Reads the checkpoint as if it were committed: sizes and digests of all files, rows, and what they cover."""
        commit = Commit(self._job, self._identity.step, self._identity.epoch, [*parts], ObjectsFile(0, ""))
        with StoredCheckpoint(self._back_end, self._directory, commit) as checkpoint:
            try:
                catalog = checkpoint.catalog()
            except CkptdError as error:
                raise self._refusal(self._to_blame(checkpoint, parts), str(error)) from None
        for one, other in repeated(catalog):
            nodes = sorted({self._nodes[int(catalog.writer[row])] for row in (one, other)})
            key, box = catalog.tensors[catalog.tensor[one]].key, catalog.box(one)
            problem = f"the chunk of tensor {key!r} at {list(box.offsets)} is written twice"
            raise self._refusal(" and ".join(nodes), problem)
        gaps = missing(catalog)
        if gaps:
            nodes = sorted({found.node for found in self._lists})
            raise StoreError(
                f"{self._described}: chunks are in no list of {', '.join(nodes[:_SHOWN])}: {'; '.join(gaps[:_SHOWN])}; "
                "nothing is committed"
            )

    def _to_blame(self, checkpoint: StoredCheckpoint, parts: Sequence[Part]) -> str:
        """The node whose files are not as it says; all, where only together they are wrong."""
        for part in parts:
            try:
                checkpoint.part(part)
            except CkptdError:
                return self._nodes[part.writer]
        return ", ".join(sorted({found.node for found in self._lists}))


EMPTY = Catalog.build([], [], np.zeros((0, 0)), np.zeros((0, 0)))
"""No rows."""
