"""The safetensors format, read and written by ourselves: a JSON header, then bytes. No torch, no dependency.

A file is 8 bytes (little-endian length of the header), the header (name -> dtype, shape, data_offsets; and
`__metadata__`, text to text), and data that the tensors tile without gap or overlap. Several files are one model by an
index (`*.safetensors.index.json`: weight_map, name -> file), as Hugging Face has it. Limits are checked before anything
is allocated: the header's length first, then each number in it against the file.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ckptd.core.box import Box
from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError, FormatError, NotFoundError
from ckptd.core.types import itemsize
from ckptd.interop.pieces import Files, ForeignFile, Piece

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

INDEX_SUFFIX = ".safetensors.index.json"

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_FILE = re.compile(r"[^/\\\0]{1,255}\.safetensors")
_METADATA = "__metadata__"


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One tensor of a header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    """An index of several files."""

    weight_map: dict[str, str]


def is_safetensors(path: str) -> bool:
    """Whether `read` can make something of a path, by its name or what is in the directory."""
    if os.path.isdir(path):
        return any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in os.listdir(path))
    return path.endswith((".safetensors", INDEX_SUFFIX))


def read(path: str, files: Files) -> dict[str, Piece]:
    """The tensors of a file, of an index and its files, or of a directory with either; keys are their names."""
    pieces: dict[str, Piece] = {}
    paths, expected = _files_of(path)
    for file_path in paths:
        number = files.add(file_path)
        for piece in _pieces(files[number], number):
            if piece.key in pieces:
                raise FormatError(f"{path}: tensor {piece.key!r} is in two files")
            pieces[piece.key] = piece
            listed = expected.get(piece.key, os.path.basename(file_path))
            if listed != os.path.basename(file_path):
                raise FormatError(f"{path}: the index says tensor {piece.key!r} is in {listed!r}, found in {file_path}")
    missing = sorted(expected.keys() - pieces.keys())
    if missing:
        raise FormatError(f"{path}: the index lists {len(missing)} tensors that no file has, such as {missing[0]!r}")
    return pieces


def _files_of(path: str) -> tuple[list[str], Mapping[str, str]]:
    """(paths of the data files, what an index says: name -> file)."""
    if os.path.isdir(path):
        found = sorted(os.listdir(path))
        indexes = [name for name in found if name.endswith(INDEX_SUFFIX)]
        if len(indexes) > 1:
            raise ConfigError(f"{path}: has {len(indexes)} indexes; name the one to import: {', '.join(indexes[:5])}")
        if not indexes:
            names = [name for name in found if name.endswith(".safetensors")]
            if not names:
                raise NotFoundError(f"{path}: has no .safetensors file")
            return [os.path.join(path, name) for name in names], {}
        path = os.path.join(path, indexes[0])
    if not path.endswith(INDEX_SUFFIX):
        return [path], {}
    index = ForeignFile(path)
    try:
        if index.size > MAX_HEADER_BYTES:
            raise FormatError(f"{path}: {index.size} bytes; expected at most {MAX_HEADER_BYTES}")
        weight_map = msgspec.json.decode(index.read(0, index.size), type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not an index of safetensors files: {error}") from None
    finally:
        index.close()
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _FILE.fullmatch(name):
            raise FormatError(f"{path}: names the file {name[:80]!r}; expected one in the same directory")
    return [os.path.join(os.path.dirname(path), name) for name in names], weight_map


def _pieces(file: ForeignFile, number: int) -> Iterator[Piece]:
    """The tensors of one file, which must tile its data."""
    entries, start = _header(file)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].data_offsets, item[0])):
        where = f"{file.path}: tensor {name[:80]!r}"
        first, last = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise FormatError(f"{where}: dtype {entry.dtype[:20]!r} is unknown; known: {', '.join(DTYPES)}")
        size = itemsize(dtype)
        for length in entry.shape:
            if not 0 <= length < 2**62:
                raise FormatError(f"{where}: shape with a {length}")
            size *= length
            if size > 2**62:
                raise FormatError(f"{where}: a shape of more than 2^62 bytes")
        if first != end or last - first != size:
            raise FormatError(
                f"{where}: has bytes {first} to {last}; expected {end} to {end + size}, {size} bytes for its shape and "
                "dtype, right after the tensor before"
            )
        end = last
        shape = tuple(entry.shape)
        yield Piece(name, dtype, shape, Box.whole(shape), number, start + first)
    if start + end != file.size:
        raise FormatError(f"{file.path}: tensors end at byte {start + end}, the file at {file.size}")


def _header(file: ForeignFile) -> tuple[dict[str, _Entry], int]:
    """(tensors by name, where their data begins)."""
    if file.size < 8:
        raise FormatError(f"{file.path}: {file.size} bytes; not a safetensors file")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > MAX_HEADER_BYTES or 8 + length > file.size:
        raise FormatError(
            f"{file.path}: a header of {length} bytes in a file of {file.size}; at most {MAX_HEADER_BYTES}"
        )
    try:
        members = json.loads(file.read(8, length), object_pairs_hook=_once)
        if not isinstance(members, dict):
            raise FormatError("expected an object")
        metadata = members.pop(_METADATA, {})
        msgspec.convert(metadata, dict[str, str])
        return msgspec.convert(members, dict[str, _Entry]), 8 + length
    except (ValueError, RecursionError, msgspec.MsgspecError, FormatError) as error:
        raise FormatError(f"{file.path}: its header is not one of safetensors: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise FormatError("a name is there twice")
    return made


class Shard(NamedTuple):
    """One file to be written: its name, its header with length, and where each tensor's bytes go."""

    name: str
    head: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(tensors: Mapping[str, TensorInfo], shard_bytes: int, stem: str = "model") -> list[Shard]:
    """The files of a model of tensors by name: one, or several of at most `shard_bytes` each (a larger tensor is
    alone), numbered as Hugging Face does. ConfigError for dtypes that the format lacks."""
    lacking = sorted(name for name, info in tensors.items() if info.dtype not in _NAMES)
    if lacking:
        info = tensors[lacking[0]]
        raise ConfigError(
            f"{len(lacking)} tensors are of a dtype that safetensors lacks, such as {lacking[0]!r} ({info.dtype}); "
            "export them in another format"
        )
    if _METADATA in tensors:
        raise ConfigError(f"a tensor is called {_METADATA}, which safetensors keeps for itself")
    groups: list[list[str]] = [[]]
    total = 0
    for name, info in tensors.items():
        size = _bytes(info)
        if groups[-1] and total + size > shard_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    count = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    return [_shard(name, {key: tensors[key] for key in group}) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, tensors: Mapping[str, TensorInfo]) -> Shard:
    # Larger elements first, so that every tensor is aligned; the header is padded for the same reason.
    order = sorted(tensors, key=lambda key: (-itemsize(tensors[key].dtype), key))
    members: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offsets, end = {}, 0
    for key in order:
        info = tensors[key]
        offsets[key] = end
        members[key] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + _bytes(info)],
        }
        end += _bytes(info)
    header = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise ConfigError(f"{name}: a header of {len(header)} bytes; safetensors allows {MAX_HEADER_BYTES}. Use shards")
    head = struct.pack("<Q", len(header)) + header
    return Shard(name, head, {key: len(head) + offset for key, offset in offsets.items()}, len(head) + end)


def index_of(shards: Sequence[Shard], tensors: Mapping[str, TensorInfo]) -> bytes:
    """The index of several files."""
    weight_map = {key: shard.name for shard in shards for key in sorted(shard.offsets)}
    total = sum(_bytes(info) for info in tensors.values())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _bytes(info: TensorInfo) -> int:
    size = itemsize(info.dtype)
    for length in info.shape:
        size *= length
    return size
