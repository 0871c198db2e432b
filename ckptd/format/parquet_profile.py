"""Which Parquet files are manifest parts (docs/format.md, section 5): a profile that cannot unfold.

Parquet can say a gigabyte in a kilobyte: pages that decompress to anything, delta encodings, column chunks that
share pages. This module walks the headers of all pages (Thrift, compact protocol) before any page is decoded, so that
what decoding allocates is bounded by the size of the file. It decodes no values.
"""

from __future__ import annotations

from typing import Any

from ckptd.core.errors import FormatError

ROW_GROUP_ROWS = 65_536
MAX_PAGE_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 64
MAX_DICTIONARY_ENTRIES = ROW_GROUP_ROWS * MAX_DIMENSIONS

_UNFOLDED_BYTES, _UNFOLDED_FACTOR = 64 * 1024 * 1024, 64
"""All pages together may unfold to _UNFOLDED_BYTES + _UNFOLDED_FACTOR times the file."""

_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
_VALUE_ENCODINGS = (_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY)
_MAX_HEADER_BYTES = 64 * 1024


def check_profile(data: bytes, metadata: Any, rows: int, lists: frozenset[str], plain: str) -> None:
    """Checks the pyarrow FileMetaData of `data` and all page headers; raises FormatError.

    `lists` are the columns whose rows hold up to 64 values; `plain` is the one that must be neither compressed
    nor encoded.
    """
    if metadata.num_rows != rows:
        raise FormatError(f"expected {rows} rows as in COMMIT, found {metadata.num_rows}")
    if rows > len(data) // 4:
        raise FormatError(f"{rows} rows in {len(data)} bytes; at least 4 bytes a row")
    if metadata.num_row_groups != -(-rows // ROW_GROUP_ROWS):
        raise FormatError(f"{metadata.num_row_groups} row groups for {rows} rows; expected {ROW_GROUP_ROWS} in each")
    if metadata.metadata:
        raise FormatError("key-value metadata is not allowed")
    walk = _Walk(data)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        expected = min(ROW_GROUP_ROWS, rows - index * ROW_GROUP_ROWS)
        if group.num_rows != expected:
            raise FormatError(f"row group {index}: {group.num_rows} rows; expected {expected}")
        for number in range(group.num_columns):
            column = group.column(number)
            name = column.path_in_schema.split(".")[0]
            try:
                walk.column(column, expected, name in lists, name == plain)
            except FormatError as error:
                raise FormatError(f"row group {index}, column {name}: {error}") from None


class _Walk:
    """Goes through the column chunks of a file in order, adding up what they unfold to."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = 4
        self._budget = _UNFOLDED_BYTES + _UNFOLDED_FACTOR * len(data)

    def column(self, column: Any, rows: int, is_list: bool, plain: bool) -> None:
        """Checks one column chunk."""
        allowed = ("UNCOMPRESSED",) if plain else ("UNCOMPRESSED", "ZSTD")
        if column.compression not in allowed or column.file_path:
            raise FormatError(f"compression {column.compression}, file {column.file_path!r} not allowed")
        start = column.data_page_offset
        if column.dictionary_page_offset is not None:
            start = min(start, column.dictionary_page_offset)
        stop = start + column.total_compressed_size
        if not self._end <= start < stop <= len(self._data):
            raise FormatError(f"bytes {start} to {stop} overlap what came before, or leave the file")
        values, position, pages = 0, start, 0
        while position < stop:
            header = _PageHeader(self._data, position, stop)
            self._page(header, column.compression == "UNCOMPRESSED", first=pages == 0, plain=plain)
            values += 0 if header.kind == _DICTIONARY_PAGE else header.values
            position = header.end + header.compressed
            pages += 1
        most = rows * MAX_DIMENSIONS if is_list else rows
        if position != stop or values != column.num_values or not rows <= values <= most:
            raise FormatError(
                f"pages hold {values} values in {position - start} bytes; expected {rows} in {stop - start}"
            )
        self._end = stop

    def _page(self, header: _PageHeader, uncompressed: bool, first: bool, plain: bool) -> None:
        good = header.kind == _DATA_PAGE or (header.kind == _DICTIONARY_PAGE and first and not plain)
        encodings = (_PLAIN,) if plain else _VALUE_ENCODINGS
        if not good or header.encoding not in encodings or not set(header.level_encodings) <= {_RLE}:
            raise FormatError(f"page of kind {header.kind}, encoding {header.encoding} not allowed")
        if header.kind == _DICTIONARY_PAGE and header.values > MAX_DICTIONARY_ENTRIES:
            raise FormatError(f"dictionary of {header.values} entries")
        if header.unfolded > MAX_PAGE_BYTES or (uncompressed and header.unfolded != header.compressed):
            raise FormatError(f"page of {header.unfolded} bytes, {header.compressed} stored; at most {MAX_PAGE_BYTES}")
        self._budget -= header.unfolded
        if self._budget < 0:
            raise FormatError("pages unfold to more than a file of this size may")


class _PageHeader:
    """One page header: kind, sizes, values and encodings; `end` is where the page's bytes begin."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        reader = _Thrift(data, start, min(stop, start + _MAX_HEADER_BYTES))
        fields = reader.struct(1)
        self.end = reader.position
        self.kind = _integer(fields, 1)
        self.unfolded = _integer(fields, 2)
        self.compressed = _integer(fields, 3)
        details = fields.get(5 if self.kind == _DATA_PAGE else 7)
        if not isinstance(details, dict):
            raise FormatError(f"page of kind {self.kind} not allowed")
        self.values = _integer(details, 1)
        self.encoding = _integer(details, 2)
        self.level_encodings = [_integer(details, n) for n in (3, 4)] if self.kind == _DATA_PAGE else []
        if self.compressed > stop - self.end:
            raise FormatError(f"page of {self.compressed} bytes; {stop - self.end} left")


def _integer(fields: dict[int, object], number: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise FormatError(f"page header: field {number} is {value!r}")
    return value


class _Thrift:
    """The part of Thrift's compact protocol that page headers use; anything else is a FormatError."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self._data = data
        self._stop = stop
        self.position = start

    def struct(self, depth: int) -> dict[int, object]:
        """Fields by number."""
        if depth > 3:
            raise FormatError("page header: nested too deep")
        fields: dict[int, object] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 8:
            self._skip(self._varint())
            return None
        if kind == 12:
            return self.struct(depth + 1)
        raise FormatError(f"page header: Thrift type {kind}")

    def _byte(self) -> int:
        if self.position >= self._stop:
            raise FormatError("page header: cut short")
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        result = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise FormatError("page header: a number of more than 70 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        if count > self._stop - self.position:
            raise FormatError("page header: cut short")
        self.position += count
