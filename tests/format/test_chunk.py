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
from ckptd.core.native import crc32c
from ckptd.core.types import DTYPES, itemsize
from ckptd.format.chunk import choose_codec, decode_chunk, encode_chunk, plane_width


def encoded(raw: bytes | memoryview, dtype: str, codec: int | None = None) -> tuple[int, bytes]:
    """Also checks that the checksum is of `raw`, and that nothing lies where it was not to be."""
    source = memoryview(raw).cast("B")
    buffer = bytearray(2 * source.nbytes + 1024)
    room = source.nbytes if codec is None else len(buffer) - 1
    found = encode_chunk(source, dtype, memoryview(buffer)[:room], codec)
    assert found.crc == crc32c(source)
    assert not any(buffer[room:])
    return found.codec, bytes(found.stored)


def decoded(codec: int, stored: bytes, dtype: str, size: int) -> bytes:
    into = bytearray(size)
    assert decode_chunk(codec, stored, dtype, memoryview(into)) == crc32c(into)
    return bytes(into)


@given(data=st.binary(max_size=4000), dtype=st.sampled_from(list(DTYPES)), codec=st.sampled_from([None, RAW, ZSTD]))
@settings(max_examples=150, deadline=None)
def test_round_trip(data: bytes, dtype: str, codec: int | None) -> None:
    raw = data * itemsize(dtype)
    used, stored = encoded(raw, dtype, codec)
    assert codec is None or used == codec
    assert len(stored) <= len(raw) or codec == ZSTD
    assert decoded(used, stored, dtype, len(raw)) == raw


@pytest.mark.parametrize("dtype", [name for name in DTYPES if plane_width(name) >= 2])
def test_byte_planes_lie_as_the_document_says(dtype: str) -> None:
    raw = bytes(i * 7 % 256 for i in range(16 * 12))
    codec, stored = encoded(raw, dtype, BYTEPLANES_ZSTD)
    planes = zstandard.ZstdDecompressor().decompress(stored)
    width, count = plane_width(dtype), len(raw) // plane_width(dtype)
    assert all(planes[j * count + i] == raw[i * width + j] for i in range(count) for j in range(width))
    assert decoded(codec, stored, dtype, len(raw)) == raw


def test_codecs_suit_the_dtype() -> None:
    planes = {name for name in DTYPES if choose_codec(name) == BYTEPLANES_ZSTD}
    assert planes == {"float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"}
    assert {plane_width(name) for name in ("complex32", "float16", "complex64")} == {2, 4}


def test_noise_stays_raw() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 3 * 2**20, np.uint8).tobytes()
    for dtype, size in (("uint8", 10_000), ("float32", 10_000), ("float32", len(noise)), ("bfloat16", len(noise))):
        assert encoded(noise[:size], dtype) == (RAW, noise[:size])


def planes_of(raw: bytes, width: int) -> bytes:
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, width).T).tobytes()


def weights(count: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


BLOCK = 128 * 1024
LARGE: dict[str, tuple[np.ndarray, str, int]] = {
    "weights": (weights(BLOCK * 3), "float32", 3),
    "a last block of one byte": (weights(BLOCK * 2 + 1), "float32", 3),
    "a whole chunk": (weights(CHUNK_BYTES // 4), "float32", 3),
    "bfloat16": (weights(BLOCK * 5).view(np.uint16)[1::2].copy(), "bfloat16", 1),
    "float64": (weights(BLOCK * 2).astype(np.float64), "float64", 0),
    "complex64": (weights(BLOCK * 4), "complex64", 3),
    "half of them zero": (weights(BLOCK * 4) * (np.arange(BLOCK * 4) < BLOCK * 2), "float32", 0),
    "few values": (weights(7)[np.random.default_rng(1).integers(0, 7, BLOCK * 3)], "float32", 0),
    "counted": (np.arange(CHUNK_BYTES // 4, dtype=np.float32), "float32", 0),
    "only the middle is noise": (
        np.random.default_rng(2).integers(0, 2**32, BLOCK * 3, np.uint32) & 0x00FFFF00 | 0x3F000007,
        "float32",
        0,
    ),
}


@pytest.mark.parametrize("case", list(LARGE))
def test_planes_of_noise_lie_raw_in_one_frame(case: str) -> None:
    """Any decoder reads the frame; noise in the leading planes is where the document says, and nothing gets larger."""
    values, dtype, leading = LARGE[case]
    raw, width = values.tobytes(), plane_width(dtype)
    codec, stored = encoded(raw, dtype)
    assert codec == BYTEPLANES_ZSTD
    planes = planes_of(raw, width)
    assert zstandard.ZstdDecompressor().decompress(stored) == planes
    assert decoded(codec, stored, dtype, len(raw)) == raw
    assert len(stored) <= len(zstandard.ZstdCompressor(level=1).compress(planes)) * 1.01
    items, at = len(raw) // width, 10
    for start in (plane * items + first for plane in range(leading) for first in range(0, items, BLOCK)):
        size = min(BLOCK, items - start % items)
        assert stored[at : at + 3] == (size << 3).to_bytes(3, "little")
        assert stored[at + 3 : at + 3 + size] == planes[start : start + size]
        at += 3 + size
    assert leading == 0 or int.from_bytes(stored[at : at + 3], "little") >> 1 & 3 == 2, "a compressed block follows"


@pytest.mark.parametrize("level", [1, 3, 19])
def test_frames_that_others_write(level: int) -> None:
    """Blocks that copy from raw ones before them are not mistaken for blocks that can be read alone."""
    noise = np.random.default_rng(level).integers(0, 256, BLOCK * 2, np.uint8).tobytes()
    for planes in (noise * 4, noise * 2 + bytes(BLOCK * 4), noise[::-1] + noise * 2 + noise[:BLOCK] + bytes(BLOCK)):
        raw = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, -1).T).tobytes()
        for parameters in ({}, {"write_checksum": True}):
            stored = zstandard.ZstdCompressor(level=level, **parameters).compress(planes)
            assert decoded(BYTEPLANES_ZSTD, stored, "float32", len(raw)) == raw


def test_damage_anywhere_in_a_frame() -> None:
    """Found by the decoder, or by the checksum that it returns."""
    raw = weights(BLOCK * 3).tobytes()
    codec, stored = encoded(raw, "float32")
    generator = np.random.default_rng(3)
    places = {*range(14), *generator.integers(0, len(stored), 60).tolist(), 10 + BLOCK + 3, len(stored) - 1}
    for place in sorted(places):
        damaged = bytearray(stored)
        damaged[place] ^= 1 << generator.integers(8)
        into = bytearray(len(raw))
        try:
            found = decode_chunk(codec, bytes(damaged), "float32", memoryview(into))
        except FormatError:
            continue
        assert (found == crc32c(raw)) == (bytes(into) == raw)
        assert found == crc32c(into)
    for size in (9, 13, BLOCK, len(stored) - 1):
        with pytest.raises(FormatError):
            decode_chunk(codec, stored[:size], "float32", memoryview(bytearray(len(raw))))


def test_what_has_no_room_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    with pytest.raises(ValueError, match="no room in 1000 bytes"):
        encode_chunk(noise.data, "uint8", memoryview(bytearray(1000)), ZSTD)


def test_the_checksum_is_of_what_was_encoded() -> None:
    """Somebody writes to the source all the while."""
    values = weights(BLOCK * 3)
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            values[:] = -values

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        into = memoryview(bytearray(values.nbytes))
        for _ in range(20):
            codec, stored, crc = encode_chunk(memoryview(values).cast("B"), "float32", into)
            back = bytearray(values.nbytes)
            assert decode_chunk(codec, stored, "float32", memoryview(back)) == crc
    finally:
        stop.set()
        thread.join(timeout=60)


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
            codec, stored = encoded(raw, "float32")
            if decoded(codec, stored, "float32", len(raw)) != raw:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
