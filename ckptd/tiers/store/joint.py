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
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, StoreError
from ckptd.core.types import SnapshotId
from ckptd.format.commit import MAX_WRITERS, Commit, ObjectsFile, Part
from ckptd.format.manifest import from_parquet, to_parquet
from ckptd.plan.share import View, object_rows, share_objects, share_stored
from ckptd.plan.whole import missing, repeated
from ckptd.tiers.store import names
from ckptd.tiers.store.backend import Path
from ckptd.tiers.store.journal import Journal
from ckptd.tiers.store.parts import discard, discard_unfinished, has_data, has_manifest, settle
from ckptd.tiers.store.reader import StoredCheckpoint
from ckptd.tiers.store.store import Store
from ckptd.tiers.store.writer import CheckpointWriter, Pace, Resting

_SHOWN = 5


class Rows(NamedTuple):
    """Chunks, and where their bytes are; which of them are `resting`, that is, expected to come again unchanged."""

    catalog: Catalog
    view: View
    resting: npt.NDArray[np.bool_] | None = None


class Contribution(NamedTuple):
    """What the ranks of one node have of a snapshot: `rows`, stored as they are; and of which the root decides, rows
    that are each of one rank's `own`, and `objects` (rank -> path -> value)."""

    ranks: list[int]
    rows: Rows
    own: Rows | None
    objects: dict[int, dict[str, bytes]]


class _List(msgspec.Struct):
    """What one node says that it has written: a part, and perhaps one whose manifest is not in the store but here.
    `objects`: rank -> path -> which of the `values`."""

    snapshot: SnapshotId
    job: str
    node: str
    number: int
    nodes: int
    ranks: list[int]
    shared: Part
    own: Part | None
    own_manifest: bytes
    values: list[bytes]
    objects: dict[int, dict[str, int]]

    def objects_of(self, rank: int) -> dict[str, bytes]:
        """path -> value of a rank."""
        return {path: self.values[which] for path, which in self.objects.get(rank, {}).items()}


class NodeWriter:
    """What node `number` of `nodes` writes of a checkpoint; `node` is its name."""

    def __init__(self, store: Store, identity: SnapshotId, job: str, node: str, number: int, nodes: int) -> None:
        if not 0 <= number < nodes <= (MAX_WRITERS - 1) // 2:
            raise ValueError(f"node {number} of {nodes}")
        self._store = store
        self._back_end = store.back_end
        self._identity = identity
        self._who = (identity, job, node, number, nodes)
        self._writer, self._own_writer = number, nodes + number
        self._directory = names.checkpoint(identity)
        self._journal = Journal(self._back_end, names.lists(self._directory))

    def is_done(self) -> bool:
        """Whether nothing is left to write: this node's list is there and holds, or else COMMIT is."""
        return self._is_listed() or self._store.exists(self._identity)

    def write(self, given: Contribution, pace: Pace, earlier: Resting | None = None) -> Resting | None:
        """Writes everything anew, durably, but for what rests and is in an `earlier` checkpoint; then the list. What
        rests in this one, for later ones. StoreError, CorruptionError; what was written is then removed, as far as it
        can be."""
        writer = self._store.writer(self._identity, self._who[1], joined=True)  # refuses what is in doubt
        try:
            return self._write(writer, given, pace, earlier)
        except BaseException:
            with contextlib.suppress(Exception):
                if self._journal.get(self._writer) is None:  # else another node has taken this one's place
                    self._discard()
            raise

    def _write(
        self, writer: CheckpointWriter, given: Contribution, pace: Pace, earlier: Resting | None
    ) -> Resting | None:
        for path in ((self._directory,), *names.folders(self._directory), self._journal.path):
            self._back_end.make_directory(path, exist_ok=True)
        self._discard()
        part, own, manifest = writer.part(self._writer), None, b""
        rows = given.rows
        resting = np.zeros(len(rows.catalog), np.bool_) if rows.resting is None else rows.resting
        placed, data, kept = part.write_apart(rows.catalog, rows.view, resting, earlier, pace)
        shared = part.write_manifest(placed, data)
        if given.own is not None:
            catalog, lengths = writer.part(self._own_writer).write_data(given.own.catalog, given.own.view, pace)
            manifest = to_parquet(catalog)
            digest = hashlib.sha256(manifest).hexdigest()
            own = Part(self._own_writer, len(catalog), len(manifest), digest, lengths)
        settle(self._back_end, self._directory)
        self._settle_directories()
        values, objects = _numbered(given.objects)
        listed = _List(*self._who, given.ranks, shared, own, manifest, values, objects)
        self._journal.put(self._writer, msgspec.msgpack.encode(listed))
        return kept

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
        self._journal.discard(self._writer)
        mine = (self._writer, self._own_writer)
        discard(self._back_end, self._directory, lambda path: names.writer_of(path) in mine)

    def _is_listed(self) -> bool:
        listed = _read_list(self._journal, self._writer)
        if listed is None or (listed.snapshot, listed.job, listed.node, listed.number, listed.nodes) != self._who:
            return False
        own = listed.own is None or has_data(self._back_end, self._directory, listed.own)
        place = self._back_end, self._directory, listed.shared
        return own and has_data(*place) and has_manifest(*place)


def _numbered(objects: dict[int, dict[str, bytes]]) -> tuple[list[bytes], dict[int, dict[str, int]]]:
    """The distinct values, and for each rank and path which of them it is."""
    numbers: dict[bytes, int] = {}
    chosen = {
        rank: {path: numbers.setdefault(value, len(numbers)) for path, value in values.items()}
        for rank, values in objects.items()
    }
    return list(numbers), chosen


def _read_list(journal: Journal, number: int) -> _List | None:
    payload = journal.get(number)
    if payload is None:
        return None
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.msgpack.decode(payload, type=_List)
    return None


def commit(store: Store, identity: SnapshotId, job: str, nodes: int, still: Callable[[], None] = lambda: None) -> None:
    """Puts COMMIT of what `nodes` nodes have written. StoreError, naming the node, where it cannot be a whole
    checkpoint; `still` is asked last and raises if it must not be one."""
    root = _Root(store, identity, job, _read_lists(store, identity, job, nodes))
    root.commit(still)


def _read_lists(store: Store, identity: SnapshotId, job: str, nodes: int) -> list[_List]:
    directory = names.checkpoint(identity)
    journal = Journal(store.back_end, names.lists(directory))
    lists = []
    for number in range(nodes):
        listed = _read_list(journal, number)
        if listed is None:
            raise StoreError(
                f"{store.back_end.describe((directory,))}: node number {number} of {nodes} has left no list of what it "
                "wrote, or a damaged one; it must write again"
            )
        if (listed.snapshot, listed.job, listed.number, listed.nodes) != (identity, job, number, nodes):
            raise StoreError(
                f"{store.back_end.describe((directory,))}: node {listed.node} lists what it wrote of "
                f"{listed.snapshot} of job {listed.job!r} as number {listed.number} of {listed.nodes}; expected number "
                f"{number} of {nodes} of job {job!r}; it must write again"
            )
        lists.append(listed)
    return lists


class _Root:
    """One attempt to commit what is in the lists."""

    def __init__(self, store: Store, identity: SnapshotId, job: str, lists: Sequence[_List]) -> None:
        self._back_end = store.back_end
        self._identity = identity
        self._job = job
        self._lists = lists
        self._directory = names.checkpoint(identity)
        self._writer = store.writer(identity, job, joined=True)
        self._objects_writer = 2 * len(lists)

    def commit(self, still: Callable[[], None]) -> None:
        self._check_ranks()
        discard_unfinished(self._back_end, self._directory)
        discard(self._back_end, self._directory, self._is_mine)
        of_rank = {rank: listed.objects_of(rank) for listed in self._lists for rank in listed.ranks}
        shared, own = share_objects([of_rank[rank] for rank in sorted(of_rank)])
        mine = [*self._manifests(), *self._part_of(own)]
        if mine:
            settle(self._back_end, self._directory)
        parts = [*(listed.shared for listed in self._lists), *mine]
        self._check_whole(parts)
        still()
        self._writer.commit(parts, shared)

    def _is_mine(self, path: Path) -> bool:
        """What only roots write, and one that was killed may have left."""
        writer = names.writer_of(path) or 0
        manifest = names.MANIFEST in path and writer >= len(self._lists)
        return manifest or writer == self._objects_writer

    def _manifests(self) -> list[Part]:
        """Of what differs between ranks, but for writers of which nothing is needed."""
        stored, lengths = [], []
        for listed in self._lists:
            if listed.own is not None:
                try:
                    stored.append(from_parquet(listed.own_manifest, listed.own.rows))
                except CkptdError as error:
                    raise self._refusal([listed.node], str(error)) from None
                lengths.append((listed.own.writer, listed.own.data))
        needed = zip(share_stored(stored), lengths, strict=True)
        return [self._writer.part(number).write_manifest(rows, data) for rows, (number, data) in needed if len(rows)]

    def _part_of(self, objects: dict[tuple[str, int], bytes]) -> list[Part]:
        """The part that holds objects which differ, if there are any."""
        if not objects:
            return []
        rows, content = object_rows(objects, writer=self._objects_writer)

        def view(row: int, buffer: memoryview) -> memoryview:
            start = int(rows.file_offset[row])
            return memoryview(content)[start : start + len(buffer)]

        part = self._writer.part(self._objects_writer)
        return [part.write_manifest(*part.write_data(rows, view))]

    # --- whether it is one whole checkpoint

    def _check_ranks(self) -> None:
        """Every rank once: from 0, without gaps."""
        listed = Counter(rank for found in self._lists for rank in found.ranks)
        for rank, count in listed.items():
            if count > 1:
                holders = [found.node for found in self._lists if rank in found.ranks]
                raise self._refusal(holders, f"rank {rank} is listed {count} times")
        absent = sorted(set(range(max(listed, default=0) + 1)) - set(listed))
        if absent:
            lists = "; ".join(f"{found.node}: {found.ranks}" for found in self._lists[:_SHOWN])
            raise self._refusal(None, f"ranks {absent} are in no list ({lists})")

    def _check_whole(self, parts: Sequence[Part]) -> None:
        """Reads the checkpoint as if it were committed: sizes and digests of all files, rows, and what they cover."""
        commit = Commit(self._job, self._identity.step, self._identity.epoch, [*parts], ObjectsFile(0, ""))
        with StoredCheckpoint(self._back_end, self._directory, commit) as checkpoint:
            try:
                catalog = checkpoint.catalog()
            except CkptdError as error:
                raise self._refusal(self._to_blame(checkpoint, parts), str(error)) from None
        for rows in repeated(catalog):
            key, box = catalog.tensors[catalog.tensor[rows[0]]].key, catalog.box(rows[0])
            nodes = [self._node_of(int(catalog.writer[row])) for row in rows]
            raise self._refusal(nodes, f"the chunk of tensor {key!r} at {list(box.offsets)} is written twice")
        gaps = missing(catalog)
        if gaps:
            raise self._refusal(None, "; ".join(gaps[:_SHOWN]))

    def _to_blame(self, checkpoint: StoredCheckpoint, parts: Sequence[Part]) -> list[str] | None:
        """The node whose files are not as it says; None, where only together they are wrong."""
        for part in parts:
            try:
                checkpoint.part(part)
            except CkptdError:
                return [self._node_of(part.writer)]
        return None

    def _node_of(self, writer: int) -> str:
        return self._lists[0 if writer == self._objects_writer else writer % len(self._lists)].node

    def _refusal(self, nodes: Sequence[str] | None, problem: str) -> StoreError:
        """`nodes`: those to blame; None: no single one."""
        chosen = sorted({listed.node for listed in self._lists} if nodes is None else {*nodes})
        who = ("node " if len(chosen) == 1 else "nodes ") + ", ".join(chosen[:_SHOWN])
        described = self._back_end.describe((self._directory,))
        return StoreError(f"{described}: as written by {who}: {problem}; nothing is committed, write it again")
