"""Names of entries on both sides, and how objects are joined and taken apart again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ckptd.core.errors import ConfigError
from ckptd.dcp.names import Path, check_names, join_objects, key_of, leaves, name_of, path_of, unambiguous
from ckptd.format.objects import Ref, decode, encode

KEYS = st.text("ab/\\.", min_size=1, max_size=3)
TENSOR = torch.zeros(())
VALUES = st.recursive(
    st.sampled_from([None, TENSOR, 1, "x", -(2**70)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def flattened(state: dict[str, Any]) -> dict[Path, Any]:
    """Path -> entry, as DCP's own planners find them; tensors as references."""
    try:
        flat, paths = flatten_state_dict(state)
    except ValueError:  # two entries with one name: DCP refuses them
        return {}
    return {
        paths[name]: Ref(key_of(paths[name])) if isinstance(value, torch.Tensor) else value
        for name, value in flat.items()
    }


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(KEYS | st.sampled_from(["state", "param_groups"]), VALUES, max_size=4))
def test_objects_come_apart_as_dcp_does_it(state: dict[str, Any]) -> None:
    """What is joined for the store is taken apart into the entries that DCP made, for any state dict."""
    entries = flattened(state)
    tensors = {path: value for path, value in entries.items() if isinstance(value, Ref)}
    values = {path: encode(value) for path, value in entries.items() if path not in tensors}
    stored = join_objects(tensors, values)
    found = {path: leaf for key, data in stored.items() for path, leaf in leaves(path_of(key), decode(data))}
    assert found == {path: value for path, value in entries.items() if path in values or path in found}
    assert all(path in found for path in tensors if any(isinstance(element, int) for element in path))


@given(st.lists(KEYS, min_size=1, max_size=4))
def test_keys_and_paths(elements: list[str]) -> None:
    assert path_of(key_of(tuple(elements))) == tuple(elements)


def test_an_optimizer_is_stored_as_ckptd_stores_it() -> None:
    entries = {
        ("o", "param_groups", 0, "lr"): 0.1,
        ("o", "param_groups", 0, "params"): ["w"],
        ("o", "param_groups", 1, "lr"): 0.2,
        ("o", "state", "w", "calls"): 3,
        ("o", "state", "w", "mode"): "slow",
        ("other", "state", "w", "calls"): 4,
    }
    tensors: list[Path] = [("o", "param_groups", 1, "decay"), ("o", "state", "w", "average")]
    stored = join_objects(tensors, {path: encode(value) for path, value in entries.items()})
    assert {key: decode(data) for key, data in stored.items()} == {
        "o/param_groups": [{"lr": 0.1, "params": ["w"]}, {"lr": 0.2, "decay": Ref("o/param_groups/1/decay")}],
        "o/state/w": {"calls": 3, "mode": "slow"},
        "other/state/w/calls": 4,
    }


def test_ambiguous_names_are_keys() -> None:
    """A checkpoint of ckptd may have keys that DCP would call the same."""
    paths: list[Path] = [("a", "b.c"), ("a.b", "c"), ("d", "e")]
    assert unambiguous(paths) == {"a/b.c": ("a", "b.c"), "a.b/c": ("a.b", "c"), "d.e": ("d", "e")}
    assert name_of(("x", 0, "y")) == "x.0.y"


def test_names_that_ckptd_needs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objects\.x: tensors under 'objects'"):
        check_names([("objects", "x")], [])
    with pytest.raises(ConfigError, match=r"rng\.python: values under 'rng'"):
        check_names([], [("rng", "python")])
    check_names([("objects",), ("rng", "torch")], [("rng",), ("objects", "x")])
