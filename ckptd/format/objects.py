"""Objects: non-tensor state as msgpack with extension types (docs/format.md, section 6).

Owns the neutral classes that stand for things of torch (TensorValue, DtypeValue, DeviceValue, SizeValue, Ref), the
encoder, and a decoder that checks depth and counts before it recurses or allocates; nothing is executed or imported.
Invariant: decode(encode(x)) equals x in type and bits, and equal values of equal order have equal bytes, so that
ranks can compare encodings. Does not know torch: `convert` and `restore` translate to and from the neutral classes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.errors import ConfigError, FormatError
from ckptd.core.types import DTYPES, itemsize, join_key

MAX_DEPTH = 64
MAX_ITEMS = 2**24
MAX_BIG_INTEGER_BYTES = 4096
MAX_OBJECTS_BYTES = 256 * 1024 * 1024

TUPLE, SET, FROZENSET, BIG_INTEGER, COMPLEX, ARRAY, SCALAR = 1, 2, 3, 4, 5, 6, 7
TENSOR, DTYPE, DEVICE, SIZE, REFERENCE, MAP, ORDERED, COUNTER = 8, 9, 10, 11, 12, 13, 14, 15


@dataclasses.dataclass(frozen=True)
class TensorValue:
    """A small tensor inside an object: dtype name, shape, and its bytes, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclasses.dataclass(frozen=True)
class DtypeValue:
    """A dtype, by the name in core.types.DTYPES."""

    name: str


@dataclasses.dataclass(frozen=True)
class DeviceValue:
    """A device as torch spells it, such as `cuda:0`."""

    text: str


@dataclasses.dataclass(frozen=True)
class SizeValue:
    """A torch.Size."""

    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ref:
    """A leaf that is a tensor of the manifest, by its key."""

    key: str


Convert = Callable[[object], object]

_LEAF_DEPTH = 2
"""Arrays nested in the payload of an extension without elements."""
_LEAF_ITEMS, _SCALAR_ITEMS = 70, 4
"""At most so many items are in such a payload."""
_FEW = 1024
"""So many equal hashes in one set or dict cost nothing worth preventing."""

_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_NUMPY_DTYPE = re.compile(r"[<>|](?:[biufcSU][1-9][0-9]{0,8}|[mM]8\[(?:[0-9]{1,9})?[A-Za-z]{1,2}\])")
_NUMBER_BYTES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}
_scalar = msgspec.msgpack.Encoder().encode


def encode(value: object, *, convert: Convert | None = None) -> bytes:
    """`value` as msgpack. `convert` turns a foreign object into one known here, or raises TypeError.

    Raises ConfigError that names the place inside the value of whatever cannot be encoded.
    """
    encoder = _Encoder(convert)
    encoder.add(value, (), 1)
    return b"".join(encoder.pieces)


def decode(data: bytes, *, restore: Convert | None = None) -> object:
    """The inverse of `encode`; `restore` gets each neutral class and gives what stands in its place.

    Raises FormatError in time and memory that grow with the bytes given, whatever they are.
    """
    decoder = _Decoder(data, restore)
    value = decoder.value(1)
    if decoder.position != len(data):
        raise FormatError(f"object: {len(data) - decoder.position} bytes after its end")
    return value


def pack_table(objects: Mapping[str, bytes]) -> bytes:
    """objects.msgpack of encoded values by path; raises ConfigError if it grows too large."""
    data = msgspec.msgpack.encode({path: msgspec.Raw(objects[path]) for path in sorted(objects)})
    if len(data) > MAX_OBJECTS_BYTES:
        largest = max(objects, key=lambda path: len(objects[path]))
        raise ConfigError(
            f"objects: {len(data)} bytes; at most {MAX_OBJECTS_BYTES}. The largest is {largest!r} with "
            f"{len(objects[largest])}; keep large data in tensors"
        )
    return data


def unpack_table(data: bytes) -> dict[str, bytes]:
    """The inverse: path -> encoded value, each for `decode`; raises FormatError."""
    if len(data) > MAX_OBJECTS_BYTES:
        raise FormatError(f"objects.msgpack: {len(data)} bytes; at most {MAX_OBJECTS_BYTES}")
    try:
        table = msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"objects.msgpack: not a map of objects: {error}") from None
    if _Decoder(data, None).map_header() != len(table):
        raise FormatError("objects.msgpack: a path is listed twice")
    return {path: bytes(raw) for path, raw in table.items()}


class _Encoder:
    """Collects the pieces of one encoded value."""

    def __init__(self, convert: Convert | None) -> None:
        self.pieces: list[bytes] = []
        self._convert = convert
        self._items = 0

    def add(self, value: object, path: tuple[object, ...], depth: int) -> None:
        """Appends `value`, which lies at `path` inside containers `depth - 1` deep."""
        if not _known(value):
            value = self._converted(value, path)
        kind = type(value)
        self._count(1, path)
        if kind in _PLAIN:
            self._plain(value, path)
            return
        if depth > (MAX_DEPTH if kind in _CONTAINERS else MAX_DEPTH - _LEAF_DEPTH):
            raise _unusable(path, f"nested more than {MAX_DEPTH} deep")
        if kind in _CONTAINERS:
            _CONTAINERS[kind](self, value, path, depth)
        elif kind in _LEAVES:
            self._count(_LEAF_ITEMS, path)
            self.pieces.append(_LEAVES[kind](value, path))
        else:
            self._count(_SCALAR_ITEMS, path)
            self.pieces.append(_encode_scalar(value, path))

    def _converted(self, value: object, path: tuple[object, ...]) -> object:
        name = type(value).__qualname__
        try:
            converted = value if self._convert is None else self._convert(value)
        except TypeError as error:
            raise _unusable(path, f"{name}: {error}") from None
        if not _known(converted):
            raise _unusable(path, f"{name} is not plain data")
        return converted

    def _count(self, items: int, path: tuple[object, ...]) -> None:
        self._items += items
        if self._items > MAX_ITEMS:
            raise _unusable(path, f"more than {MAX_ITEMS} items; keep large data in arrays or tensors")

    def _plain(self, value: object, path: tuple[object, ...]) -> None:
        try:
            self.pieces.append(_scalar(value))
        except OverflowError:
            assert isinstance(value, int)
            size = (value if value >= 0 else ~value).bit_length() // 8 + 1
            if size > MAX_BIG_INTEGER_BYTES:
                raise _unusable(path, f"an integer of {size} bytes") from None
            self.pieces.append(_extension(BIG_INTEGER, value.to_bytes(size, "big", signed=True)))
        except UnicodeEncodeError:
            raise _unusable(path, "text with lone surrogates") from None

    def _elements(self, elements: Any, path: tuple[object, ...], depth: int) -> None:
        """A msgpack array. One call into msgspec where all elements are plain, as in the state of a generator."""
        if _PLAIN.issuperset(map(type, elements)):
            self._count(len(elements), path)
            try:
                self.pieces.append(_scalar(elements))
                return
            except (OverflowError, UnicodeEncodeError):
                pass
        self.pieces.append(_header(0x90, 15, 0xDC, len(elements)))
        for index, element in enumerate(elements):
            self.add(element, (*path, index), depth + 1)

    def _list(self, value: list[Any], path: tuple[object, ...], depth: int) -> None:
        self._elements(value, path, depth)

    def _tuple(self, value: tuple[Any, ...], path: tuple[object, ...], depth: int) -> None:
        self._nested(TUPLE, lambda inner: inner._elements(value, path, depth))

    def _set(self, value: set[Any] | frozenset[Any], path: tuple[object, ...], depth: int) -> None:
        def fill(inner: _Encoder) -> None:
            encoded = []
            for element in value:
                one = _Encoder(self._convert)
                one._items = inner._items
                one.add(element, (*path, "{}"), depth + 1)
                inner._items = one._items
                encoded.append(b"".join(one.pieces))
            inner.pieces += [_header(0x90, 15, 0xDC, len(encoded)), *sorted(encoded)]

        self._nested(SET if type(value) is set else FROZENSET, fill)

    def _dict(self, value: dict[Any, Any], path: tuple[object, ...], depth: int) -> None:
        if type(value) is OrderedDict or type(value) is Counter:
            self._pairs(ORDERED if type(value) is OrderedDict else COUNTER, value, path, depth)
        elif all(type(key) is str or (type(key) is int and -(2**63) <= key < 2**64) for key in value):
            self._count(len(value), path)
            self.pieces.append(_header(0x80, 15, 0xDE, len(value)))
            for key, element in value.items():
                self._plain(key, (*path, key))
                self.add(element, (*path, key), depth + 1)
        else:
            self._pairs(MAP, value, path, depth)

    def _pairs(self, code: int, value: dict[Any, Any], path: tuple[object, ...], depth: int) -> None:
        def fill(inner: _Encoder) -> None:
            inner.pieces.append(_header(0x90, 15, 0xDC, 2 * len(value)))
            for key, element in value.items():
                inner.add(key, (*path, f"key {key!r:.40}"), depth + 1)
                inner.add(element, (*path, key), depth + 1)

        self._nested(code, fill)

    def _nested(self, code: int, fill: Callable[[_Encoder], None]) -> None:
        inner = _Encoder(self._convert)
        inner._items = self._items + 1
        fill(inner)
        self._items = inner._items
        self.pieces.append(_extension(code, b"".join(inner.pieces)))


_CONTAINERS: dict[type, Callable[[_Encoder, Any, tuple[object, ...], int], None]] = {
    list: _Encoder._list,
    tuple: _Encoder._tuple,
    set: _Encoder._set,
    frozenset: _Encoder._set,
    dict: _Encoder._dict,
    OrderedDict: _Encoder._dict,
    Counter: _Encoder._dict,
}


def _known(value: object) -> bool:
    """Whether it can be encoded without `convert`; its elements are another question."""
    kind = type(value)
    return kind in _PLAIN or kind in _CONTAINERS or kind in _LEAVES or issubclass(kind, np.generic)


def _unusable(path: tuple[object, ...], problem: str) -> ConfigError:
    place = join_key(*path) if path else "the value itself"
    return ConfigError(f"object, at {place}: {problem}; expected numbers, text, lists, dicts, tuples, sets or arrays")


def _header(short: int, most: int, wide: int, count: int) -> bytes:
    """Head of a msgpack array or map of `count` items."""
    if count <= most:
        return bytes([short | count])
    return struct.pack(">BH", wide, count) if count < 2**16 else struct.pack(">BI", wide + 1, count)


def _extension(code: int, payload: bytes) -> bytes:
    return _scalar(msgspec.msgpack.Ext(code, payload))


def _numpy_dtype(dtype: np.dtype[Any], path: tuple[object, ...]) -> str:
    if not _numpy_known(dtype.str):
        raise _unusable(path, f"NumPy dtype {dtype}")
    return dtype.str


def _numpy_known(text: str) -> bool:
    if _NUMPY_DTYPE.fullmatch(text) is None:
        return False
    allowed = _NUMBER_BYTES.get(text[1])
    return allowed is None or int(text[2:]) in allowed


def _encode_array(value: npt.NDArray[Any], path: tuple[object, ...]) -> bytes:
    dtype = _numpy_dtype(value.dtype, path)
    return _extension(ARRAY, _scalar([dtype, value.shape, value.tobytes()]))


def _encode_scalar(value: Any, path: tuple[object, ...]) -> bytes:
    return _extension(SCALAR, _scalar([_numpy_dtype(value.dtype, path), value.tobytes()]))


def _encode_tensor(value: TensorValue, path: tuple[object, ...]) -> bytes:
    if value.dtype not in DTYPES or len(value.data) != math.prod(value.shape) * itemsize(value.dtype):
        raise _unusable(path, f"a tensor of dtype {value.dtype}, shape {value.shape} and {len(value.data)} bytes")
    return _extension(TENSOR, _scalar([value.dtype, value.shape, value.data]))


def _encode_dtype(value: DtypeValue, path: tuple[object, ...]) -> bytes:
    if value.name not in DTYPES:
        raise _unusable(path, f"dtype {value.name!r}")
    return _extension(DTYPE, value.name.encode())


_LEAVES: dict[type, Callable[[Any, tuple[object, ...]], bytes]] = {
    complex: lambda value, _: _extension(COMPLEX, struct.pack("<dd", value.real, value.imag)),
    np.ndarray: _encode_array,
    TensorValue: _encode_tensor,
    DtypeValue: _encode_dtype,
    DeviceValue: lambda value, _: _extension(DEVICE, value.text.encode()),
    SizeValue: lambda value, _: _extension(SIZE, _scalar(value.sizes)),
    Ref: lambda value, _: _extension(REFERENCE, value.key.encode()),
}


class _Decoder:
    """Reads msgpack from `data`, never past `end`, with depth and counts checked first."""

    def __init__(self, data: bytes, restore: Convert | None) -> None:
        self._data = data
        self._end = len(data)
        self.position = 0
        self._restore = restore
        self._items = 0

    def value(self, depth: int) -> Any:
        """The next value, inside containers `depth - 1` deep."""
        self._items += 1
        if self._items > MAX_ITEMS:
            raise FormatError(f"object: more than {MAX_ITEMS} items")
        tag = self._take(1)[0]
        if tag < 0x80 or tag >= 0xE0:
            return tag if tag < 0x80 else tag - 256
        if tag < 0xA0:
            return self._map(tag & 15, depth) if tag < 0x90 else self._array(tag & 15, depth)
        if tag < 0xC0:
            return self._text(tag & 31)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            form = _NUMBERS[tag]
            return form.unpack(self._take(form.size))[0]
        if tag in _SIZED:
            method, bytes_of_length = _SIZED[tag]
            length = int.from_bytes(self._take(bytes_of_length), "big")
            return method(self, length, depth)
        raise FormatError(f"object: byte {tag:#x} begins no msgpack value")

    def map_header(self) -> int:
        """How many entries the map that begins here has."""
        tag = self._take(1)[0]
        if 0x80 <= tag < 0x90:
            return tag & 15
        if tag not in (0xDE, 0xDF):
            raise FormatError("object: expected a map")
        return int.from_bytes(self._take(2 if tag == 0xDE else 4), "big")

    def _take(self, count: int) -> bytes:
        start = self.position
        if count > self._end - start:
            raise FormatError(f"object: cut short, {count} bytes expected at {start}, {self._end - start} left")
        self.position = start + count
        return self._data[start : self.position]

    def _enter(self, count: int, bytes_each: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise FormatError(f"object: nested more than {MAX_DEPTH} deep")
        if count * bytes_each > self._end - self.position:
            raise FormatError(f"object: {count} items announced, {self._end - self.position} bytes left")

    def _array(self, count: int, depth: int) -> list[Any]:
        self._enter(count, 1, depth)
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[Any, Any]:
        self._enter(count, 2, depth)
        items = [self.value(depth + 1) for _ in range(2 * count)]
        for key in items[::2]:
            if type(key) is not str and type(key) is not int:
                raise FormatError(f"object: a map's key is {type(key).__name__}; expected text or an integer")
        return _mapping(dict, items)

    def _text(self, length: int, depth: int = 0) -> str:
        return _utf8(self._take(length))

    def _binary(self, length: int, depth: int) -> bytes:
        return self._take(length)

    def _sized_extension(self, length: int, depth: int) -> Any:
        return self._extension(self._take(1)[0], length, depth)

    def _extension(self, code: int, length: int, depth: int) -> Any:
        if length > self._end - self.position:
            raise FormatError(f"object: an extension of {length} bytes, {self._end - self.position} left")
        outer, self._end = self._end, self.position + length
        if code in _NESTED:
            value = _NESTED[code](self._nested_array(depth))
        elif code in _FLAT:
            value = _FLAT[code](self._take(length))
        elif code in _STRUCTURED:
            value = _STRUCTURED[code](self._nested_array(depth))
        else:
            raise FormatError(f"object: extension {code} is unknown")
        if self.position != self._end:
            raise FormatError(f"object: extension {code} has {self._end - self.position} bytes too many")
        self._end = outer
        if self._restore is not None and isinstance(value, _NEUTRAL):
            return self._restore(value)
        return value

    def _nested_array(self, depth: int) -> list[Any]:
        if self.position >= self._end or not (
            0x90 <= self._data[self.position] < 0xA0 or self._data[self.position] in (0xDC, 0xDD)
        ):
            raise FormatError("object: an extension's payload is not an array")
        value = self.value(depth)
        assert isinstance(value, list)
        return value


_NEUTRAL = (TensorValue, DtypeValue, DeviceValue, SizeValue, Ref)
_CONSTANTS: dict[int, object] = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: struct.Struct(">f"),
    0xCB: struct.Struct(">d"),
    **{0xCC + i: struct.Struct(">" + form) for i, form in enumerate("BHIQbhiq")},
}


def _fixed(size: int) -> Callable[[_Decoder, int, int], Any]:
    return lambda decoder, code, depth: decoder._extension(code, size, depth)


_SIZED: dict[int, tuple[Callable[[_Decoder, int, int], Any], int]] = {
    0xC4: (_Decoder._binary, 1),
    0xC5: (_Decoder._binary, 2),
    0xC6: (_Decoder._binary, 4),
    0xC7: (_Decoder._sized_extension, 1),
    0xC8: (_Decoder._sized_extension, 2),
    0xC9: (_Decoder._sized_extension, 4),
    **{0xD4 + power: (_fixed(2**power), 1) for power in range(5)},
    0xD9: (_Decoder._text, 1),
    0xDA: (_Decoder._text, 2),
    0xDB: (_Decoder._text, 4),
    0xDC: (_Decoder._array, 2),
    0xDD: (_Decoder._array, 4),
    0xDE: (_Decoder._map, 2),
    0xDF: (_Decoder._map, 4),
}


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"object: text is not UTF-8: {error}") from None


def _unique(kind: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    try:
        if len(items) > _FEW and len(set(map(hash, items))) < len(items) - _FEW:
            raise FormatError("object: keys or elements chosen to collide")
        result = kind(items)
    except TypeError:
        raise FormatError("object: a set or key holds something that cannot be hashed") from None
    if len(result) != len(items):
        raise FormatError("object: an element or key is repeated")
    return result


def _mapping(kind: Callable[[Iterable[tuple[Any, Any]]], dict[Any, Any]], items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise FormatError("object: a dict with a key that has no value")
    pairs: dict[Any, Any] = _unique(lambda keys: dict(zip(keys, items[1::2], strict=True)), items[::2])
    return kind(pairs.items())


def _sizes(items: list[Any]) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**63 for n in items) or len(items) > 64:
        raise FormatError(f"object: {str(items)[:80]} are not sizes")
    return tuple(items)


def _fields(items: list[Any], *kinds: type) -> list[Any]:
    if [type(item) for item in items] != list(kinds):
        raise FormatError(f"object: an extension with {len(items)} fields that are not {[k.__name__ for k in kinds]}")
    return items


def _numpy(text: str, shape: tuple[int, ...], data: bytes) -> npt.NDArray[Any]:
    if not _numpy_known(text):
        raise FormatError(f"object: NumPy dtype {text[:40]!r} is not allowed")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError) as error:
        raise FormatError(f"object: NumPy dtype {text[:40]!r}: {error}") from None
    if math.prod(shape) * dtype.itemsize != len(data) or (0 in shape and max(shape) > MAX_ITEMS):
        raise FormatError(f"object: an array of dtype {text}, shape {shape} and {len(data)} bytes")
    if not dtype.itemsize or not len(data):
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _decode_array(items: list[Any]) -> npt.NDArray[Any]:
    text, shape, data = _fields(items, str, list, bytes)
    return _numpy(text, _sizes(shape), data)


def _decode_scalar(items: list[Any]) -> object:
    text, data = _fields(items, str, bytes)
    return _numpy(text, (), data)[()]


def _decode_tensor(items: list[Any]) -> TensorValue:
    dtype, shape, data = _fields(items, str, list, bytes)
    sizes = _sizes(shape)
    if math.prod(sizes) * itemsize(dtype) != len(data):
        raise FormatError(f"object: a tensor of dtype {dtype}, shape {sizes} and {len(data)} bytes")
    return TensorValue(dtype, sizes, data)


def _decode_dtype(data: bytes) -> DtypeValue:
    name = _utf8(data)
    itemsize(name)
    return DtypeValue(name)


def _decode_complex(data: bytes) -> complex:
    if len(data) != 16:
        raise FormatError(f"object: a complex number of {len(data)} bytes; expected 16")
    return complex(*struct.unpack("<dd", data))


def _decode_integer(data: bytes) -> int:
    if not 0 < len(data) <= MAX_BIG_INTEGER_BYTES:
        raise FormatError(f"object: an integer of {len(data)} bytes; at most {MAX_BIG_INTEGER_BYTES}")
    return int.from_bytes(data, "big", signed=True)


_NESTED: dict[int, Callable[[list[Any]], Any]] = {
    TUPLE: tuple,
    SET: lambda items: _unique(set, items),
    FROZENSET: lambda items: _unique(frozenset, items),
    MAP: lambda items: _mapping(dict, items),
    ORDERED: lambda items: _mapping(OrderedDict, items),
    COUNTER: lambda items: _mapping(lambda pairs: Counter(dict(pairs)), items),
}
_STRUCTURED: dict[int, Callable[[list[Any]], Any]] = {
    ARRAY: _decode_array,
    SCALAR: _decode_scalar,
    TENSOR: _decode_tensor,
    SIZE: lambda items: SizeValue(_sizes(items)),
}
_FLAT: dict[int, Callable[[bytes], Any]] = {
    BIG_INTEGER: _decode_integer,
    COMPLEX: _decode_complex,
    DTYPE: _decode_dtype,
    DEVICE: lambda data: DeviceValue(_utf8(data)),
    REFERENCE: lambda data: Ref(_utf8(data)),
}
