"""Flat tensors: one-dimensional tensors that hold flat ranges of named logical tensors, end to end.

Owns what such a tensor means: which boxes of which logical tensor lie where in it. FSDP1's flat parameters, ZeRO's
partitions and the shards of Megatron's distributed optimizer are all of this kind; for what ckptd does not know itself,
`FlatShards` in the mapping of the state says it. A range is at most 2 * dimensions - 1 boxes, each one run of the flat
tensor, so that capture and restore work in place.

Does not find flat parameters (state_fsdp1.py) nor know optimizers (state_optimizers.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ckptd.core.box import Box, flat_boxes
from ckptd.core.errors import ConfigError
from ckptd.trainer.state_tensors import Share, Source, check, is_dtensor


class FlatRange(NamedTuple):
    """The elements [start, stop) of the flattened logical tensor `name` of `shape`, which lie at `offset` of a flat
    tensor.

    An empty range says that the flat tensor stands for that tensor too, though this rank holds none of it. `order`:
    the dimensions from the slowest to the fastest in memory, where the tensor was not flattened row-major.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    order: tuple[int, ...] = ()


class FlatShards:
    """Declares, in the mapping of the state, what flat tensors of this rank hold.

    At `path` of the mapping, range `name` is stored under the key `<path>/<name>`, as a module's parameter `name` is.
    Where a flat tensor is a parameter of an optimizer of the mapping, so is the optimizer's state, under `name`. All
    ranks together must hold every element; elements that several ranks hold are taken for copies of each other.
    Elements of a flat tensor that no range names are padding.
    """

    def __init__(
        self,
        shards: Iterable[tuple[torch.Tensor, Sequence[FlatRange]]],
        *,
        values: bool = True,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """`values=False`: the elements themselves are stored by a module of the mapping whose memory the flat tensors
        share, so that only optimizer state is laid out by them. `tied`: second name -> name of tied tensors.

        Raises ConfigError for ranges that overlap or lie outside their tensors.
        """
        self.values = values
        self.tied = dict(tied or {})
        self.shards = tuple(
            (flat, tuple(FlatRange(r.name, tuple(r.shape), *r[2:]) for r in ranges)) for flat, ranges in shards
        )
        for number, (flat, ranges) in enumerate(self.shards):
            _check_flat(f"FlatShards: tensor {number}", flat, ranges)
        names = _check_disjoint([held for _, ranges in self.shards for held in ranges])
        for second, first in self.tied.items():
            if first not in names or second in names:
                raise ConfigError(
                    f"FlatShards: tied {second!r}: {first!r}: the second must be a name here, the first not"
                )


def flat_ranges(tensors: Iterable[tuple[str | None, Sequence[int]]], start: int, stop: int) -> list[FlatRange]:
    """The ranges of a flat tensor that holds the elements [start, stop) of logical tensors flattened end to end.

    `tensors`: (name, shape) of each, in order; those without a name are padding. Tensors outside [start, stop) get
    empty ranges, so that every rank knows all names.
    """
    made = []
    first = 0
    for name, shape in tensors:
        size = math.prod(shape)
        low, high = min(max(start - first, 0), size), min(max(stop - first, 0), size)
        if name is not None:
            made.append(FlatRange(name, tuple(shape), low, high, first + low - start if low < high else 0))
        first += size
    return made


@dataclasses.dataclass(frozen=True, slots=True)
class Flat:
    """What a parameter that is flat stands for; names in `ranges` are those in keys of optimizer state."""

    parameter: torch.Tensor
    ranges: tuple[FlatRange, ...]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(held.name for held in self.ranges))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the parameter's state is laid out like the parameter."""
        return tensor.ndim == 1 and tensor.numel() == self.parameter.numel() and not is_dtensor(tensor)


def flat_sources(
    key: str, flat: torch.Tensor, held: FlatRange, share: Share, *, windowed: bool = False
) -> list[Source]:
    """The boxes of one range of a flat tensor, as views of it; none for an empty range, unless its tensor is empty."""
    name = check(key, flat)
    flat = flat.detach()
    if 0 in held.shape:
        whole = Box.whole(held.shape)
        return [Source(key, name, held.shape, whole, share, flat[:0].view(held.shape), windowed)]
    return [
        Source(key, name, held.shape, box, share, flat[at : at + box.elements].view(sizes).permute(axes), windowed)
        for box, at, sizes, axes in _parts(held.shape, held.start, held.stop, held.offset, held.order)
    ]


Part = tuple[Box, int, tuple[int, ...], tuple[int, ...]]
"""A box; where it begins in the flat tensor; its sizes as they lie there; and the permutation to the box's own."""


@functools.lru_cache(maxsize=65536)
def _parts(shape: tuple[int, ...], start: int, stop: int, offset: int, order: tuple[int, ...]) -> tuple[Part, ...]:
    order = order or tuple(range(len(shape)))
    axes = tuple(sorted(range(len(order)), key=order.__getitem__))
    boxes = flat_boxes([shape[dimension] for dimension in order], start, stop)
    places = itertools.accumulate((box.elements for box in boxes), initial=offset)
    return tuple(
        (Box(*(tuple(values[axis] for axis in axes) for values in box)), at, box.sizes, axes)
        for box, at in zip(boxes, places, strict=False)
    )


def _check_flat(what: str, flat: torch.Tensor, ranges: Sequence[FlatRange]) -> None:
    if not isinstance(flat, torch.Tensor) or flat.ndim != 1 or is_dtensor(flat):
        found = f"shape {tuple(flat.shape)}" if isinstance(flat, torch.Tensor) else str(type(flat))
        raise ConfigError(f"{what}: expected a plain tensor of one dimension, found {found}; give its local, flat view")
    taken = []
    for held in ranges:
        size = math.prod(held.shape)
        if not isinstance(held.name, str) or not held.name:
            raise ConfigError(f"{what}: name {held.name!r} of a range is not a text")
        if not 0 <= held.start <= held.stop <= size:
            raise ConfigError(f"{what}: range [{held.start}, {held.stop}) of {held.name}, which has {size} elements")
        if held.order and sorted(held.order) != list(range(len(held.shape))):
            raise ConfigError(f"{what}: order {held.order} of {held.name} is no order of {len(held.shape)} dimensions")
        if held.start < held.stop:
            taken.append((held.offset, held.offset + held.stop - held.start, held.name))
    taken.sort()
    if taken and (taken[0][0] < 0 or taken[-1][1] > flat.numel()):
        raise ConfigError(f"{what}: {taken[-1][2]} ends at element {taken[-1][1]} of {flat.numel()}")
    for (_, end, name), (begin, _, other) in itertools.pairwise(taken):
        if begin < end:
            raise ConfigError(f"{what}: {name} and {other} lie on the same elements; give each range its own offset")


def _check_disjoint(ranges: Sequence[FlatRange]) -> set[str]:
    """No element of a logical tensor is held twice, and its shape is one; gives the names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for held in ranges:
        if shapes.setdefault(held.name, held.shape) != held.shape:
            raise ConfigError(f"FlatShards: {held.name} has shape {shapes[held.name]} and shape {held.shape}")
    spans = sorted((held.name, held.start, held.stop) for held in ranges if held.start < held.stop)
    for (name, _, stop), (other, start, _) in itertools.pairwise(spans):
        if name == other and start < stop:
            raise ConfigError(f"FlatShards: element {start} of {name} is in two ranges; a rank holds it once")
    return set(shapes)
