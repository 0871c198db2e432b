"""Nested values of state dicts as tensors and objects of a checkpoint, and back.

Owns the names: a tensor's key is its path of dict keys and list positions; what is no tensor is an object. Two rules
say how much one object holds, the same that ckptd's optimizers keep to: a list is one object, at its path, with
references (`Ref`) to the tensors in it (`optimizer/param_groups`); and what is not a tensor in the state of one
parameter is one object, at the path of that state (`optimizer/state/<parameter>`, beside `param_groups`).

Values are inert: plain data, `format.objects` classes, and a leaf class for tensors that is the caller's. Depth is
bounded, and the count by the bytes that spell the value: what holds itself many times over is refused, not unfolded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptd.core.errors import ConfigError, FormatError
from ckptd.core.types import join_key, split_key
from ckptd.format import objects as encoding
from ckptd.interop.pickles import CountedPairs, OrderedPairs
from ckptd.plan.share import RNG_PREFIX

MAX_DEPTH = 60
MAX_ITEMS = 2**24

_UNFOLDED = 16
"""A value may have so many items for every byte that spells it: what is used several times is unfolded."""

_GROUPS, _STATE = "param_groups", "state"


@dataclasses.dataclass
class Split:
    """Tensors by key, as the leaves that stood for them, and encoded objects by path."""

    tensors: dict[str, Any]
    objects: dict[str, bytes]


def split(value: Any, name: str, is_tensor: Callable[[Any], bool], what: str, spelled_bytes: int) -> Split:
    """Takes a value apart, all of it under the top-level name `name` (empty: none). FormatError where it cannot be.

    `spelled_bytes`: of the pickles that it was read from.
    """
    splitting = _Splitting(is_tensor, what, min(_UNFOLDED * spelled_bytes + 1024, MAX_ITEMS))
    root = (name,) if name else ()
    if is_tensor(value) or not isinstance(value, dict):
        if not root:
            raise ConfigError(f"{what}: holds a single value; give it a name")
        splitting.leaf(root, value)
    else:
        splitting.mapping(root, value, 0)
    for path in splitting.objects:
        if path.startswith(RNG_PREFIX):
            raise ConfigError(f"{what}: object {path!r}: names under {RNG_PREFIX!r} are ckptd's own; use another name")
    return Split(splitting.tensors, splitting.objects)


class _Splitting:
    """One value being taken apart."""

    def __init__(self, is_tensor: Callable[[Any], bool], what: str, limit: int) -> None:
        self.tensors: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self._is_tensor = is_tensor
        self._what = what
        self._limit = limit
        self._items = 0

    def mapping(self, path: tuple[Any, ...], value: dict[Any, Any], depth: int) -> None:
        """A dict whose entries are named one by one."""
        self._count(path, depth)
        if getattr(value, "others", None):
            raise FormatError(f"{self._what}: {join_key(*path)}: a dict with keys that are neither text nor numbers")
        stateful = isinstance(value.get(_GROUPS), list) and isinstance(value.get(_STATE), dict)
        for key, inner in value.items():
            here = (*path, key)
            if stateful and key == _STATE:
                self.state(here, inner, depth + 1)
            elif isinstance(inner, dict) and not self._is_tensor(inner) and inner:
                self.mapping(here, inner, depth + 1)
            else:
                self.leaf(here, inner)

    def state(self, path: tuple[Any, ...], value: dict[Any, Any], depth: int) -> None:
        """The state of an optimizer: of each parameter, tensors by name and the rest as one object."""
        self._count(path, depth)
        for parameter, entries in value.items():
            here = (*path, parameter)
            if not isinstance(entries, dict):
                self.leaf(here, entries)
                continue
            rest = {}
            for name, entry in entries.items():
                self._count(here, depth)
                if self._is_tensor(entry):
                    self._tensor((*here, name), entry)
                else:
                    rest[name] = entry
            if rest:
                self.leaf(here, rest)

    def leaf(self, path: tuple[Any, ...], value: Any) -> None:
        """A tensor, or one object with whatever is in it."""
        if self._is_tensor(value):
            self._tensor(path, value)
            return
        key = join_key(*path)
        try:
            encoded = encoding.encode(self._skeleton(path, value, 0))
        except (ConfigError, RecursionError) as error:
            raise FormatError(f"{self._what}: {key}: {error}") from None
        if self.objects.setdefault(key, encoded) != encoded:
            raise FormatError(f"{self._what}: two values are called {key!r}")

    def _skeleton(self, path: tuple[Any, ...], value: Any, depth: int) -> Any:
        """`value` with references in place of its tensors, and plain containers."""
        self._count(path, depth)
        if self._is_tensor(value):
            return encoding.Ref(self._tensor(path, value))
        if isinstance(value, dict):
            made = {key: self._skeleton((*path, key), inner, depth + 1) for key, inner in value.items()}
            for number, (key, inner) in enumerate(getattr(value, "others", ())):
                made[_hashable(key)] = self._skeleton((*path, f"#{number}"), inner, depth + 1)
            if isinstance(value, CountedPairs):
                return Counter(made)
            return OrderedDict(made) if isinstance(value, OrderedPairs) else made
        if isinstance(value, (list, tuple)):
            return type(value)(self._skeleton((*path, i), inner, depth + 1) for i, inner in enumerate(value))
        return value

    def _tensor(self, path: tuple[Any, ...], value: Any) -> str:
        key = join_key(*path)
        if self.tensors.setdefault(key, value) is not value:
            raise FormatError(f"{self._what}: two tensors are called {key!r}")
        return key

    def _count(self, path: tuple[Any, ...], depth: int) -> None:
        self._items += 1
        if depth > MAX_DEPTH or self._items > self._limit:
            raise FormatError(
                f"{self._what}: {join_key(*path)[:200]}: nested more than {MAX_DEPTH} deep, or more than {self._limit} "
                "values"
            )


def _hashable(key: Any) -> Any:
    if isinstance(key, (float, bool, bytes, type(None))):
        return key
    if isinstance(key, tuple) and all(isinstance(part, (str, int, float, bool, bytes, type(None))) for part in key):
        return key
    raise FormatError(f"a dict with a key of type {type(key).__name__}")


def join(tensors: Mapping[str, Any], objects: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The nested dicts that keys and object paths, both without `prefix`, spell; a `Ref` becomes the tensor of its key.

    Keys in references are whole ones. ConfigError where one name is a value and also holds others.
    """
    root: dict[str, Any] = {}
    whole = {prefix + key: tensor for key, tensor in tensors.items()}
    for path, value in sorted(objects.items(), key=lambda item: len(split_key(item[0]))):
        _put(root, path, _mapped(value, lambda key: whole[key]))
    referred = {key for value in objects.values() for key in references(value)}
    for key, tensor in tensors.items():
        if prefix + key not in referred:
            _put(root, key, tensor)
    return root


def _put(root: dict[str, Any], key: str, value: Any) -> None:
    *path, last = split_key(key)
    inner = root
    for element in path:
        inner = inner.setdefault(element, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key!r}: lies inside of a value that is no dict; export less, with --prefix")
    if last in inner:
        raise ConfigError(f"{key!r}: is there twice; export less, with --prefix")
    inner[last] = value


def _mapped(value: Any, tensor: Callable[[str], Any]) -> Any:
    """`value` with `tensor(key)` in place of each reference."""
    if isinstance(value, encoding.Ref):
        return tensor(value.key)
    if isinstance(value, dict):
        made = {key: _mapped(inner, tensor) for key, inner in value.items()}
        return type(value)(made) if isinstance(value, (OrderedDict, Counter)) else made
    if type(value) in (list, tuple):
        return type(value)(_mapped(inner, tensor) for inner in value)
    return value


def references(value: Any) -> list[str]:
    """The keys of all tensors that a value refers to."""
    found: list[str] = []
    _mapped(value, found.append)
    return found


def without_references(value: Any) -> Any:
    """`value` with None in place of each reference."""
    return _mapped(value, lambda key: None)
