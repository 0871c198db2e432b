"""Codecs: what is encoded decodes, and nothing else does."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import BYTEPLANES_ZSTD, RAW, ZSTD
from ckptd.core.errors import FormatError
from ckptd.core.types import DTYPES, itemsize
from ckptd.format.chunk import choose_codec, decode_chunk, encode_chunk, plane_width


def decoded(codec: int, stored: bytes | memoryview, dtype: str, size: int) -> bytes:
    into = bytearray(size)
    decode_chunk(codec, stored, dtype, memoryview(into))
    return bytes(into)


@given(data=st.binary(max_size=4000), dtype=st.sampled_from(list(DTYPES)), codec=st.sampled_from([None, RAW, ZSTD]))
@settings(max_examples=150, deadline=None)
def test_round_trip(data: bytes, dtype: str, codec: int | None) -> None:
    raw = data * itemsize(dtype)
    used, stored = encode_chunk(memoryview(raw), dtype, codec)
    assert codec is None or used == codec
    assert len(stored) <= len(raw) or codec == ZSTD
    assert decoded(used, stored, dtype, len(raw)) == raw


@pytest.mark.parametrize("dtype", [name for name in DTYPES if plane_width(name) >= 2])
def test_byte_planes_lie_as_the_document_says(dtype: str) -> None:
    raw = bytes(i * 7 % 256 for i in range(16 * 12))
    codec, stored = encode_chunk(memoryview(raw), dtype, BYTEPLANES_ZSTD)
    planes = zstandard.ZstdDecompressor().decompress(stored)
    width, count = plane_width(dtype), len(raw) // plane_width(dtype)
    assert all(planes[j * count + i] == raw[i * width + j] for i in range(count) for j in range(width))
    assert decoded(codec, stored, dtype, len(raw)) == raw


def test_codecs_suit_the_dtype() -> None:
    planes = {name for name in DTYPES if choose_codec(name) == BYTEPLANES_ZSTD}
    assert planes == {"float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"}
    assert {plane_width(name) for name in ("complex32", "float16", "complex64")} == {2, 4}


def test_noise_stays_raw_and_is_not_copied() -> None:
    raw = memoryview(np.random.default_rng(0).integers(0, 256, 10_000, np.uint8))
    codec, stored = encode_chunk(raw, "uint8")
    assert codec == RAW
    assert stored is raw


def test_a_whole_chunk() -> None:
    values = np.arange(CHUNK_BYTES // 4, dtype=np.float32)
    codec, stored = encode_chunk(memoryview(values).cast("B"), "float32")
    assert codec == BYTEPLANES_ZSTD
    assert decoded(codec, stored, "float32", CHUNK_BYTES) == values.tobytes()


FRAME = zstandard.ZstdCompressor().compress(bytes(range(256)) * 4)


@pytest.mark.parametrize(
    ("codec", "stored", "size"),
    [
        (RAW, b"123", 4),
        (RAW, b"12345", 4),
        (3, b"1234", 4),
        (ZSTD, b"", 4),
        (ZSTD, b"no frame at all", 4),
        (ZSTD, FRAME, 1023),
        (ZSTD, FRAME, 1025),
        (ZSTD, FRAME[:-20], 1024),
        (ZSTD, FRAME + b"more", 1024),
        (ZSTD, FRAME + FRAME, 1024),
        (ZSTD, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1024)), 1024),
        (BYTEPLANES_ZSTD, FRAME, 1022),
        (BYTEPLANES_ZSTD, FRAME, 2048),
    ],
)
def test_wrong_bytes_are_refused(codec: int, stored: bytes, size: int) -> None:
    with pytest.raises(FormatError):
        decoded(codec, stored, "float32", size)


def test_threads_do_not_share_workspaces() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        raw = np.random.default_rng(seed).integers(0, 4, 50_000, np.int32).astype(np.float32).tobytes()
        for _ in range(10):
            codec, stored = encode_chunk(memoryview(raw), "float32")
            if decoded(codec, stored, "float32", len(raw)) != raw:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
