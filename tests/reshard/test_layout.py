"""The rules language: what it means, rank by rank, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError
from ckptd.plan.layout import Layout, Mesh, Placed, Split, rank_elements, shards
from tests.reshard.layouts import coordinates, expected_shard, meshes

MESH = Mesh.parse("dp=2,tp=4,pp=2")


def info(key: str, *shape: int) -> TensorInfo:
    return TensorInfo(key, "float32", shape)


def layout(text: str, mesh: Mesh = MESH) -> Layout:
    return Layout.parse(text, mesh, "rules.toml")


def test_mesh() -> None:
    assert MESH == Mesh(("dp", "tp", "pp"), (2, 4, 2))
    assert MESH.ranks == 16
    assert str(MESH) == "dp=2,tp=4,pp=2"
    assert Mesh.parse("").ranks == 1


@pytest.mark.parametrize("text", ["dp", "dp=0", "dp=-1", "dp=2,dp=2", "2=dp", "dp=2;tp=2", "a=2000,b=2000", "dp=1.5"])
def test_a_mesh_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        Mesh.parse(text)


@settings(max_examples=100, deadline=None)
@given(meshes(), st.lists(st.integers(0, 9), max_size=3), st.data())
def test_shards_are_what_the_ranks_hold(mesh: Mesh, shape: list[int], data: st.DataObject) -> None:
    """The distinct boxes of all ranks, computed rank by rank, and nothing else; they tile the tensor."""
    axes = data.draw(st.permutations(range(len(mesh.sizes))))[: data.draw(st.integers(0, 3))]
    splits = tuple(Split(axis, data.draw(st.integers(0, len(shape) - 1))) for axis in axes if shape)
    placed = Placed(info("w", *shape), splits, (None,) * len(mesh.sizes))
    offsets, sizes = shards(placed, mesh)
    found = [tuple(zip(low, size, strict=True)) for low, size in zip(offsets.tolist(), sizes.tolist(), strict=True)]
    held = {rank: expected_shard(tuple(shape), splits, mesh.sizes, rank) for rank in coordinates(mesh)}
    if 0 in shape:
        assert found == [tuple((0, length) for length in shape)]
    else:
        boxes = {tuple((part.start, len(part)) for part in parts) for parts in held.values() if all(map(len, parts))}
        assert sorted(boxes) == found
        assert int(np.prod(sizes, axis=1).sum()) == int(np.prod(shape, dtype=np.int64))
    elements = np.broadcast_to(rank_elements(placed, mesh), mesh.sizes)
    for rank, parts in held.items():
        assert elements[rank] == np.prod([len(part) for part in parts], dtype=np.int64)


def test_the_first_rule_that_matches_counts() -> None:
    rules = layout(
        """
        [[placement]]
        keys = ["*.wq.weight", "*.wk.weight"]
        shard = [{ mesh = "tp", dim = 0 }, { mesh = "dp", dim = -1 }]
        [[placement]]
        keys = "*.norm.*"
        replicate = true
        [[placement]]
        keys = "*"
        shard = { mesh = "dp", dim = 0 }
        """
    )
    placed, unused = rules.place([info("m/0.wq.weight", 8, 8), info("m/0.norm.w", 8), info("m/x", 8), info("step")])
    assert [one.splits for one in placed] == [(Split(1, 0), Split(0, 1)), (), (Split(0, 0),), ()]
    assert unused == []


def test_layers_over_stages() -> None:
    keys = [f"model/layers.{layer}.w" for layer in range(5)]
    evenly = layout('[[stage]]\nmesh = "pp"\nkeys = "*layers.{layer}.*"')
    placed, _ = evenly.place([info(key, 2) for key in [*keys, "model/head.w"]])
    assert [one.stages[2] for one in placed] == [(0,), (0,), (0,), (1,), (1,), None]
    chosen = layout(
        '[[stage]]\nmesh = "pp"\nkeys = "*layers.{layer}.*"\nfirst = [0, 2]\n'
        '[[stage]]\nmesh = "pp"\nkeys = "*head*"\nstage = -1\n'
        '[[stage]]\nmesh = "pp"\nkeys = "*nothing*"\nstage = [0, 1]\n'
    )
    placed, unused = chosen.place([info(key, 2) for key in [*keys, "model/head.w"]])
    assert [one.stages[2] for one in placed] == [(0,), (0,), (1,), (1,), (1,), (1,)]
    assert unused == ["stage 3 (*nothing*)"]
    assert rank_elements(placed[0], MESH).sum() == 2
    assert rank_elements(placed[0], MESH)[..., 1].sum() == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = ", "not TOML"),
        ("[[rule]]", "unknown tables"),
        ("placement = 1", "expected a table"),
        ("[[placement]]\nreplicate = true", "expected `keys`"),
        ('[[placement]]\nkeys = ["*", 1]\nreplicate = true', "expected `keys`"),
        ('[[placement]]\nkeys = "*"', "one of `shard` and `replicate`"),
        ('[[placement]]\nkeys = "*"\nreplicate = false', "replicate = true"),
        ('[[placement]]\nkeys = "*"\nreplicate = true\ndim = 1', "unknown"),
        ('[[placement]]\nkeys = "*"\nshard = { mesh = "xp", dim = 0 }', "not a dimension of the mesh"),
        ('[[placement]]\nkeys = "*"\nshard = { mesh = "dp", dim = true }', "expected { mesh"),
        ('[[placement]]\nkeys = "*"\nshard = []', "twice, or none"),
        ('[[placement]]\nkeys = "*"\nshard = [{ mesh = "dp", dim = 0 }, { mesh = "dp", dim = 1 }]', "twice"),
        ('[[placement]]\nkeys = "*{layer}*"\nreplicate = true', "nowhere"),
        ('[[stage]]\nmesh = "pp"\nkeys = "*"', "once"),
        ('[[stage]]\nmesh = "pp"\nkeys = "*"\nstage = 2', "expected stages from -2 to 1"),
        ('[[stage]]\nmesh = "pp"\nkeys = "*.{layer}.*"\nfirst = [0, 2, 4]', "each of 2 stages"),
        ('[[stage]]\nmesh = "pp"\nkeys = "*.{layer}.*"\nfirst = [1, 2]', "rising from 0"),
        ('[[stage]]\nkeys = "*"\nstage = 0', "not a dimension of the mesh"),
    ],
)
def test_rules_that_cannot_be_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"rules\.toml") as caught:
        layout(text)
    assert reason in str(caught.value)


def test_a_layout_that_does_not_fit_lists_every_tensor() -> None:
    rules = layout('[[placement]]\nkeys = "*"\nshard = { mesh = "dp", dim = 1 }')
    with pytest.raises(ConfigError) as caught:
        rules.place([info("a", 2), info("b", 2, 2), info("c", 3)])
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["a", "c"]
