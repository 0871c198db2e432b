"""What an entry of a state dict is called by DCP and by ckptd, and where its value stands. Pure.

DCP flattens a state dict: an entry has a path of keys and list indices and is named by it, joined by dots. ckptd joins
the same path by slashes. So both find each other's tensors, and objects too, by two rules that `join_objects` applies
and `leaves` undoes:

- a list that DCP takes apart is one object, at the path of the list, with references to the tensors in it
  (`optimizer/param_groups`);
- what is not a tensor in the state of one parameter is one object, at the path of that state
  (`optimizer/state/<parameter>`). The state of an optimizer is what stands beside a list `param_groups`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckptd.core.errors import ConfigError
from ckptd.core.types import join_key, split_key
from ckptd.format.objects import Ref, decode, encode
from ckptd.plan.share import OBJECTS_PREFIX, RNG_PREFIX

Path = tuple[str | int, ...]
"""Keys (text) and list indices (numbers) that lead to an entry."""

_GROUPS, _STATE = "param_groups", "state"


def key_of(path: Path) -> str:
    """The key or object path of ckptd."""
    return join_key(*path)


def path_of(key: str) -> Path:
    """The path that a key spells. Indices come back as text."""
    return tuple(split_key(key) if "\\" in key else key.split("/"))


def name_of(path: Path) -> str:
    """The name that DCP gives to the entry at `path`."""
    return ".".join(map(str, path))


def check_names(tensors: Iterable[Path], objects: Iterable[Path]) -> None:
    """Raises ConfigError for entries whose key would mean something else in a checkpoint."""
    for path in tensors:
        if key_of(path).startswith(OBJECTS_PREFIX):
            raise ConfigError(f"{name_of(path)}: tensors under 'objects' are ckptd's own; rename that entry")
    for path in objects:
        if len(path) > 1 and path[0] == RNG_PREFIX[:-1]:
            raise ConfigError(f"{name_of(path)}: values under 'rng' are ckptd's own, per rank; rename that entry")


def join_objects(tensors: Iterable[Path], values: Mapping[Path, bytes]) -> dict[str, bytes]:
    """Object path -> encoded value, as they are stored, from encoded values by path and the paths of all tensors."""
    paths = [*tensors]
    lists = {path[: _list_depth(path)] for path in (*paths, *values) if _list_depth(path)}
    optimizers = {path[:-1] for path in lists if path[-1] == _GROUPS}
    stored: dict[str, bytes] = {}
    joined = _Joined()
    for path, value in values.items():
        root = _root(path, optimizers)
        if root == path:
            stored[key_of(path)] = value
        else:
            joined.put(root, path, decode(value))
    for path in paths:
        if _list_depth(path):
            joined.put(_root(path, optimizers), path, Ref(key_of(path)))
    return stored | {key_of(root): encode(value) for root, value in joined.finish().items()}


def _list_depth(path: Path) -> int:
    """How many keys lead to the outermost list on the path; 0 where there is none."""
    return next((i for i, element in enumerate(path) if isinstance(element, int)), 0)


def _root(path: Path, optimizers: set[Path]) -> Path:
    """The path of the object that holds the value at `path`."""
    depth = _list_depth(path)
    if depth:
        return path[:depth]
    for i in range(len(path) - 2):
        if path[i] == _STATE and path[:i] in optimizers:
            return path[: i + 2]
    return path


class _Joined:
    """Objects put together from the entries that DCP made of them."""

    _VANISHED: Any = object()
    """Stands for an element of which DCP makes no entry: an empty dict, or a list of such."""

    def __init__(self) -> None:
        self._objects: dict[Path, Any] = {}
        self._lists: list[list[Any]] = []

    def put(self, root: Path, path: Path, value: Any) -> None:
        """Puts `value` at `path` into the object at `root`, with the dicts and lists between them."""
        container: Any = self._objects
        key: Any = root
        for element in path[len(root) :]:
            inside = self._get(container, key)
            if inside is self._VANISHED:
                inside = {}
                if isinstance(element, int):
                    inside = []
                    self._lists.append(inside)
                self._set(container, key, inside)
            container, key = inside, element
        self._set(container, key, value)

    def finish(self) -> dict[Path, Any]:
        """The objects by path. Every list in them is one that DCP takes apart again."""
        for made in reversed(self._lists):
            made[:] = [{} if value is self._VANISHED else value for value in made]
            if _terminal(made):
                made.append({})
        return self._objects

    def _get(self, container: Any, key: Any) -> Any:
        if isinstance(container, list):
            return container[key] if key < len(container) else self._VANISHED
        return container.get(key, self._VANISHED)

    def _set(self, container: Any, key: Any, value: Any) -> None:
        if isinstance(container, list):
            container += [self._VANISHED] * (key + 1 - len(container))
        container[key] = value


def leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    """(path, value) of the entries that DCP makes of the value at `path`; those of tensors are `Ref`."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from leaves((*path, str(key)), inside)
    elif isinstance(value, list) and not _terminal(value):
        for index, inside in enumerate(value):
            yield from leaves((*path, index), inside)
    else:
        yield path, value


def _terminal(value: Any) -> bool:
    """Whether DCP stores it as one object."""
    if not isinstance(value, list):
        return not isinstance(value, Mapping)
    return all(type(entry) is not Ref and _terminal(entry) for entry in value)


def unambiguous(paths: Iterable[Path]) -> dict[str, Path]:
    """Name -> path. Where one name would stand for several, each is named by its key instead."""
    named = [(name_of(path), path) for path in paths]
    count = Counter(name for name, _ in named)
    return {name if count[name] == 1 else key_of(path): path for name, path in named}
