"""Byte planes against numpy's transpose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import native


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 200), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_split_is_a_transpose_and_join_undoes_it(itemsize: int, items: int, shift: int, seed: int) -> None:
    """Every item size, lengths that are no multiple of a vector's, odd addresses."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, items * itemsize + shift, dtype=np.uint8)[shift:]
    planes, back = np.zeros_like(source), np.zeros_like(source)
    assert native.byteplanes_split(source, planes, itemsize) == native.crc32c(source)
    np.testing.assert_array_equal(planes.reshape(itemsize, items), source.reshape(items, itemsize).T)
    assert native.byteplanes_join(planes, back, itemsize) == native.crc32c(source)
    np.testing.assert_array_equal(back, source)


@settings(deadline=None)
@given(
    itemsize=st.sampled_from([1, 2, 3, 4, 8, 16]),
    items=st.integers(0, 5000),
    leading=st.integers(1, 16),
    block=st.integers(3, 900),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_leading_planes_lie_in_blocks(itemsize: int, items: int, leading: int, block: int, gap: int, seed: int) -> None:
    """With gaps between, which stay as they were."""
    leading = min(leading, itemsize)
    source = np.random.default_rng(seed).integers(0, 256, (items, itemsize), np.uint8)
    plane_bytes = native.Blocks.plane_bytes(items, block, gap)
    memory = np.full(leading * plane_bytes, 77, np.uint8)
    planes = np.zeros((itemsize - leading) * items, np.uint8)
    blocks = native.Blocks(memory.data, leading, block, gap)
    assert native.byteplanes_split(source.reshape(-1), planes, itemsize, blocks) == native.crc32c(source.reshape(-1))
    np.testing.assert_array_equal(planes.reshape(itemsize - leading, items), source[:, leading:].T)
    for number, plane in enumerate(memory.reshape(leading, plane_bytes)):
        expected = [np.r_[[77] * gap, source[at : at + block, number]] for at in range(0, items, block)]
        np.testing.assert_array_equal(plane, np.concatenate(expected) if expected else plane[:0])
    back = np.zeros(items * itemsize, np.uint8)
    assert native.byteplanes_join(planes, back, itemsize, blocks) == native.crc32c(back)
    np.testing.assert_array_equal(back, source.reshape(-1))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_a_whole_chunk(itemsize: int) -> None:
    source = np.random.default_rng(itemsize).bytes(2**20 + 16)
    planes, back = bytearray(len(source)), bytearray(len(source))
    native.byteplanes_split(source, planes, itemsize)
    assert planes[: len(source) // itemsize] == source[::itemsize]
    native.byteplanes_join(planes, back, itemsize)
    assert back == source


def test_refuses_wrong_lengths() -> None:
    for split in (True, False):

        def move(items: bytearray, planes: bytearray, itemsize: int, split: bool = split) -> int:
            if split:
                return native.byteplanes_split(items, planes, itemsize)
            return native.byteplanes_join(planes, items, itemsize)

        with pytest.raises(ValueError, match="7 bytes, expected a multiple of itemsize 2"):
            move(bytearray(7), bytearray(7), 2)
        with pytest.raises(ValueError, match="planes have 4 bytes, blocks 0; expected 8 and 0"):
            move(bytearray(8), bytearray(4), 2)
        for itemsize in (0, 65):
            with pytest.raises(ValueError, match="itemsize is not 1 to 64"):
                move(bytearray(130), bytearray(130), itemsize)
    with pytest.raises(BufferError):
        native.byteplanes_split(bytes(8), bytes(8), 2)
    with pytest.raises(BufferError):
        native.byteplanes_join(bytes(8), bytes(8), 2)


@pytest.mark.parametrize(
    ("leading", "block", "gap", "problem"),
    [
        (3, 4, 1, "leading is not 0 to itemsize"),
        (-1, 4, 1, "leading is not 0 to itemsize"),
        (1, 0, 0, "block or gap"),
        (1, 4, -1, "block or gap"),
        (1, 4, 5, "block or gap"),
        (1, 3, 1, "planes have 4 bytes, blocks 5; expected 4 and 6"),
    ],
)
def test_refuses_blocks_that_cannot_be(leading: int, block: int, gap: int, problem: str) -> None:
    blocks = native.Blocks(memoryview(bytearray(5)), leading, block, gap)
    with pytest.raises(ValueError, match=problem):
        native.byteplanes_split(bytes(8), bytearray(4), 2, blocks)
