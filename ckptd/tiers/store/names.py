"""Names of files and directories in a store (docs/format.md, section 1): made from integers, parsed back into integers.

A name is ours only if it is spelled exactly as the integers in it would be. Nothing read from a file is ever a path.
"""

from __future__ import annotations

import re

from ckptd.core.types import Epoch, SnapshotId
from ckptd.tiers.store.backend import Path

COMMIT = "COMMIT"
COMMIT_TEMPORARY = "COMMIT.tmp"
OBJECTS = "objects.msgpack"
MANIFEST = "manifest.parquet"
DATA = "data"
WRITTEN = "written"
EPOCHS = "epochs"

_CHECKPOINT = re.compile(r"step-([0-9]{8,18})\.([0-9]{1,18})-([0-9a-f]{16})")
_EPOCH = re.compile(r"([0-9]{1,18})-([0-9a-f]{16})")
_WRITER = re.compile(r"w([0-9]{5,6})(?:\.parquet|-[0-9]{5,7}\.ckd)")
_TOKEN = re.compile(r"\.token-[0-9a-f]{16}")


def checkpoint(identity: SnapshotId) -> str:
    """The directory of a checkpoint."""
    return f"step-{identity.step:08d}.{identity.epoch}"


def parse_checkpoint(name: str) -> SnapshotId | None:
    """The inverse; None for names that are not ours."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        return None
    identity = SnapshotId(Epoch(int(match[2]), match[3]), int(match[1]))
    return identity if checkpoint(identity) == name else None


def record(epoch: Epoch) -> Path:
    """The file of an epoch record."""
    return (EPOCHS, str(epoch))


def record_temporary(epoch: Epoch) -> Path:
    """Where an epoch record is written before it gets its name."""
    return (EPOCHS, f".{epoch}.tmp")


def parse_record(name: str) -> Epoch | None:
    """The epoch whose record has this name; None for names that are not ours."""
    match = _EPOCH.fullmatch(name)
    if match is None:
        return None
    epoch = Epoch(int(match[1]), match[2])
    return epoch if str(epoch) == name else None


def token(nonce: str) -> Path:
    """The file by which nodes recognise the same store; `nonce` is 16 hex digits."""
    name = f".token-{nonce}"
    if not is_token(name):
        raise ValueError(f"token {nonce!r}: expected 16 hex digits")
    return (name,)


def is_token(name: str) -> bool:
    """Whether a file in the store is such a token."""
    return _TOKEN.fullmatch(name) is not None


def manifest_part(directory: str, writer: int) -> Path:
    """A writer's manifest part."""
    return (directory, MANIFEST, f"w{writer:05d}.parquet")


def data_file(directory: str, writer: int, file: int) -> Path:
    """One data file."""
    return (directory, DATA, f"w{writer:05d}-{file:05d}.ckd")


def lists(directory: str) -> Path:
    """The lists of what each node has written, until it is committed."""
    return (directory, WRITTEN)


def folders(directory: str) -> tuple[Path, Path]:
    """The directories of a checkpoint's data files and manifest parts."""
    return (directory, DATA), (directory, MANIFEST)


def writer_of(path: Path) -> int | None:
    """The writer of a manifest part or data file; None for names that are not ours."""
    match = _WRITER.fullmatch(path[-1])
    return None if match is None else int(match[1])
