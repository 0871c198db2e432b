"""The mapping of the application state as a tree: where modules, optimizers and the rest stand in it.

A dict, list or tuple that holds a module, optimizer, generator or object with a state dict somewhere is a branch; all
other values are leaves, plain containers of data and tensors included. Owns paths of leaves and the rules for names;
does not look into leaves.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ckptd.core.errors import ConfigError
from ckptd.core.types import join_key
from ckptd.trainer import rng
from ckptd.trainer.state_flat import FlatShards
from ckptd.trainer.state_values import MAX_DEPTH

RESERVED = ("rng", "objects")
"""Top-level names that ckptd uses itself."""


class Kind(enum.Enum):
    """What a leaf is; decides which part of the state stores it."""

    MODULE = enum.auto()
    OPTIMIZER = enum.auto()
    STATEFUL = enum.auto()
    GENERATOR = enum.auto()
    FLAT = enum.auto()
    TENSOR = enum.auto()
    DATA = enum.auto()
    BRANCH = enum.auto()


@dataclasses.dataclass(slots=True)
class Node:
    """A value of the mapping at `path`; `children` are those of a branch, by their key or index in it."""

    path: str
    value: Any
    kind: Kind
    children: list[tuple[Any, Node]] = dataclasses.field(default_factory=list)

    def leaves(self) -> Iterator[Node]:
        """All leaves below, in the order of the mapping."""
        if self.kind is not Kind.BRANCH:
            yield self
        for _, child in self.children:
            yield from child.leaves()

    def unchanged(self) -> bool:
        """Whether the branches still hold the same modules, optimizers and other objects at the same places."""
        if len(self.value) != len(self.children):
            return False
        for key, child in self.children:
            try:
                now = self.value[key]
            except (KeyError, IndexError):
                return False
            if child.kind is Kind.DATA:
                if isinstance(now, torch.Tensor) or structural(now):
                    return False
                child.value = now
            elif now is not child.value or (child.kind is Kind.BRANCH and not child.unchanged()):
                return False
        return True

    def replace(self, settled: Callable[[Node], Any]) -> Any:
        """Puts `settled(leaf)` in the place of each leaf, rebuilding tuples; returns the value of this node."""
        if self.kind is not Kind.BRANCH:
            return settled(self)
        values = [(key, child.value, child.replace(settled)) for key, child in self.children]
        changed = [(key, new) for key, old, new in values if new is not old]
        if not changed:
            return self.value
        if isinstance(self.value, tuple):
            new = [value for _, _, value in values]
            self.value = type(self.value)(*new) if hasattr(self.value, "_fields") else tuple(new)
        else:
            for key, value in changed:
                self.value[key] = value
        for (_, child), (_, _, value) in zip(self.children, values, strict=True):
            child.value = value
        return self.value


def grow(state: Mapping[str, Any]) -> Node:
    """The tree of a state mapping. Raises ConfigError for names that cannot be used."""
    if not isinstance(state, Mapping):
        raise ConfigError(f"state: expected a mapping from names to modules, optimizers and data, found {type(state)}")
    for name in state:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"state: name {name!r} is not a text; name each entry")
        if name in RESERVED:
            raise ConfigError(f"state: name {name!r} is reserved (for {', '.join(RESERVED)}); use another")
    return Node("", state, Kind.BRANCH, [(name, _node(value, join_key(name), 1)) for name, value in state.items()])


def _node(value: Any, path: str, depth: int) -> Node:
    kind = _kind(value)
    if kind is not Kind.BRANCH:
        return Node(path, value, kind)
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {MAX_DEPTH}; flatten the state")
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    children = [(key, _node(child, f"{path}/{join_key(key)}", depth + 1)) for key, child in items]
    if len({child.path for _, child in children}) < len(children):
        raise ConfigError(f"{path}: two keys have the same text; rename one")
    return Node(path, value, Kind.BRANCH, children)


def _kind(value: Any) -> Kind:
    own = _own_kind(value)
    if own is not None:
        return own
    return Kind.BRANCH if _branch(value, 0) else Kind.DATA


def _own_kind(value: Any) -> Kind | None:
    """The kind of a leaf that is not plain data, else None."""
    if isinstance(value, torch.Tensor):
        return Kind.TENSOR
    if isinstance(value, torch.nn.Module):
        return Kind.MODULE
    if isinstance(value, torch.optim.Optimizer):
        return Kind.OPTIMIZER
    if isinstance(value, rng.GENERATORS):
        return Kind.GENERATOR
    if isinstance(value, FlatShards):
        return Kind.FLAT
    stateful = callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
    return Kind.STATEFUL if stateful and not isinstance(value, type) else None


def structural(value: Any) -> bool:
    """Whether it is, or holds, something other than plain data and tensors."""
    return _own_kind(value) not in (None, Kind.TENSOR) or _branch(value, 0)


_ATOMS = (type(None), bool, int, float, complex, str, bytes)


def _branch(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        children: Any = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    else:
        return False
    if depth > MAX_DEPTH:
        return False
    return any(
        _own_kind(child) not in (None, Kind.TENSOR) or _branch(child, depth + 1)
        for child in children
        if type(child) not in _ATOMS
    )
