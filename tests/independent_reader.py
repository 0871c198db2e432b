"""A second reader of checkpoints, written from docs/format.md alone: nothing of the package is imported.

Slow and simple. If it and the package disagree about a golden file, one of them, or the document, is wrong.

    read_checkpoint(directory) -> (header, {(key, rank or None): (dtype, shape, bytes)}, objects)
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zstandard

ITEMSIZE = {
    **dict.fromkeys(["bool", "uint8", "int8"], 1),
    **dict.fromkeys(["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"], 1),
    **dict.fromkeys(["uint16", "int16", "float16", "bfloat16"], 2),
    **dict.fromkeys(["uint32", "int32", "float32", "complex32"], 4),
    **dict.fromkeys(["uint64", "int64", "float64", "complex64"], 8),
    "complex128": 16,
}

Tensor = tuple[str, tuple[int, ...], bytes]


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[tuple[str, int | None], Tensor], dict[str, Any]]:
    """COMMIT, tensors by (key, rank), decoded objects. AssertionError for whatever is not as the document says."""
    commit = unseal((directory / "COMMIT").read_bytes(), "ckptd checkpoint")
    blob = checked(directory / "objects.msgpack", commit["objects"])
    arrays: dict[tuple[str, int | None], tuple[str, np.ndarray]] = {}
    for part in commit["parts"]:
        writer = part["writer"]
        path = directory / "manifest.parquet" / f"w{writer:05d}.parquet"
        checked(path, part)
        files = [(directory / "data" / f"w{writer:05d}-{n:05d}.ckd").read_bytes() for n in range(len(part["data"]))]
        assert [len(data) for data in files] == part["data"]
        rows = pq.read_table(path).to_pylist()
        assert len(rows) == part["rows"]
        assert [row["key"].encode() for row in rows] == sorted(row["key"].encode() for row in rows)
        for row in rows:
            assert row["writer"] == writer
            add_chunk(arrays, row, decode(row, files))
    tensors = {
        place: (dtype, array.shape[:-1], array.tobytes()) for place, (dtype, array) in sorted(arrays.items(), key=repr)
    }
    objects, end = unpack(blob, 0)
    assert end == len(blob)
    return commit, tensors, objects


def unseal(data: bytes, kind: str) -> dict[str, Any]:
    """Sealed JSON: COMMIT or an epoch record."""
    body, _, ending = data.rpartition(b',"sha256":"')
    assert ending == hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    members: dict[str, Any] = json.loads(data)
    assert members["format"] == kind
    assert members["version"] == 1
    return members


def checked(path: Path, listed: dict[str, Any]) -> bytes:
    data = path.read_bytes()
    assert len(data) == listed["size"]
    assert hashlib.sha256(data).hexdigest() == listed["sha256"]
    return data


def decode(row: dict[str, Any], files: list[bytes]) -> bytes:
    """The raw bytes of a chunk."""
    if row["raw"] == 0:
        return b""
    stored = files[row["file"]][row["file_offset"] : row["file_offset"] + row["stored"]]
    assert len(stored) == row["stored"]
    raw = stored if row["codec"] == 0 else zstandard.ZstdDecompressor().decompress(stored, max_output_size=row["raw"])
    if row["codec"] == 2:
        size = ITEMSIZE[row["dtype"]]
        width = size // 2 if row["dtype"].startswith("complex") else size
        raw = np.frombuffer(raw, np.uint8).reshape(width, -1).T.tobytes()
    assert len(raw) == row["raw"]
    assert crc32c(raw) == row["crc32c"]
    return raw


def add_chunk(arrays: dict[tuple[str, int | None], tuple[str, np.ndarray]], row: dict[str, Any], raw: bytes) -> None:
    """Puts a chunk in its place in its tensor; the last dimension is the bytes of an element."""
    size = ITEMSIZE[row["dtype"]]
    place = (row["key"], row["rank"])
    dtype, array = arrays.setdefault(place, (row["dtype"], np.zeros((*row["shape"], size), np.uint8)))
    assert (dtype, array.shape) == (row["dtype"], (*row["shape"], size))
    box = tuple(slice(o, o + s) for o, s in zip(row["offsets"], row["sizes"], strict=True))
    array[box] = np.frombuffer(raw, np.uint8).reshape(*row["sizes"], size)


CRC_TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    CRC_TABLE.append(byte)


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ CRC_TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def unpack(data: bytes, at: int) -> tuple[Any, int]:
    """(value, where it ends). Extensions of things that Python has no literal for become (name, fields)."""
    tag = data[at]
    at += 1
    if tag < 0x80 or tag >= 0xE0:
        return tag - 256 * (tag >= 0xE0), at
    if tag < 0xA0:
        return items(data, at, tag & 15, is_map=tag < 0x90)
    if tag < 0xC0:
        return data[at : at + (tag & 31)].decode(), at + (tag & 31)
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if 0xCA <= tag <= 0xD3:
        form = ">" + "fdBHIQbhiq"[tag - 0xCA]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if 0xD4 <= tag <= 0xD8:
        return extension(data[at], data[at + 1 : at + 1 + 2 ** (tag - 0xD4)]), at + 1 + 2 ** (tag - 0xD4)
    width = {
        0xC4: 1,
        0xC5: 2,
        0xC6: 4,
        0xC7: 1,
        0xC8: 2,
        0xC9: 4,
        0xD9: 1,
        0xDA: 2,
        0xDB: 4,
        0xDC: 2,
        0xDD: 4,
        0xDE: 2,
        0xDF: 4,
    }
    length = int.from_bytes(data[at : at + width[tag]], "big")
    at += width[tag]
    if tag <= 0xC6:
        return data[at : at + length], at + length
    if tag <= 0xC9:
        return extension(data[at], data[at + 1 : at + 1 + length]), at + 1 + length
    if tag <= 0xDB:
        return data[at : at + length].decode(), at + length
    return items(data, at, length, is_map=tag >= 0xDE)


def items(data: bytes, at: int, count: int, is_map: bool) -> tuple[Any, int]:
    found = []
    for _ in range(count * (2 if is_map else 1)):
        value, at = unpack(data, at)
        found.append(value)
    return (dict(zip(found[::2], found[1::2], strict=True)) if is_map else found), at


def extension(code: int, payload: bytes) -> Any:
    if code == 4:
        return int.from_bytes(payload, "big", signed=True)
    if code == 5:
        return complex(*struct.unpack("<dd", payload))
    if code in (9, 10, 12):
        return {9: "dtype", 10: "device", 12: "ref"}[code], payload.decode()
    fields, end = unpack(payload, 0)
    assert end == len(payload)
    if code in (1, 2, 3):
        return {1: tuple, 2: set, 3: frozenset}[code](fields)
    if code == 6:
        return "array", fields[0], np.frombuffer(fields[2], fields[0]).reshape(fields[1]).tolist()
    if code == 7:
        return "scalar", fields[0], np.frombuffer(fields[1], fields[0])[0].item()
    if code in (13, 14, 15):
        return {13: "map", 14: "ordered", 15: "counter"}[code], list(zip(fields[::2], fields[1::2], strict=True))
    return {8: "tensor", 11: "size"}[code], fields


if __name__ == "__main__":
    header, found_tensors, found_objects = read_checkpoint(Path(sys.argv[1]))
    print({key: header[key] for key in ("job", "step", "epoch")})
    for (key, rank), (dtype, shape, raw) in found_tensors.items():
        print(key, "" if rank is None else f"(rank {rank})", dtype, shape, len(raw))
    print(found_objects)
