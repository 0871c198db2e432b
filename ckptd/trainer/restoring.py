"""Restoring an application's state from a place that holds a whole snapshot: compare, fill, finish, on all ranks.

Owns the order and what is said of differences. Invariants: every difference on any rank is in one MismatchError, the
same on every rank, raised before any tensor is written; once tensors are written, an error says so.

Does not find the snapshot (api.py, checkpointer.py) nor know what a leaf of the state is (state.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import msgspec

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, MismatchError, StoreError
from ckptd.plan.load import LoadPlan, Want, mismatch_message, plan_partially
from ckptd.plan.share import objects_for, serving_rank, tensor_infos
from ckptd.trainer.collective import Group
from ckptd.trainer.loading import fill
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


class _Differences(msgspec.Struct, array_like=True):
    """What keeps one rank from loading, and what of the checkpoint it has no use for."""

    found: list[str]
    unexpected: list[str]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What one rank fills, and with what it finishes."""

    values: dict[str, bytes]
    targets: list[Source]
    plan: LoadPlan
    rank: int


def restore_state(
    app: AppState,
    group: Group,
    origin: Origin,
    *,
    strict: bool = True,
    cast: bool = False,
    rng: bool = False,
    what: str = "the checkpoint",
) -> None:
    """Fills `app` from `origin`, in place; collective.

    Raises MismatchError with every difference and nothing written; CorruptionError and the like where reading fails,
    with PARTLY_WRITTEN in the message. `strict=False` takes what both have. `what` names the origin in messages.
    """
    prepared: list[_Prepared] = []

    def prepare() -> bytes:
        made, differences = _prepare(app, group, origin, strict=strict, cast=cast, rng=rng)
        prepared.append(made)
        return msgspec.msgpack.encode(differences)

    answers = group.together(prepare)
    _raise_differences([msgspec.msgpack.decode(data, type=_Differences) for data in answers], what)
    group.together(functools.partial(_told, lambda: _fill(origin, prepared[0])))
    group.together(functools.partial(_told, lambda: app.finish(prepared[0].values, rng=rng)))


def _prepare(
    app: AppState, group: Group, origin: Origin, *, strict: bool, cast: bool, rng: bool
) -> tuple[_Prepared, _Differences]:
    """The targets, their plan, and every difference; writes nothing."""
    catalog = origin.catalog()
    rank = serving_rank(catalog, group.rank, group.size)
    values = objects_for(group.rank, origin.objects(), catalog, origin.read, world=group.size, rng=rng)
    tensors = tensor_infos(catalog)
    found, unexpected = [], []
    if strict:
        found += [f"{key}: not in the checkpoint" for key in app.missing(tensors, values)]
        unexpected = app.unexpected([*tensors, *values])
    targets: list[Source] = []
    try:
        targets = [target for target in app.targets(tensors, values) if target.key in catalog]
    except MismatchError as error:
        found.append(str(error))
    wants = [Want(target.key, target.dtype, target.shape, target.box) for target in targets]
    plan, differing = plan_partially(catalog, wants, rank=rank, cast=cast)
    return _Prepared(values, targets, plan, rank), _Differences([*found, *differing], unexpected)


def _raise_differences(answers: list[_Differences], what: str) -> None:
    """MismatchError if any rank has a difference, or no rank has a use for a key."""
    unexpected = set(answers[0].unexpected).intersection(*(answer.unexpected for answer in answers))
    lines = dict.fromkeys(line for answer in answers for line in answer.found)
    lines |= dict.fromkeys(f"{key}: in the checkpoint only (strict=False ignores it)" for key in sorted(unexpected))
    if lines:
        raise MismatchError(mismatch_message(what, list(lines)))


def _fill(origin: Origin, prepared: _Prepared) -> None:
    fill(origin.catalog(), origin.read, prepared.targets, rank=prepared.rank, plan=prepared.plan)


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
