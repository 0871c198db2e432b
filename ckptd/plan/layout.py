"""The layout of a target: a mesh of ranks, and rules that say which rank is to hold which boxes of which tensor.

Owns the rules language of `ckptd reshard` (docs/resharding.md) and what it means: a tensor's dimension is split over
a dimension of the mesh as torch.chunk splits it (runs of ceil(n / k), the last ones shorter or empty), one split after
the other, so that every shard is one box. Invariants: the shards of a tensor are disjoint and cover it; the same
rules and tensors give the same layout. Pure; knows nothing of chunks, files or values.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError

Ints = npt.NDArray[np.int64]

MAX_RANKS = 2**20
MAX_LISTED = 20
"""Problems named in one message."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LAYER = "{layer}"
_STAND_IN = "\ue000"
"""Stands for {layer} while fnmatch translates a pattern: a character that no key should have."""


class Mesh(NamedTuple):
    """Ranks as an array: names of its dimensions, outermost first, and their sizes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """A mesh from `dp=2,tp=4,pp=2`; of nothing: one rank. Raises ConfigError."""
        names: list[str] = []
        sizes: list[int] = []
        for item in filter(None, text.split(",")):
            name, _, size = (part.strip() for part in item.partition("="))
            if not _NAME.fullmatch(name) or not re.fullmatch(r"[1-9][0-9]{0,6}", size) or name in names:
                raise ConfigError(f"mesh {text!r}: {item!r} is not NAME=SIZE with a new name and a size from 1 up")
            names.append(name)
            sizes.append(int(size))
        if math.prod(sizes) > MAX_RANKS:
            raise ConfigError(f"mesh {text!r}: {math.prod(sizes)} ranks; at most {MAX_RANKS}")
        return cls(tuple(names), tuple(sizes))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True)) or "1 rank"


class Split(NamedTuple):
    """Dimension `dimension` of a tensor (negative: from the last) is split over dimension `axis` of the mesh."""

    axis: int
    dimension: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which tensors are split how; no splits: every rank of the stage has the whole tensor."""

    keys: tuple[str, ...]
    splits: tuple[Split, ...]


@dataclasses.dataclass(frozen=True)
class StageRule:
    """Which tensors are on which stages of dimension `axis` of the mesh: on `stages`, or where {layer} in the pattern
    is a number, on the last stage whose first layer (`first`; empty: as even as can be) is not above it."""

    axis: int
    keys: tuple[str, ...]
    stages: tuple[int, ...]
    first: tuple[int, ...]


class Placed(NamedTuple):
    """One tensor in a layout: its splits (dimensions from 0) and, for each dimension of the mesh, which coordinates
    hold it (None: all)."""

    info: TensorInfo
    splits: tuple[Split, ...]
    stages: tuple[tuple[int, ...] | None, ...]

    @property
    def first_stage(self) -> tuple[int, ...]:
        """What orders tensors by stage: the lowest stage on each dimension of the mesh, -1 for tensors of all."""
        return tuple(-1 if held is None else min(held) for held in self.stages)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules in the order in which they are tried: the first that matches a key counts."""

    mesh: Mesh
    placements: tuple[Placement, ...] = ()
    stage_rules: tuple[StageRule, ...] = ()

    @classmethod
    def parse(cls, text: str, mesh: Mesh, where: str = "layout") -> Layout:
        """A layout from TOML; ConfigError that names `where`, the rule and what is wrong with it."""
        try:
            rules = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where}: not TOML: {error}") from None
        unknown = set(rules) - {"placement", "stage"}
        if unknown:
            raise ConfigError(f"{where}: unknown tables {sorted(unknown)}; expected [[placement]] and [[stage]]")
        placements = [_Rule(where, "placement", i, rule, mesh) for i, rule in enumerate(_tables(rules, "placement"))]
        stages = [_Rule(where, "stage", i, rule, mesh) for i, rule in enumerate(_tables(rules, "stage"))]
        return cls(mesh, tuple(rule.placement() for rule in placements), tuple(rule.stage() for rule in stages))

    def place(self, tensors: Sequence[TensorInfo]) -> tuple[list[Placed], list[str]]:
        """Where each tensor goes, and the rules that matched none of them (in words).

        Raises ConfigError that lists the tensors which a rule cannot split.
        """
        matchers = [_matcher(rule.keys) for rule in self.placements]
        stage_of = _Stages(self.stage_rules, self.mesh, tensors)
        used: set[int] = set()
        problems: list[str] = []
        placed = []
        for info in tensors:
            number = next((i for i, matches in enumerate(matchers) if matches(info.key) is not None), None)
            splits: tuple[Split, ...] = ()
            if number is not None:
                used.add(number)
                splits = _fitting(info, self.placements[number], number, self.mesh, problems)
            stages = stage_of(info.key)
            problems += [
                f"{info.key}: split over {self.mesh.names[split.axis]!r}, which has it only on stages {held}"
                for split in splits
                if (held := stages[split.axis]) is not None
            ]
            placed.append(Placed(info, splits, stages))
        if problems:
            raise ConfigError("the layout does not fit the checkpoint:\n" + _listed(problems))
        unused = [f"placement {i + 1} ({', '.join(r.keys)})" for i, r in enumerate(self.placements) if i not in used]
        return placed, unused + stage_of.unused()


def shards(placed: Placed, mesh: Mesh) -> tuple[Ints, Ints]:
    """(offsets [n, D], sizes [n, D]) of the distinct shards of a tensor that hold elements, in row-major order of
    their offsets. A tensor without elements is one shard."""
    shape = placed.info.shape
    if 0 in shape or not shape:
        return np.zeros((1, len(shape)), np.int64), np.array([shape], np.int64).reshape(1, len(shape))
    spans = extents(placed, mesh)
    count = np.broadcast_shapes(*(low.shape for low, _ in spans))
    offsets = np.stack([np.broadcast_to(low, count).reshape(-1) for low, _ in spans], axis=1)
    sizes = np.stack([np.broadcast_to(size, count).reshape(-1) for _, size in spans], axis=1)
    filled = (sizes > 0).all(axis=1)
    offsets, sizes = offsets[filled], sizes[filled]
    order = np.lexsort(offsets.T[::-1])
    return offsets[order], sizes[order]


def extents(placed: Placed, mesh: Mesh) -> list[tuple[Ints, Ints]]:
    """For each dimension of the tensor (offset, size) of what a rank holds: arrays that broadcast to the mesh."""
    spans = []
    for dimension, length in enumerate(placed.info.shape):
        offset = np.zeros((1,) * len(mesh.sizes), np.int64)
        size = np.full_like(offset, length)
        for split in placed.splits:
            if split.dimension != dimension:
                continue
            parts = mesh.sizes[split.axis]
            index = np.arange(parts).reshape([-1 if a == split.axis else 1 for a in range(len(mesh.sizes))])
            start = np.minimum(index * -(-size // parts), size)
            size, offset = np.minimum(-(-size // parts), size - start), offset + start
        spans.append((offset, size))
    return spans


def rank_elements(placed: Placed, mesh: Mesh) -> Ints:
    """How many elements each rank holds: an array that broadcasts to the mesh."""
    elements = np.ones((1,) * len(mesh.sizes), np.int64)
    for _, size in extents(placed, mesh):
        elements = elements * size
    for axis, held in enumerate(placed.stages):
        if held is not None:
            index = np.arange(mesh.sizes[axis]).reshape([-1 if a == axis else 1 for a in range(len(mesh.sizes))])
            elements = elements * np.isin(index, held)
    return elements


class _Stages:
    """Which coordinates of the mesh hold a key, as the stage rules say."""

    def __init__(self, rules: Sequence[StageRule], mesh: Mesh, tensors: Sequence[TensorInfo]) -> None:
        self._rules = rules
        self._mesh = mesh
        self._matchers = [_matcher(rule.keys) for rule in rules]
        self._used: set[int] = set()
        layers = [0] * len(rules)
        for info in tensors:
            for axis in range(len(mesh.sizes)):
                number, layer = self._match(axis, info.key)
                if number is not None and layer is not None:
                    layers[number] = max(layers[number], layer + 1)
        self._first = [rule.first or _even(layers[i], mesh.sizes[rule.axis]) for i, rule in enumerate(rules)]

    def __call__(self, key: str) -> tuple[tuple[int, ...] | None, ...]:
        held: list[tuple[int, ...] | None] = []
        for axis in range(len(self._mesh.sizes)):
            number, layer = self._match(axis, key)
            if number is None:
                held.append(None)
                continue
            self._used.add(number)
            if layer is None:
                held.append(self._rules[number].stages)
            else:
                held.append((max(stage for stage, start in enumerate(self._first[number]) if start <= layer),))
        return tuple(held)

    def unused(self) -> list[str]:
        return [f"stage {i + 1} ({', '.join(r.keys)})" for i, r in enumerate(self._rules) if i not in self._used]

    def _match(self, axis: int, key: str) -> tuple[int | None, int | None]:
        """(number of the first rule on this dimension of the mesh that matches, the layer in the key if it asks)."""
        for number, (rule, matches) in enumerate(zip(self._rules, self._matchers, strict=True)):
            if rule.axis == axis and (match := matches(key)) is not None:
                return number, None if rule.stages else int(match["layer"])
        return None, None


def _even(layers: int, stages: int) -> tuple[int, ...]:
    """The first layer of each stage, the longer stages first."""
    base, longer = divmod(layers, stages)
    return tuple(stage * base + min(stage, longer) for stage in range(stages))


class _Rule:
    """One table of the rules file being read."""

    def __init__(self, where: str, kind: str, number: int, table: Any, mesh: Mesh) -> None:
        self._name = f"{where}: [[{kind}]] {number + 1}"
        self._mesh = mesh
        self._table = table if isinstance(table, dict) else {}
        if not isinstance(table, dict):
            raise self._wrong("expected a table")

    def placement(self) -> Placement:
        self._only("keys", "shard", "replicate")
        keys = self._keys(layers=0)
        if ("shard" in self._table) == ("replicate" in self._table):
            raise self._wrong("expected one of `shard` and `replicate`")
        if "replicate" in self._table:
            if self._table["replicate"] is not True:
                raise self._wrong("expected replicate = true")
            return Placement(keys, ())
        shard = self._table["shard"]
        splits = tuple(self._split(item) for item in (shard if isinstance(shard, list) else [shard]))
        if not splits or len({split.axis for split in splits}) != len(splits):
            raise self._wrong("`shard` names a dimension of the mesh twice, or none")
        return Placement(keys, splits)

    def stage(self) -> StageRule:
        self._only("keys", "mesh", "stage", "first")
        axis = self._axis(self._table.get("mesh"))
        if "stage" in self._table:
            if "first" in self._table:
                raise self._wrong("expected one of `stage` and `first`")
            size = self._mesh.sizes[axis]
            given = self._integers("stage")
            if not given or any(not -size <= stage < size for stage in given):
                raise self._wrong(f"stage = {given}: expected stages from {-size} to {size - 1}")
            return StageRule(axis, self._keys(layers=0), tuple(sorted({stage % size for stage in given})), ())
        return StageRule(axis, self._keys(layers=1), (), self._first(axis))

    def _first(self, axis: int) -> tuple[int, ...]:
        if "first" not in self._table:
            return ()
        first = self._integers("first")
        if len(first) != self._mesh.sizes[axis] or first[0] != 0 or first != sorted(first):
            raise self._wrong(
                f"first = {first}: expected the first layer of each of {self._mesh.sizes[axis]} stages, rising from 0"
            )
        return tuple(first)

    def _split(self, item: Any) -> Split:
        if not isinstance(item, dict) or set(item) != {"mesh", "dim"} or not _is_integer(item["dim"]):
            raise self._wrong(f"shard: {item!r}; expected {{ mesh = NAME, dim = NUMBER }}")
        return Split(self._axis(item["mesh"]), item["dim"])

    def _axis(self, name: Any) -> int:
        if name not in self._mesh.names:
            raise self._wrong(f"mesh = {name!r}: not a dimension of the mesh {self._mesh}")
        return self._mesh.names.index(name)

    def _keys(self, layers: int) -> tuple[str, ...]:
        keys = self._table.get("keys")
        globs = [keys] if isinstance(keys, str) else keys
        if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) and glob for glob in globs):
            raise self._wrong("expected `keys`: a pattern or a list of patterns")
        for glob in globs:
            if glob.count(_LAYER) != layers or _STAND_IN in glob:
                raise self._wrong(f"keys: {glob!r} should have {_LAYER} {'once' if layers else 'nowhere'}")
        return tuple(globs)

    def _integers(self, name: str) -> list[int]:
        given = self._table[name]
        values = given if isinstance(given, list) else [given]
        if not all(_is_integer(value) and abs(value) < 2**31 for value in values):
            raise self._wrong(f"{name} = {given!r}: expected whole numbers")
        return values

    def _only(self, *names: str) -> None:
        unknown = set(self._table) - set(names)
        if unknown:
            raise self._wrong(f"unknown {sorted(unknown)}; known: {', '.join(names)}")

    def _wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._name}: {reason}")


def _tables(rules: dict[str, Any], name: str) -> list[Any]:
    tables = rules.get(name, [])
    return tables if isinstance(tables, list) else [tables]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _matcher(globs: Iterable[str]) -> Any:
    """A function that gives the match of the first of some patterns, or None. `*` matches `/` too."""
    patterns = [
        re.compile(fnmatch.translate(glob.replace(_LAYER, _STAND_IN)).replace(_STAND_IN, r"(?P<layer>[0-9]{1,9})"))
        for glob in globs
    ]

    def match(key: str) -> re.Match[str] | None:
        return next(filter(None, (pattern.match(key) for pattern in patterns)), None)

    return match


def _fitting(info: TensorInfo, placement: Placement, number: int, mesh: Mesh, problems: list[str]) -> tuple[Split, ...]:
    """The placement's splits for one tensor, dimensions counted from 0. Scalars have nothing to split."""
    if not info.shape:
        return ()
    found = []
    for axis, dimension in placement.splits:
        if not -len(info.shape) <= dimension < len(info.shape):
            problems.append(
                f"{info.key}: placement {number + 1} splits dimension {dimension} over {mesh.names[axis]!r}, "
                f"shape is {list(info.shape)}"
            )
            continue
        found.append(Split(axis, dimension % len(info.shape)))
    return tuple(found)


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - MAX_LISTED
    return "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
