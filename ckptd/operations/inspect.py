"""What a store and a checkpoint hold, as plain data: everything that `ckptd ls` and `ckptd show` print.

Reads COMMIT for a summary, the manifest and the objects for the contents; never the chunk data (except the per-rank
objects, which are small). Prints nothing, changes nothing.
"""

from __future__ import annotations

import dataclasses
import fnmatch

import numpy as np
import numpy.typing as npt

from ckptd.core import lineage
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import CkptdError, FormatError, NotFoundError, VersionError
from ckptd.core.types import SnapshotId
from ckptd.format import objects
from ckptd.format.commit import VERSION
from ckptd.tiers.store import Commit, Store, StoredCheckpoint, names

_UNCOMMITTED = "no COMMIT"
"""How the store's reason begins for a directory that is no checkpoint yet, or no longer."""

OBJECT_PREFIX = "objects/"
"""Keys under it are not tensors of the user's but per-rank objects: `objects/<path>@<rank>`, encoded, as uint8."""


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """One committed checkpoint. `live`: on the branch of history that a restart continues (None: not known); `bytes` of
    all its files; `created_s`: when COMMIT was written, UNIX time, where the file system tells."""

    name: str
    id: SnapshotId
    job: str
    live: bool | None
    created_s: float | None
    bytes: int
    chunks: int
    writers: int


@dataclasses.dataclass(frozen=True)
class StoreSummary:
    """All checkpoints of a store, newest first. `uncommitted` directories are being written or were left by a killed
    writer; `broken` names what should be readable and is not, with the reason."""

    uri: str
    checkpoints: list[CheckpointSummary]
    uncommitted: list[str]
    broken: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One logical tensor. `bytes` counts every value held (per-rank ones too), `stored` the same after the codec;
    `ranks` are those that hold a value of their own."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: int
    bytes: int
    stored: int
    ranks: list[int]


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a checkpoint; tied tensors share their bytes and are counted once."""

    tensors: int
    objects: int
    chunks: int
    bytes: int
    stored: int
    writers: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that one checkpoint holds; `objects`, decoded, by path, where they were asked for."""

    summary: CheckpointSummary
    format: int
    totals: Totals
    tensors: list[TensorSummary]
    objects: dict[str, object] | None


def summarize_checkpoint(checkpoint: StoredCheckpoint, live: bool | None = None) -> CheckpointSummary:
    """What COMMIT alone says of a checkpoint."""
    commit = checkpoint.commit
    return CheckpointSummary(
        name=checkpoint.name,
        id=checkpoint.id,
        job=checkpoint.job,
        live=live,
        created_s=_created_s(checkpoint),
        bytes=stored_bytes(commit),
        chunks=commit.rows,
        writers=len(commit.parts),
    )


def stored_bytes(commit: Commit) -> int:
    """Bytes of all files that COMMIT lists."""
    return commit.data_bytes + commit.objects.size + sum(part.size for part in commit.parts)


def summarize_store(store: Store) -> StoreSummary:
    """Every checkpoint of `store`, newest first (by epoch, then step), and what is broken."""
    uncommitted, broken = split_broken(store)
    committed = store.checkpoints()
    alive: set[SnapshotId] | None = None
    try:
        alive = set(lineage.live(committed, store.records()))
    except (FormatError, VersionError) as error:
        broken.append((names.EPOCHS, str(error)))
    checkpoints = []
    for identity in sorted(committed, reverse=True):
        try:
            live = None if alive is None else identity in alive
            checkpoints.append(summarize_checkpoint(store.reader(identity), live))
        except NotFoundError:
            continue  # pruned between the listing and now
    return StoreSummary(store.uri, checkpoints, uncommitted, broken)


def split_broken(store: Store) -> tuple[list[str], list[tuple[str, str]]]:
    """(directories without COMMIT, (directory, reason) where there is one that is not valid)."""
    found = sorted(store.broken())
    uncommitted = [name for name, reason in found if reason.startswith(_UNCOMMITTED)]
    return uncommitted, [(name, reason) for name, reason in found if name not in uncommitted]


def inspect_checkpoint(checkpoint: StoredCheckpoint, pattern: str | None = None, with_values: bool = False) -> Contents:
    """Everything about one checkpoint: tensors whose key matches the glob `pattern`, values of objects if asked."""
    catalog = checkpoint.catalog()
    shared = checkpoint.objects()
    paths = [*shared, *(info.key for info in catalog.tensors if is_object(info.key))]
    values = None
    if with_values:
        values = {path: objects.decode(data) for path, data in read_objects(checkpoint).items()}
    return Contents(
        summary=summarize_checkpoint(checkpoint),
        format=VERSION,
        totals=total(catalog, len(paths)),
        tensors=summarize_tensors(catalog, pattern),
        objects=values,
    )


def is_object(key: str) -> bool:
    """Whether a key of the catalog is a per-rank object."""
    return key.startswith(OBJECT_PREFIX)


def summarize_tensors(catalog: Catalog, pattern: str | None = None) -> list[TensorSummary]:
    """Every tensor whose key matches the glob `pattern`, by key; per-rank objects are left out."""
    raw, stored = _sums(catalog, catalog.raw), _sums(catalog, catalog.stored)
    found = []
    for position, info in enumerate(catalog.tensors):
        if is_object(info.key) or (pattern is not None and not fnmatch.fnmatchcase(info.key, pattern)):
            continue
        rows = catalog.rows(info.key)
        ranks = np.unique(catalog.rank[rows.start : rows.stop])
        found.append(
            TensorSummary(
                key=info.key,
                dtype=info.dtype,
                shape=info.shape,
                chunks=len(rows),
                bytes=int(raw[position]),
                stored=int(stored[position]),
                ranks=[int(rank) for rank in ranks if rank != ALL_RANKS],
            )
        )
    return found


def total(catalog: Catalog, object_count: int) -> Totals:
    """Sums over all tensors of `catalog`, of a checkpoint with that many objects."""
    places = np.stack([catalog.writer, catalog.file, catalog.file_offset, catalog.stored], axis=1)
    _, first = np.unique(places, axis=0, return_index=True)
    return Totals(
        tensors=sum(not is_object(info.key) for info in catalog.tensors),
        objects=object_count,
        chunks=len(catalog),
        bytes=int(catalog.raw[first].sum()),
        stored=int(catalog.stored[first].sum()),
        writers=len(np.unique(catalog.writer)),
    )


def read_objects(checkpoint: StoredCheckpoint) -> dict[str, bytes]:
    """Every object, encoded, by path; the value that one rank holds for itself is at `<path>@<rank>`."""
    catalog = checkpoint.catalog()
    found = dict(checkpoint.objects())
    for info in catalog.tensors:
        if is_object(info.key):
            found[info.key.removeprefix(OBJECT_PREFIX)] = read_bytes(checkpoint, catalog, info.key)
    return dict(sorted(found.items()))


def read_bytes(checkpoint: StoredCheckpoint, catalog: Catalog, key: str) -> bytes:
    """The bytes of a one-dimensional tensor, its chunks joined in order."""
    rows = sorted(catalog.rows(key), key=lambda row: catalog.box(row).offsets)
    data = bytearray(sum(int(catalog.raw[row]) for row in rows))
    view, position = memoryview(data), 0
    for row in rows:
        size = int(catalog.raw[row])
        checkpoint.read(row, view[position : position + size])
        position += size
    return bytes(data)


def _sums(catalog: Catalog, column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sum of `column` over the rows of each tensor."""
    sums = np.zeros(len(catalog.tensors), np.int64)
    np.add.at(sums, catalog.tensor, column)
    return sums


def _created_s(checkpoint: StoredCheckpoint) -> float | None:
    try:
        return checkpoint.committed_at
    except CkptdError:
        return None
