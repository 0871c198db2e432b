"""Erasure codes against an independent reference: every loss of every small code, unequal inputs, ends of memory."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyeclib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import native

Bytes = npt.NDArray[np.uint8]

CODES = [(n - m, m) for n in range(2, 9) for m in range(1, n)]


# ---- the reference: GF(2^8) by polynomials, nothing shared with the code under test


@functools.cache
def multiplication_table() -> Bytes:
    """[256, 256] products of polynomials over GF(2) modulo x^8 + x^4 + x^3 + x^2 + 1."""
    left, right = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    product = np.zeros((256, 256), np.int64)
    for bit in range(8):
        product ^= np.where(right >> bit & 1, left << bit, 0)
    for bit in range(14, 7, -1):
        product ^= np.where(product >> bit & 1, 0x11D << (bit - 8), 0)
    return product.astype(np.uint8)


def inverse(value: int) -> int:
    return int(np.flatnonzero(multiplication_table()[value] == 1)[0])


def reference(data: Sequence[Bytes], m: int, length: int) -> list[Bytes]:
    """Data padded to `length`, then the m parities."""
    table, k = multiplication_table(), len(data)
    padded = [np.concatenate([part, np.zeros(length - len(part), np.uint8)]) for part in data]
    parities = []
    for parity in range(m):
        factors = [inverse((k + parity) ^ column) for column in range(k)]
        terms = [table[factor][part] for factor, part in zip(factors, padded, strict=True)]
        parities.append(functools.reduce(np.bitwise_xor, terms))
    return padded + parities


# ---- calls


def addresses(buffers: Sequence[Sequence[Bytes]]) -> npt.NDArray[np.uint64]:
    return np.array([[buffer.ctypes.data for buffer in row] for row in buffers], np.uint64).reshape(len(buffers), -1)


def sizes(buffers: Sequence[Sequence[Bytes]]) -> npt.NDArray[np.int64]:
    return np.array([[len(buffer) for buffer in row] for row in buffers], np.int64).reshape(len(buffers), -1)


def run(
    call: Callable[..., None], rows: Sequence[Sequence[Bytes]], count: int, lengths: Sequence[int], **options: Any
) -> list[list[Bytes]]:
    """`count` targets for each row of sources, into memory that held something else; checks the checksums too."""
    targets = [[np.full(length, 0xA5, np.uint8) for _ in range(count)] for length in lengths]
    crc = np.full((len(rows), count), 0xDEADBEEF, np.uint32)
    call(addresses(rows), sizes(rows), addresses(targets), np.array(lengths, np.int64), crc=crc, **options)
    assert crc.tolist() == [[native.crc32c(target) for target in row] for row in targets]
    return targets


def encode(data: Sequence[Bytes], m: int, length: int, **options: Any) -> list[Bytes]:
    return run(native.erasure_encode, [data], m, [length], **options)[0]


def decode(present: dict[int, Bytes], wanted: Sequence[int], length: int, **options: Any) -> list[Bytes]:
    call = functools.partial(native.erasure_decode, list(present), list(wanted))
    return run(call, [list(present.values())], len(wanted), [length], **options)[0]


def segments(k: int, length: int, seed: int, cut: Sequence[int] = ()) -> list[Bytes]:
    """k random segments; where `cut` says so they end early."""
    random = np.random.default_rng(seed)
    ends = [*cut, *([length] * k)][:k]
    return [random.integers(0, 256, end, np.uint8) for end in ends]


def same(found: Sequence[Bytes], expected: Sequence[Bytes]) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(found, expected, strict=True))


engines = pytest.mark.parametrize("portable", [False, True], ids=["isal", "portable"])


@engines
@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_loss_of_every_small_code(k: int, m: int, portable: bool) -> None:
    """Any positions that are lost, up to m, come back from the first and from the last k that are left."""
    length = 67
    data = segments(k, length, seed=k * 16 + m, cut=(length, 13, 0, 66))
    whole = reference(data, m, length)
    assert same(encode(data, m, length, portable=portable), whole[k:])
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), count):
            left = [position for position in range(k + m) if position not in lost]
            for chosen in {tuple(left[:k]), tuple(left[-k:])}:
                present = {position: whole[position] if position >= k else data[position] for position in chosen}
                assert same(decode(present, lost, length, portable=portable), [whole[p] for p in lost]), (chosen, lost)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_losses_of_larger_codes(draw: st.DataObject) -> None:
    """Up to 16 positions, any order, inputs that end anywhere, both engines alike."""
    k = draw.draw(st.integers(1, 15), "k")
    m = draw.draw(st.integers(1, 16 - k), "m")
    length = draw.draw(st.integers(0, 400), "length")
    ends = draw.draw(st.lists(st.integers(0, length), min_size=k, max_size=k), "ends")
    data = segments(k, length, 1, ends)
    whole = reference(data, m, length)
    order = draw.draw(st.permutations(range(k + m)), "order")
    present = {position: whole[position] if position >= k else data[position] for position in order[:k]}
    wanted = order[k : k + draw.draw(st.integers(0, m), "wanted")]
    for portable in (False, True):
        assert same(encode(data, m, length, portable=portable), whole[k:])
        assert same(decode(present, wanted, length, portable=portable), [whole[position] for position in wanted])


@pytest.mark.parametrize("length", [1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 129, 255, 4097])
def test_short_rows_take_every_path_of_the_kernels(length: int) -> None:
    for k, m in [(1, 1), (2, 1), (3, 2), (5, 3), (4, 4), (2, 7)]:
        data = segments(k, length, length)
        assert same(encode(data, m, length), reference(data, m, length)[k:])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_rows_are_shared_among_threads(threads: int) -> None:
    """Rows of several blocks and of none, with ends between, give the same whoever computes them."""
    block = 256 * 1024
    lengths = [3 * block + 5, 0, 17, block, 9 * block + 1]
    rows = [segments(3, length, length, (length, length // 2, min(length, block + 1))) for length in lengths]
    expected = [reference(row, 2, length)[3:] for row, length in zip(rows, lengths, strict=True)]
    for portable in (False, True):
        found = run(native.erasure_encode, rows, 2, lengths, threads=threads, portable=portable)
        assert all(same(left, right) for left, right in zip(found, expected, strict=True))


def test_more_threads_than_there_are_parts() -> None:
    data = segments(2, 5_000_000, 3)
    assert same(encode(data, 1, 5_000_000, threads=1000), reference(data, 1, 5_000_000)[2:])


def test_nothing_to_do_is_done() -> None:
    assert encode(segments(2, 0, 0), 0, 0) == []
    none = np.zeros((0, 3), np.uint64)
    native.erasure_encode(none, none.astype(np.int64), none[:, :2], np.zeros(0, np.int64), threads=4)
    assert [len(part) for part in encode(segments(2, 0, 0), 3, 0)] == [0, 0, 0]


def test_a_mirror_is_a_copy() -> None:
    data = segments(1, 1000, 4)
    assert same(encode(data, 1, 1000), data)


def test_the_example_of_the_document() -> None:
    data = [np.array([byte], np.uint8) for byte in (1, 2)]
    assert [int(part[0]) for part in encode(data, 2, 1)] == [0x7B, 0xF5]
    document = (Path(__file__).resolve().parents[2] / "docs" / "erasure.md").read_text()
    assert "Data 01 and 02 give the parities 7b and f5" in document


def test_the_matrix_is_that_of_isal() -> None:
    """Other software that uses ISA-L's Cauchy matrix reads our parity."""
    path = sorted(Path(pyeclib.__file__).parents[1].glob("pyeclib.libs/libisal*.so*"))[0]
    for k, m in [*CODES, (10, 6), (100, 27), (128, 128)]:
        matrix = (ctypes.c_ubyte * ((k + m) * k))()
        ctypes.CDLL(str(path)).gf_gen_cauchy1_matrix(matrix, k + m, k)
        unit = [np.array([int(row == column) for column in range(k)], np.uint8) for row in range(k)]
        expected = np.frombuffer(bytes(matrix), np.uint8).reshape(k + m, k)[k:]
        assert np.array_equal(np.stack(encode(unit, m, k)), expected)


# ---- the ends of memory


@pytest.fixture
def guarded() -> Iterator[Callable[[int], Bytes]]:
    """Makes arrays whose last byte is followed by a page that nobody may touch."""
    kept: list[tuple[mmap.mmap, int]] = []
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    page = mmap.PAGESIZE

    def make(size: int) -> Bytes:
        memory = mmap.mmap(-1, -(-size // page) * page + page)
        view = np.frombuffer(memory, np.uint8)
        last = view.ctypes.data + len(memory) - page
        assert mprotect(ctypes.c_void_p(last), page, mmap.PROT_EXEC & 0) == 0
        kept.append((memory, last))
        return view[len(memory) - page - size : len(memory) - page]

    yield make
    for _, last in kept:
        mprotect(ctypes.c_void_p(last), page, mmap.PROT_READ | mmap.PROT_WRITE)


@engines
@pytest.mark.parametrize("length", [1, 33, 4095, 300_000])
def test_nothing_beyond_an_end_is_touched(guarded: Callable[[int], Bytes], length: int, portable: bool) -> None:
    """Inputs and outputs end where memory ends, each somewhere else; a touch would kill the process."""
    ends = (length, length // 2, 1, 0)
    data = []
    for plain in segments(4, length, 7, ends):
        data.append(guarded(len(plain)))
        data[-1][:] = plain
    targets = [guarded(length) for _ in range(2)]
    row = np.array([length], np.int64)
    native.erasure_encode(addresses([data]), sizes([data]), addresses([targets]), row, portable=portable)
    assert same(targets, reference(data, 2, length)[4:])


# ---- bad arguments


def valid() -> dict[str, Any]:
    data, targets = segments(2, 8, 0), [np.zeros(8, np.uint8)]
    return {
        "sources": addresses([data]),
        "sizes": sizes([data]),
        "targets": addresses([targets]),
        "lengths": np.array([8], np.int64),
        "kept": (data, targets),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"sources": a["sources"].astype(np.int64)}, "sources has the wrong dtype"),
        (lambda a: a | {"sources": a["sources"][0]}, "sources is not two-dimensional"),
        (lambda a: a | {"targets": a["targets"][0]}, "targets is not two-dimensional"),
        (lambda a: a | {"targets": np.vstack([a["targets"]] * 2)}, r"targets has shape \[2, 1\]"),
        (lambda a: a | {"sizes": a["sizes"][:, :1]}, r"sizes has shape \[1, 1\]"),
        (lambda a: a | {"lengths": np.array([8, 8], np.int64)}, r"lengths has shape \[2\]"),
        (lambda a: a | {"crc": np.zeros((1, 2), np.uint32)}, r"crc has shape \[1, 2\]"),
        (lambda a: a | {"threads": 0}, "threads is less than 1"),
        (lambda a: a | {"lengths": np.array([-1], np.int64)}, "length -1 is negative"),
        (lambda a: a | {"sizes": a["sizes"] + 1}, "source 0 has 9 bytes, expected 0 to 8"),
        (lambda a: a | {"sizes": a["sizes"] - 9}, "source 0 has -1 bytes"),
        (lambda a: a | {"sources": a["sources"] * np.uint64(0)}, "source 0 is at address 0"),
        (lambda a: a | {"targets": a["targets"] * np.uint64(0)}, "target 0 is at address 0"),
        (lambda a: a | {"targets": a["sources"][:, 1:] + np.uint64(7)}, "target 0 overlaps source 1"),
        (lambda a: a | {"targets": np.hstack([a["targets"]] * 2)}, "target 1 overlaps target 0"),
        (lambda a: a | {"sources": np.zeros((1, 0), np.uint64), "sizes": np.zeros((1, 0), np.int64)}, "0 sources"),
        (lambda a: a | {"targets": np.ones((1, 255), np.uint64)}, "2 sources and 255 targets"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    arguments = change(valid())
    arguments.pop("kept")
    with pytest.raises(ValueError, match=message):
        native.erasure_encode(**arguments)


@pytest.mark.parametrize(
    ("present", "wanted", "message"),
    [
        ([0, 0], [1], "present position 0 is already present"),
        ([0, 2], [2], "wanted position 2 is already present"),
        ([0, 256], [1], "present position 256, expected 0 to 255"),
        ([0, 2], [-1], "wanted position -1, expected 0 to 255"),
        ([0], [1], r"sources has shape \[1, 2\], expected \[1, 1\]"),
        ([0, 2], [1, 3], r"targets has shape \[1, 1\], expected \[1, 2\]"),
    ],
)
def test_positions_that_cannot_be_are_refused(present: list[int], wanted: list[int], message: str) -> None:
    arguments = valid()
    arguments.pop("kept")
    with pytest.raises(ValueError, match=message):
        native.erasure_decode(present, wanted, **arguments)


def test_one_bad_row_stops_all() -> None:
    """Nothing is written before everything is checked."""
    rows = [segments(1, 8, 1), segments(1, 8, 2)]
    targets = [[np.zeros(8, np.uint8)], [np.zeros(8, np.uint8)]]
    lengths = np.array([8, 7], np.int64)
    with pytest.raises(ValueError, match="erasure row 1: source 0 has 8 bytes, expected 0 to 7"):
        native.erasure_encode(addresses(rows), sizes(rows), addresses(targets), lengths)
    assert not np.any(targets)
