"""COMMIT, the record that makes a checkpoint exist, and epoch records (docs/format.md, sections 7 and 8).

Both are one line of JSON that ends in the SHA-256 of what precedes. Decoding checks, in this order: is it ours
(FormatError), is it undamaged (CorruptionError), do we know its version (VersionError), is every member in range
(FormatError). Nothing here names a file: names follow from integers.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ckptd.core.catalog import MAX_CHUNKS
from ckptd.core.errors import CorruptionError, FormatError, VersionError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId

VERSION = 1
MAX_COMMIT_BYTES = 64 * 1024 * 1024
MAX_RECORD_BYTES = 4096
MAX_WRITERS = 10**6
MAX_DATA_FILES = 2**20
MAX_STEP = 10**18 - 1

_CHECKPOINT = "ckptd checkpoint"
_EPOCH = "ckptd epoch"
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n\Z')
_SEAL_BYTES = len(b',"sha256":"') + 64 + len(b'"}\n')

_Body = TypeVar("_Body")
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Bytes = Annotated[int, Meta(ge=0, le=2**50)]
_Step = Annotated[int, Meta(ge=0, le=MAX_STEP)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one writer added to a checkpoint: its manifest part (rows, size, SHA-256) and its data files' lengths."""

    writer: Annotated[int, Meta(ge=0, lt=MAX_WRITERS)]
    rows: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
    size: _Bytes
    sha256: _Digest
    data: list[_Bytes]


class ObjectsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 of objects.msgpack."""

    size: _Bytes
    sha256: _Digest


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything COMMIT says: which snapshot of which job, and how long and what every file is."""

    job: Annotated[str, Meta(max_length=4096)]
    step: _Step
    epoch: Epoch
    parts: list[Part]
    objects: ObjectsFile

    @property
    def id(self) -> SnapshotId:
        return SnapshotId(self.epoch, self.step)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def data_bytes(self) -> int:
        return sum(sum(part.data) for part in self.parts)

    def check(self) -> Commit:
        """Itself, if it keeps the rules that bind members together; raises FormatError."""
        self.epoch.check()
        writers = [part.writer for part in self.parts]
        if any(p >= q for p, q in zip(writers, writers[1:], strict=False)):
            raise FormatError("COMMIT: parts are not listed by rising writer")
        if self.rows > MAX_CHUNKS:
            raise FormatError(f"COMMIT: {self.rows} rows; at most {MAX_CHUNKS}")
        files = sum(len(part.data) for part in self.parts)
        if files > MAX_DATA_FILES:
            raise FormatError(f"COMMIT: {files} data files; at most {MAX_DATA_FILES}")
        return self


class _EpochBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    epoch: Epoch
    restore_point: tuple[Epoch, _Step] | None


def encode_commit(commit: Commit) -> bytes:
    """The bytes of COMMIT."""
    return _sealed(_CHECKPOINT, msgspec.to_builtins(commit.check()))


def decode_commit(data: bytes) -> Commit:
    """The inverse; raises FormatError, CorruptionError, VersionError."""
    return _convert(_unsealed("COMMIT", _CHECKPOINT, data), Commit, "COMMIT").check()


def encode_record(record: EpochRecord) -> bytes:
    """The bytes of an epoch record."""
    return _sealed(_EPOCH, {"epoch": record.epoch, "restore_point": record.restore_point})


def decode_record(data: bytes) -> EpochRecord:
    """The inverse; raises FormatError, CorruptionError, VersionError."""
    body = _convert(_unsealed("epoch record", _EPOCH, data), _EpochBody, "epoch record")
    point = None
    if body.restore_point is not None:
        point = SnapshotId(body.restore_point[0].check(), body.restore_point[1])
    return EpochRecord(body.epoch.check(), point)


def _sealed(kind: str, members: dict[str, Any]) -> bytes:
    body = msgspec.json.encode({"format": kind, "version": VERSION, **members})[:-1]
    return body + f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def _unsealed(name: str, kind: str, data: bytes) -> dict[str, msgspec.Raw]:
    """Members of sealed JSON without format, version and digest, once all three are right."""
    try:
        members = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        found_kind, version = members.pop("format", None), members.pop("version", None)
        found = msgspec.json.decode(found_kind or b"null", type=object)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: {len(data)} bytes that are not JSON ({error}); truncated or foreign") from None
    if found != kind:
        raise FormatError(f"{name}: expected format {kind!r}, found {str(found)[:80]!r}; not a file of ckptd")
    seal = _SEAL.search(data, max(len(data) - _SEAL_BYTES, 0))
    if seal is None or hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1]:
        raise CorruptionError(f"{name}: its SHA-256 does not match its contents; the file was damaged or edited")
    if version != msgspec.Raw(b"%d" % VERSION):
        raise VersionError(
            f"{name}: format version {bytes(version or b'none')[:20]!r}; this build reads version {VERSION}, "
            "use the ckptd that wrote it or a later one"
        )
    del members["sha256"]
    return members


def _convert(members: dict[str, msgspec.Raw], kind: type[_Body], name: str) -> _Body:
    try:
        return msgspec.json.decode(msgspec.json.encode(members), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FormatError(f"{name}: {error}") from None
