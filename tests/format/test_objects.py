"""Objects: every value comes back in type and bits, equal values have equal bytes, hostile bytes get FormatError."""

from __future__ import annotations

import contextlib
import random
import struct
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import ConfigError, FormatError
from ckptd.format.objects import (
    MAX_DEPTH,
    DeviceValue,
    DtypeValue,
    Ref,
    SizeValue,
    TensorValue,
    decode,
    encode,
    pack_table,
    unpack_table,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
HASHABLE = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
        | st.sets(HASHABLE, max_size=4)
        | st.frozensets(HASHABLE, max_size=4)
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    """Equal in type and bits, NaN included, and in the order of dicts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    return bool(one == other)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_round_trip(value: Any) -> None:
    data = encode(value)
    assert same(decode(data), value)
    assert encode(decode(data)) == data


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_give_a_value_or_a_format_error(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        decode(data)
    with contextlib.suppress(FormatError):
        unpack_table(data)


@given(VALUES, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_give_a_value_or_a_format_error(value: Any, generator: random.Random) -> None:
    data = bytearray(encode(value))
    data[generator.randrange(len(data))] = generator.randrange(256)
    with contextlib.suppress(FormatError):
        decode(bytes(data))


def test_plain_values_are_plain_msgpack() -> None:
    value = {"a": [1, None, True, 2.5, "x", b"y", -(2**63), 2**64 - 1], "b": {}, 3: list(range(70000))}
    assert msgspec.msgpack.decode(encode(value)) == value


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.arange(6.0)[::-2],
        np.array(1.5, np.float16),
        np.zeros((0, 3), np.complex64),
        np.array([True, False]),
        np.array(["a", "\u00fc\u00fc"]),
        np.array([b"ab", b"c"]),
        np.array([1], ">i4"),
        np.array(["2020-01-01"], "datetime64[D]"),
    ],
    ids=lambda a: a.dtype.str,
)
def test_arrays(array: np.ndarray) -> None:
    found = decode(encode(array))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.int8(-3), np.bool_(True), np.float64(2), np.datetime64("2020")])
def test_numpy_scalars_keep_their_type(scalar: np.generic) -> None:
    found = decode(encode([scalar]))
    assert isinstance(found, list)
    assert type(found[0]) is type(scalar)
    assert found[0] == scalar


def test_random_states() -> None:
    state = random.getstate()
    assert decode(encode(state)) == state
    legacy = np.random.RandomState(3).get_state(legacy=False)
    np.testing.assert_equal(decode(encode(legacy)), legacy)
    modern = np.random.default_rng(3).bit_generator.state
    assert decode(encode(modern)) == modern


def test_neutral_values_and_their_translation() -> None:
    values = [
        TensorValue("bfloat16", (2, 1), b"abcd"),
        DtypeValue("float32"),
        DeviceValue("cuda:1"),
        SizeValue((2, 3)),
        Ref("a/b"),
        Counter("hello"),
    ]
    assert decode(encode(values)) == values
    assert decode(encode((values[1],)), restore=lambda value: f"<{value.name}>") == ("<float32>",)  # type: ignore[attr-defined]

    def convert(value: object) -> object:
        if isinstance(value, range):
            return [DtypeValue("int8"), *value]
        raise TypeError("only ranges")

    assert decode(encode({"r": range(2)}, convert=convert)) == {"r": [DtypeValue("int8"), 0, 1]}
    with pytest.raises(ConfigError, match="at a/1: object: only ranges"):
        encode({"a": [0, object()]}, convert=convert)


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b/c": [1, object()]}}, r"a/b\\/c/1: object"),
        (object(), "the value itself"),
        ([len], "0: builtin_function"),
        ({"x": Text("y")}, "x: Text"),
        ({"x": defaultdict(list)}, "x: defaultdict"),
        ((1, "\ud800"), "1: text with lone surrogates"),
        ({"\ud800": 1}, "lone surrogates"),
        ({1 << 40000}, "an integer of"),
        (np.array([object()]), "NumPy dtype object"),
        (np.zeros(2, "i4,f4"), "NumPy dtype"),
        (TensorValue("float32", (2,), b"1234"), "tensor of dtype"),
        (DtypeValue("float33"), "float33"),
    ],
)
def test_what_cannot_be_encoded_is_named_with_its_place(value: object, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        encode(value)


def nested(depth: int, wrap: Any) -> Any:
    value: Any = wrap()
    for _ in range(depth - 1):
        value = wrap([value]) if wrap is not dict else {"x": value}
    return value


@pytest.mark.parametrize("wrap", [list, tuple, dict, frozenset])
def test_depth(wrap: Any) -> None:
    deepest = nested(MAX_DEPTH, wrap)
    assert decode(encode(deepest)) == deepest
    with pytest.raises(ConfigError, match="nested more than 64"):
        encode(nested(MAX_DEPTH + 1, wrap))
    with pytest.raises(ConfigError, match="nested more than 64"):
        encode(nested(100_000 if wrap is not frozenset else 300, wrap))


def test_leaves_with_payloads_at_the_greatest_depth() -> None:
    for leaf in (np.zeros(2), np.float32(1), SizeValue((1,)), TensorValue("int8", (1,), b"x")):
        value: Any = leaf
        for _ in range(MAX_DEPTH - 3):
            value = [value]
        decode(encode(value))
        with pytest.raises(ConfigError, match="nested"):
            encode([[[value]]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"\xc1", "begins no"),
        (b"\x01\x01", "after its end"),
        (b"\xdd\xff\xff\xff\xff", "announced"),
        (b"\xdf\xff\xff\xff\xff", "announced"),
        (b"\xc6\xff\xff\xff\xff", "cut short"),
        (b"\xc9\xff\xff\xff\xff\x01", "an extension of"),
        (b"\x91" * 65 + b"\xc0", "nested more than 64"),
        (b"\x91" * 1_000_000, "nested more than 64"),
        (b"\x82\xa1a\x01\xa1a\x02", "repeated"),
        (b"\x81\xc0\x01", "key is NoneType"),
        (b"\xa1\xff", "UTF-8"),
        (b"\xd4\x63\x00", "extension 99"),
        (b"\xd6\xff\x00\x00\x00\x00", "extension 255"),
        (b"\xd4\x01\xc0", "not an array"),
        (b"\xd5\x01\x90\x90", "too many"),
        (b"\xc7\x03\x02\x92\x01\x01", "repeated"),
        (b"\xc7\x02\x02\x91\x90", "cannot be hashed|cut short"),
        (b"\xc7\x02\x0d\x91\x01", "no value"),
        (b"\xd4\x05\x00", "complex"),
        (b"\xc7\x00\x04", "integer of 0"),
        (b"\xc7\x05\x09float", "float"),
        (encode(np.zeros(3)).replace(b"<f8", b"|O8"), "not allowed"),
        (encode(np.zeros(3)).replace(b"<f8", b"<f4"), "an array of dtype"),
        (encode(TensorValue("int8", (3,), b"abc")).replace(b"\x91\x03", b"\x91\x04"), "a tensor of dtype"),
        (encode(SizeValue((3,)))[:-1] + b"\xff", "not sizes"),
    ],
)
def test_hostile_bytes(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode(data)


def test_keys_that_collide_are_refused_quickly() -> None:
    """Python hashes integers modulo 2^61 - 1: a set of its multiples would take quadratic time."""
    elements = encode([i * (2**61 - 1) for i in range(20_000)])
    with pytest.raises(FormatError, match="collide"):
        decode(b"\xc9" + len(elements).to_bytes(4, "big") + b"\x02" + elements)


def test_table() -> None:
    table = {"b": encode({"x": (1, 2)}), "a": encode(None), "\u00fc": encode([1])}
    packed = pack_table(table)
    assert unpack_table(packed) == table
    assert pack_table(dict(reversed(table.items()))) == packed
    assert list(unpack_table(packed)) == ["a", "b", "\u00fc"]
    for wrong in (
        b"",
        b"\x90",
        packed[:-1],
        packed + b"\0",
        b"\x82\xa1a\xc0\xa1a\xc0",
        b"\x81\x01\xc0",
        b"\x81\xa1\xff\xc0",
    ):
        with pytest.raises(FormatError):
            unpack_table(wrong)
