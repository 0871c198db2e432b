"""Differences of two checkpoints, compared with what NumPy says of the whole arrays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import CorruptionError
from ckptd.format.objects import encode
from ckptd.operations.diff import Difference, ObjectDifference, TensorDifference, diff
from ckptd.tiers.store import open_checkpoint
from tests.operations.stores import Memory, Tensor, flip, write


def compare(
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    own: tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]] = ({}, {}),
    chunk_bytes: tuple[int, int] = (64, 64),
) -> Difference:
    before, after = Memory(source, own[0], chunk_bytes[0]), Memory(target, own[1], chunk_bytes[1])
    return diff(before, after)  # type: ignore[arg-type]


def only(difference: Difference) -> TensorDifference:
    """The one tensor that differs, where nothing else does."""
    (found,) = difference.tensors
    assert difference == Difference(tensors=[found], compared=difference.compared)
    return found


def test_equal() -> None:
    tensors: dict[str, Tensor] = {"w": np.arange(100.0), "scalar": np.array(3, "i8"), "none": np.zeros((0, 2))}
    difference = compare(tensors, dict(tensors))
    assert difference.equal
    assert difference.compared == 3


def test_keys_dtypes_and_shapes() -> None:
    difference = compare(
        {"gone": np.zeros(2), "cast": np.zeros(2, "f4"), "grown": np.zeros(2), "same": np.zeros(2)},
        {"new": np.zeros(2), "cast": np.zeros(2, "f8"), "grown": np.zeros((2, 1)), "same": np.zeros(2)},
    )
    assert (difference.only_source, difference.only_target, difference.compared) == (["gone"], ["new"], 1)
    assert [(c.key, c.source_dtype, c.target_dtype, c.target_shape) for c in difference.changed] == [
        ("cast", "float32", "float64", (2,)),
        ("grown", "float64", "float64", (2, 1)),
    ]
    assert not difference.equal


shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(["f2", "f4", "f8", "i4", "u1", "c8"]),
    chunk_bytes=st.tuples(st.sampled_from([16, 24, 40, 4096]), st.sampled_from([16, 24, 40, 4096])),
    seed=st.integers(0, 2**32 - 1),
    changed=st.floats(0, 1),
)
def test_agrees_with_numpy_whatever_the_chunks(
    shape: tuple[int, ...], dtype: str, chunk_bytes: tuple[int, int], seed: int, changed: float
) -> None:
    rng = np.random.default_rng(seed)
    source = rng.integers(-50, 50, shape).astype(dtype)
    target = np.where(rng.random(shape) < changed, rng.integers(-50, 50, shape).astype(dtype), source).astype(dtype)
    difference = compare({"w": source}, {"w": target}, chunk_bytes=chunk_bytes)
    count = int((source != target).sum())
    if not count:
        assert difference.equal
        return
    found = only(difference)
    assert (found.elements, found.shape, found.ranks) == (count, shape, [])
    if dtype in ("i4", "u1"):
        assert found.max_abs is None
    else:
        assert found.max_abs == pytest.approx(np.abs(source.astype("c16") - target.astype("c16")).max())


def test_bfloat16_is_widened() -> None:
    def bits(*values: float) -> npt.NDArray[np.uint16]:
        return (np.array(values, "f4").view("u4") >> 16).astype("u2")

    found = only(compare({"w": ("bfloat16", bits(1, 2, 3))}, {"w": ("bfloat16", bits(1, 2.5, -3))}))
    assert (found.elements, found.max_abs) == (2, 6.0)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex32", "bool"])
def test_dtypes_without_arithmetic(dtype: str) -> None:
    width = {"complex32": "u4"}.get(dtype, "u1")
    found = only(compare({"w": (dtype, np.array([0, 1], width))}, {"w": (dtype, np.array([1, 1], width))}))
    assert (found.elements, found.max_abs) == (1, None)


def test_equal_means_the_same_bits() -> None:
    """A NaN equals itself; -0.0 is not 0.0; a NaN on one side makes the difference NaN, also after larger ones."""
    assert compare({"w": np.array([np.nan, np.inf])}, {"w": np.array([np.nan, np.inf])}).equal
    zero = only(compare({"w": np.array([0.0])}, {"w": np.array([-0.0])}))
    assert (zero.elements, zero.max_abs) == (1, 0.0)
    one_sided = only(compare({"w": np.array([np.nan] + [0.0] * 99)}, {"w": np.array([0.0] * 99 + [5.0])}))
    assert one_sided.elements == 2
    assert one_sided.max_abs is not None
    assert math.isnan(one_sided.max_abs)
    payloads = np.array([0x7FC00000], "u4").view("f4"), np.array([0x7FC00001], "u4").view("f4")
    assert only(compare({"w": payloads[0]}, {"w": payloads[1]})).max_abs == 0.0
    assert only(compare({"w": np.array([np.inf])}, {"w": np.array([1.0])})).max_abs == math.inf


def test_own_values_of_ranks_are_compared_rank_by_rank() -> None:
    """Rank 2 has a value of its own only on one side: what it would load there is the common one."""
    common = np.zeros(3)
    first = {("b", 1): common + 1, ("b", 2): common + 2}
    found = only(compare({"b": common}, {"b": common}, own=(first, {("b", 1): common + 1.5})))
    assert (found.ranks, found.elements, found.max_abs) == ([1, 2], 6, 2.0)
    assert compare({"b": common}, {"b": common}, own=({("b", 1): common}, {})).equal
    everyone = only(compare({"b": common}, {"b": common + 1}))
    assert everyone.ranks == []


def test_a_value_that_only_one_side_holds() -> None:
    """A tensor without a common value, on different ranks: nothing to compare is a difference, not equality."""
    found = only(compare({}, {}, own=({("b", 0): np.zeros(4)}, {("b", 1): np.zeros(4)})))
    assert (found.elements, found.ranks, found.max_abs) == (8, [0, 1], None)


def test_objects_by_path(tmp_path: Path) -> None:
    before = {"scheduler": {"lr": [0.1, 0.2], "epoch": 3}, "same": float("nan"), "kind": (1, 2), "gone": {1, 2}}
    after = {"scheduler": {"lr": [0.1, 0.3, 0.4], "name": "x", "epoch": 3}, "same": float("nan"), "kind": [1, 2]}
    write(tmp_path / "a", 1, {"objects/loader@1": np.frombuffer(encode({"position": 4}), np.uint8)}, before)
    write(tmp_path / "b", 1, {"objects/loader@1": np.frombuffer(encode({"position": 5}), np.uint8)}, after)
    with open_checkpoint(tmp_path / "a") as source, open_checkpoint(tmp_path / "b") as target:
        difference = diff(source, target)
        assert diff(source, source).equal
    assert difference.tensors == []
    assert difference.only_source == []
    assert difference.objects == [
        ObjectDifference("gone", "{1, 2}", None),
        ObjectDifference("kind", "(1, 2)", "[1, 2]"),
        ObjectDifference("loader@1/position", "4", "5"),
        ObjectDifference("scheduler/lr/1", "0.2", "0.3"),
        ObjectDifference("scheduler/lr/2", None, "0.4"),
        ObjectDifference("scheduler/name", None, "'x'"),
    ]


def test_equal_checksums_are_not_read(tmp_path: Path) -> None:
    """Comparing two large checkpoints that share most chunks costs two manifests. A damaged chunk is told when it must
    be read, and is not noticed where it need not: that is what verify is for."""
    values = np.random.default_rng(0).integers(0, 256, 4000).astype("u1")
    first, second = write(tmp_path / "a", 1, {"w": values}), write(tmp_path / "b", 1, {"w": values})
    flip(next((first / "data").iterdir()), 100)
    with open_checkpoint(first) as source, open_checkpoint(second) as target:
        assert diff(source, target).equal
    third = write(tmp_path / "c", 1, {"w": values}, chunk_bytes=1500)
    with (
        open_checkpoint(first) as source,
        open_checkpoint(third) as target,
        pytest.raises(CorruptionError, match="w00000"),
    ):
        diff(source, target)


def test_progress_reaches_its_end() -> None:
    calls: list[tuple[int, int]] = []
    tensors: dict[str, Tensor] = {"a": np.zeros(100), "b": np.ones(50)}
    diff(Memory(tensors, {}, 64), Memory(tensors, {}, 64), lambda done, total: calls.append((done, total)))  # type: ignore[arg-type]
    assert calls == [(800, 1200), (1200, 1200)]
