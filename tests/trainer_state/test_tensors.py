"""Boxes of DTensors, for every rank of meshes larger than a test can start."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard, _StridedShardOffsetMode

from ckptd.core.errors import ConfigError
from ckptd.trainer.state_tensors import _boxes, boxes

PLAIN = [
    ((8, 6), (2,), (Shard(0),)),
    ((5, 6), (4,), (Shard(0),)),
    ((3, 2), (5,), (Shard(0),)),
    ((0, 4), (2,), (Shard(0),)),
    ((7, 5), (2, 3), (Shard(0), Shard(1))),
    ((7, 5), (3, 2), (Shard(0), Shard(0))),
    ((7, 5, 2), (2, 2), (Replicate(), Shard(1))),
    ((4, 9), (2, 2, 2), (Shard(1), Replicate(), Shard(1))),
    ((), (2, 2), (Replicate(), Replicate())),
]


def coordinates(mesh_shape: tuple[int, ...]) -> Any:
    return itertools.product(*map(range, mesh_shape))


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), PLAIN)
def test_boxes_are_torchs(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Any, ...]) -> None:
    covered = np.zeros(shape, int)
    for coordinate in coordinates(mesh_shape):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)
        ((box, part),) = _boxes(shape, mesh_shape, coordinate, placements)
        assert box.sizes == tuple(sizes)
        if box.elements:
            assert box.offsets == tuple(offsets)
        assert box.inside(shape)
        assert [p.stop - p.start for p in part] == list(sizes)
        covered[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
    replicas = int(np.prod([n for n, p in zip(mesh_shape, placements, strict=True) if p.is_replicate()]))
    assert (covered == replicas).all(), "every element is held, by as many ranks as replicate it"


STRIDED = [
    ((8, 4), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((16, 3), (2, 4), (_StridedShard(0, split_factor=4), Shard(0))),
    ((11, 3), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((12, 8), (2, 2), (_StridedShard(1, split_factor=2), Shard(0))),
    ((8, 4), (2, 2), (Replicate(), _StridedShard(0, split_factor=2))),
]


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), STRIDED)
def test_strided_boxes(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Any, ...]) -> None:
    """Interleaved shards are several boxes; put together in local order they are the indices that torch gives."""
    whole = np.arange(np.prod(shape)).reshape(shape)
    for coordinate in coordinates(mesh_shape):
        indices = [np.arange(n) for n in shape]
        for count, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
            if isinstance(placement, Replicate):
                continue
            held = indices[placement.dim]
            if isinstance(placement, _StridedShard):
                _, chosen = placement._local_shard_size_and_offset(
                    len(held), count, rank, offset_mode=_StridedShardOffsetMode.ALL
                )
                indices[placement.dim] = held[np.asarray(chosen, int)]
            else:
                size, start = placement._local_shard_size_and_offset(len(held), count, rank)
                indices[placement.dim] = held[start : start + size]
        local = np.full([len(i) for i in indices], -1)
        for box, part in _boxes(shape, mesh_shape, coordinate, placements):
            local[part] = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        assert np.array_equal(local, whole[np.ix_(*indices)])


@pytest.mark.parametrize(("tensor_parallel", "data_parallel"), list(itertools.product((1, 2, 3, 4), (2, 3, 5))))
def test_what_fsdp2_leaves_of_what_tensor_parallelism_left(tensor_parallel: int, data_parallel: int) -> None:
    """FSDP2 cuts local shards, by torch.chunk; uneven ones too, of which a rank may get the shorter, or none."""

    def chunk(rows: torch.Tensor, count: int, rank: int) -> torch.Tensor:
        return (*rows.chunk(count), *[rows[:0]] * count)[rank]

    mesh_shape = (data_parallel, tensor_parallel)
    placements = (_StridedShard(0, split_factor=tensor_parallel), Shard(0))
    for length, (data, tensor) in itertools.product(range(24), coordinates(mesh_shape)):
        expected = chunk(chunk(torch.arange(length), tensor_parallel, tensor), data_parallel, data)
        parts = _boxes((length,), mesh_shape, (data, tensor), placements)
        found = [torch.arange(box.offsets[0], box.offsets[0] + box.sizes[0]) for box, _ in parts]
        assert torch.equal(torch.cat(found), expected), (length, data, tensor)


class Mesh:
    shape = (2,)

    def get_coordinate(self) -> list[int] | None:
        return None


def test_placements_that_cannot_be_stored() -> None:
    with pytest.raises(ConfigError, match=r"w: placement .* is a sum that is still pending"):
        boxes((2,), Mesh(), (Partial(),), "w")

    class Ragged(Replicate):
        def is_replicate(self) -> bool:
            return False

    with pytest.raises(ConfigError, match=r"w: placement .* is unknown"):
        boxes((2,), Mesh(), (Ragged(),), "w")
    assert boxes((2,), Mesh(), (Replicate(),), "w") == (), "a rank outside the mesh holds nothing"
