"""Tensors inside other people's files as an origin of chunks: which bytes of which file are which box.

Owns the reading of foreign files by position. A piece is a box of a tensor as a strided run of bytes in one file; it is
cut into chunks, and only a chunk at a time is read. Invariants: no byte is read outside of a file; every piece was
checked to lie inside its file before any is read. Knows no file format.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ckptd.core.box import CHUNK_BYTES, Box, contiguous_strides, cut
from ckptd.core.catalog import MAX_DIMENSIONS, Catalog
from ckptd.core.errors import ConfigError, CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.core.types import itemsize
from ckptd.format.manifest import MAX_KEY_BYTES
from ckptd.operations.reshard import Origin
from ckptd.plan.share import OBJECTS_PREFIX

_MAX_TENSOR_BYTES = 2**62


class ForeignFile:
    """A regular file somebody else wrote, opened for reading; links to one are followed (caches are full of them)."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from None
        self._status = os.fstat(self._descriptor)
        if not stat.S_ISREG(self._status.st_mode):
            os.close(self._descriptor)
            raise FormatError(f"{path}: expected a regular file")

    @property
    def size(self) -> int:
        return self._status.st_size

    @property
    def identity(self) -> tuple[str, int, int]:
        """What changes when the file does."""
        return self.path, self.size, self._status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file, all of which must be there; the size must have been checked to be sensible."""
        self.check(offset, size)
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def check(self, offset: int, size: int) -> None:
        """FormatError for bytes that lie outside of the file."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FormatError(f"{self.path}: says it has bytes {offset} to {offset + size}; it has {self.size}")

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`."""
        while into:
            try:
                count = os.preadv(self._descriptor, [into], offset)
            except OSError as error:
                raise StoreError(f"{self.path}: read: {error.strerror}") from None
            if count == 0:
                raise CorruptionError(f"{self.path}: ends at {offset}; it was cut short while it was read")
            into = into[count:]
            offset += count

    def window(self, offset: int, size: int) -> io.BufferedReader:
        """Bytes of the file as a file of their own."""
        self.check(offset, size)
        return io.BufferedReader(_Window(self, offset, size))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Window(io.RawIOBase):
    """See `ForeignFile.window`."""

    def __init__(self, file: ForeignFile, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        into = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        self._file.read_into(self._offset + self._position, into)
        self._position += into.nbytes
        return into.nbytes


class Files:
    """The files of one import, each opened once; a context manager."""

    def __init__(self) -> None:
        self.files: list[ForeignFile] = []
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self.files:
            file.close()

    def add(self, path: str) -> int:
        """The number of the file at `path`."""
        if path not in self._numbers:
            self._numbers[path] = len(self.files)
            self.files.append(ForeignFile(path))
        return self._numbers[path]

    def __getitem__(self, number: int) -> ForeignFile:
        return self.files[number]


class Piece(NamedTuple):
    """The box `box` of tensor `key` (whole `shape`): from byte `offset` of file `file` on, `strides` in elements (None:
    packed, row-major)."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    file: int
    offset: int
    strides: tuple[int, ...] | None = None


class _Chunk(NamedTuple):
    """A box, its first byte in the file, and how many bytes from there on it spans; strides in bytes if not packed."""

    box: Box
    offset: int
    span: int
    strides: tuple[int, ...] | None


def origin_of_pieces(pieces: Sequence[Piece], files: Files, name: str) -> Origin:
    """An origin for `operations.reshard`. Raises FormatError for pieces that cannot be, ConfigError for keys that mean
    something else in a checkpoint."""
    infos: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for piece in pieces:
        _check(piece, files)
        info = infos.setdefault(piece.key, (piece.key, piece.dtype, piece.shape))
        if info[1:] != (piece.dtype, piece.shape):
            raise FormatError(f"{name}: tensor {piece.key!r} is {info[1:]} and {(piece.dtype, piece.shape)}")
    index = {key: number for number, key in enumerate(infos)}
    # Rows as the catalog will have them: by key, then as given.
    order = sorted(range(len(pieces)), key=lambda number: pieces[number].key)
    rows = [(pieces[number], chunk) for number in order for chunk in _chunks(pieces[number])]
    width = max((len(info[2]) for info in infos.values()), default=0)
    boxes = [chunk.box for _, chunk in rows]
    catalog = Catalog.build(
        infos.values(),
        [index[piece.key] for piece, _ in rows],
        np.array([[*box.offsets, *[0] * (width - len(box.offsets))] for box in boxes], np.int64).reshape(
            len(rows), width
        ),
        np.array([[*box.sizes, *[1] * (width - len(box.sizes))] for box in boxes], np.int64).reshape(len(rows), width),
        file=[piece.file for piece, _ in rows],
        file_offset=[chunk.offset for _, chunk in rows],
    )
    strided = {row: chunk for row, (_, chunk) in enumerate(rows) if chunk.strides is not None}
    return Origin(catalog, _Reader(catalog, files, strided).read, name, _fingerprint(files, catalog))


class _Reader:
    """Reads the chunks of a catalog of pieces."""

    def __init__(self, catalog: Catalog, files: Files, strided: dict[int, _Chunk]) -> None:
        self._catalog = catalog
        self._files = files
        self._strided = strided

    def read(self, row: int, into: memoryview) -> None:
        catalog = self._catalog
        file, offset = self._files[int(catalog.file[row])], int(catalog.file_offset[row])
        info = catalog.tensors[catalog.tensor[row]]
        chunk = self._strided.get(row)
        if chunk is None or chunk.strides is None:
            file.read_into(offset, into)
        else:
            width = itemsize(info.dtype)
            span = np.frombuffer(file.read(offset, chunk.span), np.uint8)
            source = np.lib.stride_tricks.as_strided(span, (*chunk.box.sizes, width), (*chunk.strides, 1))
            np.copyto(np.frombuffer(into, np.uint8).reshape(*chunk.box.sizes, width), source)
        if info.dtype == "bool" and np.frombuffer(into, np.uint8).max(initial=0) > 1:
            raise FormatError(f"{file.path}: tensor {info.key!r} is bool and has bytes other than 0 and 1")


def _check(piece: Piece, files: Files) -> None:
    where = f"{files[piece.file].path}: tensor {piece.key[:80]!r}"
    if piece.key.startswith(OBJECTS_PREFIX):
        raise ConfigError(f"{where}: names under {OBJECTS_PREFIX!r} are ckptd's own; import it under another name")
    try:
        length = len(piece.key.encode())
    except UnicodeEncodeError:
        raise FormatError(f"{where}: a name with lone surrogates, which is no UTF-8") from None
    if not 0 < length <= MAX_KEY_BYTES:
        raise FormatError(f"{where}: a name of {length} bytes; expected 1 to {MAX_KEY_BYTES}")
    width = itemsize(piece.dtype)
    dimensions = len(piece.shape)
    if dimensions > MAX_DIMENSIONS or math.prod(piece.shape) * width > _MAX_TENSOR_BYTES:
        raise FormatError(f"{where}: shape {list(piece.shape)[:MAX_DIMENSIONS]} is not a shape")
    if not piece.box.inside(piece.shape):
        raise FormatError(f"{where}: {piece.box} lies outside of shape {list(piece.shape)}")
    if piece.strides is None:
        files[piece.file].check(piece.offset, piece.box.elements * width)
        return
    if len(piece.strides) != dimensions or any(stride < 0 for stride in piece.strides):
        raise FormatError(f"{where}: strides {list(piece.strides)} for sizes {list(piece.box.sizes)}")
    span = _span(piece.box.sizes, piece.strides) * width
    files[piece.file].check(piece.offset, span)
    if piece.box.elements * width > max(span, 0):
        raise FormatError(f"{where}: elements that share memory (strides {list(piece.strides)}); make it contiguous")


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """From the first element to behind the last, in elements."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _chunks(piece: Piece) -> Iterator[_Chunk]:
    """The piece as chunks of which each spans at most a chunk's bytes in the file."""
    width = itemsize(piece.dtype)
    sizes = piece.box.sizes
    packed = contiguous_strides(sizes)
    if piece.strides is None or all(
        size <= 1 or stride == expected for size, stride, expected in zip(sizes, piece.strides, packed, strict=True)
    ):
        offset = piece.offset
        for box in cut(piece.box, width):
            size = box.elements * width
            yield _Chunk(box, offset if size else 0, size, None)
            offset += size
        return
    yield from _strided_chunks(piece.box, piece.offset, tuple(stride * width for stride in piece.strides), width)


def _strided_chunks(box: Box, offset: int, strides: tuple[int, ...], width: int) -> Iterator[_Chunk]:
    """Halves a box, along what reaches farthest in the file, until it spans no more than a chunk."""
    reach = [(size - 1) * stride for size, stride in zip(box.sizes, strides, strict=True)]
    span = sum(reach) + width if box.elements else 0
    if span <= CHUNK_BYTES:
        yield _Chunk(box, offset if span else 0, span, strides)
        return
    dimension = reach.index(max(reach))
    half = box.sizes[dimension] // 2
    for start, size in ((0, half), (half, box.sizes[dimension] - half)):
        offsets = tuple(o + start * (d == dimension) for d, o in enumerate(box.offsets))
        sizes = tuple(size if d == dimension else s for d, s in enumerate(box.sizes))
        yield from _strided_chunks(Box(offsets, sizes), offset + start * strides[dimension], strides, width)


def refuse_overlaps(ranges: Iterable[tuple[int, int, int]], files: Files) -> None:
    """FormatError where two of the (file, offset, size) have a byte in common."""
    last = (-1, 0, 0)
    for file, offset, size in sorted(ranges):
        if size and file == last[0] and offset < last[1] + last[2]:
            raise FormatError(f"{files[file].path}: what lies at {last[1]} and at {offset} overlaps")
        if size:
            last = (file, offset, size)


def _fingerprint(files: Files, catalog: Catalog) -> bytes:
    """Files by path, size and time, and what was found in them."""
    digest = hashlib.sha256(repr([file.identity for file in files.files]).encode())
    digest.update(repr(catalog.tensors).encode("utf-8", "surrogatepass"))
    for column in (catalog.tensor, catalog.offsets, catalog.sizes, catalog.file, catalog.file_offset):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.digest()
