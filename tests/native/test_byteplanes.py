"""Byte planes against numpy's transpose."""

from __future__ import annotations

from collections.abc import Callable

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
    native.byteplanes_split(source, planes, itemsize)
    np.testing.assert_array_equal(planes.reshape(itemsize, items), source.reshape(items, itemsize).T)
    native.byteplanes_join(planes, back, itemsize)
    np.testing.assert_array_equal(back, source)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_a_whole_chunk(itemsize: int) -> None:
    source = np.random.default_rng(itemsize).bytes(2**20 + 16)
    planes, back = bytearray(len(source)), bytearray(len(source))
    native.byteplanes_split(source, planes, itemsize)
    assert planes[: len(source) // itemsize] == source[::itemsize]
    native.byteplanes_join(planes, back, itemsize)
    assert back == source


@pytest.mark.parametrize("transform", [native.byteplanes_split, native.byteplanes_join])
def test_refuses_wrong_lengths(transform: Callable[[bytes, bytes | bytearray, int], None]) -> None:
    with pytest.raises(ValueError, match="7 bytes, expected a multiple of itemsize 2"):
        transform(bytes(7), bytearray(7), 2)
    with pytest.raises(ValueError, match="target has 4 bytes, source 8"):
        transform(bytes(8), bytearray(4), 2)
    with pytest.raises(ValueError, match="itemsize is less than 1"):
        transform(bytes(8), bytearray(8), 0)
    with pytest.raises(BufferError):
        transform(bytes(8), bytes(8), 2)
