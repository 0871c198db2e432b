"""Pickles as data: plain values come out as they are, everything else is refused, and nothing is ever executed."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import FormatError
from ckptd.format.objects import DtypeValue, SizeValue
from ckptd.interop.pickles import METADATA_GLOBALS, PLAIN_GLOBALS, TENSOR_GLOBALS, read_pickle, storage_of

TABLES = (PLAIN_GLOBALS, TENSOR_GLOBALS, METADATA_GLOBALS)
ATOMS = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers(-(2**40), 2**40)
VALUES = st.recursive(
    ATOMS | st.sets(st.text()) | st.frozensets(st.integers(-99, 99)) | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(VALUES, st.integers(2, 5))
def test_plain_values(value: Any, protocol: int) -> None:
    found = read_pickle(pickle.dumps(value, protocol), PLAIN_GLOBALS, "a pickle")
    assert repr(unordered(found)) == repr(unordered(value))


def unordered(value: Any) -> Any:
    """The same for an OrderedDict as for a dict, for a set as for a sorted list of its elements."""
    if isinstance(value, dict):
        return {key: unordered(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return [type(value).__name__, *sorted(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(map(unordered, value))
    return value


@settings(max_examples=200, deadline=None)
@given(VALUES, st.data())
def test_damaged_pickles_are_read_or_refused(value: Any, data: st.DataObject) -> None:
    damaged = bytearray(pickle.dumps(value, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for table in TABLES:
        with contextlib.suppress(FormatError):
            read_pickle(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), table, "a pickle", storage_of)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        read_pickle(b"\x80\x04" + data + b"..", TENSOR_GLOBALS, "a pickle", storage_of)


def reduced(function: Any, *arguments: Any) -> Callable[[Path, int], bytes]:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return function, arguments

    return lambda mark, protocol: pickle.dumps({"model": Attack()}, protocol)


class Dropper:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def by_state(mark: Path, protocol: int) -> bytes:
    """BUILD with attributes that hold a call."""
    return pickle.dumps(collections.OrderedDict(a=Dropper(mark)), protocol)


def by_extension(mark: Path, protocol: int) -> bytes:
    return b"\x80\x02\x82\x01."


def by_instance(mark: Path, protocol: int) -> bytes:
    return b"\x80\x02(S'touch " + str(mark).encode() + b"'\nios\nsystem\n."


def by_object(mark: Path, protocol: int) -> bytes:
    return b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo."


def by_dotted_name(mark: Path, protocol: int) -> bytes:
    """An attribute of something that is admitted."""
    return b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."


def by_attributes_of_a_class(mark: Path, protocol: int) -> bytes:
    """Sets an attribute of the admitted class itself."""
    return b"\x80\x02ccollections\nOrderedDict\nN}X\x06\x00\x00\x00updateNs\x86b."


def by_call_of_a_value(mark: Path, protocol: int) -> bytes:
    return b"\x80\x02X\x04\x00\x00\x00true)R."


def by_new_of_a_value(mark: Path, protocol: int) -> bytes:
    return b"\x80\x02ctorch\nSize\n)\x81."


EXECUTING: dict[str, Callable[[Path, int], bytes]] = {
    "os.system": lambda mark, protocol: pickle.dumps([Dropper(mark)], protocol),
    "in a tuple": lambda mark, protocol: pickle.dumps((1, {"x": Dropper(mark)}), protocol),
    "eval": reduced(eval, "1"),
    "getattr": reduced(getattr, "x", "upper"),
    "import": reduced(__import__, "os"),
    "torch.load": lambda mark, protocol: b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "state": by_state,
    "extension": by_extension,
    "INST": by_instance,
    "OBJ": by_object,
    "dotted": by_dotted_name,
    "attributes of a class": by_attributes_of_a_class,
    "call of a value": by_call_of_a_value,
    "NEWOBJ of a function": by_new_of_a_value,
}


@pytest.mark.parametrize("attack", EXECUTING)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed(attack: str, protocol: int, tmp_path: Path) -> None:
    data = EXECUTING[attack](tmp_path / "mark", protocol)
    for table in TABLES:
        with pytest.raises(FormatError):
            read_pickle(data, table, "a pickle", storage_of)
    assert not (tmp_path / "mark").exists()


def test_the_attack_works_on_pickle_itself(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    pickle.loads(EXECUTING["os.system"](tmp_path / "mark", 4))
    assert (tmp_path / "mark").exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PATH = b"cpathlib\nPath\n"

BOMBS = {
    # LONG_BINPUT into place 2^32 - 1, for which pickle itself makes room with all places before it.
    "memo": b"\x80\x02Nr\xff\xff\xff\xffN.",
    "text longer than the pickle": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "bytes longer than the pickle": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "integer": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + bytes(5000) + b".",
    "a name without end": b"\x80\x02c" + b"x" * 10_000 + b"\ny\n.",
    # A path joined of two times the path before: 2^60 characters.
    "doubled text": b"\x80\x02"
    + PATH
    + text("xx")
    + b"q\x00\x85R"
    + b"q\x00"
    + b"".join(b"0" + PATH + b"h\x00h\x00\x86Rq\x00" for _ in range(60))
    + b".",
    # The same list made a set ten thousand times.
    "copied list": b"\x80\x02]("
    + b"K\x01" * 50_000
    + b"eq\x00"
    + b"0cbuiltins\nset\nq\x010"
    + b"".join(b"h\x01h\x00\x85R0" for _ in range(10_000))
    + b"N.",
    "protocol 0": b"I1\n.",
    "protocol 9": b"\x80\x09N.",
    "nothing": b"",
    "no end": b"\x80\x02N",
    "two values": b"\x80\x02NN.",
    "open mark": b"\x80\x02(N.",
    "empty stack": b"\x80\x02.",
    "pop of nothing": b"\x80\x020N.",
    "memo that is empty": b"\x80\x02h\x07.",
    "list of a number": b"\x80\x02K\x01K\x02a.",
    "set of lists": b"\x80\x04\x8f(]\x90.",
    "text that is none": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "a storage of no type": b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_pickle(BOMBS[bomb], METADATA_GLOBALS, "a pickle", storage_of)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024**2
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_no_recursion() -> None:
    """A million tuples in each other are read, and dropped, without a deep stack."""
    depth = 10 * sys.getrecursionlimit()
    found = read_pickle(b"\x80\x02N" + b"\x85" * depth + b".", PLAIN_GLOBALS, "a pickle")
    for _ in range(depth):
        (found,) = found
    assert found is None


def test_keys_that_could_collide_are_not_hashed() -> None:
    """Tuples and large integers can be chosen so that all have one hash: they are kept aside."""
    value = {(1, 2): 3, 2**70: 4, "a": 5}
    found = read_pickle(pickle.dumps(value, 4), PLAIN_GLOBALS, "a pickle")
    assert dict(found) == {"a": 5}
    assert found.others == [((1, 2), 3), (2**70, 4)]


def test_dtypes_and_sizes() -> None:
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    pickle.dump({"d": torch.bfloat16, "s": torch.Size([2, 3]), "v": torch.device("cuda", 1)}, stream, 2)
    found = read_pickle(stream.getvalue(), PLAIN_GLOBALS, "a pickle")
    assert found["d"] == DtypeValue("bfloat16")
    assert found["s"] == SizeValue((2, 3))
    assert found["v"].text == "cuda:1"
