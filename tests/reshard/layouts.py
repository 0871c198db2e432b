"""Random layouts and what they mean, computed in another way: torch.chunk's rule, rank by rank, with slices."""

from __future__ import annotations

import itertools
import math

from hypothesis import strategies as st

from ckptd.core.catalog import TensorInfo
from ckptd.plan.layout import Layout, Mesh, Placement, Split

AXES = ("dp", "tp", "pp")


def expected_shard(
    shape: tuple[int, ...], splits: tuple[tuple[int, int], ...], sizes: tuple[int, ...], rank: tuple[int, ...]
) -> tuple[range, ...]:
    """The elements, by dimension, that the rank at these coordinates holds."""
    held = [range(length) for length in shape]
    for axis, dimension in splits:
        whole = held[dimension]
        step = math.ceil(len(whole) / sizes[axis])
        held[dimension] = whole[rank[axis] * step : (rank[axis] + 1) * step]
    return tuple(held)


def coordinates(mesh: Mesh) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in mesh.sizes))


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    count = draw(st.integers(0, 3))
    return Mesh(AXES[:count], tuple(draw(st.integers(1, 4)) for _ in range(count)))


@st.composite
def layouts(draw: st.DrawFn, infos: list[TensorInfo]) -> Layout:
    """A layout with a placement for some of the tensors."""
    mesh = draw(meshes())
    placements = []
    for info in infos:
        axes = draw(st.permutations(range(len(mesh.sizes))))[: draw(st.integers(0, len(mesh.sizes)))]
        if info.shape and axes:
            splits = tuple(Split(axis, draw(st.integers(-len(info.shape), len(info.shape) - 1))) for axis in axes)
            placements.append(Placement((info.key,), splits))
    return Layout(mesh, tuple(placements))
