"""The synchronous interface: `save`, `load` and `open`, without a daemon.

Owns what these promise: a save is committed when it returns and nothing exists if it fails; a load checks everything
it can before it writes into a tensor, in place, for any layout. Both are collective where a process group exists; all
ranks raise the same error. `open` is for one process that looks at a checkpoint.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, TensorInfo
from ckptd.core.errors import CorruptionError, NotFoundError
from ckptd.core.types import SnapshotId
from ckptd.format.manifest import to_parquet
from ckptd.plan.share import objects_for, tensor_infos
from ckptd.tensors.values import torch_dtype
from ckptd.tiers.store import Store, StoredCheckpoint, open_checkpoint
from ckptd.trainer import collective
from ckptd.trainer.loading import fill
from ckptd.trainer.restoring import Report, restore_state
from ckptd.trainer.saving import save_state
from ckptd.trainer.state import AppState
from ckptd.trainer.state_tensors import Share, Source
from ckptd.trainer.state_values import decode

log = logging.getLogger("ckptd")

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def save(
    state: MutableMapping[str, Any], path: str | Path, *, step: int | None = None, overwrite: bool = False
) -> None:
    """Writes `state` as one committed checkpoint into the store at `path` (directory or URI), and waits for it.

    `step`: completed steps the state stands for; 0 if not given. A store holds one checkpoint of a step: another is a
    StoreError, unless `overwrite`, which commits the new one before it removes the old. Other steps stay.

    Collective where a process group exists. If it raises (ConfigError, StoreError, CorruptionError: the same on every
    rank), nothing was committed.
    """
    save_state(state, path, collective.world(), step=0 if step is None else step, overwrite=overwrite)


class Loaded(int):
    """What `load` returns: the step, as a number, and what a load with `strict=False` left out.

    `missing`: keys that the state of some rank has and the checkpoint has not; they are as they were. `unexpected`:
    keys of the checkpoint, below names of the state, that no rank's state has.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __new__(cls, step: int, report: Report) -> Loaded:
        made = super().__new__(cls, step)
        made.missing, made.unexpected = report.missing, report.unexpected
        return made


def load(
    state: MutableMapping[str, Any],
    path: str | Path,
    *,
    strict: bool = True,
    cast: bool = False,
    rng: bool = False,
    keys: str | Sequence[str] | None = None,
) -> Loaded:
    """Fills `state` in place from the newest checkpoint of the store at `path`, or from one checkpoint directory.

    Returns its step. The layout may differ from the one that saved: shards are cut anew. Top-level names that the
    checkpoint has and `state` has not are ignored. All ranks together read each byte from the store once.

    strict: every tensor here must be in the checkpoint and the reverse; False loads what both have, and what is
    returned lists the rest. Shapes must agree either way. cast: converts where dtypes differ. rng: also sets the
    generators of Python, NumPy, torch and the devices, each rank its own.

    keys: a pattern, or several, of what to load: `"model"` and all below it, `"model/layers.0.*"` (`*` matches `/`
    too), `"optimizer/state/*/exp_avg"`. Everything else stays as it is, and need not be in the checkpoint.

    Collective where a process group exists. Raises MismatchError that lists every difference, with the tensors as
    they were; CorruptionError, FormatError or StoreError where reading fails, and says if tensors were written.
    """
    group = collective.world()
    app: list[AppState] = []

    def find() -> bytes:
        app.append(AppState(state))
        return msgspec.msgpack.encode(open_checkpoint(str(path)).id if group.rank == 0 else None)

    chosen = msgspec.msgpack.decode(group.together(find)[0], type=SnapshotId)
    stored: list[StoredCheckpoint] = []

    def look() -> bytes:
        stored.append(_open_exactly(str(path), chosen))
        return b""

    group.together(look)
    patterns = [keys] if isinstance(keys, str) else keys
    with stored[0]:
        what = stored[0].location
        report = restore_state(app[0], group, stored[0], strict=strict, cast=cast, rng=rng, keys=patterns, what=what)
    if group.rank == 0:
        _tell(report, what)
    return Loaded(chosen.step, report)


def _tell(report: Report, what: str) -> None:
    """What a load with strict=False left out is not passed over in silence."""
    for keys, said in ((report.missing, "not in it, left as they were"), (report.unexpected, "in it only, ignored")):
        if keys:
            more = ", ..." if len(keys) > 10 else ""
            log.warning("%s: %d keys are %s: %s%s", what, len(keys), said, ", ".join(keys[:10]), more)


def _open_exactly(path: str, name: SnapshotId) -> StoredCheckpoint:
    """The checkpoint `name` at `path`, also if a newer one was committed in between."""
    stored = open_checkpoint(path)
    return stored if stored.id == name else Store.open(path).reader(name)


def open(path: str | Path) -> Checkpoint:  # the public name; the built-in is not used here
    """The newest checkpoint of the store at `path`, or the one in that directory. Reads no tensor yet.

    Raises NotFoundError, FormatError or StoreError.
    """
    return Checkpoint(open_checkpoint(str(path)))


class Description(NamedTuple):
    """A logical tensor: its dtype and its global shape."""

    dtype: torch.dtype
    shape: torch.Size


class Descriptions(Mapping[str, Description]):
    """Key -> dtype and shape of every tensor of a checkpoint, sorted by key."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos

    def __getitem__(self, key: str) -> Description:
        info = self._infos[key]
        return Description(torch_dtype(info.dtype), torch.Size(info.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors>"


class Checkpoint:
    """A committed checkpoint, to look into. Everything is read when it is asked for."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        self._stored = stored

    def __repr__(self) -> str:
        return f"<ckptd checkpoint of job {self.job!r}, {self._stored.id}>"

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._stored.id.step

    @property
    def epoch(self) -> int:
        """Number of the start of the job that wrote it."""
        return self._stored.id.epoch.number

    @property
    def job(self) -> str:
        """Name of the job that wrote it."""
        return self._stored.job

    @functools.cached_property
    def tensors(self) -> Mapping[str, Description]:
        """Key -> `.dtype` and `.shape` of every logical tensor."""
        return Descriptions(tensor_infos(self._stored.catalog()))

    @functools.cached_property
    def objects(self) -> Mapping[str, Any]:
        """Path -> value of everything that is no tensor, as rank 0 saw it, generators included. Tensors inside a value
        are references whose `.key` can be read."""
        catalog = self._stored.catalog()
        encoded = objects_for(0, self._stored.objects(), catalog, self._stored.read)
        return {path: decode(value) for path, value in sorted(encoded.items())}

    @functools.cached_property
    def manifest(self) -> pa.Table:
        """The table of chunks: a row for each, as docs/format.md describes them."""
        return pq.read_table(pa.BufferReader(to_parquet(self._stored.catalog())))

    def read(self, key: str, index: Index | None = None) -> torch.Tensor:
        """The tensor `key`, or the part of it that `index` selects, as a new CPU tensor.

        `index` is ints and slices, as in `tensor[index]`; only chunks that hold some of it are read. For per-rank
        tensors it is the value that serves every rank. Raises NotFoundError, IndexError, CorruptionError.
        """
        infos = tensor_infos(self._stored.catalog())
        if key not in infos:
            raise NotFoundError(f"{self!r} has no tensor {key!r}; `.tensors` lists all {len(infos)}")
        info = infos[key]
        box, rest = _select(index, info.shape)
        made = torch.empty(box.sizes, dtype=torch_dtype(info.dtype))
        target = Source(key, info.dtype, info.shape, box, Share.REPLICATED, made)
        fill(self._stored.catalog(), self._stored, [target], rank=ALL_RANKS)
        return made[rest]

    def verify(self) -> None:
        """Reads everything and compares all checksums; raises CorruptionError that lists what is wrong."""
        problems = self._stored.verify()
        if problems:
            raise CorruptionError(f"{self!r} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))


def _select(index: Index | None, shape: tuple[int, ...]) -> tuple[Box, tuple[int | slice, ...]]:
    """The smallest box that holds what `index` selects, and what to select from that box."""
    given = (...,) if index is None else index if isinstance(index, tuple) else (index,)
    dots = sum(item is ... for item in given)
    if dots > 1 or len(given) - dots > len(shape):
        raise IndexError(f"index {index!r} has too many entries for shape {list(shape)}")
    position = next((i for i, item in enumerate(given) if item is ...), len(given))
    missing = len(shape) - (len(given) - dots)
    full = (*given[:position], *(slice(None),) * missing, *given[position + dots :])
    offsets: list[int] = []
    sizes: list[int] = []
    rest: list[int | slice] = []
    for item, size in zip(full, shape, strict=True):
        if isinstance(item, slice):
            chosen = range(size)[item]
            if chosen.step < 0:
                raise IndexError(f"index {index!r}: steps must be positive")
            offsets.append(chosen.start if chosen else 0)
            sizes.append(chosen[-1] - chosen.start + 1 if chosen else 0)
            rest.append(slice(None, None, chosen.step))
            continue
        try:
            offsets.append(range(size)[item])  # type: ignore[index]
        except IndexError:
            raise IndexError(f"index {index!r} is out of range for shape {list(shape)}") from None
        except TypeError:
            raise IndexError(f"index {index!r}: expected ints and slices") from None
        sizes.append(1)
        rest.append(0)
    return Box(tuple(offsets), tuple(sizes)), tuple(rest)
