"""Writing one checkpoint: parts by many writers, then COMMIT by the root (docs/format.md, section 9).

Invariants: nothing is named in COMMIT before it is durable; a failed sync ends the attempt; a failure from the renaming
of COMMIT on leaves the checkpoint in doubt, and its files alone. Every sync and rename here is needed:
tests/store/test_crashes.py leaves them out one by one and sees a checkpoint lost or torn.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.core.errors import StoreError
from ckptd.core.types import SnapshotId
from ckptd.format.commit import Commit, ObjectsFile, Part, encode_commit
from ckptd.format.layout import FILE_BYTES, LARGE_ALIGNMENT, aligned
from ckptd.format.manifest import to_parquet
from ckptd.format.objects import pack_table
from ckptd.format.table import encode_table
from ckptd.plan.share import Read, View
from ckptd.tiers.store import names
from ckptd.tiers.store.backend import BackEnd, OutputFile, Path
from ckptd.tiers.store.parts import settle
from ckptd.tiers.store.pipeline import copying, encoded_rows
from ckptd.tiers.throttle import Throttle

_PADDING = bytes(LARGE_ALIGNMENT)
_PLACE = {"file": "i4", "file_offset": "i8", "stored": "i8", "codec": "u1"}


class CheckpointWriter:
    """One attempt at one checkpoint, made by `Store.writer`. `ended` is told of the COMMIT: True, it is durable; False,
    it may or may not be. `joined`: another process created the directory, commits, and cleans up."""

    def __init__(
        self, back_end: BackEnd, identity: SnapshotId, job: str, ended: Callable[[bool], None], joined: bool = False
    ) -> None:
        self.id = identity
        self._back_end = back_end
        self._job = job
        self._directory = names.checkpoint(identity)
        self._tell = ended
        self._joined = joined
        self._committing = False
        self._ended: str | None = None

    def part(self, writer: int) -> PartWriter:
        """Writes what this process adds; `writer` is its number, unique in the checkpoint."""
        return PartWriter(self._back_end, self._directory, writer, self._attempt)

    def commit(self, parts: Sequence[Part], objects: Mapping[str, bytes]) -> None:
        """Makes the checkpoint exist, durably, of exactly these parts. StoreError if it cannot."""
        directory = (self._directory,)
        with self._attempt():
            table = pack_table(objects)
            commit = encode_commit(
                Commit(
                    self._job,
                    self.id.step,
                    self.id.epoch,
                    sorted(parts, key=lambda part: part.writer),
                    ObjectsFile(len(table), hashlib.sha256(table).hexdigest()),
                )
            )
            self._back_end.write((*directory, names.OBJECTS), table)
            self._back_end.settle(directory)
            self._back_end.settle(())
            temporary = (*directory, names.COMMIT_TEMPORARY)
            publish = self._back_end.prepare((*directory, names.COMMIT), temporary, commit)
            self._committing = True
            try:
                publish()
                self._back_end.settle(directory)
            except BaseException:
                self._tell(False)
                raise
            self._ended = "it is committed"
            self._tell(True)

    def abort(self) -> None:
        """Removes what was written, unless COMMIT was reached: then all must stay as it is."""
        self._ended = self._ended or "it was aborted"
        if not self._committing and not self._joined:
            self._back_end.remove_tree((self._directory,))

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """Runs one step of the attempt; the first error ends it for good."""
        if self._ended is not None:
            raise StoreError(f"{self.id}: cannot go on writing this checkpoint: {self._ended}")
        try:
            yield
        except BaseException as error:
            self._ended = self._ended or f"an earlier step failed: {error}"
            raise


class Resting(NamedTuple):
    """Data files of a checkpoint that hold nothing but chunks which are expected to come again unchanged, named by what
    they are (`identity`), so that a later checkpoint need not have them written once more. `columns`: places of those
    chunks, in order; `file` is counted from `first`."""

    identity: bytes
    directory: str
    writer: int
    first: int
    lengths: list[int]
    columns: dict[str, npt.NDArray[Any]]

    def paths(self, directory: str, writer: int, first: int) -> list[Path]:
        """The files, as they are named elsewhere."""
        return [names.data_file(directory, writer, first + number) for number in range(len(self.lengths))]

    @property
    def held(self) -> list[Path]:
        """The files."""
        return self.paths(self.directory, self.writer, self.first)


class Pace(NamedTuple):
    """How to write: on how many threads, until when, how fast."""

    threads: int = 1
    cancelled: Callable[[], bool] = lambda: False
    throttle: Throttle | None = None


_AT_ONCE = Pace()


class PartWriter:
    """One writer's data files and manifest part."""

    def __init__(
        self,
        back_end: BackEnd,
        directory: str,
        writer: int,
        attempt: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._back_end = back_end
        self._directory = directory
        self._writer = writer
        self._attempt = attempt

    def write(
        self, catalog: Catalog, read: Read, *, threads: int = 1, cancelled: Callable[[], bool] = lambda: False
    ) -> Part:
        """Writes all rows of `catalog`, whose places say where the bytes are now, durably; the answer is for `commit`.

        `read(row, into)` fills `into` with a row's raw bytes; it is called on `threads` threads. Rows that share a
        place are stored once. Raises StoreError (disk, cancelled) and CorruptionError (checksum of what was read).
        """
        part = self.write_manifest(*self.write_data(catalog, copying(read), Pace(threads, cancelled)))
        with self._attempt():
            settle(self._back_end, self._directory)
        return part

    def write_data(self, catalog: Catalog, view: View, pace: Pace = _AT_ONCE) -> tuple[Catalog, list[int]]:
        """The first half of `write`: the data files, durable after `parts.settle`. For `write_manifest`: the rows with
        the places that they have now, and the lengths of the files."""
        placed, lengths, _ = self.write_apart(catalog, view, np.zeros(len(catalog), np.bool_), None, pace)
        return placed, lengths

    def write_apart(
        self,
        catalog: Catalog,
        view: View,
        resting: npt.NDArray[np.bool_],
        earlier: Resting | None,
        pace: Pace = _AT_ONCE,
    ) -> tuple[Catalog, list[int], Resting | None]:
        """`write_data`, where rows that are `resting` have files of their own, after all others: those of an `earlier`
        checkpoint, if it had the same. With what they are for a later one."""
        with self._attempt():
            chosen, owner = _without_ties(catalog)
            moving, still = chosen[~resting[chosen]], chosen[resting[chosen]]
            data = _DataFiles(self._back_end, self._directory, self._writer)
            columns = {name: np.zeros(len(catalog), kind) for name, kind in _PLACE.items()}
            with contextlib.closing(data):
                self._encode(catalog, moving, view, pace, data, columns)
                first, kept = len(data.lengths), None
                if len(still):
                    identity = _identity(catalog.select(still))
                    if earlier is not None and earlier.identity == identity and data.link(earlier):
                        for name, column in earlier.columns.items():
                            columns[name][still] = column
                        columns["file"][still] += first
                    else:
                        self._encode(catalog, still, view, pace, data, columns)
                    places = {name: column[still] for name, column in columns.items()}
                    places["file"] = places["file"] - first
                    kept = Resting(identity, self._directory, self._writer, first, data.lengths[first:], places)
            placed = {name: column[owner] for name, column in columns.items()}
            return catalog.replaced(writer=np.full(len(catalog), self._writer), **placed), data.lengths, kept

    def _encode(
        self,
        catalog: Catalog,
        rows: npt.NDArray[np.int64],
        view: View,
        pace: Pace,
        data: _DataFiles,
        columns: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Writes rows into new files, and notes their places."""
        written = 0
        encoded = encoded_rows(catalog, rows.tolist(), view, pace.threads, pace.cancelled, pace.throttle)
        with contextlib.closing(encoded):
            for row, codec, stored in encoded:
                columns["file"][row], columns["file_offset"][row] = data.append(stored)
                columns["stored"][row], columns["codec"][row] = stored.nbytes, codec
                written += 1
        if written != len(rows):
            raise StoreError(f"{self._back_end.describe((self._directory,))}: writing was cancelled")
        data.finish()

    def write_manifest(self, catalog: Catalog, lengths: list[int]) -> Part:
        """The second half: lists rows in data files of these lengths. Durable after `parts.settle`."""
        with self._attempt():
            manifest = to_parquet(catalog)
            self._back_end.write(names.manifest_part(self._directory, self._writer), manifest)
            return Part(self._writer, len(catalog), len(manifest), hashlib.sha256(manifest).hexdigest(), lengths)


class _DataFiles:
    """Appends chunks to data files, each placed as the format says."""

    def __init__(self, back_end: BackEnd, directory: str, writer: int) -> None:
        self.lengths: list[int] = []
        self._back_end = back_end
        self._directory = directory
        self._writer = writer
        self._file: OutputFile | None = None

    def append(self, stored: memoryview) -> tuple[int, int]:
        """Writes one chunk; returns (file, file_offset)."""
        start = aligned(self.lengths[-1], len(stored)) if self._file is not None else 0
        if self._file is not None and start + len(stored) > FILE_BYTES:
            self.finish()
        if self._file is None:
            path = names.data_file(self._directory, self._writer, len(self.lengths))
            self._file = self._back_end.create(path)
            self.lengths.append(0)
            start = 0
        self._file.write(_PADDING[: start - self.lengths[-1]])
        self._file.write(stored)
        self.lengths[-1] = start + len(stored)
        return len(self.lengths) - 1, start

    def link(self, earlier: Resting) -> bool:
        """Adds files of an earlier checkpoint; False, with none of them added, where they cannot be had."""
        targets = earlier.paths(self._directory, self._writer, len(self.lengths))
        for number, (source, target) in enumerate(zip(earlier.held, targets, strict=True)):
            if not self._back_end.link(source, target, earlier.lengths[number]):
                for made in targets[:number]:
                    self._back_end.discard(made)
                return False
        self.lengths += earlier.lengths
        return True

    def finish(self) -> None:
        """Makes the contents of the current file durable."""
        if self._file is not None:
            self._file.sync()
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _identity(catalog: Catalog) -> bytes:
    """Names chunks by what they are and hold."""
    return hashlib.sha256(encode_table(catalog) + catalog.crc.astype("<u4").tobytes()).digest()


def _without_ties(catalog: Catalog) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows to store, in order; for every row, the row that stores its bytes). Empty rows are not stored.

    Tied rows have one place now, and must agree in everything that makes their stored bytes the same.
    """
    rows = np.arange(len(catalog))
    filled = np.flatnonzero(catalog.raw)
    dtypes = {name: number for number, name in enumerate(sorted({info.dtype for info in catalog.tensors}))}
    dtype = np.array([dtypes[info.dtype] for info in catalog.tensors], np.int64)[catalog.tensor[filled]]
    place = [getattr(catalog, name)[filled] for name in ("writer", "file", "file_offset", "raw", "crc")]
    order = np.lexsort((filled, dtype, *place))
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in (dtype, *place):
        same &= column[order[1:]] == column[order[:-1]]
    first = np.concatenate([[True], ~same]) if len(order) else np.zeros(0, bool)
    leader = filled[order][np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    rows[filled[order]] = leader
    return np.sort(filled[order][first]), rows
