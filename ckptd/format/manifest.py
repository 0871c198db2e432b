"""Manifest parts: a writer's rows of the catalog as Parquet (docs/format.md, section 5).

Writing keeps the profile of the document; reading checks it before a page is decoded, decodes one row group at a time,
and returns a Catalog whose rows are sorted by key and whose boxes lie inside their tensors. Places are checked
by format.layout, digests by the caller.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import ALL_RANKS, MAX_CHUNKS, Catalog
from ckptd.core.errors import FormatError
from ckptd.core.types import itemsize
from ckptd.format.parquet_profile import MAX_DIMENSIONS, ROW_GROUP_ROWS, check_profile

MAX_KEY_BYTES = 1024
MAX_BOX_NUMBERS = 2**28
"""Rows times dimensions of one part."""

_MAX_TENSOR_BYTES = 2**62
_LISTS = ("shape", "offsets", "sizes")
_NUMBERS = {
    "rank": pa.int32(),
    "writer": pa.int32(),
    "file": pa.int32(),
    "file_offset": pa.int64(),
    "stored": pa.int64(),
    "raw": pa.int64(),
    "codec": pa.uint8(),
    "crc32c": pa.uint32(),
}
_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("key", "dtype")]
    + [pa.field(name, pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False) for name in _LISTS]
    + [pa.field(name, kind, nullable=name == "rank") for name, kind in _NUMBERS.items()]
)
_READ_SCHEMA = pa.schema(
    [pa.field(name, pa.dictionary(pa.int32(), pa.string()), nullable=False) for name in ("key", "dtype")]
    + [_SCHEMA.field(name) for name in _SCHEMA.names[2:]]
)
_ENCODED = ["key", "dtype", *(f"{name}.list.element" for name in _LISTS), "rank", "writer", "file", "codec"]
_PLAIN = "crc32c"

Ints = npt.NDArray[np.int64]


def to_parquet(catalog: Catalog) -> bytes:
    """The bytes of a part with all rows of `catalog`; raises FormatError for keys and sizes the format cannot hold."""
    for info in catalog.tensors:
        _check_tensor(info.key, info.dtype, info.shape)
    sink = pa.BufferOutputStream()
    compressed = dict.fromkeys([*_ENCODED, *_NUMBERS], "zstd") | {_PLAIN: "none"}
    with pq.ParquetWriter(
        sink,
        _SCHEMA,
        compression=compressed,
        use_dictionary=_ENCODED,
        column_encoding={_PLAIN: "PLAIN"},
        data_page_version="1.0",
        write_statistics=False,
        store_schema=False,
    ) as writer:
        for start in range(0, len(catalog), ROW_GROUP_ROWS):
            writer.write_table(_table(catalog, slice(start, start + ROW_GROUP_ROWS)), row_group_size=ROW_GROUP_ROWS)
    return bytes(sink.getvalue())


def from_parquet(data: bytes, rows: int) -> Catalog:
    """The rows of a part that COMMIT says has `rows` of them. Raises FormatError."""
    if rows > MAX_CHUNKS:
        raise FormatError(f"manifest part: {rows} rows; at most {MAX_CHUNKS}")
    try:
        check_profile(data, rows)
        collected = _Rows(rows)
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["key", "dtype"])
        for index in range(file.num_row_groups):
            collected.add(file.read_row_group(index, use_threads=False))
        return collected.catalog()
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise FormatError(f"manifest part: cannot be decoded: {error}") from None
    except FormatError as error:
        raise FormatError(f"manifest part: {error}") from None


def _check_tensor(key: str, dtype: str, shape: tuple[int, ...]) -> None:
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise FormatError(f"tensor {key!r}: the key has lone surrogates and cannot be written as UTF-8") from None
    if not 0 < length <= MAX_KEY_BYTES:
        raise FormatError(f"tensor {key[:80]!r}: a key of {length} bytes; expected 1 to {MAX_KEY_BYTES}")
    if (
        len(shape) > MAX_DIMENSIONS
        or min(shape, default=0) < 0
        or math.prod(shape) * itemsize(dtype) > _MAX_TENSOR_BYTES
    ):
        raise FormatError(f"tensor {key!r}: shape {shape} is not a shape")


def _table(catalog: Catalog, rows: slice) -> Any:
    """Rows of the catalog as an Arrow table of _SCHEMA."""
    tensor = catalog.tensor[rows]
    used, index = np.unique(tensor, return_inverse=True)
    infos = [catalog.tensors[i] for i in used]
    dimensions = np.array([len(info.shape) for info in infos], np.int64)[index] if infos else np.zeros(0, np.int64)
    width = catalog.offsets.shape[1]
    shapes = np.ones((len(infos), width), np.int64)
    for position, info in enumerate(infos):
        shapes[position, : len(info.shape)] = info.shape
    columns = [
        pa.array([info.key for info in infos], pa.string()).take(pa.array(index)),
        pa.array([info.dtype for info in infos], pa.string()).take(pa.array(index)),
        _lists(shapes[index], dimensions),
        _lists(catalog.offsets[rows], dimensions),
        _lists(catalog.sizes[rows], dimensions),
        pa.array(catalog.rank[rows], pa.int32(), mask=catalog.rank[rows] == ALL_RANKS),
    ]
    columns += [
        pa.array(getattr(catalog, "crc" if name == "crc32c" else name)[rows], kind)
        for name, kind in _NUMBERS.items()
        if name != "rank"
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _lists(padded: Ints, dimensions: Ints) -> Any:
    """An Arrow list column of the first `dimensions` numbers of every row."""
    ends = np.concatenate([[0], np.cumsum(dimensions)]).astype(np.int32)
    values = padded[np.arange(padded.shape[1]) < dimensions[:, None]]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values), type=_SCHEMA.field("shape").type)


class _Rows:
    """Collects row groups, checks what binds rows together, and makes the catalog."""

    def __init__(self, rows: int) -> None:
        self._expected = rows
        self._tensors: list[tuple[str, str, tuple[int, ...]]] = []
        self._tensor: list[Ints] = []
        self._boxes: list[tuple[Ints, Ints]] = []
        self._numbers: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _NUMBERS}

    def add(self, table: Any) -> None:
        """The rows of one row group; keys must go on in order."""
        if not table.schema.equals(_READ_SCHEMA):
            raise FormatError("its columns are not those of a manifest")
        table.validate(full=True)  # Parquet's decoder does not check that indices lie inside their dictionary
        (shape, dimensions), (offsets, dims_of_offsets), (sizes, dims_of_sizes) = (
            _padded(table, name, fill) for name, fill in zip(_LISTS, (1, 0, 1), strict=True)
        )
        if not (np.array_equal(dimensions, dims_of_offsets) and np.array_equal(dimensions, dims_of_sizes)):
            raise FormatError("shape, offsets and sizes of a chunk differ in length")
        if self._expected * shape.shape[1] > MAX_BOX_NUMBERS:
            raise FormatError(f"{self._expected} rows of {shape.shape[1]} dimensions")
        keys, key = _dictionary(table, "key")
        dtypes, dtype = _dictionary(table, "dtype")
        begins = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
        first = np.repeat(begins, np.diff(np.append(begins, len(key))))
        same = (shape == shape[first]).all(axis=1) & (dimensions == dimensions[first]) & (dtype == dtype[first])
        if not same.all():
            row = int(np.flatnonzero(~same)[0])
            raise FormatError(f"tensor {keys[key[row]]!r}: its chunks differ in dtype or shape")
        tensor = np.empty(len(begins), np.int64)
        for run, row in enumerate(begins.tolist()):
            extent = tuple(shape[row, : dimensions[row]].tolist())
            tensor[run] = self._number(keys[key[row]], dtypes[dtype[row]], extent, goes_on=run == 0)
        self._tensor.append(np.repeat(tensor, np.diff(np.append(begins, len(key)))))
        self._check_bytes(sizes, tensor, begins, len(key))
        self._boxes.append((offsets, sizes))
        for name, collected in self._numbers.items():
            collected.append(_numbers(table, name))

    def _number(self, key: str, dtype: str, shape: tuple[int, ...], goes_on: bool) -> int:
        """Which tensor this is: a new one, or the last one where a row group cuts it in two."""
        if self._tensors and (key, dtype, shape) == self._tensors[-1] and goes_on:
            return len(self._tensors) - 1
        if self._tensors and key <= self._tensors[-1][0]:
            raise FormatError(
                f"tensor {key[:80]!r}: comes after {self._tensors[-1][0]!r}, or with another shape or dtype"
            )
        _check_tensor(key, dtype, shape)
        self._tensors.append((key, dtype, shape))
        return len(self._tensors) - 1

    def _check_bytes(self, sizes: Ints, tensor: Ints, begins: Ints, rows: int) -> None:
        """No box may be larger than a chunk; in floating point, where a product cannot wrap around."""
        items = np.array([itemsize(self._tensors[i][1]) for i in tensor], np.float64)
        with np.errstate(all="ignore"):
            raw = np.prod(sizes, axis=1, dtype=np.float64) * np.repeat(items, np.diff(np.append(begins, rows)))
        good = (raw >= 0) & (raw <= CHUNK_BYTES)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise FormatError(f"a chunk of sizes {sizes[row].tolist()}; at most {CHUNK_BYTES} bytes")

    def catalog(self) -> Catalog:
        """All rows added."""
        width = max((len(shape) for _, _, shape in self._tensors), default=0)

        def joined(which: int, fill: int) -> Ints:
            parts = [_widened(boxes[which], width, fill) for boxes in self._boxes]
            return np.concatenate(parts) if parts else np.zeros((0, width), np.int64)

        tensor = np.concatenate(self._tensor) if self._tensor else np.zeros(0, np.int64)
        if len(tensor) != self._expected:
            raise FormatError(f"expected {self._expected} rows, found {len(tensor)}")
        numbers = {
            "crc" if name == "crc32c" else name: np.concatenate(parts) if parts else np.zeros(0, np.int64)
            for name, parts in self._numbers.items()
        }
        return Catalog.build(self._tensors, tensor, joined(0, 0), joined(1, 1), **numbers)


def _widened(array: Ints, width: int, fill: int) -> Ints:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _column(table: Any, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


def _padded(table: Any, name: str, fill: int) -> tuple[Ints, Ints]:
    """(numbers [rows, most dimensions] padded with `fill`, dimensions of every row) of a list column."""
    column = _column(table, name)
    ends = column.offsets.to_numpy().astype(np.int64)
    dimensions = np.diff(ends)
    width = int(dimensions.max(initial=0))
    if width > MAX_DIMENSIONS:
        raise FormatError(f"a chunk of {width} dimensions; at most {MAX_DIMENSIONS}")
    padded = np.full((len(dimensions), width), fill, np.int64)
    values = column.values.slice(int(ends[0]), int(ends[-1] - ends[0]))
    padded[np.arange(width) < dimensions[:, None]] = values.to_numpy()
    return padded, dimensions


def _dictionary(table: Any, name: str) -> tuple[list[str], npt.NDArray[np.int32]]:
    """(distinct texts, index of every row) of a text column."""
    column = _column(table, name)
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def _numbers(table: Any, name: str) -> npt.NDArray[Any]:
    column = _column(table, name)
    if name != "rank":
        return np.asarray(column.to_numpy())
    rank = np.asarray(column.fill_null(ALL_RANKS).to_numpy())
    if column.null_count != np.count_nonzero(rank == ALL_RANKS) or rank.min(initial=0) < ALL_RANKS:
        raise FormatError("a negative rank")
    return rank
