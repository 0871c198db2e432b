"""Files of torch.save: read by position without torch, written as a stream.

A file is a zip archive, stored uncompressed: `data.pkl`, a pickle that describes tensors as views of storages, and a
record `data/<number>` for each storage. Reading takes the pickle as data (`pickles`, as narrow as weights_only=True)
and then only needs to know where records lie; tensors are never loaded whole. Writing makes the same archive, record by
record, so that torch.load(weights_only=True) reads it. There is a pickle in it by nature: whoever exports is told.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from collections import OrderedDict
from typing import IO, Any, NamedTuple

from ckptd.core.box import Box
from ckptd.core.errors import FormatError
from ckptd.core.types import itemsize
from ckptd.interop.pickles import TENSOR_GLOBALS, TensorView, read_pickle, storage_of
from ckptd.interop.pieces import Files, ForeignFile, Piece

MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 256 * 1024**2
MAX_RECORDS = 2**22

_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20


class Archive(NamedTuple):
    """The value that a file holds, with `TensorView` for tensors; where its records lie: (offset, size); how long the
    pickle is."""

    value: Any
    records: dict[str, tuple[int, int]]
    pickle_bytes: int


def is_torch_file(path: str) -> bool:
    """Whether a path is a file that begins as a zip archive."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_archive(file: ForeignFile, offset: int, size: int, what: str) -> Archive:
    """The archive in a range of a file (a whole file, or an item of a .distcp). Raises FormatError."""
    try:
        with file.window(offset, size) as window, zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_RECORDS:
                raise FormatError(f"{len(infos)} records; expected at most {MAX_RECORDS}")
            root, pickled = _pickle_of(infos)
            _check_stored(pickled, MAX_PICKLE_BYTES)
            records = {}
            order = None
            for info in infos:
                if info.filename == f"{root}byteorder":
                    order = info
                elif info.filename.startswith(f"{root}data/"):
                    _check_stored(info, size)
                    records[info.filename.removeprefix(f"{root}data/")] = _place(file, offset, size, info)
            if order is not None:
                _check_stored(order, 16)
                if archive.read(order) != b"little":
                    raise FormatError("its tensors are not little-endian")
            data = archive.read(pickled)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        raise FormatError(f"{what}: not a file of torch.save that can be read: {error}") from None
    return Archive(read_pickle(data, TENSOR_GLOBALS, what, storage_of), records, len(data))


def _pickle_of(infos: list[zipfile.ZipInfo]) -> tuple[str, zipfile.ZipInfo]:
    found = [info for info in infos if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
    if len(found) != 1 or len({info.filename for info in infos}) != len(infos):
        raise FormatError(f"a zip archive with {len(found)} records data.pkl, or with records of one name")
    return found[0].filename.removesuffix("data.pkl"), found[0]


def _check_stored(info: zipfile.ZipInfo, limit: int) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise FormatError(f"record {info.filename[:80]!r} is compressed or encrypted; torch.save stores plainly")
    if info.file_size > limit:
        raise FormatError(f"record {info.filename[:80]!r} has {info.file_size} bytes; expected at most {limit}")


def _place(file: ForeignFile, offset: int, size: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes begin in the file, and how many there are."""
    start = info.header_offset
    if start < 0 or start + _LOCAL_HEADER_BYTES > size:
        raise FormatError(f"record {info.filename[:80]!r} lies outside of the archive")
    header = file.read(offset + start, _LOCAL_HEADER_BYTES)
    names, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    begin = start + _LOCAL_HEADER_BYTES + names + extra
    if header[:4] != MAGIC or begin + info.file_size > size:
        raise FormatError(f"record {info.filename[:80]!r} lies outside of the archive")
    return offset + begin, info.file_size


def piece_of(view: TensorView, key: str, archive: Archive, file: int, what: str) -> Piece:
    """A tensor of an archive as a piece of the file; FormatError where the view leaves its storage."""
    dtype = view.dtype or view.storage.dtype
    if dtype is None:
        raise FormatError(f"{what}: tensor {key!r}: bytes without a dtype")
    if view.storage.record not in archive.records:
        raise FormatError(f"{what}: tensor {key!r}: no record {view.storage.record}")
    start, size = archive.records[view.storage.record]
    width = itemsize(dtype)
    held = view.storage.elements * itemsize(view.storage.dtype or "uint8")
    reach = 0
    if 0 not in view.sizes:
        reach = view.offset + 1 + sum((n - 1) * abs(s) for n, s in zip(view.sizes, view.strides, strict=True))
    if held > size or view.offset < 0 or reach * width > held:
        raise FormatError(
            f"{what}: tensor {key!r}: reaches to byte {reach * width} of a storage of {held} bytes, of which {size} "
            "are there"
        )
    return Piece(key, dtype, view.sizes, Box.whole(view.sizes), file, start + view.offset * width, view.strides)


def read(path: str, files: Files) -> tuple[Archive, int]:
    """(the archive, the file's number)."""
    number = files.add(path)
    return read_archive(files[number], 0, files[number].size, path), number


class Placeholder:
    """A tensor of a file to be written: its bytes follow later."""

    def __init__(self, dtype: str, sizes: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.sizes = sizes
        self.record = -1


def pickle_value(value: Any) -> bytes:
    """The pickle of a value with placeholders, as torch.save would make it; numbers the placeholders' records."""
    import pickle

    import torch

    from ckptd.tensors.values import torch_dtype

    records = itertools.count()

    class Storage:
        """What a placeholder refers to; never pickled itself."""

        def __init__(self, of: Placeholder) -> None:
            self.of = of

    class Pickler(pickle.Pickler):
        """As torch.save's, with placeholders for tensors."""

        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Storage):
                return None
            count = 1
            for size in obj.of.sizes:
                count *= size
            if torch_storage(obj.of.dtype) is torch.UntypedStorage:
                count *= itemsize(obj.of.dtype)
            return "storage", torch_storage(obj.of.dtype), str(obj.of.record), "cpu", count

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, Placeholder):
                return NotImplemented
            if obj.record < 0:
                obj.record = next(records)
            strides = [1] * len(obj.sizes)
            for dimension in range(len(obj.sizes) - 2, -1, -1):
                strides[dimension] = strides[dimension + 1] * max(obj.sizes[dimension + 1], 1)
            view: tuple[Any, ...] = (Storage(obj), 0, obj.sizes, tuple(strides), False, OrderedDict())
            if torch_storage(obj.dtype) is torch.UntypedStorage:
                return torch._utils._rebuild_tensor_v3, (*view, torch_dtype(obj.dtype), None)
            return torch._utils._rebuild_tensor_v2, view

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def torch_storage(dtype: str) -> Any:
    """The class by which a pickle names storages of a dtype; UntypedStorage where there is none of its own."""
    import torch

    named = {
        "bool": "Bool",
        "uint8": "Byte",
        "int8": "Char",
        "int16": "Short",
        "int32": "Int",
        "int64": "Long",
        "float16": "Half",
        "bfloat16": "BFloat16",
        "float32": "Float",
        "float64": "Double",
        "complex64": "ComplexFloat",
        "complex128": "ComplexDouble",
    }
    return getattr(torch, f"{named[dtype]}Storage") if dtype in named else torch.UntypedStorage


class ArchiveWriter:
    """Writes a file of torch.save, record after record; a context manager."""

    def __init__(self, path: str, pickled: bytes, root: str = "archive") -> None:
        self._root = root
        self._archive = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED)
        self._archive.writestr(f"{root}/data.pkl", pickled)
        self._archive.writestr(f"{root}/byteorder", b"little")
        self._record: IO[bytes] | None = None

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_record()
        self._archive.writestr(f"{self._root}/version", b"3\n")
        self._archive.close()

    def begin(self, record: int, size: int) -> None:
        """Begins a record of `size` bytes, aligned to 64 as torch aligns them."""
        self._end_record()
        info = zipfile.ZipInfo(f"{self._root}/data/{record}")
        large = size >= 2**31
        begin = self._archive.start_dir + _LOCAL_HEADER_BYTES + len(info.filename) + (_ZIP64_BYTES if large else 0)
        padding = -(begin + 4) % 64
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        info.file_size = size
        self._record = self._archive.open(info, "w", force_zip64=large)

    def write(self, data: memoryview) -> None:
        """Appends to the record."""
        if self._record is None:
            raise ValueError("no record was begun")
        self._record.write(data)

    def _end_record(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None
