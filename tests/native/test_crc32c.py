"""CRC-32C against a table computed in plain Python, and the identities that split checksums rest on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import native


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def reference_crc32c(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = TABLE[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def test_the_published_check_values() -> None:
    """From RFC 3720, appendix B.4, and the catalogue of CRCs."""
    assert native.crc32c(b"123456789") == 0xE3069283
    assert native.crc32c(bytes(32)) == 0x8A9136AA
    assert native.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert native.crc32c(bytes(range(32))) == 0x46DD794E
    assert native.crc32c(b"") == 0


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_equals_the_reference(data: bytes) -> None:
    assert native.crc32c(data) == reference_crc32c(data)


@settings(deadline=None)
@given(st.binary(max_size=600), st.binary(max_size=600))
def test_continues_and_combines(first: bytes, second: bytes) -> None:
    whole = native.crc32c(first + second)
    assert native.crc32c(second, native.crc32c(first)) == whole
    assert native.crc32c_combine(native.crc32c(first), native.crc32c(second), len(second)) == whole


@pytest.mark.parametrize("zeros", [0, 1, 4095, 4096, 16 * 2**20 + 3])
def test_combines_long_second_parts(zeros: int) -> None:
    second = bytes(zeros)
    combined = native.crc32c_combine(native.crc32c(b"first"), native.crc32c(second), zeros)
    assert combined == native.crc32c(b"first" + second)


def test_combines_lengths_beyond_memory() -> None:
    """Associative, so that parts of parts can be combined: (a + b) + c == a + (b + c) for 2^40 bytes too."""
    first, second, third, length = 0x12345678, 0x9ABCDEF0, 0x0F1E2D3C, 2**40 + 7
    left = native.crc32c_combine(native.crc32c_combine(first, second, length), third, length)
    right = native.crc32c_combine(first, native.crc32c_combine(second, third, length), 2 * length)
    assert left == right


def test_takes_any_contiguous_buffer() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert native.crc32c(array) == native.crc32c(array.tobytes())
    assert native.crc32c(memoryview(array.tobytes())[3:50]) == native.crc32c(array.tobytes()[3:50])
    with pytest.raises(ValueError, match="contiguous"):
        native.crc32c(array[:, ::2])
    with pytest.raises(TypeError):
        native.crc32c("text")  # type: ignore[arg-type]
