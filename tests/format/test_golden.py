"""Golden checkpoints: bytes written once, which every later version reads, and the independent reader too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ckptd.core.catalog import BYTEPLANES_ZSTD, RAW, ZSTD
from ckptd.format import objects
from ckptd.tiers.store import Store, open_checkpoint
from ckptd.tiers.store.names import checkpoint
from tests.golden import make_v1
from tests.independent_reader import read_checkpoint, unseal

Expected = dict[tuple[str, int | None], tuple[str, tuple[int, ...], bytes]]


def expected_tensors() -> Expected:
    first, second = make_v1.first_writer(), make_v1.second_writer()
    held = {(key, None): tensor for key, tensor in first.items()}
    held |= {(key, 1 if key == "model/counter" else None): tensor for key, tensor in second.items()}
    held |= {(key, None): first[source] for key, source in make_v1.TIED.items()}
    return {place: (dtype, array.shape, array.tobytes()) for place, (dtype, array) in held.items()}


def test_the_package_reads_the_golden_checkpoint() -> None:
    with open_checkpoint(make_v1.ROOT) as stored:
        assert (stored.id, stored.job) == (make_v1.FULL, make_v1.JOB)
        assert stored.verify() == []
        catalog = stored.catalog()
        found: dict[tuple[str, int | None], tuple[str, np.ndarray]] = {}
        for row in catalog:
            info = catalog.tensors[catalog.tensor[row]]
            size = int(catalog.raw[row]) // max(catalog.box(row).elements, 1) or 1
            rank = None if catalog.rank[row] < 0 else int(catalog.rank[row])
            blank = np.zeros(info.shape, f"V{size}")
            _, array = found.setdefault((info.key, rank), (info.dtype, blank))
            data = bytearray(int(catalog.raw[row]))
            stored.read(row, memoryview(data))
            box = catalog.box(row)
            place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            array[place] = np.frombuffer(data, array.dtype).reshape(box.sizes)
        assert {k: (dtype, a.shape, a.tobytes()) for k, (dtype, a) in found.items()} == expected_tensors()
        assert set(catalog.codec.tolist()) == {RAW, ZSTD, BYTEPLANES_ZSTD}
        assert len(stored.commit.parts[0].data) > 1
        decoded = {path: objects.decode(data) for path, data in stored.objects().items()}
    np.testing.assert_equal(decoded, make_v1.values())
    assert {path: objects.encode(value) for path, value in decoded.items()} == {
        path: objects.encode(value) for path, value in make_v1.values().items()
    }


def test_the_independent_reader_reads_the_same() -> None:
    commit, tensors, found = read_checkpoint(make_v1.ROOT / checkpoint(make_v1.FULL))
    assert (commit["job"], commit["step"], commit["epoch"]) == (make_v1.JOB, 500, [2, "0123456789abcdef"])
    assert tensors == expected_tensors()
    assert found.keys() == make_v1.values().keys()
    for path, value in make_v1.values().items():
        np.testing.assert_equal(found[path], independent(value))


def independent(value: Any) -> Any:
    """A value as the independent reader spells it."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.tolist()
    if isinstance(value, np.generic):
        return "scalar", value.dtype.str, value.item()
    if type(value).__name__ in ("Counter", "OrderedDict"):
        return {"Counter": "counter", "OrderedDict": "ordered"}[type(value).__name__], list(value.items())
    if isinstance(value, dict):
        if all(type(key) in (str, int) for key in value):
            return {key: independent(element) for key, element in value.items()}
        return "map", [(key, independent(element)) for key, element in value.items()]
    if isinstance(value, list):
        return [independent(element) for element in value]
    match value:
        case objects.TensorValue(dtype, shape, data):
            return "tensor", [dtype, list(shape), data]
        case objects.DtypeValue(text):
            return "dtype", text
        case objects.DeviceValue(text):
            return "device", text
        case objects.Ref(text):
            return "ref", text
        case objects.SizeValue(sizes):
            return "size", list(sizes)
    return value


def test_a_checkpoint_of_nothing_and_epoch_records() -> None:
    store = Store.open(make_v1.ROOT)
    assert store.checkpoints() == [make_v1.BARE, make_v1.FULL]
    assert store.records() == make_v1.RECORDS
    assert store.newest() == make_v1.FULL
    with store.reader(make_v1.BARE) as bare:
        assert (len(bare.catalog()), bare.objects(), bare.verify()) == (0, {}, [])
    commit, tensors, found = read_checkpoint(make_v1.ROOT / checkpoint(make_v1.BARE))
    assert (commit["step"], tensors, found) == (0, {}, {})
    record = unseal((make_v1.ROOT / "epochs" / str(make_v1.FULL.epoch)).read_bytes(), "ckptd epoch")
    assert record["restore_point"] == [[1, "fedcba9876543210"], 0]


def test_the_generator_still_makes_what_the_golden_files_say(tmp_path: Any) -> None:
    """Bytes may differ with the versions of compressors; what the independent reader finds may not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptd.tiers.store.writer.FILE_BYTES", 8192)
        make_v1.make(tmp_path / "store")
    made = read_checkpoint(tmp_path / "store" / checkpoint(make_v1.FULL))
    golden = read_checkpoint(make_v1.ROOT / checkpoint(make_v1.FULL))
    assert made[1] == golden[1]
    np.testing.assert_equal(made[2], golden[2])
    assert math.isinf(made[2]["plain"][12])
