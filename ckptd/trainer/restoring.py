"""Restoring an application's state from a place that holds a whole snapshot: compare, fill, finish, on all ranks.

Owns the order, what is said of differences, and which part is restored where only some keys are asked for. Invariants:
every difference on any rank is in one MismatchError, the same on every rank, raised before any tensor is written; once
tensors are written, an error says so; what was not asked for stays as it is.

What several ranks read together (`SharedTier`: a store, the memory of several nodes) they pass on to each other
(exchange.py); from other origins, as memory on the one node, each rank reads what it wants. Does not find the snapshot
(api.py, checkpointer.py) nor know what a leaf of the state is (state.py).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import msgspec
from torch.optim import Optimizer

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, ConfigError, MismatchError, StoreError
from ckptd.plan.load import Want, mismatch_message, plan_partially
from ckptd.plan.share import RNG_PREFIX, objects_for, serving_rank, tensor_infos
from ckptd.trainer.collective import Group
from ckptd.trainer.exchange import Exchange, SharedTier
from ckptd.trainer.loading import Filling, RowReader, RunReader, fill_alone
from ckptd.trainer.state import AppState
from ckptd.trainer.state_tensors import Source

PARTLY_WRITTEN = (
    "Loading had begun: tensors of the state are partly overwritten. Load again, from here or another checkpoint, "
    "before you use them"
)


class Origin(Protocol):
    """Where a snapshot is read from: a stored checkpoint, or memory."""

    def catalog(self) -> Catalog: ...

    def objects(self) -> dict[str, bytes]: ...

    def read(self, row: int, into: memoryview) -> None: ...


@runtime_checkable
class ToldByFirst(Protocol):
    """An origin of which rank 0 reads manifest and objects for all, as of `StoredCheckpoint`."""

    def metadata(self) -> bytes: ...

    def adopt(self, metadata: bytes) -> None: ...


@dataclasses.dataclass(frozen=True)
class Report:
    """What was left out: `missing` are keys that some rank's state has and the checkpoint has not, `unexpected` those
    of the checkpoint, below names of the state, that no rank's state has. Both empty after a strict load."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class _Differences(msgspec.Struct, array_like=True):
    """What keeps one rank from loading; what its state misses; what of the checkpoint it has no use for."""

    found: list[str]
    missing: list[str]
    unexpected: list[str]
    nothing: bool


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What one rank fills, and with what it finishes."""

    values: dict[str, bytes]
    filling: Filling


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the caller wants; see `restore_state`."""

    strict: bool
    cast: bool
    rng: bool
    keys: Sequence[str] | None


def restore_state(
    app: AppState,
    group: Group,
    origin: Origin,
    *,
    strict: bool = True,
    cast: bool = False,
    rng: bool = False,
    keys: Sequence[str] | None = None,
    what: str = "the checkpoint",
) -> Report:
    """Fills `app` from `origin`, in place; collective.

    Raises MismatchError with every difference and nothing written; CorruptionError and the like where reading fails,
    with PARTLY_WRITTEN in the message. `strict=False` takes what both have. `keys`: patterns (`matcher`); everything
    else stays as it is, and its absence is no difference. `what` names the origin in messages.
    """
    asked = _Asked(strict, cast, rng, keys)
    prepared: list[_Prepared] = []

    # What rank 0 has read for all, the others verify as if they had read it.
    told = origin if group.size > 1 and isinstance(origin, ToldByFirst) else None
    metadata = b"" if told is None else group.from_first(told.metadata)

    def prepare() -> bytes:
        if told is not None and group.rank != 0:
            told.adopt(metadata)
        made, differences = _prepare(app, group, origin, asked)
        prepared.append(made)
        return msgspec.msgpack.encode(differences)

    answers = group.together(prepare)
    report = _judge([msgspec.msgpack.decode(data, type=_Differences) for data in answers], asked, what)
    _fill(group, origin, prepared[0].filling)
    group.together(functools.partial(_told, lambda: _finish(app, prepared[0].values, asked)))
    return report


def matcher(keys: Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a key, or one that it lies below, matches any of these patterns: `*`, `?` and `[abc]` as in file names,
    but for `*`, which matches `/` too. None: all do."""
    if keys is None:
        return lambda key: True
    for pattern in keys:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"keys={keys!r}: expected patterns of keys, such as 'model' or 'model/layers.0.*'")
    below = "|".join(f"{fnmatch.translate(pattern.rstrip('/'))[:-2]}(?:/.*)?" for pattern in keys)
    compiled = re.compile(f"(?s:{below})")
    return lambda key: compiled.fullmatch(key) is not None


def _prepare(app: AppState, group: Group, origin: Origin, asked: _Asked) -> tuple[_Prepared, _Differences]:
    """The targets, their plan, and every difference; writes nothing."""
    catalog = origin.catalog()
    rank = serving_rank(catalog, group.rank, group.size)
    wanted = matcher(asked.keys)
    every = objects_for(group.rank, origin.objects(), catalog, origin.read, world=group.size, rng=asked.rng)
    values = {path: value for path, value in every.items() if wanted(path) or _is_needed(path, every)}
    tensors = {key: info for key, info in tensor_infos(catalog).items() if wanted(key)}
    missing = [key for key in app.missing(tensors, values) if wanted(key)]
    unexpected = app.unexpected([*tensors, *values])
    found: list[str] = []
    targets: list[Source] = []
    try:
        targets = [target for target in app.targets(tensors, values) if target.key in tensors]
    except MismatchError as error:
        found.append(str(error))
    wants = [Want(target.key, target.dtype, target.shape, target.box) for target in targets]
    plan, differing = plan_partially(catalog, wants, rank=rank, cast=asked.cast)
    filling = Filling(catalog, targets, plan)
    nothing = asked.keys is not None and not tensors and not any(map(wanted, every))
    return _Prepared(values, filling), _Differences([*found, *differing], missing, unexpected, nothing)


def _is_needed(path: str, objects: Mapping[str, bytes]) -> bool:
    """Whether an object counts whatever keys are asked for: generators, of which `rng` decides, and what is no value
    of its own, but says how the tensors of an optimizer's state were placed."""
    parent, _, name = path.rpartition("/")
    return path.startswith(RNG_PREFIX) or (name == "placement" and f"{parent}/param_groups" in objects)


def _judge(answers: list[_Differences], asked: _Asked, what: str) -> Report:
    """What is left out. MismatchError if any rank has a difference, or no rank has a use for a key."""
    missing = sorted({key for answer in answers for key in answer.missing})
    unexpected = sorted(set(answers[0].unexpected).intersection(*(answer.unexpected for answer in answers)))
    lines = dict.fromkeys(line for answer in answers for line in answer.found)
    if all(answer.nothing for answer in answers):
        lines[f"keys={list(asked.keys or ())}: match no key of the checkpoint"] = None
    if asked.strict:
        lines |= dict.fromkeys(f"{key}: not in the checkpoint" for key in missing)
        lines |= dict.fromkeys(f"{key}: in the checkpoint only (strict=False ignores it)" for key in unexpected)
    if lines:
        raise MismatchError(mismatch_message(what, list(lines)))
    return Report(tuple(missing), tuple(unexpected))


def _fill(group: Group, origin: Origin, filling: Filling) -> None:
    """Fills the targets, together with the other ranks where the tier is shared."""
    if group.size > 1 and isinstance(origin, SharedTier):
        with Exchange(group, origin, filling) as exchange:
            _told(exchange.run)
        return
    reader = origin if isinstance(origin, RunReader) else RowReader(origin.catalog(), origin.read)
    group.together(functools.partial(_told, lambda: fill_alone(filling, reader)))


def _finish(app: AppState, values: dict[str, bytes], asked: _Asked) -> None:
    if asked.keys is None:
        app.finish(values, rng=asked.rng)
        return
    with _rest_kept(app.optimizers()):
        app.finish(values, rng=asked.rng)


@contextmanager
def _rest_kept(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """A restore drops state of optimizers that the checkpoint does not have; here that means: was not asked for."""
    holders = [getattr(optimizer, "optim", optimizer) for optimizer in optimizers]  # ZeroRedundancyOptimizer's own
    before: list[tuple[Any, list[tuple[Any, Any]]]] = [
        (holder, [(key, dict(entry) if isinstance(entry, dict) else entry) for key, entry in holder.state.items()])
        for holder in holders
    ]
    yield
    for holder, entries in before:
        for key, entry in entries:
            now = holder.state.setdefault(key, entry)
            if now is not entry and isinstance(now, dict) and isinstance(entry, dict):
                for name, value in entry.items():
                    now.setdefault(name, value)


def _told(work: Callable[[], None]) -> bytes:
    """Does what writes into the state; its errors say that the state is not what it was."""
    try:
        work()
    except (CkptdError, OSError) as error:
        kind = type(error) if isinstance(error, CkptdError) else StoreError
        raise kind(f"{error}. {PARTLY_WRITTEN}") from error
    except Exception as error:
        error.add_note(PARTLY_WRITTEN)
        raise
    return b""
