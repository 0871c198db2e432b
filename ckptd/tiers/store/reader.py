"""Reading one committed checkpoint: COMMIT, then what it lists, then chunks (docs/format.md, sections 9 and 10).

Chunks are read one by one (`read`), or in runs of neighbours, one request each (`runs`, `read_run`). A run can also be
fetched as it is stored and decoded by another process that has the same checkpoint open.

Invariants: nothing is parsed before its SHA-256 was right; no chunk is returned whose CRC32C was not. What COMMIT
lists and is missing or of another length was there once: a CorruptionError. Safe in threads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core import native
from ckptd.core.catalog import RAW, Catalog
from ckptd.core.errors import CkptdError, CorruptionError, FormatError, NotFoundError
from ckptd.core.types import SnapshotId
from ckptd.format.chunk import decode_chunk
from ckptd.format.commit import MAX_COMMIT_BYTES, Commit, Part, decode_commit
from ckptd.format.layout import check_layout
from ckptd.format.manifest import from_parquet
from ckptd.format.objects import MAX_OBJECTS_BYTES, unpack_table
from ckptd.plan.whole import missing
from ckptd.tiers.store import names
from ckptd.tiers.store.backend import BackEnd, InputFile, Path, for_each
from ckptd.tiers.store.files import read_file, size_of
from ckptd.tiers.store.runs import in_place_order, run_starts

MAX_PART_BYTES = 2**31

Progress = Callable[[int, int], None]

_OPEN_FILES = 256
_BATCH_ROWS = 64


def read_commit(back_end: BackEnd, directory: str) -> Commit:
    """COMMIT of a checkpoint's directory. NotFoundError if there is none; FormatError, VersionError if not valid."""
    path = (directory, names.COMMIT)
    try:
        commit = decode_commit(read_file(back_end, path, MAX_COMMIT_BYTES))
    except CkptdError as error:
        # Errors of the disk name the path already.
        if isinstance(error, NotFoundError) or str(error).startswith(back_end.describe(path)):
            raise
        raise type(error)(f"{back_end.describe((directory,))}: {error}") from None
    named = names.parse_checkpoint(directory)
    if named is not None and named != commit.id:
        raise FormatError(f"{back_end.describe(path)}: is of {commit.id}; the directory was renamed, or COMMIT copied")
    return commit


class _Metadata(msgspec.Struct, array_like=True):
    """What is read before any chunk, as it is stored: the objects, and the parts of the manifest in COMMIT's order."""

    objects: bytes
    parts: list[bytes]


class StoredCheckpoint:
    """A committed checkpoint. Keeps data files open; a context manager, or closed when it is no longer used.

    `commit`: a COMMIT that is about to be put, to see whether all that it names is there."""

    def __init__(self, back_end: BackEnd, directory: str, commit: Commit | None = None) -> None:
        self._back_end = back_end
        self._directory = directory
        self.commit = read_commit(back_end, directory) if commit is None else commit
        self._catalog: Catalog | None = None
        self._given: dict[Path, bytes] = {}
        self._lengths_known = False
        self._files: dict[tuple[int, int], InputFile] = {}
        self._parts = {part.writer: part for part in self.commit.parts}
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def id(self) -> SnapshotId:
        return self.commit.id

    @property
    def job(self) -> str:
        return self.commit.job

    @property
    def name(self) -> str:
        """That of its directory."""
        return self._directory

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        return self._back_end.describe((self._directory,))

    @property
    def committed_at(self) -> float:
        """When it was committed, in seconds since 1970, as the file system remembers: for people, not for decisions."""
        with contextlib.closing(self._back_end.open((self._directory, names.COMMIT))) as file:
            return file.modified

    def __enter__(self) -> StoredCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its data files; no reads may be under way."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def catalog(self) -> Catalog:
        """All its chunks, parsed once; the lengths of all data files are checked against COMMIT."""
        with self._lock:
            if self._catalog is None:
                files = [(part, number) for part in self.commit.parts for number in range(len(part.data))]
                if not self._lengths_known:
                    for_each(self._back_end, lambda file: self._check_length(*file), files)
                self._catalog = Catalog.merge(self._catalogs())
                for part in self.commit.parts:
                    self._given.pop(names.manifest_part(self._directory, part.writer), None)
            return self._catalog

    def metadata(self) -> bytes:
        """Manifest and objects as they are stored, so that others need not read them: for their `adopt`."""
        parts = for_each(self._back_end, self._manifest, self.commit.parts)
        objects = self._objects()
        self._give(parts, objects)
        return msgspec.msgpack.encode(_Metadata(objects, parts))

    def adopt(self, metadata: bytes) -> None:
        """Takes what `metadata` gave another reader of this checkpoint, which looks at the lengths of all files too.
        It is believed no more than what is read here: each digest is compared with this reader's own COMMIT."""
        try:
            given = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            raise FormatError(f"{self.location}: what another rank sent of it: {error}") from None
        if len(given.parts) != len(self.commit.parts):
            raise CorruptionError(
                f"{self.location}: COMMIT lists {len(self.commit.parts)} parts, another rank sent {len(given.parts)}"
            )
        self._give(given.parts, given.objects)
        self._lengths_known = True

    def _give(self, parts: Sequence[bytes], objects: bytes) -> None:
        paths = [names.manifest_part(self._directory, part.writer) for part in self.commit.parts]
        self._given = {**dict(zip(paths, parts, strict=True)), (self._directory, names.OBJECTS): objects}

    def objects(self) -> dict[str, bytes]:
        """Encoded shared objects by path, for format.objects.decode."""
        data = self._objects()
        with self._naming((self._directory, names.OBJECTS)):
            return unpack_table(data)

    def _objects(self) -> bytes:
        listed = self.commit.objects
        return self._listed((self._directory, names.OBJECTS), listed.size, listed.sha256, MAX_OBJECTS_BYTES)

    @property
    def parallel(self) -> int:
        """How many reads at a time are worth while, cores apart."""
        return self._back_end.parallel

    def read(self, row: int, into: memoryview) -> None:
        """Fills `into`, of exactly the row's raw bytes, with its decoded bytes. CorruptionError if they are not those
        that were captured; `into` then holds garbage."""
        self._read(self.catalog(), row, into)

    def runs(self, rows: npt.ArrayLike) -> list[list[int]]:
        """`rows`, but for those without bytes, in order of place and cut into runs for `read_run`: neighbours in one
        file, of at most RUN_BYTES together, or one chunk."""
        catalog = self.catalog()
        order = in_place_order(catalog, rows)
        return [run.tolist() for run in np.split(order, run_starts(catalog, order)[1:])] if len(order) else []

    def read_run(self, rows: Sequence[int], into: Sequence[memoryview]) -> None:
        """`read` of each row of a run into its buffer, with one request to the store."""
        if len(rows) == 1:
            self.read(rows[0], into[0])
            return
        stored = self._scratch(self.stored_bytes(rows))
        self.fetch(rows, stored)
        self.decode(rows, stored, into)

    def expect(self, rows: Sequence[int]) -> None:
        """A run will be read soon: what comes from a disk may be on its way meanwhile."""
        catalog, first = self.catalog(), rows[0]
        with self._data_file((int(catalog.writer[first]), int(catalog.file[first]))) as file:
            file.expect(int(catalog.file_offset[first]), self.stored_bytes(rows))

    def stored_bytes(self, rows: Sequence[int]) -> int:
        """Bytes that `fetch` reads for a run."""
        catalog = self.catalog()
        end = max(int(catalog.file_offset[row] + catalog.stored[row]) for row in rows)
        return end - int(catalog.file_offset[rows[0]])

    def fetch(self, rows: Sequence[int], stored: memoryview) -> None:
        """Fills `stored`, of `stored_bytes`, with what is stored for a run; nothing is verified."""
        catalog, first = self.catalog(), rows[0]
        with self._data_file((int(catalog.writer[first]), int(catalog.file[first]))) as file:
            file.read_into(int(catalog.file_offset[first]), stored)

    def decode(self, rows: Sequence[int], stored: memoryview, into: Sequence[memoryview]) -> None:
        """Decodes and verifies a run that was fetched, here or by another reader, each row into its buffer.
        CorruptionError as from `read`."""
        catalog = self.catalog()
        start = int(catalog.file_offset[rows[0]])
        for row, target in zip(rows, into, strict=True):
            offset = int(catalog.file_offset[row]) - start
            self._decode(catalog, row, stored[offset : offset + int(catalog.stored[row])], target.cast("B"))

    def _read(self, catalog: Catalog, row: int, into: memoryview) -> None:
        raw = int(catalog.raw[row])
        target = into.cast("B")
        if target.nbytes != raw:
            raise ValueError(f"a buffer of {target.nbytes} bytes for a chunk of {raw}")
        if raw == 0:
            return
        straight = int(catalog.codec[row]) == RAW
        stored = target if straight else self._scratch(int(catalog.stored[row]))
        with self._data_file((int(catalog.writer[row]), int(catalog.file[row]))) as file:
            file.read_into(int(catalog.file_offset[row]), stored)
        if straight:
            self._check(catalog, row, native.crc32c(target))
        else:
            self._decode(catalog, row, stored, target)

    def _decode(self, catalog: Catalog, row: int, stored: memoryview, target: memoryview) -> None:
        """Decodes what is stored for a row, and verifies it."""
        try:
            found = decode_chunk(int(catalog.codec[row]), stored, catalog.tensors[catalog.tensor[row]].dtype, target)
        except FormatError as error:
            raise CorruptionError(f"{self._described(catalog, row)}: {error}") from None
        self._check(catalog, row, found)

    def _check(self, catalog: Catalog, row: int, found: int) -> None:
        expected = int(catalog.crc[row])
        if found != expected:
            raise CorruptionError(
                f"{self._described(catalog, row)}: expected CRC32C {expected:08x}, found {found:08x}; the file was "
                "damaged"
            )

    def _described(self, catalog: Catalog, row: int) -> str:
        """The place of a chunk, for messages."""
        file = names.data_file(self._directory, int(catalog.writer[row]), int(catalog.file[row]))
        key = catalog.tensors[catalog.tensor[row]].key
        return f"{self._back_end.describe(file)}: chunk at {int(catalog.file_offset[row])} of tensor {key!r}"

    def verify(self, progress: Progress | None = None, *, threads: int = 1) -> list[str]:
        """Reads everything; returns all that is wrong, one line each. `progress(bytes done, bytes in all)`.

        Goes part by part, so that one damaged file hides nothing about the others.
        """
        with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-verify") as executor:
            return _Verification(self, executor, progress).run()

    def _catalogs(self) -> list[Catalog]:
        """Those of all parts. Some are fetched at a time, one is parsed at a time: parsing takes memory."""
        found, at_once = [], self._back_end.parallel
        for first in range(0, len(self.commit.parts), at_once):
            parts = self.commit.parts[first : first + at_once]
            fetched = for_each(self._back_end, self._manifest, parts)
            found += [self._parsed(part, data) for part, data in zip(parts, fetched, strict=True)]
        return found

    def _manifest(self, part: Part) -> bytes:
        path = names.manifest_part(self._directory, part.writer)
        return self._listed(path, part.size, part.sha256, MAX_PART_BYTES)

    def part(self, part: Part) -> Catalog:
        """The chunks of one part, parsed; the lengths of its files are checked as well."""
        for number in range(len(part.data)):
            self._check_length(part, number)
        return self._part(part)

    def _part(self, part: Part) -> Catalog:
        return self._parsed(part, self._manifest(part))

    def _parsed(self, part: Part, data: bytes) -> Catalog:
        with self._naming(names.manifest_part(self._directory, part.writer)):
            catalog = from_parquet(data, part.rows)
            check_layout(catalog, part.writer, part.data)
            return catalog

    def _listed(self, path: Path, size: int, sha256: str, limit: int) -> bytes:
        """The contents of a file that COMMIT lists, once size and digest are right."""
        described = self._back_end.describe(path)
        if size > limit:
            raise FormatError(f"{described}: COMMIT says {size} bytes; expected at most {limit}")
        try:
            given = self._given.get(path)
            data = read_file(self._back_end, path, size) if given is None else given
        except NotFoundError as error:
            raise CorruptionError(f"{error}; COMMIT lists it") from None
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptionError(f"{described}: size or SHA-256 is not that in COMMIT; the file was damaged")
        return data

    def _check_length(self, part: Part, number: int) -> None:
        path = names.data_file(self._directory, part.writer, number)
        try:
            found = size_of(self._back_end, path)
        except NotFoundError as error:
            raise CorruptionError(f"{error}; COMMIT lists it") from None
        if found != part.data[number]:
            raise CorruptionError(f"{self._back_end.describe(path)}: expected {part.data[number]} bytes, found {found}")

    def _open(self, path: Path) -> InputFile:
        try:
            return self._back_end.open(path)
        except NotFoundError as error:
            raise CorruptionError(f"{error}; COMMIT lists it") from None

    @contextlib.contextmanager
    def _data_file(self, key: tuple[int, int]) -> Iterator[InputFile]:
        """A data file: the first _OPEN_FILES stay open, others are opened for each read."""
        with self._lock:
            file = self._files.get(key)
            if file is None and len(self._files) < _OPEN_FILES:
                file = self._files[key] = self._open(names.data_file(self._directory, *key))
        if file is not None:
            yield file
            return
        with contextlib.closing(self._open(names.data_file(self._directory, *key))) as passing:
            yield passing

    def _scratch(self, size: int) -> memoryview:
        """This thread's buffer for stored bytes."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = memoryview(bytearray(size))
        return buffer[:size]

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FormatError as error:
            raise type(error)(f"{self._back_end.describe(path)}: {error}") from None


class _Verification:
    """One pass over all files of a checkpoint."""

    def __init__(self, checkpoint: StoredCheckpoint, executor: Executor, progress: Progress | None) -> None:
        commit = checkpoint.commit
        self._checkpoint = checkpoint
        self._executor = executor
        self._progress = progress
        self._done = 0
        self._total = commit.data_bytes + commit.objects.size + sum(part.size for part in commit.parts)
        self._problems: list[str] = []

    def run(self) -> list[str]:
        self._attempt(self._checkpoint.objects)
        self._advance(self._checkpoint.commit.objects.size)
        for part in self._checkpoint.commit.parts:
            self._verify_part(part)
        if not self._problems:
            self._attempt(lambda: self._problems.extend(missing(self._checkpoint.catalog())))
        self._done = self._total
        self._advance(0)
        return self._problems

    def _attempt(self, check: Callable[[], object]) -> bool:
        try:
            check()
        except CkptdError as error:
            self._problems.append(str(error))
            return False
        return True

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _verify_part(self, part: Part) -> None:
        whole = [
            self._attempt(functools.partial(self._checkpoint._check_length, part, number))
            for number in range(len(part.data))
        ]
        catalogs: list[Catalog] = []
        self._attempt(lambda: catalogs.append(self._checkpoint._part(part)))
        self._advance(part.size)
        for catalog in catalogs:
            order = np.lexsort((catalog.file_offset, catalog.file))
            rows = [row for row in order[np.flatnonzero(catalog.raw[order])].tolist() if whole[catalog.file[row]]]
            batches = [rows[i : i + _BATCH_ROWS] for i in range(0, len(rows), _BATCH_ROWS)]
            check = functools.partial(self._verify_chunks, catalog)
            for batch, problems in zip(batches, self._executor.map(check, batches), strict=True):
                self._problems += problems
                self._advance(int(catalog.stored[batch].sum()))

    def _verify_chunks(self, catalog: Catalog, rows: list[int]) -> list[str]:
        problems = []
        buffer = memoryview(bytearray(int(catalog.raw[rows].max())))
        for row in rows:
            try:
                self._checkpoint._read(catalog, row, buffer[: int(catalog.raw[row])])
            except CkptdError as error:
                problems.append(str(error))
        return problems
