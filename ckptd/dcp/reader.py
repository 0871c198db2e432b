"""`StorageReader`: dcp.load from a store of ckptd, whoever wrote the checkpoint.

Owns the metadata that DCP plans with, made from the catalog (all chunks as they are stored) and the objects, and the
reading of what the planner asks for: each chunk that holds some of it once, verified, straight into the tensor where it
fits. Invariants: all ranks read one checkpoint; a rank writes into no tensor before all of its items are known to fit;
nothing that was read is unpickled. Values that only one rank has (generators, buffers that differ) are not visible to
DCP, which has no notion of them: those that serve every rank are read.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import CkptdError, MismatchError, NotFoundError, StoreError
from ckptd.dcp.names import Path, leaves, name_of, path_of, unambiguous
from ckptd.dcp.options import checked_step, checked_threads
from ckptd.dcp.values import decode, part_of, pickled
from ckptd.format.objects import Ref
from ckptd.plan.load import Want, plan_load
from ckptd.plan.share import tensor_infos
from ckptd.tensors.values import dtype_name, torch_dtype
from ckptd.tiers.store import Store, StoredCheckpoint, open_checkpoint

_PARTLY = "Loading had begun: tensors of the state dict are partly overwritten on this rank; load again before use"


class StorageReader(storage.StorageReader):
    """Reads the newest checkpoint of the store at `path`, or the one of `step`; a checkpoint's own directory works too.

    `checkpoint_id` of dcp.load replaces `path`. `thread_count`: threads that read and decode on each rank, by default
    one per core. `cast`: converts where dtypes differ, which else is a MismatchError.

    Errors are in the `failures` of DCP's CheckpointException: NotFoundError, FormatError, CorruptionError, StoreError,
    MismatchError, beside DCP's own for names and shapes that do not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        thread_count: int | None = None,
        cast: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.step = checked_step(step)
        self.thread_count = checked_threads(thread_count)
        self.cast = cast
        self._load_id = secrets.token_hex(8)
        self._contents: _Contents | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": None}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path; DCP logs it."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be the path of a store."""
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another load, from `checkpoint_id` if given."""
        if checkpoint_id:
            self.path = checkpoint_id
        self._load_id = secrets.token_hex(8)
        self._contents = None

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """What the checkpoint holds, under DCP's names. An error comes up when it is looked into: of one that is raised
        here, DCP concludes that there is none, and goes on to an AssertionError."""
        self._contents = None
        meta = StorageMeta(checkpoint_id=self.path, load_id=self._load_id)
        try:
            self._contents = contents = _Contents(self._open())
            return Metadata(contents.entries, planner_data=contents.paths, storage_meta=meta)
        except CkptdError as error:
            return Metadata(_Unreadable(error), storage_meta=meta)

    def _open(self) -> StoredCheckpoint:
        if self.step is None:
            return open_checkpoint(self.path)
        store = Store.open(self.path)
        found = store.newest(self.step)
        if found is None:
            raise NotFoundError(f"{store.uri}: no committed checkpoint of step {self.step}")
        return store.reader(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises what kept the metadata from being read."""
        len(metadata.state_dict_metadata)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which checkpoint the plan is for."""
        return replace(plan, storage_data=self._opened().stored.id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raises StoreError if the ranks would read different checkpoints."""
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            raise StoreError(
                f"{self.path}: the ranks found different checkpoints, {' and '.join(map(str, sorted(found)))}; one was "
                "committed meanwhile, or their paths lead to different stores. Load again, or give step="
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads all items of the plan into what the planner gives for them. Returns when all are read."""
        contents = self._opened()
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        with contents.stored:
            given = [planner.resolve_tensor(item) for item in tensors]
            targets = [_target(contents, item, tensor) for item, tensor in zip(tensors, given, strict=True)]
            filling = _Filling(contents.catalog, contents.stored, targets, cast=self.cast)
            try:
                filling.run(self.thread_count)
                for item, tensor in zip(tensors, given, strict=True):
                    planner.commit_tensor(item, tensor)
                for item in plan.items:
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, pickled(contents.value(item.storage_index.fqn)))
            except CkptdError as error:
                raise type(error)(f"{error}. {_PARTLY}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _opened(self) -> _Contents:
        if self._contents is None:
            raise StoreError(f"{self.path}: read_metadata has not been called, or failed")
        return self._contents


class _Contents:
    """A checkpoint under DCP's names: `entries` is the metadata, `paths` are where the entries stand in a state dict.

    A tensor is found by its key too, and an object that DCP takes apart also as a whole; these are not listed.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.stored = stored
        self.catalog = stored.catalog()
        described = _described(self.catalog)
        whole = {path: decode(data) for path, data in stored.objects().items()}
        keys, values = _placed(described, whole)
        self.paths = unambiguous([*keys, *values])
        self._keys = {key: key for key in described}
        self._keys |= {name: keys[path] for name, path in self.paths.items() if path in keys}
        self._values = {**{name_of(path_of(path)): value for path, value in whole.items()}, **whole}
        self._values |= {name: values[path] for name, path in self.paths.items() if path in values}
        everything: dict[str, STORAGE_TYPES] = {name: BytesStorageMetadata() for name in self._values}
        everything |= {name: described[key] for name, key in self._keys.items()}
        self.entries = _Entries({name: everything[name] for name in self.paths}, everything)

    def info(self, name: str) -> TensorInfo:
        """The tensor of that name."""
        if name not in self._keys:
            raise NotFoundError(f"{self.stored.location}: no tensor {name!r}")
        return self.catalog.info(self._keys[name])

    def value(self, name: str) -> Any:
        """The object of that name, with the tensors it refers to read."""
        if name not in self._values:
            raise NotFoundError(f"{self.stored.location}: no object {name!r}")
        return self._filled(self._values[name])

    def _filled(self, value: Any) -> Any:
        """`value` with tensors in the place of references."""
        if isinstance(value, Ref):
            info = self.catalog.info(value.key)
            made = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            whole = Box.whole(info.shape)
            _Filling(self.catalog, self.stored, [_Target(info, whole, made)]).run(1)
            return made
        if type(value) in (list, tuple):
            return type(value)(map(self._filled, value))
        if isinstance(value, dict):
            for key, inside in value.items():
                value[key] = self._filled(inside)
        return value


def _described(catalog: Catalog) -> dict[str, TensorStorageMetadata]:
    """Key -> DCP's description of each tensor that every rank can read, with its chunks."""
    described = {}
    for key, info in tensor_infos(catalog).items():
        rows = [row for row in catalog.rows(key) if catalog.rank[row] == ALL_RANKS]
        if rows:
            boxes = map(catalog.box, rows)
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]
            properties = TensorProperties(dtype=torch_dtype(info.dtype))
            described[key] = TensorStorageMetadata(properties, torch.Size(info.shape), chunks)
    return described


def _placed(tensors: Mapping[str, object], whole: Mapping[str, Any]) -> tuple[dict[Path, str], dict[Path, Any]]:
    """Path in a state dict -> key of the tensor that stands there, and path -> object."""
    keys: dict[Path, str] = {}
    values: dict[Path, Any] = {}
    for place, value in whole.items():
        for path, leaf in leaves(path_of(place), value):
            if not isinstance(leaf, Ref):
                values[path] = leaf
            elif leaf.key in tensors:
                keys[path] = leaf.key
    referred = set(keys.values())
    return keys | {path_of(key): key for key in tensors if key not in referred}, values


class _Entries(dict[str, STORAGE_TYPES]):
    """The metadata of a checkpoint by name; `everything` has further names that are found but not listed."""

    def __init__(self, listed: Mapping[str, STORAGE_TYPES], everything: Mapping[str, STORAGE_TYPES]) -> None:
        super().__init__(listed)
        self._everything = everything

    def __contains__(self, name: object) -> bool:
        return name in self._everything

    def __missing__(self, name: str) -> STORAGE_TYPES:
        return self._everything[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._everything.get(name, default)


class _Unreadable(dict[str, STORAGE_TYPES]):
    """The metadata of a checkpoint that cannot be read: raises the error that says why, whatever is asked."""

    def __init__(self, error: CkptdError) -> None:
        super().__init__()
        self._error = error

    def _raise(self, *_: object) -> NoReturn:
        raise self._error

    __contains__ = __getitem__ = __iter__ = __len__ = get = items = keys = values = _raise


class _Target(NamedTuple):
    """Where a part of a tensor goes: `box` of it into `tensor`, which has the sizes of the box."""

    info: TensorInfo
    box: Box
    tensor: torch.Tensor


class _Filling:
    """Reads boxes of tensors into targets. Constructing it checks that all fit, and writes nothing."""

    def __init__(
        self, catalog: Catalog, stored: StoredCheckpoint, targets: Sequence[_Target], *, cast: bool = False
    ) -> None:
        wants = [Want(t.info.key, str(dtype_name(t.tensor.dtype)), t.info.shape, t.box) for t in targets]
        self._catalog = catalog
        self._stored = stored
        self._targets = targets
        self._plan = plan_load(catalog, wants, rank=ALL_RANKS, cast=cast, what=stored.location)
        self._local = threading.local()

    def run(self, threads: int) -> None:
        """Reads; each chunk once."""
        groups = self._by_row()
        if threads == 1 or len(groups) < 2:
            for parts in groups:
                self._fill(parts)
            return
        pool = ThreadPoolExecutor(threads, "ckptd-load")
        try:
            for _ in pool.map(self._fill, groups):
                pass
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _by_row(self) -> list[list[int]]:
        """The parts of the plan, those of one chunk together, in the order in which chunks lie in the files."""
        row, catalog = self._plan.row, self._catalog
        order = np.lexsort((row, catalog.file_offset[row], catalog.file[row], catalog.writer[row]))
        cuts = np.flatnonzero(np.diff(row[order])) + 1
        return [parts.tolist() for parts in np.split(order, cuts) if len(parts)]

    def _fill(self, parts: Sequence[int]) -> None:
        """Reads one chunk and puts `parts` of it into their targets."""
        row = int(self._plan.row[parts[0]])
        chunk = self._catalog.box(row)
        dtype = torch_dtype(self._catalog.tensors[self._catalog.tensor[row]].dtype)
        if len(parts) == 1:
            box, target = self._part(parts[0], len(chunk.sizes))
            if box == chunk and target.is_cpu and target.is_contiguous() and target.dtype == dtype:
                self._stored.read(row, target.reshape(-1).view(torch.uint8).numpy().data)
                return
        staged = self._staging(int(self._catalog.raw[row]))
        self._stored.read(row, staged.numpy().data)
        whole = staged.view(dtype).reshape(chunk.sizes)
        for part in parts:
            box, target = self._part(part, len(chunk.sizes))
            target.copy_(part_of(whole, chunk, box))

    def _part(self, part: int, dimensions: int) -> tuple[Box, torch.Tensor]:
        """The box of a part, and the view of its target where it goes."""
        offsets, sizes = self._plan.offsets[part, :dimensions].tolist(), self._plan.sizes[part, :dimensions].tolist()
        box = Box(tuple(offsets), tuple(sizes))
        target = self._targets[int(self._plan.want[part])]
        return box, part_of(target.tensor, target.box, box)

    def _staging(self, size: int) -> torch.Tensor:
        """This thread's buffer."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.uint8)
        return buffer[:size]


def _target(contents: _Contents, item: ReadItem, given: torch.Tensor) -> _Target:
    """Where an item goes; raises MismatchError where what the planner gives cannot take it."""
    info = contents.info(item.storage_index.fqn)
    name = item.dest_index.fqn
    tensor = given.detach()
    if tuple(tensor.shape) != tuple(item.lengths):
        raise MismatchError(f"{name}: {list(item.lengths)} elements to read, room for {list(tensor.shape)} here")
    if dtype_name(tensor.dtype) is None:
        raise MismatchError(f"{name}: {info.dtype} in the checkpoint, {tensor.dtype} here")
    start = item.storage_index.offset or (0,) * len(info.shape)
    offsets = tuple(o + inside for o, inside in zip(start, item.storage_offsets, strict=True))
    return _Target(info, Box(offsets, tuple(item.lengths)), tensor)
