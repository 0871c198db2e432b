"""The words of the design as types: Level, Epoch, SnapshotId, Job, and the table of dtypes.

All are immutable and ordered where the design orders them. No I/O.
"""

from __future__ import annotations

import enum
import hashlib
import re

import msgspec

from ckptd.core.errors import FormatError


class Level(str, enum.Enum):
    """How safe a snapshot is. Ordered; each member equals its name as a string."""

    CAPTURED = "captured"
    SEALED = "sealed"
    PROTECTED = "protected"
    DURABLE = "durable"

    @property
    def order(self) -> int:
        """Position in the order captured < sealed < protected < durable."""
        return _LEVEL_ORDER[self.value]

    def __str__(self) -> str:
        return self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: str) -> bool:
        return self.order < Level(other).order

    def __le__(self, other: str) -> bool:
        return self.order <= Level(other).order

    def __gt__(self, other: str) -> bool:
        return self.order > Level(other).order

    def __ge__(self, other: str) -> bool:
        return self.order >= Level(other).order


_LEVEL_ORDER = {level.value: position for position, level in enumerate(Level)}

_NONCE = re.compile(r"[0-9a-f]{16}")
_EPOCH = re.compile(r"(\d{1,18})-([0-9a-f]{16})")


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One incarnation of a job's membership; compared as a pair, number first.

    `number` grows at every restart; `nonce` is 16 random hex digits that keep two launches apart.
    """

    number: int
    nonce: str

    def __str__(self) -> str:
        return f"{self.number}-{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> Epoch:
        """The inverse of `str`; raises FormatError."""
        match = _EPOCH.fullmatch(text)
        if match is None:
            raise FormatError(f"epoch {text!r}: expected NUMBER-NONCE with 16 hex digits of nonce")
        return cls(int(match[1]), match[2])

    def check(self) -> Epoch:
        """Itself, if its fields are in range; raises FormatError."""
        if not 0 <= self.number < 10**18 or _NONCE.fullmatch(self.nonce) is None:
            raise FormatError(f"epoch {self.number}-{self.nonce!r}: out of range")
        return self


class SnapshotId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """x = (epoch, step): names a snapshot of a job; also the name of its checkpoint."""

    epoch: Epoch
    step: int

    def __str__(self) -> str:
        return f"step {self.step} of epoch {self.epoch}"


class Job(msgspec.Struct, frozen=True):
    """What a restart is recognised by: a name chosen by the user or derived from the store URI."""

    name: str

    @property
    def digest(self) -> str:
        """16 hex digits that stand for the name where names cannot go (socket paths)."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]


# dtype name (torch's, without the prefix) -> bytes per element. The format stores the names.
DTYPES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}


def itemsize(dtype: str) -> int:
    """Bytes per element of a dtype by name; raises FormatError for one that is unknown."""
    try:
        return DTYPES[dtype]
    except KeyError:
        raise FormatError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}") from None


def join_key(*elements: object) -> str:
    """Path elements as a key: joined by `/`, a `/` or backslash inside an element escaped by a backslash."""
    return "/".join(str(e).replace("\\", "\\\\").replace("/", "\\/") for e in elements)


def split_key(key: str) -> list[str]:
    """The inverse of `join_key`."""
    elements: list[str] = [""]
    characters = iter(key)
    for character in characters:
        if character == "\\":
            elements[-1] += next(characters, "")
        elif character == "/":
            elements.append("")
        else:
            elements[-1] += character
    return elements
