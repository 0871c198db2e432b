"""`StorageWriter`: dcp.save and dcp.async_save into a store of ckptd.

Owns one save at a time, in DCP's order: the coordinator names the checkpoint and creates it (prepare_global_plan),
every rank writes one part with the chunks of its items (write_data), the coordinator commits (finish). Invariants:
before `finish` has committed, no checkpoint exists, and nothing is removed; what a failed save leaves has no COMMIT,
and is removed when the coordinator saves again, drops the writer, or ends. No collectives of its own, so it works in
the thread and in the process of async_save; an instance that is not saving can be pickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ckptd.core.box import Box, cut
from ckptd.core.catalog import Catalog
from ckptd.core.config import node_name
from ckptd.core.errors import CkptdError, ConfigError, NotFoundError, StoreError
from ckptd.core.native import address_of, copy_bytes, crc32c
from ckptd.core.types import SnapshotId
from ckptd.dcp.names import Path, check_names, join_objects, key_of
from ckptd.dcp.options import checked_step, checked_threads
from ckptd.dcp.values import bytes_of, encode, encode_saved, part_of, usable
from ckptd.tensors.values import dtype_name
from ckptd.tiers.store import CheckpointWriter, Part, Store


class _Assignment(NamedTuple):
    """What the coordinator tells a rank: the checkpoint to write into, its job, and the rank's writer number."""

    id: SnapshotId
    job: str
    writer: int


class _Written(NamedTuple):
    """What a rank tells the coordinator of one item: where its entry stands, and of a tensor its (key, dtype, shape)
    and the part that holds it, of an object its encoded value."""

    id: SnapshotId
    path: Path
    tensor: tuple[str, str, tuple[int, ...]] | None
    part: Part | None
    value: bytes


class StorageWriter(storage.StorageWriter):
    """Writes a checkpoint of `step` into the store at `path`, a directory or URI that all ranks share.

    `path`: other checkpoints in it stay; `checkpoint_id` of dcp.save replaces it. `step`: completed steps that the
    state stands for, 0 if not given; set the attribute before a save to use one writer for many. `thread_count`:
    threads that encode chunks on each rank, by default one per core. `overwrite`: a checkpoint of this step is
    replaced, after the new one is committed; False makes it a StoreError.

    Errors are in the `failures` of DCP's CheckpointException; if a save raises, nothing was committed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        thread_count: int | None = None,
        overwrite: bool = True,
    ) -> None:
        super().__init__()
        self.path = path
        self.step = checked_step(step)
        self.thread_count = checked_threads(thread_count)
        self.overwrite = overwrite
        self._save_id = secrets.token_hex(8)
        self._attempt: _Attempt | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attempt": None}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path; DCP logs it."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can be the path of a store."""
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta:
        """What DCP's planner may know of the place."""
        return StorageMeta(checkpoint_id=self.path, save_id=self._save_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another save, to `checkpoint_id` if given."""
        if checkpoint_id:
            self.path = checkpoint_id
        self._save_id = secrets.token_hex(8)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begins a save on this rank, and removes what an earlier one that failed has left."""
        self._drop_attempt()
        if not kwargs.get("use_collectives", True):
            raise ConfigError("use_collectives=False: the ranks write one checkpoint together; leave it True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Checks what can be checked before anything is written."""
        if not getattr(plan, "usable", True):
            raise _caching()
        paths = _paths(plan)
        objects = {item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO}
        check_names(
            [_path(paths, item.index) for item in plan.items if item.index.fqn not in objects],
            [_path(paths, item.index) for item in plan.items if item.index.fqn in objects],
        )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Names and creates the checkpoint, and tells each rank."""
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise _caching()
        self._attempt = _Attempt(self, checked_step(self.step) or 0)
        name, job = self._attempt.id, self._attempt.store.uri
        return [replace(plan, storage_data=_Assignment(name, job, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's part: the data files and manifest of its tensors. Returns when they are durable."""
        if getattr(planner, "_enable_plan_caching", False):
            raise _caching()
        if not isinstance(plan.storage_data, _Assignment):
            raise ConfigError("the planner dropped storage_data from the plan; finish_plan must keep it")
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, plan.storage_data, planner))
        return future

    def _write(self, plan: SavePlan, assigned: _Assignment, planner: SavePlanner) -> list[WriteResult]:
        paths = _paths(plan)
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        results = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                value = _encoded(planner, item)
                written = _Written(assigned.id, _path(paths, item.index), None, None, value)
                results.append(WriteResult(item.index, len(value), written))
        chunks = _Chunks(tensors, [key_of(_path(paths, item.index)) for item in tensors], planner, self.thread_count)
        part = self._write_part(chunks, assigned) if len(chunks.catalog) else None
        for number, item in enumerate(tensors):
            written = _Written(assigned.id, _path(paths, item.index), chunks.infos[number], part, b"")
            results.append(WriteResult(item.index, chunks.sizes[number], written))
        return results

    def _write_part(self, chunks: _Chunks, assigned: _Assignment) -> Part:
        writer = self._joined(assigned) if self._attempt is None else self._attempt.writer
        return writer.part(assigned.writer).write(chunks.catalog, chunks.read, threads=self.thread_count)

    def _joined(self, assigned: _Assignment) -> CheckpointWriter:
        """The checkpoint that the coordinator has created, if this rank's path leads there."""
        found = True
        try:
            store = Store.open(self.path)
            found = store.has_token(assigned.id.epoch.nonce)
        except NotFoundError:
            found = False
        if not found:
            raise ConfigError(
                f"{self.path} on node {node_name()} is not the store that the coordinator opened ({assigned.job}); "
                "give a path that leads every rank to one shared store"
            )
        return store.writer(assigned.id, assigned.job, joined=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits; only now does the checkpoint exist. Then removes an older one of this step."""
        attempt = self._attempt
        if attempt is None:
            raise ConfigError("finish: this writer is not the coordinator of a save in progress")
        try:
            attempt.commit([result for rank in results for result in rank])
        finally:
            self._drop_attempt()
        metadata.storage_meta = self.storage_meta()

    def _drop_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None


class _Attempt:
    """The coordinator's side of one save: a directory that becomes a checkpoint or goes away, at the latest with
    `owner` or the process. While it lasts, a token in the store lets other ranks know that theirs is the same."""

    def __init__(self, owner: StorageWriter, step: int) -> None:
        self.store = Store.open(owner.path, create=True)
        self.id = self.store.new_name(step, replace=owner.overwrite)
        self.writer = self.store.writer(self.id, self.store.uri)
        self._removal = weakref.finalize(owner, _clean, self.store, self.writer, os.getpid())
        try:
            self.store.leave_token(self.id.epoch.nonce)
        except BaseException:
            self.close()
            raise

    def commit(self, results: Sequence[WriteResult]) -> None:
        """Commits what the ranks have written, if it fits together."""
        tensors: dict[Path, tuple[str, str, tuple[int, ...]]] = {}
        values: dict[Path, bytes] = {}
        parts: dict[int, Part] = {}
        paths: dict[str, Path] = {}
        for result in results:
            written = result.storage_data
            if not isinstance(written, _Written) or written.id != self.id:
                raise StoreError(f"{result.index.fqn}: was not written by this save, which is of {self.id}")
            if paths.setdefault(result.index.fqn, written.path) != written.path:
                raise ConfigError(
                    f"{result.index.fqn}: is {written.path} on one rank and {paths[result.index.fqn]} on another; "
                    "build the state dict alike on every rank"
                )
            if written.tensor is None:
                values[written.path] = written.value
            elif tensors.setdefault(written.path, written.tensor) != written.tensor:
                known = tensors[written.path]
                raise ConfigError(f"{result.index.fqn}: is {written.tensor[1:]} on one rank, {known[1:]} on another")
            if written.part is not None:
                parts[written.part.writer] = written.part
        older = [name for name in self.store.checkpoints() if name.step == self.id.step]
        self.writer.commit(list(parts.values()), join_objects(tensors, values))
        for name in older:
            try:
                self.store.remove(name)
            except CkptdError as error:  # the save has succeeded all the same
                warnings.warn(f"{name} is replaced by {self.id}, but could not be removed: {error}", stacklevel=2)

    def close(self) -> None:
        """Removes the token, and the directory unless it was committed, now."""
        self._removal()


def _clean(store: Store, writer: CheckpointWriter, process: int) -> None:
    """What is left of a save goes, but for a checkpoint. A forked child has copies of these, but no say."""
    if os.getpid() != process:
        return
    for remove in (writer.abort, lambda: store.remove_token(writer.id.epoch.nonce)):
        with contextlib.suppress(CkptdError, OSError):
            remove()


class _Chunks:
    """The tensors of a rank's items, cut into chunks: a catalog with checksums, whose rows are read from the planner.

    `infos` and `sizes` are (key, dtype, shape) and bytes per item. A tensor is asked for twice, for checksums and for
    writing, and is not kept between: planners may make them anew each time.
    """

    def __init__(self, items: Sequence[WriteItem], keys: Sequence[str], planner: SavePlanner, threads: int) -> None:
        self._items = items
        self._planner = planner
        self._lock = threading.Lock()
        self._held: dict[int, torch.Tensor] = {}
        self.infos: list[tuple[str, str, tuple[int, ...]]] = []
        self.sizes: list[int] = []
        self._boxes: list[Box] = []
        self._item: list[int] = []
        checksums: list[int] = []
        with ThreadPoolExecutor(threads, "ckptd-checksum") as pool:
            for number, (item, key) in enumerate(zip(items, keys, strict=True)):
                tensor, box, shape = self._resolve(number), _box(item), _shape(item)
                self.infos.append((key, str(dtype_name(tensor.dtype)), shape))
                self.sizes.append(tensor.numel() * tensor.itemsize)
                if not box.elements and 0 not in shape:
                    continue  # an empty shard of a tensor that others hold
                boxes = list(cut(box, tensor.itemsize))
                self._boxes += boxes
                self._item += [number] * len(boxes)
                checksums += pool.map(lambda b, t=tensor, o=box: crc32c(bytes_of(part_of(t, o, b))), boxes)
        self._left = np.bincount(np.array(self._item, np.int64), minlength=len(items)).tolist()
        self.catalog = self._catalog(checksums)
        self._row = self.catalog.file_offset.tolist()

    def _catalog(self, checksums: list[int]) -> Catalog:
        """`file_offset` is the position of the chunk in the lists, which no two rows share."""
        held = [self.infos[number] for number in self._item]
        index = {info[0]: i for i, info in enumerate(dict.fromkeys(held))}
        width = max((len(shape) for _, _, shape in held), default=0)
        offsets = np.zeros((len(held), width), np.int64)
        sizes = np.ones((len(held), width), np.int64)
        for row, box in enumerate(self._boxes):
            offsets[row, : len(box.offsets)] = box.offsets
            sizes[row, : len(box.sizes)] = box.sizes
        tensor = [index[key] for key, _, _ in held]
        return Catalog.build(
            dict.fromkeys(held), tensor, offsets, sizes, crc=checksums, file_offset=np.arange(len(held))
        )

    def read(self, row: int, into: memoryview) -> None:
        """Fills `into` with the bytes of one row; each row is read once."""
        number = self._item[self._row[row]]
        with self._lock:
            tensor = self._held.get(number)
            if tensor is None:
                tensor = self._held[number] = self._resolve(number)
            self._left[number] -= 1
            if not self._left[number]:
                del self._held[number]
        data = bytes_of(part_of(tensor, _box(self._items[number]), self._boxes[self._row[row]]))
        copy_bytes(address_of(data), into, False)

    def _resolve(self, number: int) -> torch.Tensor:
        item = self._items[number]
        tensor = usable(self._planner.resolve_data(item), item.index.fqn)
        if tuple(tensor.shape) != _box(item).sizes:
            raise ConfigError(
                f"{item.index.fqn}: the planner gives shape {tuple(tensor.shape)} for a shard of {_box(item).sizes}"
            )
        return tensor


def _box(item: WriteItem) -> Box:
    """The part of its tensor that an item is."""
    assert item.tensor_data is not None, "an item of a tensor"
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _shape(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None, "an item of a tensor"
    return tuple(item.tensor_data.size)


def _paths(plan: SavePlan) -> dict[str, Path]:
    """DCP's name -> path of every entry of the state dict, where the planner has flattened it."""
    return plan.planner_data if isinstance(plan.planner_data, dict) else {}


def _path(paths: dict[str, Path], index: MetadataIndex) -> Path:
    return tuple(paths.get(index.fqn, (index.fqn,)))


def _encoded(planner: SavePlanner, item: WriteItem) -> bytes:
    """The encoded object of an item: from the planner's own lookup, else from the file that it makes of it."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is not None:
        return encode(lookup(item.index), item.index.fqn)
    return encode_saved(planner.resolve_data(item), item.index.fqn)


def _caching() -> ConfigError:
    return ConfigError(
        "the planner reuses plans of an earlier save (enable_plan_caching=True), which name the checkpoint of that "
        "save; use a planner without plan caching"
    )
