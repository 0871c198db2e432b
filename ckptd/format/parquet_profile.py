"""Which Parquet files are manifest parts (docs/format.md, section 5): a profile that cannot unfold or confuse.

Parquet can say a gigabyte in a kilobyte: pages that decompress to anything, delta encodings, column chunks that share
pages. And Parquet libraries believe footers: one unknown number there ends a process that uses pyarrow. So this module
reads the footer and the headers of all pages itself, and what it lets through has exactly our columns, in order, and
decodes to an amount of memory that is bounded by the size of the file. It decodes no values.
"""

from __future__ import annotations

from typing import NamedTuple

from ckptd.core.errors import FormatError
from ckptd.format.thrift import Reader, Struct, Value

ROW_GROUP_ROWS = 65_536
MAX_PAGE_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 64
MAX_DICTIONARY_ENTRIES = ROW_GROUP_ROWS * MAX_DIMENSIONS

_MAGIC = b"PAR1"
_UNFOLDED_BYTES, _UNFOLDED_FACTOR = 64 * 1024 * 1024, 64
"""All pages together may unfold to _UNFOLDED_BYTES + _UNFOLDED_FACTOR times the file."""
_MAX_PAGE_HEADER_BYTES = 1024
_MAX_CREATOR_BYTES = 256

_INT32, _INT64, _BYTE_ARRAY = 1, 2, 6
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_UNCOMPRESSED, _ZSTD = 0, 6
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
_ENCODINGS = frozenset({_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY})


class _Column(NamedTuple):
    """A column of the manifest in Parquet's terms; `annotation` is (converted type, logical type) of its top."""

    name: bytes
    physical: int
    optional: bool = False
    is_list: bool = False
    annotation: tuple[int, Struct] | None = None
    plain: bool = False

    @property
    def path(self) -> list[Value]:
        return [self.name, b"list", b"element"] if self.is_list else [self.name]

    def elements(self) -> list[Struct]:
        """What the schema in a footer says of it."""
        top: Struct = {3: _OPTIONAL if self.optional else _REQUIRED, 4: self.name}
        if self.annotation is not None:
            top[6], top[10] = self.annotation
        if not self.is_list:
            return [top | {1: self.physical}]
        return [top | {5: 1}, {3: _REPEATED, 4: b"list", 5: 1}, {1: self.physical, 3: _REQUIRED, 4: b"element"}]


_TEXT: tuple[int, Struct] = (0, {1: {}})
_LIST: tuple[int, Struct] = (3, {3: {}})
_COLUMNS = (
    _Column(b"key", _BYTE_ARRAY, annotation=_TEXT),
    _Column(b"dtype", _BYTE_ARRAY, annotation=_TEXT),
    _Column(b"shape", _INT64, is_list=True, annotation=_LIST),
    _Column(b"offsets", _INT64, is_list=True, annotation=_LIST),
    _Column(b"sizes", _INT64, is_list=True, annotation=_LIST),
    _Column(b"rank", _INT32, optional=True),
    _Column(b"writer", _INT32),
    _Column(b"file", _INT32),
    _Column(b"file_offset", _INT64),
    _Column(b"stored", _INT64),
    _Column(b"raw", _INT64),
    _Column(b"codec", _INT32, annotation=(11, {10: {1: 8, 2: False}})),
    _Column(b"crc32c", _INT32, annotation=(13, {10: {1: 32, 2: False}}), plain=True),
)


def check_profile(data: bytes, rows: int) -> None:
    """Checks the footer and all page headers of a part with `rows` rows; raises FormatError."""
    if rows > len(data) // 4:
        raise FormatError(f"{rows} rows in {len(data)} bytes; at least 4 bytes a row")
    footer, end_of_pages = _footer(data)
    if 5 in footer:
        raise FormatError("key-value metadata is not allowed")
    _check_fields("footer", footer, required={1, 2, 3, 4}, optional={6, 7})
    schema = [{3: _REQUIRED, 4: b"schema", 5: len(_COLUMNS)}, *(e for column in _COLUMNS for e in column.elements())]
    if footer[2] != schema:
        raise FormatError("its columns are not those of a manifest")
    if footer.get(7, [{1: {}}] * len(_COLUMNS)) != [{1: {}}] * len(_COLUMNS):
        raise FormatError("an order of values that is not the usual one")
    creator = footer.get(6, b"")
    if not isinstance(creator, bytes) or len(creator) > _MAX_CREATOR_BYTES:
        raise FormatError("a creator that is not a short text")
    if footer[3] != rows:
        raise FormatError(f"expected {rows} rows as in COMMIT, found {footer[3]!r:.40}")
    groups = _structs(footer, 4)
    if len(groups) != -(-rows // ROW_GROUP_ROWS):
        raise FormatError(f"{len(groups)} row groups for {rows} rows; expected {ROW_GROUP_ROWS} in each")
    walk = _Walk(data, end_of_pages)
    for index, group in enumerate(groups):
        walk.group(index, group, min(ROW_GROUP_ROWS, rows - index * ROW_GROUP_ROWS))


def _footer(data: bytes) -> tuple[Struct, int]:
    """(the footer, where it begins)."""
    stop = len(data) - 8
    start = stop - int.from_bytes(data[-8:-4], "little")
    if data[:4] != _MAGIC or data[-4:] != _MAGIC or not 4 <= start < stop:
        raise FormatError("not a Parquet file, or cut short")
    reader = Reader(data, start, stop)
    footer = reader.struct()
    if reader.position != stop:
        raise FormatError(f"{stop - reader.position} bytes after the footer")
    return footer, start


def _check_fields(name: str, fields: Struct, required: set[int], optional: set[int]) -> None:
    if not required <= fields.keys() <= required | optional:
        raise FormatError(f"{name}: fields {sorted(fields)}; expected {sorted(required)}, allowed {sorted(optional)}")


def _structs(fields: Struct, number: int) -> list[Struct]:
    value = fields[number]
    found = [element for element in value if isinstance(element, dict)] if isinstance(value, list) else None
    if found is None or found != value:
        raise FormatError(f"field {number} is not a list of structs")
    return found


def _struct(fields: Struct, number: int) -> Struct:
    value = fields[number]
    if not isinstance(value, dict):
        raise FormatError(f"field {number} is not a struct")
    return value


def _integer(fields: Struct, number: int, least: int = 0, most: int = 2**31 - 1) -> int:
    value = fields[number]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise FormatError(f"field {number} is {value!r:.40}; expected {least} to {most}")
    return value


class _Walk:
    """Goes through the column chunks of a file in order, adding up what they unfold to."""

    def __init__(self, data: bytes, stop: int) -> None:
        self._data = data
        self._stop = stop
        self._end = len(_MAGIC)
        self._budget = _UNFOLDED_BYTES + _UNFOLDED_FACTOR * len(data)

    def group(self, index: int, group: Struct, rows: int) -> None:
        """Checks one row group."""
        _check_fields(f"row group {index}", group, required={1, 2, 3}, optional={5, 6, 7})
        columns = _structs(group, 1)
        if group[3] != rows or len(columns) != len(_COLUMNS):
            raise FormatError(f"row group {index}: {group[3]!r:.40} rows, {len(columns)} columns; expected {rows} rows")
        for column, chunk in zip(_COLUMNS, columns, strict=True):
            try:
                _check_fields("column chunk", chunk, required={2, 3}, optional=set())
                self._chunk(column, _struct(chunk, 3), rows)
            except FormatError as error:
                raise FormatError(f"row group {index}, column {column.name.decode()}: {error}") from None

    def _chunk(self, column: _Column, metadata: Struct, rows: int) -> None:
        _check_fields("metadata", metadata, required={1, 2, 3, 4, 5, 6, 7, 9}, optional={11, 13, 16})
        if metadata[1] != column.physical or metadata[3] != column.path:
            raise FormatError("is of another type or path")
        compression = _integer(metadata, 4)
        if compression not in ({_UNCOMPRESSED} if column.plain else {_UNCOMPRESSED, _ZSTD}):
            raise FormatError(f"compression {compression} is not allowed")
        encodings = metadata[2]
        if not isinstance(encodings, list) or not all(e in _ENCODINGS for e in encodings if isinstance(e, int)):
            raise FormatError(f"encodings {encodings!r:.80} are not allowed")
        start = _integer(metadata, 9, most=self._stop)
        if 11 in metadata:
            start = min(start, _integer(metadata, 11, most=self._stop))
        stop = start + _integer(metadata, 7, least=1, most=self._stop)
        if not self._end <= start < stop <= self._stop:
            raise FormatError(f"bytes {start} to {stop} overlap what came before, or the footer")
        values = self._pages(column, start, stop, compression == _UNCOMPRESSED)
        most = rows * MAX_DIMENSIONS if column.is_list else rows
        if values != metadata[5] or not rows <= values <= most:
            raise FormatError(f"pages hold {values} values for {rows} rows, the footer says {metadata[5]!r:.40}")
        self._end = stop

    def _pages(self, column: _Column, start: int, stop: int, uncompressed: bool) -> int:
        """Checks the pages from `start` to `stop`; returns how many values they hold."""
        values, position = 0, start
        while position < stop:
            page = _page_header(self._data, position, stop)
            dictionary = page.kind == _DICTIONARY_PAGE
            if dictionary and (column.plain or position != start or page.values > MAX_DICTIONARY_ENTRIES):
                raise FormatError(f"a dictionary of {page.values} entries where none may be")
            if page.encodings - ({_PLAIN, _RLE} if column.plain else _ENCODINGS) or (column.plain and page.dictionary):
                raise FormatError(f"page with encodings {sorted(page.encodings)} not allowed")
            if page.unfolded > MAX_PAGE_BYTES or (uncompressed and page.unfolded != page.stored):
                raise FormatError(f"page of {page.unfolded} bytes, {page.stored} stored; at most {MAX_PAGE_BYTES}")
            self._budget -= page.unfolded
            if self._budget < 0:
                raise FormatError("pages unfold to more than a file of this size may")
            values += 0 if dictionary else page.values
            position = page.begin + page.stored
        return values


class _Page(NamedTuple):
    """A page header: sizes in bytes, values, all encodings; the page's bytes begin at `begin`."""

    kind: int
    unfolded: int
    stored: int
    values: int
    encodings: frozenset[int]
    begin: int

    @property
    def dictionary(self) -> bool:
        """Whether it is a dictionary, or refers to one."""
        return self.kind == _DICTIONARY_PAGE or bool(self.encodings & {_PLAIN_DICTIONARY, _RLE_DICTIONARY})


def _page_header(data: bytes, start: int, stop: int) -> _Page:
    reader = Reader(data, start, min(stop, start + _MAX_PAGE_HEADER_BYTES))
    fields = reader.struct()
    kind = _integer(fields, 1) if 1 in fields else -1
    if kind not in (_DATA_PAGE, _DICTIONARY_PAGE):
        raise FormatError(f"page of kind {kind} not allowed")
    details = 5 if kind == _DATA_PAGE else 7
    _check_fields("page header", fields, required={1, 2, 3, details}, optional=set())
    inner = _struct(fields, details)
    numbers = {1, 2, 3, 4} if kind == _DATA_PAGE else {1, 2}
    _check_fields("page header", inner, required=numbers, optional={5} if kind == _DATA_PAGE else {3})
    stored = _integer(fields, 3, most=stop - reader.position)
    encodings = frozenset(_integer(inner, number) for number in numbers - {1})
    if kind == _DATA_PAGE and (inner[3], inner[4], inner.get(5, {})) != (_RLE, _RLE, {}):
        raise FormatError("levels that are not run lengths, or statistics")
    if kind == _DICTIONARY_PAGE and not encodings <= {_PLAIN, _PLAIN_DICTIONARY}:
        raise FormatError("a dictionary that is not plain")
    return _Page(kind, _integer(fields, 2), stored, _integer(inner, 1), encodings, reader.position)
