"""Chunks: raw bytes to stored bytes and back (docs/format.md, section 4).

Owns the codecs and the choice among them. Decoding writes into a buffer whose size the caller declares, as a stream
with a bounded window, and believes no header. Both directions return the crc32c of the raw bytes that they saw, taken
on the way; what it ought to be, the caller knows. Safe in threads.
"""

from __future__ import annotations

import struct
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from ckptd.core import native
from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import BYTEPLANES_ZSTD, RAW, ZSTD
from ckptd.core.errors import FormatError
from ckptd.core.types import itemsize

LEVEL = 1
CODECS = {RAW: "raw", ZSTD: "zstd", BYTEPLANES_ZSTD: "byte planes + zstd"}

_LEAST_BYTES = 128
"""Smaller chunks are not worth a frame."""
_GAIN = 0.03
"""What compression must save for a chunk to be stored compressed."""

_SAMPLED_BYTES = 1024 * 1024
"""From this size on a sample says which planes are not worth compressing."""
_SAMPLE_RUNS, _RUN_ITEMS = 8, 2048
_PLANE_GAIN = 1 / 64
"""Zstandard itself leaves literals alone that Huffman codes make no shorter than this."""

_BLOCK_BYTES = 128 * 1024
"""The most that a block of a zstd frame may hold (RFC 8878, 3.1.1.2.4)."""
_HEADER_BYTES = 3
_WINDOW_LOG = 19


class Encoded(NamedTuple):
    """One chunk as it is stored, and the CRC-32C of its raw bytes."""

    codec: int
    stored: memoryview
    crc: int


class _Workspace(threading.local):
    """Per thread: zstd contexts, and scratch memory (fresh pages would cost more than the codec)."""

    def __init__(self) -> None:
        self.compressors = {ZSTD: zstandard.ZstdCompressor(level=LEVEL), BYTEPLANES_ZSTD: _for_planes()}
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=CHUNK_BYTES)
        self._scratch = memoryview(b"")

    def scratch(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8).data
        return self._scratch[:size]


def _for_planes() -> zstandard.ZstdCompressor:
    """What byte planes have to give is that some bytes are frequent, not that they repeat: with next to no search for
    what repeats they come out smaller, in two thirds of the time. Long runs are found all the same."""
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=_WINDOW_LOG, hash_log=7, min_match=7)
    return zstandard.ZstdCompressor(compression_params=parameters)


_workspace = _Workspace()


def plane_width(dtype: str) -> int:
    """Bytes of the numbers that byte planes take apart: the element, or half of a complex one."""
    return itemsize(dtype) // 2 if dtype.startswith("complex") else itemsize(dtype)


def choose_codec(dtype: str) -> int:
    """The codec worth trying for `dtype`."""
    floating = dtype.startswith(("float", "bfloat", "complex"))
    return BYTEPLANES_ZSTD if floating and plane_width(dtype) >= 2 else ZSTD


def encode_chunk(raw: memoryview, dtype: str, into: memoryview, codec: int | None = None) -> Encoded:
    """Encodes `raw`, the contiguous bytes of elements of `dtype`, into the beginning of `into`, which is at least as
    long. The checksum is of what was encoded, even if `raw` changes meanwhile.

    `codec` None: whichever suits the dtype, or RAW unless it saves enough. Given: that; ValueError if there is no room.
    """
    wanted = choose_codec(dtype) if codec is None else codec
    if wanted == RAW or (codec is None and raw.nbytes < _LEAST_BYTES):
        return _encode_raw(raw, into)
    most = int(raw.nbytes * (1 - _GAIN)) if codec is None else into.nbytes
    if wanted == BYTEPLANES_ZSTD:
        encoded = _encode_planes(raw, plane_width(dtype), into, most)
    else:
        source = _workspace.scratch(raw.nbytes)
        crc = native.copy_bytes(native.address_of(raw), source)
        encoded = _filled(wanted, into, 0, _workspace.compressors[wanted].compress(source), most, crc)
    if encoded is not None:
        return encoded
    if codec is not None:
        raise ValueError(f"codec {codec}: no room in {into.nbytes} bytes")
    return _encode_raw(raw, into)


def _encode_raw(raw: memoryview, into: memoryview) -> Encoded:
    stored = into[: raw.nbytes]
    return Encoded(RAW, stored, native.copy_bytes(native.address_of(raw), stored))


def _encode_planes(raw: memoryview, width: int, into: memoryview, most: int) -> Encoded | None:
    """One frame of the byte planes. Leading ones that compression would not make smaller are put straight into raw
    blocks of the frame; the others are compressed together, and their blocks follow."""
    leading = _leading_noise(raw, width)
    if leading == width:
        return None
    items = raw.nbytes // width
    planes = _workspace.scratch((width - leading) * items)
    compressor = _workspace.compressors[BYTEPLANES_ZSTD]
    if leading == 0:
        crc = native.byteplanes_split(raw, planes, width)
        return _filled(BYTEPLANES_ZSTD, into, 0, compressor.compress(planes), most, crc)
    header = _frame_header(raw.nbytes)
    blocks = _raw_blocks(into[len(header) :], items, leading)
    crc = native.byteplanes_split(raw, planes, width, blocks)
    into[: len(header)] = header
    _header_places(blocks, items)[:] = _raw_headers(items)
    frame = compressor.compress(planes)
    following = memoryview(frame)[zstandard.frame_header_size(frame) :]
    return _filled(BYTEPLANES_ZSTD, into, len(header) + blocks.memory.nbytes, following, most, crc)


def _filled(codec: int, into: memoryview, start: int, data: bytes | memoryview, most: int, crc: int) -> Encoded | None:
    """`into` with `data` from `start` on; None where that is more than `most` bytes."""
    end = start + len(data)
    if end > most:
        return None
    into[start:end] = data
    return Encoded(codec, into[:end], crc)


def _leading_noise(raw: memoryview, width: int) -> int:
    """How many of the first planes, whose bytes signify least, compression makes no smaller, as a sample has it."""
    items = raw.nbytes // width
    if raw.nbytes < _SAMPLED_BYTES:
        return 0
    numbers = np.frombuffer(raw, np.uint8).reshape(items, width)
    starts = np.linspace(0, items - _RUN_ITEMS, _SAMPLE_RUNS, dtype=np.int64)
    sample = np.concatenate([numbers[start : start + _RUN_ITEMS] for start in starts])
    planes = np.ascontiguousarray(sample.T)
    compressor = _workspace.compressors[BYTEPLANES_ZSTD]
    for plane in range(width):
        if len(compressor.compress(planes[plane].data)) < len(sample) * (1 - _PLANE_GAIN):
            return plane
    return width


def _frame_header(content: int) -> bytes:
    """Magic, descriptor (4 bytes of content size, no checksum), window, content size (RFC 8878, 3.1.1.1)."""
    return struct.pack("<IBBI", zstandard.MAGIC_NUMBER, 0x80, (_WINDOW_LOG - 10) << 3, content)


def _raw_blocks(memory: memoryview, items: int, leading: int) -> native.Blocks:
    """The beginning of `memory`, as blocks for planes of `items` bytes."""
    size = leading * native.Blocks.plane_bytes(items, _BLOCK_BYTES, _HEADER_BYTES)
    return native.Blocks(memory[:size], leading, _BLOCK_BYTES, _HEADER_BYTES)


def _raw_headers(items: int) -> npt.NDArray[np.uint8]:
    """[blocks, 3]: what is before each block of a plane that is stored raw, none of them the last of its frame."""
    sizes = np.minimum(items - np.arange(0, items, _BLOCK_BYTES), _BLOCK_BYTES)
    return (sizes << 3).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :_HEADER_BYTES]


def _header_places(blocks: native.Blocks, items: int) -> npt.NDArray[np.uint8]:
    """[leading, blocks, 3]: the gaps before the blocks."""
    memory = np.frombuffer(blocks.memory, np.uint8).reshape(blocks.leading, -1)
    count = -(-items // _BLOCK_BYTES)
    return np.lib.stride_tricks.as_strided(
        memory, (blocks.leading, count, _HEADER_BYTES), (memory.strides[0], _BLOCK_BYTES + _HEADER_BYTES, 1)
    )


def decode_chunk(codec: int, stored: bytes | memoryview, dtype: str, into: memoryview) -> int:
    """Fills `into`, contiguous and writable, which must be exactly the decoded size, and returns the CRC-32C of what is
    there now. Raises FormatError."""
    source = memoryview(stored).cast("B")
    if codec == RAW:
        if source.nbytes != into.nbytes:
            raise FormatError(f"raw chunk: expected {into.nbytes} bytes, found {source.nbytes}")
        return native.copy_bytes(native.address_of(source), into)
    if codec == ZSTD:
        _decompress(source, into)
        return native.crc32c(into)
    if codec == BYTEPLANES_ZSTD:
        return _decode_planes(source, plane_width(dtype), into)
    raise FormatError(f"codec {codec} is unknown; known: {CODECS}")


def _decode_planes(source: memoryview, width: int, into: memoryview) -> int:
    if into.nbytes % width or into.nbytes > CHUNK_BYTES:
        raise FormatError(f"byte planes of {into.nbytes} bytes for numbers of {width} bytes")
    found = _leading_raw(source, width, into.nbytes)
    if found is not None:
        blocks, rest = found
        planes = _decompress_rest(rest, into.nbytes // width * (width - blocks.leading))
        if planes is not None:
            return native.byteplanes_join(planes, into, width, blocks)
    planes = _workspace.scratch(into.nbytes)
    _decompress(source, planes)
    return native.byteplanes_join(planes, into, width)


def _leading_raw(source: memoryview, width: int, size: int) -> tuple[native.Blocks, memoryview] | None:
    """The leading planes that lie in raw blocks of their own, so that they can be taken from where they are, and the
    blocks that follow; None if it is not so, or they are not half of all, or something is wrong with the frame."""
    items = size // width
    if size < _SAMPLED_BYTES:
        return None
    try:
        found = zstandard.get_frame_parameters(source[:18])
        start = zstandard.frame_header_size(source[:18])
    except zstandard.ZstdError:
        return None
    if found.content_size != size or found.has_checksum or found.dict_id:
        return None
    headers = _raw_headers(items)
    plane_bytes = native.Blocks.plane_bytes(items, _BLOCK_BYTES, _HEADER_BYTES)
    leading = 0
    while leading < width - 1 and start + (leading + 1) * plane_bytes <= source.nbytes:
        plane = _raw_blocks(source[start + leading * plane_bytes :], items, 1)
        if not np.array_equal(_header_places(plane, items)[0], headers):
            break
        leading += 1
    blocks = _raw_blocks(source[start:], items, leading)
    return (blocks, source[start + leading * plane_bytes :]) if 2 * leading >= width else None


def _decompress_rest(blocks: memoryview, size: int) -> memoryview | None:
    """Blocks of a frame that come after raw ones, decompressed to `size` bytes by themselves; None if they cannot be.
    What they mean depends on what is before them only if they copy from there, and then this does not succeed."""
    header = struct.pack("<IBI", zstandard.MAGIC_NUMBER, 0xA0, size)
    scratch = _workspace.scratch(size + len(header) + blocks.nbytes)
    planes, frame = scratch[:size], scratch[size:]
    frame[: len(header)] = header
    frame[len(header) :] = blocks
    try:
        _decompress(frame, planes)
    except FormatError:
        return None
    return planes


def _decompress(source: memoryview, into: memoryview) -> None:
    """One zstd frame, exactly as long as `into`."""
    try:
        declared = zstandard.frame_content_size(source[:18])
        if declared != into.nbytes:
            raise FormatError(f"zstd frame: expected {into.nbytes} bytes, its header says {declared}")
        with _workspace.decompressor.stream_reader(source, read_across_frames=False) as reader:
            filled = 0
            while filled < into.nbytes:
                count = reader.readinto(into[filled:])
                if count == 0:
                    raise FormatError(f"zstd frame: ends after {filled} of {into.nbytes} bytes")
                filled += count
            if reader.read(1):
                raise FormatError(f"zstd frame: goes on after {into.nbytes} bytes")
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd frame: {error}") from None
