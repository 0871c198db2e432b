"""Filling tensors from a fake tier: any chunks into any targets, by address or through staging."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import CorruptionError, MismatchError
from ckptd.tensors.values import DTYPE_NAMES
from ckptd.trainer.loading import fill, plan_fill
from ckptd.trainer.state_tensors import Share, Source


class Tier:
    """Chunks of whole tensors in memory; counts reads, fails where told."""

    def __init__(self, tensors: dict[str, torch.Tensor], chunk_bytes: int) -> None:
        entries = [
            (i, box)
            for i, value in enumerate(tensors.values())
            for box in cut(Box.whole(value.shape), value.element_size(), chunk_bytes)
        ]
        width = max(value.ndim for value in tensors.values())
        self.tensors = tensors
        self.catalog = Catalog.build(
            [(key, DTYPE_NAMES[value.dtype], value.shape) for key, value in tensors.items()],
            [i for i, _ in entries],
            np.array([(*box.offsets, *(0,) * (width - len(box.offsets))) for _, box in entries], np.int64),
            np.array([(*box.sizes, *(1,) * (width - len(box.sizes))) for _, box in entries], np.int64),
            file_offset=np.arange(len(entries)),
        )
        self.reads: list[int] = []
        self.fails_at: int | None = None
        self.lock = threading.Lock()

    def read(self, row: int, into: memoryview) -> None:
        with self.lock:
            self.reads.append(row)
        if row == self.fails_at:
            raise CorruptionError("chunk 3: its bytes changed")
        box = self.catalog.box(row)
        value = self.tensors[self.catalog.tensors[self.catalog.tensor[row]].key]
        part = value[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].contiguous()
        assert len(into) == part.numel() * part.element_size()
        into[:] = part.reshape(-1).view(torch.uint8).numpy().tobytes()


def target(key: str, value: torch.Tensor, shape: tuple[int, ...] | None = None, offsets: tuple[int, ...] | None = None):
    box = Box(offsets or (0,) * value.ndim, tuple(value.shape))
    return Source(key, DTYPE_NAMES[value.dtype], shape or tuple(value.shape), box, Share.REPLICATED, value)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    content = np.random.default_rng(sum(shape)).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    return torch.tensor(content).view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return torch.equal(*flat)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("threads", [1, 4])
def test_whole_tensors_of_every_dtype(dtype: torch.dtype, threads: int) -> None:
    tier = Tier({"w": random((40, 6, 5), dtype), "n": random((), dtype), "e": random((0, 3), dtype)}, 256)
    values = {key: torch.zeros_like(value) for key, value in tier.tensors.items()}
    fill(tier.catalog, tier.read, [target(k, v) for k, v in values.items()], rank=0, threads=threads)
    assert all(same_bits(values[key], tier.tensors[key]) for key in values)
    needed = np.flatnonzero(tier.catalog.raw).tolist()
    assert sorted(tier.reads) == needed, "each chunk once, empty ones never"


@pytest.mark.parametrize("chunk_bytes", [8, 60, 10**6])
def test_shards_and_strided_targets(chunk_bytes: int) -> None:
    """Shards cut elsewhere than the chunks, into transposed, sliced and broken-up memory."""
    whole = random((13, 7, 5), torch.int16)
    tier = Tier({"w": whole}, chunk_bytes)
    for (r0, r1), (c0, c1) in itertools.product([(0, 4), (4, 13)], [(0, 3), (3, 7)]):
        size = (r1 - r0, c1 - c0, 5)
        packed = torch.zeros(size, dtype=torch.int16)
        turned = torch.zeros(size[::-1], dtype=torch.int16).permute(2, 1, 0)
        spaced = torch.zeros((size[0], size[1] * 2, 7), dtype=torch.int16)
        tier.reads.clear()
        views = [packed, turned, spaced[:, ::2, 1:6]]
        fill(tier.catalog, tier.read, [target("w", v, (13, 7, 5), (r0, c0, 0)) for v in views], rank=0)
        assert all(torch.equal(view, whole[r0:r1, c0:c1]) for view in views)
        assert not spaced[:, 1::2].any()
        assert not spaced[:, :, [0, 6]].any()
        assert len(tier.reads) == len(set(tier.reads)), "a chunk that three targets want is read once"


class OneRun(Tier):
    """Everything is read at once."""

    parallel = 1

    def runs(self, rows: Any) -> list[list[int]]:
        return [np.asarray(rows).tolist()[::-1]]

    def expect(self, rows: Sequence[int]) -> None:
        pass

    def read_run(self, rows: Sequence[int], into: Sequence[memoryview]) -> None:
        for row, target in zip(rows, into, strict=True):
            self.read(row, target)


def test_one_run_fills_targets_of_all_kinds() -> None:
    """Whole chunks and parts of them, in other dtypes, broken up, in two targets, of none to five dimensions."""
    shapes = [(), (9,), (4, 3), (5, 1, 7), (2, 3, 2, 3), (2, 2, 1, 3, 2)]
    tier = OneRun({str(shape): random(shape, torch.int32) for shape in shapes}, 24)
    targets, expected = [], []
    for shape in shapes:
        whole = tier.tensors[str(shape)]
        part = whole[1:, ..., 1:] if len(shape) > 1 else whole[shape[0] // 2 :] if shape else whole
        first = tuple(size - left for size, left in zip(shape, part.shape, strict=True))
        held = [torch.zeros(whole.shape, dtype=torch.int32), torch.zeros(whole.shape, dtype=torch.float64)]
        held += [torch.zeros((*part.shape, 2), dtype=torch.int32)[..., 1]]
        targets += [target(str(shape), held[0]), target(str(shape), held[1]), target(str(shape), held[2], shape, first)]
        expected += [whole, whole.double(), part]
    fill(tier.catalog, tier, targets, rank=0, cast=True)
    for one, value in zip(targets, expected, strict=True):
        assert torch.equal(one.tensor, value), one.key
    assert len(tier.reads) == len(set(tier.reads))


def test_cast_converts_and_without_it_nothing_is_written() -> None:
    tier = Tier({"w": torch.randn(50, 4, dtype=torch.float64)}, 300)
    value = torch.zeros(50, 4, dtype=torch.bfloat16)
    with pytest.raises(MismatchError, match="float64 in the checkpoint, bfloat16 here"):
        fill(tier.catalog, tier.read, [target("w", value)], rank=0)
    assert not tier.reads
    assert not value.any()
    fill(tier.catalog, tier.read, [target("w", value)], rank=0, cast=True)
    assert torch.equal(value, tier.tensors["w"].to(torch.bfloat16))


def test_parameters_are_filled_in_place_whatever_autograd_says() -> None:
    tier = Tier({"w": torch.randn(6, 4)}, 32)
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    fill(tier.catalog, tier.read, [target("w", weight.detach())], rank=0)
    assert torch.equal(weight, tier.tensors["w"])
    fill(tier.catalog, tier.read, [target("w", weight.detach().T.contiguous().T)], rank=0)
    weight.sum().backward()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_failing_read_ends_the_load(threads: int) -> None:
    tier = Tier({"w": torch.randn(20_000, 4)}, 16)
    tier.fails_at = 3
    with pytest.raises(CorruptionError, match="chunk 3"):
        fill(tier.catalog, tier.read, [target("w", torch.zeros(20_000, 4))], rank=0, threads=threads)
    assert len(tier.reads) < 20_000, "the other threads stop too"


def test_nothing_to_fill() -> None:
    tier = Tier({"w": torch.randn(4)}, 16)
    fill(tier.catalog, tier.read, [], rank=ALL_RANKS)
    fill(tier.catalog, tier.read, [target("w", torch.zeros(0), (4,), (4,))], rank=0)
    assert not tier.reads
    assert len(plan_fill(tier.catalog, [target("w", torch.zeros(4))], rank=0)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_tensors_are_filled_through_staging() -> None:
    tier = Tier({"w": torch.randn(300, 40)}, 4096)
    value = torch.zeros(100, 40, device="cuda")
    fill(tier.catalog, tier.read, [target("w", value, (300, 40), (150, 0))], rank=0)
    assert torch.equal(value.cpu(), tier.tensors["w"][150:250])
