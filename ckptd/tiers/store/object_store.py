"""The back end of objects: S3, Google Cloud Storage and every other file system of pyarrow and fsspec.

Nothing is renamed or synced; an object is there when its upload is complete. Two things are known to go wrong with
uploads and are answered here: a stream that is dropped half-way publishes what it has, so the length of every object is
read back before its writer may speak of it; and a stream takes data faster than the network, so it is drained every
IN_FLIGHT_BYTES. An upload that is killed leaves nothing that can be listed; the bucket's lifecycle rule for incomplete
multipart uploads frees it (docs/format.md, section 9).

An existing name is refused before it is written, which is no lock: names that no two writers share make it safe.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pyarrow.fs as pafs

from ckptd.core.errors import CkptdError, CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.tiers.store import filesystems
from ckptd.tiers.store.backend import Entry, Path
from ckptd.tiers.store.location import Location
from ckptd.tiers.store.posix import open_root

IN_FLIGHT_BYTES = 64 * 1024 * 1024
"""Bytes of one object that may wait in memory for the network."""
RANGE_BYTES = 4 * 1024 * 1024
"""Longer reads are taken apart into ranges of this size, read at the same time: one connection is slow."""

_PARALLEL = 16


def open_objects(location: Location, create: bool) -> ObjectBackEnd:
    """The objects at a location. NotFoundError if there are none; `create` marks the place, so that an empty store
    exists, but makes no bucket unless the URI says so."""
    with named_errors(location.text, "open"):
        found = filesystems.find(location)
        kind = found.system.get_file_info(found.root).type
        if kind is pafs.FileType.NotFound and create:
            _make_place(location, found)
        elif kind is pafs.FileType.NotFound:
            raise NotFoundError(f"{location.text}: nothing is there; expected a store")
        elif kind is not pafs.FileType.Directory:
            raise NotFoundError(f"{location.text}: is an object; expected a store, below which objects are")
    return ObjectBackEnd(found, location.text)


def _make_place(location: Location, found: filesystems.ObjectSystem) -> None:
    bucket = found.root.partition("/")[0]
    needed = found.buckets and ("allow_bucket_creation", "true") not in location.options
    if needed and found.system.get_file_info(bucket).type is pafs.FileType.NotFound:
        raise NotFoundError(f"{location.text}: there is no bucket {bucket!r}; create it, or correct its name")
    if isinstance(found.system, pafs.LocalFileSystem):
        open_root(found.root, create=True)  # with the modes of a store of files
    else:
        found.system.create_dir(found.root, recursive=True)


class ObjectBackEnd:
    """See `BackEnd`."""

    parallel = _PARALLEL

    def __init__(self, place: filesystems.ObjectSystem, text: str) -> None:
        self._place = place
        self._system = place.system
        self._text = text
        self._made: set[str] = set()
        self._ranges = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="ckptd-ranges")

    def describe(self, path: Path) -> str:
        return "/".join((self._text, *path))

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        """Nothing: directories are made with the objects in them."""

    def create(self, path: Path) -> ObjectOutput:
        with named_errors(self.describe(path), "create"):
            if self._information(path).type is not pafs.FileType.NotFound:
                raise StoreError(f"{self.describe(path)}: create: exists already")
            return self._open_output(path)

    def write(self, path: Path, data: bytes) -> None:
        with contextlib.closing(self.create(path)) as file:
            file.write(data)
            file.sync()

    def prepare(self, path: Path, temporary: Path, data: bytes) -> Callable[[], None]:
        def put() -> None:
            with named_errors(self.describe(path), "write"):
                opened = self._open_output(path)
            with contextlib.closing(opened) as file:
                file.write(data)
                file.sync()

        return put

    def confirm(self, path: Path, temporary: Path, data: bytes) -> None:
        """Nothing: an object that is seen is durable, and putting it again might cut it short."""

    def link(self, source: Path, target: Path, length: int) -> bool:
        try:
            if self._information(target).type is not pafs.FileType.NotFound:
                return False  # and whoever writes it is told so
            self._make_parent(target)
            with named_errors(self.describe(target), "copy"):
                self._system.copy_file(self._key(source), self._key(target))
            if self.length(target) == length:
                return True
        except (StoreError, NotFoundError):  # pruned; a system that cannot copy
            pass
        self.discard(target)
        return False

    def settle(self, path: Path) -> None:
        """Nothing: an object is durable with its name."""

    def open(self, path: Path) -> ObjectInput:
        with named_errors(self.describe(path), "open"):
            # A store of objects has nothing else; a directory tree may have pipes, and opening one would wait.
            if self._place.directories:
                kind = self._information(path).type
                if kind not in (pafs.FileType.File, pafs.FileType.NotFound):
                    raise FormatError(f"{self.describe(path)}: expected a regular file")
            file = self._system.open_input_file(self._key(path))
            return ObjectInput(self, path, file, self._ranges if self._place.threads else None)

    def list(self, path: Path) -> list[Entry]:
        key = self._key(path)
        with named_errors(self.describe(path), "list"):
            selector = pafs.FileSelector(key, allow_not_found=True, recursive=self._place.flat)
            found = self._system.get_file_info(selector)
        if not found and path:  # where directories are but parts of names, an empty one is none
            raise NotFoundError(f"{self.describe(path)}: list: nothing is there")
        if not self._place.flat:
            return [Entry(entry.base_name, entry.type is pafs.FileType.Directory) for entry in found]
        entries: dict[str, bool] = {}
        for entry in found:
            name, inside, _ = entry.path.removeprefix(key + "/").partition("/")
            entries[name] = entries.get(name, False) or bool(inside) or entry.type is pafs.FileType.Directory
        return [Entry(name, is_directory) for name, is_directory in entries.items()]

    def discard(self, path: Path) -> None:
        self._remove(path, self._system.delete_file)

    def remove_tree(self, path: Path) -> None:
        self._remove(path, self._system.delete_dir)
        self._made.clear()

    def _remove(self, path: Path, remove: Callable[[str], None]) -> None:
        """Each file system says in its own way that there is nothing to remove, so it is looked at instead."""
        with named_errors(self.describe(path), "remove"):
            try:
                remove(self._key(path))
            except Exception:
                if self._information(path).type is not pafs.FileType.NotFound:
                    raise

    def length(self, path: Path) -> int | None:
        """Bytes of an object as the system has it now; None if there is none."""
        size: int | None = self._information(path).size
        return size

    def modified(self, path: Path) -> float:
        """When an object was put; 0 if nobody knows."""
        return float(self._information(path).mtime_ns or 0) / 1e9

    def _information(self, path: Path) -> pafs.FileInfo:
        with named_errors(self.describe(path), "look up"):
            return self._system.get_file_info(self._key(path))

    def _make_parent(self, path: Path) -> None:
        parent = self._key(path[:-1])
        if self._place.directories and parent not in self._made:
            self._system.create_dir(parent, recursive=True)
            self._made.add(parent)

    def _open_output(self, path: Path) -> ObjectOutput:
        self._make_parent(path)
        return ObjectOutput(self, path, self._system.open_output_stream(self._key(path), compression=None))

    def _key(self, path: Path) -> str:
        return "/".join((self._place.root, *path))


class ObjectOutput:
    """See `OutputFile`. `sync` completes the upload. Closing without it may publish a short object."""

    def __init__(self, back_end: ObjectBackEnd, path: Path, stream: Any) -> None:
        self._back_end = back_end
        self._path = path
        self._stream = stream
        self._length = 0
        self._in_flight = 0
        self._failed = False

    def write(self, data: bytes | memoryview) -> None:
        with self._failing("write"):
            self._stream.write(data)
            self._length += len(data)
            self._in_flight += len(data)
            if self._in_flight >= IN_FLIGHT_BYTES:
                self._stream.flush()
                self._in_flight = 0

    def sync(self) -> None:
        with self._failing("complete the upload"):
            self._stream.close()
            found = self._back_end.length(self._path)
            if found != self._length:
                described = self._back_end.describe(self._path)
                raise StoreError(f"{described}: uploaded {self._length} bytes, found {found}; the upload was cut short")

    def close(self) -> None:
        self._failed = True
        with contextlib.suppress(Exception):  # what an upload that nobody wants may still say
            self._stream.close()

    @contextlib.contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        described = self._back_end.describe(self._path)
        if self._failed:
            raise StoreError(f"{described}: {action}: the file was given up after an earlier failure")
        try:
            with named_errors(described, action):
                yield
        except BaseException:
            self._failed = True
            raise


class ObjectInput:
    """See `InputFile`. `ranges` reads several ranges at a time; without it the file is read by one thread at a time."""

    def __init__(self, back_end: ObjectBackEnd, path: Path, file: Any, ranges: ThreadPoolExecutor | None) -> None:
        self._back_end = back_end
        self._path = path
        self._file = file
        self._ranges = ranges
        self._turn = threading.Lock()
        self.size: int = file.size()

    @property
    def modified(self) -> float:
        return self._back_end.modified(self._path)

    def expect(self, offset: int, size: int) -> None:
        """Nothing reads ahead."""

    def read_into(self, offset: int, into: memoryview) -> None:
        view = into.cast("B")
        described = self._back_end.describe(self._path)
        if offset + len(view) > self.size:
            raise CorruptionError(f"{described}: ends at {self.size}; it was truncated")
        with named_errors(described, "read"):
            if self._ranges is None:
                with self._turn:
                    self._read(offset, view)
            elif len(view) <= RANGE_BYTES:
                self._read(offset, view)
            else:
                starts = range(0, len(view), RANGE_BYTES)
                work = [self._ranges.submit(self._read, offset + s, view[s : s + RANGE_BYTES]) for s in starts]
                wait(work)  # of all: after an error nobody may go on writing into `into`
                for future in work:
                    future.result()

    def _read(self, offset: int, into: memoryview) -> None:
        data = self._file.read_at(len(into), offset)
        if len(data) != len(into):
            described = self._back_end.describe(self._path)
            raise CorruptionError(f"{described}: ends at {offset + len(data)}; it was truncated")
        into[:] = data

    def close(self) -> None:
        with contextlib.suppress(Exception):  # reading is over; nothing depends on it
            self._file.close()


@contextlib.contextmanager
def named_errors(path: str, action: str) -> Iterator[None]:
    """Errors of the file system as ours, naming path and reason."""
    try:
        yield
    except CkptdError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{path}: {action}: no such object") from None
    # Each file system raises what its own client does: OSError, ArrowInvalid, botocore's and aiohttp's errors.
    except Exception as error:
        raise StoreError(f"{path}: {action}: {error or type(error).__name__}") from error
