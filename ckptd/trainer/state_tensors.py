"""Tensors as sources: which boxes of a logical tensor a rank's tensor holds, and where their bytes lie.

Owns the meaning of DTensor placements, and the check that a tensor has bytes that can be copied. A tensor that is not
a DTensor holds its whole logical tensor; a DTensor holds one box, or several where `_StridedShard` interleaves.
Does not decide keys or who is a replica of whom: the parts of the state say that (state_modules, state_optimizers,
state_values).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ckptd.core.box import Box
from ckptd.core.errors import ConfigError
from ckptd.tensors.values import dtype_name, is_ordinary, why_not

_WHOLE = functools.lru_cache(maxsize=65536)(Box.whole)


class Share(str, enum.Enum):
    """How the ranks' tensors of one key relate."""

    REPLICATED = "replicated"
    SHARDED = "sharded"
    PER_RANK = "per_rank"


@dataclasses.dataclass(slots=True)
class Source:
    """A box of a logical tensor and the local tensor with its elements: copied from at capture, into at a restore.

    `shape` is the global one; `tensor` is detached, local, of the box's sizes, perhaps not contiguous, perhaps empty.
    `windowed`: only optimizer steps write it, so it may be copied lazily until the next one.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    share: Share
    tensor: torch.Tensor
    windowed: bool = False

    @property
    def layout(self) -> tuple[str, str, tuple[int, ...], Box, Share]:
        """All but the bytes: what a save plan depends on."""
        return (self.key, self.dtype, self.shape, self.box, self.share)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, without importing what nobody uses."""
    if is_ordinary(tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> torch.Tensor:
    """The tensor whose memory this rank owns: a DTensor's local part, else the tensor itself. No autograd, no copy."""
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local


def sources_of(key: str, tensor: torch.Tensor, share: Share, *, windowed: bool = False) -> list[Source]:
    """The sources of one tensor. DTensors are SHARDED whatever `share` says; none for a rank outside their mesh.

    Raises ConfigError, naming `key`, for a tensor without bytes of its own to copy.
    """
    if is_dtensor(tensor):
        return _sources_of_dtensor(key, tensor, windowed)
    name = check(key, tensor)
    shape = tuple(tensor.shape)
    return [Source(key, name, shape, _WHOLE(shape), share, tensor.detach(), windowed)]


def shard_sources(key: str, local: torch.Tensor, like: Any, *, windowed: bool) -> list[Source]:
    """Sources of a plain tensor that holds the same part of its logical tensor as the DTensor `like` holds of its."""
    parts = boxes(tuple(like.shape), like.device_mesh, tuple(like.placements), key)
    return _sources_of_parts(key, local, tuple(like.shape), parts, windowed)


def check(key: str, tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, if its bytes can be copied; raises ConfigError naming `key`."""
    problem = why_not(tensor)
    if problem is None and (tensor.is_conj() or tensor.is_neg()):
        problem = "it is a lazy conjugate or negative view; give a resolved copy (resolve_conj, resolve_neg)"
    if problem is not None:
        raise ConfigError(f"{key}: {problem}")
    name = dtype_name(tensor.dtype)
    assert name is not None
    return name


def _sources_of_dtensor(key: str, tensor: Any, windowed: bool) -> list[Source]:
    shape = tuple(tensor.shape)
    parts = boxes(shape, tensor.device_mesh, tuple(tensor.placements), key)
    return _sources_of_parts(key, tensor._local_tensor, shape, parts, windowed)


Part = tuple[Box, tuple[slice, ...]]


def _sources_of_parts(
    key: str, local: torch.Tensor, shape: tuple[int, ...], parts: Sequence[Part], windowed: bool
) -> list[Source]:
    if not parts:
        return []
    name = check(key, local)
    local = local.detach()
    held = sum(box.elements for box, _ in parts)
    if held != local.numel():
        raise ConfigError(
            f"{key}: its placements give this rank {held} elements of shape {shape}, its local tensor has "
            f"{tuple(local.shape)}; build the DTensor with its true global shape"
        )
    if len(parts) == 1:
        return [Source(key, name, shape, parts[0][0], Share.SHARDED, local, windowed)]
    return [Source(key, name, shape, box, Share.SHARDED, local[part], windowed) for box, part in parts]


def boxes(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], key: str) -> tuple[Part, ...]:
    """The boxes of a DTensor that this rank holds, each with the part of the local tensor that has its elements.

    Empty for a rank outside the mesh. Raises ConfigError, naming `key`, for `Partial` and unknown placements.
    """
    for placement in placements:
        if placement.is_partial():
            raise ConfigError(
                f"{key}: placement {placement} is a sum that is still pending; redistribute it to Replicate or Shard"
            )
        if not placement.is_replicate() and type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ConfigError(f"{key}: placement {placement} is unknown; redistribute it to Replicate or Shard")
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    return _boxes(shape, tuple(mesh.shape), tuple(coordinate), placements)


Run = tuple[int, int]
"""First index and count of consecutive indices along one dimension."""


@functools.lru_cache(maxsize=65536)
def _boxes(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[Part, ...]:
    """Shards dimension by dimension, mesh dimensions in the order in which they were split."""
    runs: list[list[Run]] = [[(0, size)] for size in shape]
    for mesh_dimension, interleaved in _splits(mesh_shape, placements):
        count, rank, placement = mesh_shape[mesh_dimension], coordinate[mesh_dimension], placements[mesh_dimension]
        dimension = placement.dim
        held = runs[dimension]
        length = sum(size for _, size in held)
        chosen = _strided(length, count, rank, placement.split_factor) if interleaved else [_chunk(length, count, rank)]
        runs[dimension] = _select(held, chosen) or [(shape[dimension], 0)]
    located = [list(zip(held, _locate(held), strict=True)) for held in runs]
    return tuple(
        (
            Box(tuple(run[0] for run, _ in combination), tuple(run[1] for run, _ in combination)),
            tuple(slice(start, start + run[1]) for run, start in combination),
        )
        for combination in itertools.product(*located)
    )


def _splits(mesh_shape: tuple[int, ...], placements: tuple[Any, ...]) -> Iterator[tuple[int, bool]]:
    """The mesh dimensions that shard, in the order of their splits, and whether a split interleaves.

    Dimensions split from left to right, but `_StridedShard` with factor k splits what those to its right had already
    split k ways: FSDP2 shards what tensor parallelism has left. Where no such dimensions are there, it interleaves.
    Only uneven splits tell the two apart.
    """
    orders: dict[int, list[tuple[int, bool]]] = {}
    for mesh_dimension in reversed(range(len(placements))):
        placement = placements[mesh_dimension]
        if placement.is_replicate():
            continue
        order = orders.setdefault(placement.dim, [])
        ways = list(itertools.accumulate((mesh_shape[other] for other, _ in order), operator.mul, initial=1))
        factor = placement.split_factor if type(placement).__name__ == "_StridedShard" else 1
        found = factor in ways
        order.insert(ways.index(factor) if found else 0, (mesh_dimension, not found))
    return itertools.chain.from_iterable(orders.values())


def _chunk(length: int, count: int, rank: int) -> Run:
    """The part of `range(length)` that torch.chunk gives to `rank` of `count`."""
    size = -(-length // count)
    start = min(size * rank, length)
    return start, min(size, length - start)


def _strided(length: int, count: int, rank: int, split_factor: int) -> list[Run]:
    """The parts that `_StridedShard` gives to `rank`: each of `split_factor` chunks is chunked again over `count`."""
    outer = [_chunk(length, split_factor, i) for i in range(split_factor)]
    inner = [(start, _chunk(size, count, rank)) for start, size in outer]
    return [(start + offset, size) for start, (offset, size) in inner if size]


def _select(held: Sequence[Run], chosen: Iterable[Run]) -> list[Run]:
    """The global runs of local positions `chosen`, where the local dimension is `held` end to end."""
    selected: list[Run] = []
    for start, size in chosen:
        for (first, count), at in zip(held, _locate(held), strict=True):
            low, high = max(start, at), min(start + size, at + count)
            if low < high:
                run = (first + low - at, high - low)
                if selected and selected[-1][0] + selected[-1][1] == run[0]:
                    run = (selected[-1][0], selected.pop()[1] + run[1])
                selected.append(run)
    return selected


def _locate(held: Sequence[Run]) -> list[int]:
    """Where each run starts in the local dimension."""
    return list(itertools.accumulate((size for _, size in held[:-1]), initial=0))
