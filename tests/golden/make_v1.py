"""What the golden checkpoints of format version 1 hold, and how they were made.

    python -m tests.golden.make_v1 EMPTY_DIRECTORY

The files in tests/golden/v1 are never made again: every later version must read those bytes. This script shows
what wrote them, and its values are what the tests expect to find.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import DTYPES, Epoch, SnapshotId, join_key
from ckptd.format import objects
from ckptd.tiers.store import Store, writer
from tests.store.samples import Memory, Tensors

ROOT = Path(__file__).parent / "v1"
FULL = SnapshotId(Epoch(2, "0123456789abcdef"), 500)
BARE = SnapshotId(Epoch(1, "fedcba9876543210"), 0)
RECORDS = [EpochRecord(BARE.epoch), EpochRecord(FULL.epoch, BARE)]
JOB = "golden, \u00fcnicode"


def pattern(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bytes that any language can compute: x = x * 1103515245 + 12345 mod 2^31, bits 16 to 23; as void elements."""
    size = DTYPES[dtype]
    state, data = seed, bytearray()
    for _ in range(int(np.prod(shape)) * size):
        state = (state * 1103515245 + 12345) % 2**31
        data.append(state >> 16 & (1 if dtype == "bool" else 255))
    return np.frombuffer(bytes(data), f"V{size}").reshape(shape)


def first_writer() -> Tensors:
    """One tensor of every dtype; one for each codec; corner cases of shapes and keys."""
    held: Tensors = {f"dtypes/{name}": (name, pattern(name, (2, 3, 5), i)) for i, name in enumerate(DTYPES)}
    ramp = np.arange(1200).reshape(40, 30)
    held |= {
        "codecs/zstd": ("int64", ramp),
        "codecs/planes16": ("bfloat16", (ramp.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)),
        "codecs/planes32": ("float32", ramp.astype(np.float32) / 7),
        "codecs/planes64": ("float64", ramp.astype(np.float64) / 7),
        "codecs/planes_complex": ("complex64", (ramp + 1j * ramp[::-1]).astype(np.complex64)),
        "codecs/raw": ("uint8", pattern("uint8", (700,), 99).view(np.uint8)),
        "shapes/scalar": ("float64", np.array(3.25)),
        "shapes/empty": ("float32", np.zeros((0, 7), np.float32)),
        "shapes/one_long": ("int32", np.arange(1000, dtype=np.int32)),
        "shapes/deep": ("uint8", np.arange(32, dtype=np.uint8).reshape((2, 1, 2, 1, 2, 1, 2, 1, 2))),
        "values/nan": ("float32", np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)),
        join_key("keys", "a/b", "c\\d", "\u00fc\U0001f600"): ("uint8", np.array([1, 2, 3], np.uint8)),
        "model/counter": ("int64", np.array([10, 20])),
        "model/embedding": ("float32", np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)),
    }
    return held


TIED = {"model/head": "model/embedding"}


def second_writer() -> Tensors:
    """Rows of rank 1 alone, and the encoded objects of both ranks."""
    held: Tensors = {"model/counter": ("int64", np.array([11, 22]))}
    for rank in range(2):
        value = objects.encode({"state": (3, (rank, 2**31), None)})
        held[f"objects/rng/python@{rank}"] = ("uint8", np.frombuffer(value, np.uint8))
    return held


def values() -> dict[str, Any]:
    """One object of every type of the format."""
    return {
        "plain": [
            None,
            True,
            False,
            0,
            -1,
            127,
            -33,
            2**31,
            -(2**63),
            2**64 - 1,
            1.5,
            -0.0,
            float("inf"),
            "text",
            b"\0",
        ],
        "containers": {
            "tuple": (1, (2, ())),
            "set": {3, 1, 2},
            "frozenset": frozenset({"x"}),
            "long": list(range(300)),
        },
        "big": [2**64, -(2**63) - 1, 2**200],
        "complex": 1.5 - 2j,
        "array": np.arange(6, dtype="<i2").reshape(2, 3),
        "scalar": np.float32(0.5),
        "neutral": [
            objects.TensorValue("bfloat16", (2,), b"\x80\x3f\x00\x40"),
            objects.DtypeValue("float8_e4m3fn"),
            objects.DeviceValue("cuda:0"),
            objects.SizeValue((3, 4)),
            objects.Ref("model/embedding"),
        ],
        "maps": {1: "integer key", "x": {(1, 2): "tuple key", None: 0, True: 1}},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "counter": Counter({"milestone": 2}),
    }


def make(root: Path) -> None:
    """Writes the store into an empty directory."""
    writer.FILE_BYTES = 8192  # type: ignore[attr-defined]  # several data files, without gigabytes
    store = Store.open(root, create=True)
    for record in RECORDS:
        store.write_record(record)
    store.writer(BARE, JOB).commit([], {})
    attempt = store.writer(FULL, JOB)
    first = Memory(first_writer(), writer=0, tied=TIED)
    second = Memory(second_writer(), writer=1, ranks={"model/counter": 1})
    parts = [attempt.part(i).write(memory.catalog, memory.read) for i, memory in enumerate((first, second))]
    attempt.commit(parts, {path: objects.encode(value) for path, value in values().items()})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
