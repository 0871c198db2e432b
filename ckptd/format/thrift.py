"""Reading Thrift's compact protocol, as far as Parquet's footers and page headers use it.

Generic: a struct becomes its fields by number, a list a list, text bytes. Depth and counts are checked before
recursing and before allocating; anything else is a FormatError. Knows nothing of Parquet.
"""

from __future__ import annotations

from ckptd.core.errors import FormatError

Value = bool | int | bytes | list["Value"] | dict[int, "Value"]
Struct = dict[int, Value]

_MAX_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 12


class Reader:
    """Reads from `data`, from `position` on, never past `stop`."""

    def __init__(self, data: bytes, position: int, stop: int) -> None:
        self._data = data
        self._stop = stop
        self.position = position

    def struct(self, depth: int = 1) -> Struct:
        """The struct that begins here."""
        if depth > _MAX_DEPTH:
            raise FormatError("Thrift: nested too deep")
        fields: Struct = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if number in fields:
                raise FormatError(f"Thrift: field {number} is repeated")
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Value:
        if kind == _BYTE:
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _LIST:
            return self._list(depth + 1)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise FormatError(f"Thrift: type {kind}")

    def _list(self, depth: int) -> list[Value]:
        head = self._byte()
        kind = head & 15
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if depth > _MAX_DEPTH or count > self._stop - self.position:
            raise FormatError(f"Thrift: a list of {count} at depth {depth}, {self._stop - self.position} bytes left")
        if kind in (_TRUE, _FALSE):
            return [self._byte() == _TRUE for _ in range(count)]
        return [self._value(kind, depth) for _ in range(count)]

    def _byte(self) -> int:
        if self.position >= self._stop:
            raise FormatError("Thrift: cut short")
        self.position += 1
        return self._data[self.position - 1]

    def _bytes(self, count: int) -> bytes:
        start = self.position
        if count > self._stop - start:
            raise FormatError("Thrift: cut short")
        self.position = start + count
        return self._data[start : self.position]

    def _varint(self) -> int:
        result = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise FormatError("Thrift: a number of more than 70 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
