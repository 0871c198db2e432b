"""Copies of strided boxes against numpy: every way that a box can lie on either side, threads, bad arguments."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import native

Array = npt.NDArray[Any]


def random_bytes(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


Columns = tuple[Array, Array, Array, Array, Array, Array]


def columns(pairs: Sequence[tuple[Array, Array | None]]) -> Columns:
    """The columns of `copy_boxes` for (source, target) views, padded to a common number of dimensions."""
    width = max((source.ndim for source, _ in pairs), default=0)
    sizes = np.ones((len(pairs), width), np.int64)
    source_strides = np.zeros((len(pairs), width), np.int64)
    target_strides = np.zeros((len(pairs), width), np.int64)
    for row, (source, target) in enumerate(pairs):
        sizes[row, : source.ndim] = source.shape
        source_strides[row, : source.ndim] = source.strides
        if target is not None:
            assert target.shape == source.shape
            target_strides[row, : source.ndim] = target.strides
    return (
        np.array([source.ctypes.data for source, _ in pairs], np.uint64),
        np.array([0 if target is None else target.ctypes.data for _, target in pairs], np.uint64),
        sizes,
        source_strides,
        target_strides,
        np.array([source.itemsize for source, _ in pairs], np.int64),
    )


def copy(pairs: Sequence[tuple[Array, Array | None]], threads: int = 1) -> list[int]:
    """Copies with checksums and returns these."""
    crc = np.full(len(pairs), 0xDEADBEEF, np.uint32)
    native.copy_boxes(*columns(pairs), crc=crc, threads=threads)
    return [int(value) for value in crc]


def check(source: Array, target: Array, threads: int = 1) -> None:
    """Copies with and without a checksum, and takes the checksum alone; all as numpy says."""
    expected = native.crc32c(source.tobytes())
    assert copy([(source, target)], threads) == [expected]
    assert target.tobytes() == source.tobytes()
    assert copy([(source, None)], threads) == [expected]
    target.view(f"V{target.itemsize}")[...] = np.zeros((), f"V{target.itemsize}")
    native.copy_boxes(*columns([(source, target)]), threads=threads)
    assert target.tobytes() == source.tobytes()


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], itemsize: int, seed: int) -> Array:
    """A view of `shape` into its own memory: dimensions stored in any order, with gaps, at an odd address."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    margins = [draw(st.integers(0, 3)) for _ in shape]
    stored = [shape[i] * steps[i] + margins[i] for i in order]
    count = int(np.prod(stored)) * itemsize
    shift = draw(st.integers(0, 3))
    memory = random_bytes(count + shift, seed)[shift:].view(f"V{itemsize}").reshape(stored)
    view: Array = memory.transpose(np.argsort(order)) if shape else memory
    index: tuple[Any, ...] = (..., *(slice(0, size * step, step) for size, step in zip(shape, steps, strict=True)))
    found: Array = view[index]
    return found


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Array, Array]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    itemsize = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16]))
    return draw(layouts(shape, itemsize, 1)), draw(layouts(shape, itemsize, 2))


@settings(deadline=None, max_examples=300)
@given(boxes())
def test_any_box(box: tuple[Array, Array]) -> None:
    source, target = box
    assert source.shape == target.shape
    check(source, target)


@settings(deadline=None)
@given(st.lists(boxes(), max_size=6), st.integers(1, 4))
def test_many_boxes_of_different_dimensions(pairs: list[tuple[Array, Array]], threads: int) -> None:
    assert copy(pairs, threads) == [native.crc32c(source.tobytes()) for source, _ in pairs]
    for source, target in pairs:
        assert target.tobytes() == source.tobytes()


def test_only_the_box_is_written() -> None:
    source = random_bytes(40 * 50).reshape(40, 50)
    target = np.full((60, 70), 7, np.uint8)
    expected = target.copy()
    expected[3:43, 5:55] = source
    check(source, target[3:43, 5:55])
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (63, 257), (300, 700), (1024, 512)])
def test_transposed(itemsize: int, shape: tuple[int, int]) -> None:
    memory = random_bytes(shape[0] * shape[1] * itemsize).view(f"V{itemsize}").reshape(shape)
    check(memory.T, np.empty(shape[::-1], memory.dtype))
    check(memory, np.empty(shape[::-1], memory.dtype).T)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (2, 1, 0, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_permuted(order: tuple[int, ...]) -> None:
    """channels_last and worse, large enough for whole tiles and several slabs."""
    memory = random_bytes(70 * 65 * 40 * 20 * 2).view(np.uint16).reshape(70, 65, 40, 20)
    check(memory.transpose(order), np.empty(memory.transpose(order).shape, np.uint16))


def test_packed_on_neither_side() -> None:
    """Short runs that have to be gathered for the checksum and scattered again, over several slabs."""
    memory = random_bytes(3000 * 1000 * 4).view(np.float32).reshape(3000, 1000)
    target = np.zeros((900, 9000), np.float32)[:, ::3]
    check(memory[:, :900].T, target)


def test_expanded_source() -> None:
    """A stride of zero: one element seen many times, as torch's `expand` makes it."""
    check(np.broadcast_to(np.arange(5, dtype=np.int64)[:, None], (5, 400)), np.empty((5, 400), np.int64))
    check(np.broadcast_to(np.float32(1.5), (300, 7)), np.empty((300, 7), np.float32))


@pytest.mark.parametrize("shift", [0, 1, 13, 63])
@pytest.mark.parametrize("size", [255, 256 * 1024 - 1, 256 * 1024 + 1, 3 * 2**20 + 1000])
def test_contiguous_at_any_address(shift: int, size: int) -> None:
    """Below and above the size from which stores are streamed; heads and tails of broken lines."""
    source = random_bytes(size + 5)[5:]
    memory = np.zeros(size + shift + 64, np.uint8)
    check(source, memory[shift : shift + size])
    assert not memory[:shift].any()
    assert not memory[shift + size :].any()


def test_long_rows_of_a_wide_matrix() -> None:
    """Rows long enough to be streamed one by one."""
    memory = random_bytes(200 * 5003).reshape(200, 5003)
    target = np.zeros((200, 6001), np.uint8)
    check(memory[:, 1:4000], target[:, 3:4002])
    assert not target[:, 4002:].any()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_big_jobs_are_split_and_their_checksums_joined(threads: int) -> None:
    memory = random_bytes(24 * 2**20 + 12)
    check(memory[4:], np.empty(24 * 2**20 + 8, np.uint8), threads)
    matrix = memory[: 24 * 2**20].view(np.float32).reshape(3, -1, 512)
    check(matrix[:, :, :300], np.empty(matrix[:, :, :300].shape, np.float32), threads)
    check(matrix.transpose(0, 2, 1), np.empty((3, 512, matrix.shape[1]), np.float32), threads)
    check(matrix.transpose(2, 1, 0), np.empty(matrix.shape[::-1], np.float32), threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_tens_of_thousands_of_tiny_jobs_among_big_ones(threads: int) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 65, 20_000)
    sizes[[5, 10_000, 19_999]] = [5 * 2**20 + 1, 9 * 2**20, 6 * 2**20]
    starts = np.cumsum(sizes) - sizes
    source = random_bytes(int(sizes.sum()), 4)
    target = np.zeros_like(source)
    crc = np.zeros(len(sizes), np.uint32)
    ones = np.ones((len(sizes), 1), np.int64)
    native.copy_boxes(
        (source.ctypes.data + starts).astype(np.uint64),
        (target.ctypes.data + starts).astype(np.uint64),
        sizes[:, None],
        ones,
        ones,
        ones[:, 0],
        crc=crc,
        threads=threads,
    )
    np.testing.assert_array_equal(target, source)
    expected = [native.crc32c(source[i : i + n]) for i, n in zip(starts, sizes, strict=True)]
    np.testing.assert_array_equal(crc, np.array(expected, np.uint32))


def test_nothing_and_single_elements() -> None:
    assert copy([]) == []
    scalar, found = np.array(3.5), np.array(0.0)
    assert copy([(scalar, found)]) == [native.crc32c(scalar)]
    assert found == 3.5
    empty = np.empty((4, 0, 3), np.float32)
    assert copy([(empty, empty.copy()), (scalar, found)]) == [0, native.crc32c(scalar)]


def test_jobs_without_bytes_may_have_no_address() -> None:
    """torch gives an empty tensor the address 0."""
    arguments = columns([(np.empty((0, 3), np.float32), None)])
    arguments[0][0] = 0
    crc = np.ones(1, np.uint32)
    native.copy_boxes(*arguments, crc=crc)
    assert crc[0] == 0
    native.copy_boxes(*arguments)


def test_copies_bytes_from_an_address() -> None:
    for size in (0, 1, 100, 400_000):
        source, target = random_bytes(size), bytearray(size)
        assert native.copy_bytes(native.address_of(source), target) == native.crc32c(source)
        assert target == source.tobytes()
        target = bytearray(size)
        assert native.copy_bytes(native.address_of(source), target, crc=False) == 0
        assert target == source.tobytes()
    with pytest.raises(BufferError):
        native.copy_bytes(native.address_of(source), b"read-only")
    with pytest.raises(ValueError, match="address is 0"):
        native.copy_bytes(0, bytearray(1))


def test_address_of_agrees_with_numpy() -> None:
    array = np.arange(10)
    assert native.address_of(array) == array.ctypes.data
    assert native.address_of(array[3:]) == array.ctypes.data + 3 * array.itemsize


SOURCE, TARGET, SIZES, SOURCE_STRIDES, TARGET_STRIDES, ITEMSIZE = range(6)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (SOURCE, np.zeros((1, 1), np.uint64), "source is not one-dimensional"),
        (SOURCE, np.zeros(1, np.int64), "source has the wrong dtype"),
        (SOURCE, np.zeros(1, np.uint64), "job 0: source address is 0"),
        (TARGET, np.zeros(2, np.uint64), r"target has shape \[2\], expected \[1\]"),
        (TARGET, np.zeros(1, np.uint64), "job 0: target address is 0 and no checksum"),
        (SIZES, np.ones(1, np.int64), "sizes is not two-dimensional"),
        (SIZES, np.ones((1, 2), np.int32), "sizes has the wrong dtype"),
        (SIZES, np.array([[3, -1]]), "job 0: size -1 is negative"),
        (SIZES, np.array([[2**40, 2**40]]), "job 0: more bytes than"),
        (SOURCE_STRIDES, np.ones((1, 3), np.int64), r"source_strides has shape \[1, 3\], expected \[1, 2\]"),
        (SOURCE_STRIDES, np.array([[-4, 4]]), "job 0: a stride is negative"),
        (TARGET_STRIDES, np.array([[-4, 4]]), "job 0: a stride is negative"),
        (TARGET_STRIDES, np.ones((1, 4), np.int64)[:, ::2], "target_strides is not C-contiguous"),
        (ITEMSIZE, np.zeros(1, np.int64), "job 0: itemsize 0"),
        (ITEMSIZE, np.ones(1, np.float64), "itemsize has the wrong dtype"),
    ],
)
def test_refuses_what_cannot_be(column: int, value: Array, message: str) -> None:
    """ValueError, and not a byte is copied."""
    source, target = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    arguments = list(columns([(source, target)]))
    arguments[column] = value
    with pytest.raises(ValueError, match=message):
        native.copy_boxes(*arguments)
    assert not target.any()


@pytest.mark.parametrize(
    ("crc", "message"),
    [(np.zeros(2, np.uint32), r"crc has shape \[2\]"), (np.zeros(1, np.uint64), "crc has the wrong dtype")],
)
def test_refuses_wrong_room_for_checksums(crc: Any, message: str) -> None:
    arguments = columns([(np.ones(3), np.zeros(3))])
    with pytest.raises(ValueError, match=message):
        native.copy_boxes(*arguments, crc=crc)


def test_refuses_other_impossible_arguments() -> None:
    arguments = columns([(np.ones(3), np.zeros(3))])
    with pytest.raises(ValueError, match="threads"):
        native.copy_boxes(*arguments, threads=0)
    wide = np.ones((1, 65), np.int64)
    with pytest.raises(ValueError, match="65 dimensions, at most 64"):
        native.copy_boxes(arguments[SOURCE], arguments[TARGET], wide, wide, wide, arguments[ITEMSIZE])
    read_only = np.zeros(1, np.uint32)
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        native.copy_boxes(*arguments, crc=read_only)


def test_the_most_dimensions() -> None:
    """64, of which as many as memory allows cannot be merged with another."""
    source = random_bytes(3**12).reshape((3,) * 12)[(slice(0, 2),) * 12]
    target = np.zeros(source.shape, np.uint8)
    arguments = columns([(source, target)])
    padding = np.zeros((1, 52), np.int64)
    sizes = np.concatenate([padding + 1, arguments[SIZES]], axis=1)
    source_strides, target_strides = (
        np.concatenate([padding, arguments[i]], axis=1) for i in (SOURCE_STRIDES, TARGET_STRIDES)
    )
    native.copy_boxes(arguments[SOURCE], arguments[TARGET], sizes, source_strides, target_strides, arguments[ITEMSIZE])
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("shape", [(1 << 21,), (1 << 18, 8), (1 << 20, 2)])
def test_the_checksum_is_of_what_was_copied_while_the_source_changes(shape: tuple[int, ...]) -> None:
    """In one run (streamed past the caches), packed on the source's side alone, on the target's alone."""
    source = np.zeros(shape, np.uint8)
    stopped = threading.Event()

    def change() -> None:
        for value in itertools.cycle(range(256)):
            if stopped.is_set():
                return
            source.fill(value)  # numpy lets go of the GIL

    writing = threading.Thread(target=change)
    writing.start()
    try:
        for target in (np.zeros(shape, np.uint8), np.zeros(shape[::-1], np.uint8).T):
            for _ in range(100):
                (found,) = copy([(source, target)])
                assert found == native.crc32c(target.tobytes())
            if len(shape) > 1:
                (found,) = copy([(source.T, target.T)])
                assert found == native.crc32c(target.T.tobytes())
    finally:
        stopped.set()
        writing.join()
