"""A synchronous save: every rank writes its part of one checkpoint, rank 0 commits it.

Owns the order of a save, and reading chunks out of tensors. Each step is taken by all ranks together, so that a
failure of one is a failure of all with the same error, and nothing is committed:

1. propose   each rank says what it holds (pieces, digests of its objects); rank 0 opens the store, names the
             checkpoint and leaves a token, by which the others know that their path leads to the same store
2. checksum  every rank looks for the token, and computes the same plan, which is kept for a next save of the same
             layout, and the checksums of the chunks it captures; what several ranks hold alike is stored once
             (plan/share.py)
3. write     each rank writes its data and its part of the manifest
4. commit    rank 0 commits; only now does the checkpoint exist, and only after it an older one of that step is removed

Does not decide what the state is (state.py) nor what files look like (tiers/store).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from ckptd.core.box import Box, contiguous_strides
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.config import node_name
from ckptd.core.errors import CkptdError, ConfigError, NotFoundError
from ckptd.core.native import address_of, copy_boxes, crc32c
from ckptd.core.types import SnapshotId
from ckptd.plan.save import Piece, plan_key, plan_save
from ckptd.plan.share import OBJECTS_FILE, object_rows, share_objects, share_rows, with_aliases
from ckptd.tiers.store import CheckpointWriter, Part, Store
from ckptd.trainer.collective import Group
from ckptd.trainer.loading import default_threads
from ckptd.trainer.state import AppState
from ckptd.trainer.state_tensors import Source

_CRC = np.dtype("<u4")


class _Proposal(msgspec.Struct, array_like=True):
    """What a rank holds and was asked for; `name` and `job` are rank 0's word."""

    pieces: list[Piece]
    digests: dict[str, bytes]
    aliases: dict[str, str]
    step: int
    overwrite: bool
    name: SnapshotId | None = None
    job: str = ""


class _Checked(msgspec.Struct, array_like=True):
    """CRCs of a rank's per-rank chunks in plan order, and the shared objects that it has and rank 0 has not."""

    crc: bytes
    objects: dict[str, bytes]


class _Agreement:
    """What every rank concludes from the proposals: the same on each."""

    def __init__(self, proposals: Sequence[_Proposal]) -> None:
        asked = [(proposal.step, proposal.overwrite) for proposal in proposals]
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise ConfigError(
                    f"save: rank 0 asked for step={asked[0][0]}, overwrite={asked[0][1]}, rank {rank} for "
                    f"step={other[0]}, overwrite={other[1]}; every rank must ask for the same"
                )
        assert proposals[0].name is not None, "rank 0 names the checkpoint"
        self.name = proposals[0].name
        self.job = proposals[0].job
        self.digests = [proposal.digests for proposal in proposals]
        self.catalogs = _planned([proposal.pieces for proposal in proposals])
        self.shared, own = share_objects(self.digests)
        self.own = set(own)
        held = {piece.key for proposal in proposals for piece in proposal.pieces}
        self.aliases = {
            second: first
            for proposal in reversed(proposals)
            for second, first in proposal.aliases.items()
            if second not in held
        }


_last_plan: tuple[str, list[Catalog]] | None = None


def _planned(pieces: Sequence[Sequence[Piece]]) -> list[Catalog]:
    """The save plan; a job that saves one layout again and again plans once."""
    global _last_plan
    key = plan_key(pieces)
    if _last_plan is None or _last_plan[0] != key:
        _last_plan = key, plan_save(pieces)
    return _last_plan[1]


def save_state(
    state: MutableMapping[str, Any], path: str | Path, group: Group, *, step: int, overwrite: bool
) -> SnapshotId:
    """Writes and commits one checkpoint of `step` in the store at `path`; collective.

    Raises ConfigError, StoreError or CorruptionError, the same on every rank, with nothing committed.
    """
    return _Save(state, str(path), group, step, overwrite).run()


class _Save:
    """One save in progress on one rank."""

    def __init__(self, state: MutableMapping[str, Any], path: str, group: Group, step: int, overwrite: bool) -> None:
        self._state = state
        self._path = path
        self._group = group
        self._step = step
        self._overwrite = overwrite
        self._sources: list[Source] = []
        self._objects: dict[str, bytes] = {}
        self._store: Store | None = None
        self._writer: CheckpointWriter | None = None  # rank 0's, which removes what anybody wrote if a save fails
        self._token: str | None = None  # rank 0's, while it lies in the store

    def run(self) -> SnapshotId:
        try:
            proposals = self._group.together(self._propose)
            agreed = _Agreement([msgspec.msgpack.decode(data, type=_Proposal) for data in proposals])
            reader = SourceReader(self._sources)
            mine = agreed.catalogs[self._group.rank]
            checksums = np.zeros(len(mine), np.uint32)
            answers = self._group.together(lambda: self._check(agreed, reader, mine, checksums))
            checked = [msgspec.msgpack.decode(data, type=_Checked) for data in answers]
            part = _shared_part(agreed, checked, self._group.rank, checksums)
            written = self._group.together(lambda: self._write(agreed, reader, part))
            parts = [msgspec.msgpack.decode(data, type=Part) for data in written]
            objects = {path: value for answer in checked for path, value in answer.objects.items()}
            self._group.together(lambda: self._commit(agreed, parts, objects))
        except BaseException:
            self._abort()
            raise
        finally:
            self._remove_token()
        return agreed.name

    def _propose(self) -> bytes:
        if isinstance(self._step, bool) or not isinstance(self._step, int) or not 0 <= self._step < 10**18:
            raise ConfigError(f"save: step={self._step!r}; expected a number of completed steps, 0 or more")
        app = AppState(self._state)
        self._sources = app.sources()
        self._objects = app.objects()
        proposal = _Proposal(
            pieces_of(self._sources),
            {path: hashlib.blake2b(value, digest_size=16).digest() for path, value in self._objects.items()},
            app.aliases(),
            self._step,
            self._overwrite,
        )
        if self._group.rank == 0:
            self._store = Store.open(self._path, create=True)
            proposal.name = self._store.new_name(self._step, replace=self._overwrite)
            proposal.job = self._store.uri
            self._leave_token(self._store, proposal.name.epoch.nonce)
        return msgspec.msgpack.encode(proposal)

    def _leave_token(self, store: Store, nonce: str) -> None:
        """Leaves a token that the other ranks must find; proves that the store can be written and read."""
        self._token = nonce
        store.leave_token(nonce)

    def _remove_token(self) -> None:
        """It has no use any more; what cannot be removed does no harm."""
        if self._store is not None and self._token is not None:
            with contextlib.suppress(CkptdError, OSError):
                self._store.remove_token(self._token)
            self._token = None

    def _find(self, agreed: _Agreement) -> Store:
        """The store, if this rank's path leads to the one in which rank 0 left its token."""
        try:
            store = Store.open(self._path)
            if store.has_token(agreed.name.epoch.nonce):
                return store
        except NotFoundError:
            pass
        raise ConfigError(
            f"{self._path} on node {node_name()} is not the store that rank 0 opened ({agreed.job}); give a path that "
            "leads every rank to one shared store"
        )

    def _check(
        self, agreed: _Agreement, reader: SourceReader, mine: Catalog, checksums: npt.NDArray[np.uint32]
    ) -> bytes:
        """Fills in the checksums of this rank's chunks; what the others must know of them."""
        if self._store is None:
            self._store = self._find(agreed)
        checksums[:] = reader.checksums(mine)
        elsewhere = {
            path: self._objects[path]
            for path in agreed.shared
            if path not in agreed.digests[0] and _first_holder(agreed.digests, path) == self._group.rank
        }
        own = checksums[mine.rank != ALL_RANKS].astype(_CRC)
        if self._group.rank == 0:
            self._writer = self._store.writer(agreed.name, agreed.job)
        return msgspec.msgpack.encode(_Checked(own.tobytes(), elsewhere))

    def _write(self, agreed: _Agreement, reader: SourceReader, part: Catalog) -> bytes:
        rank = self._group.rank
        own = {(path, r): self._objects[path] for path, r in agreed.own if r == rank}
        rows, content = object_rows(own, writer=rank)
        catalog = Catalog.merge([with_aliases(part, agreed.aliases), rows])

        def read(row: int, into: memoryview) -> None:
            if catalog.file[row] == OBJECTS_FILE:
                start = int(catalog.file_offset[row])
                into[:] = content[start : start + len(into)]
                return
            key = catalog.tensors[catalog.tensor[row]].key
            reader.read(agreed.aliases.get(key, key), catalog.box(row), into)

        assert self._store is not None, "opened before checksums"
        writer = self._writer or self._store.writer(agreed.name, agreed.job, joined=True)
        return msgspec.msgpack.encode(writer.part(rank).write(catalog, read, threads=default_threads()))

    def _commit(self, agreed: _Agreement, parts: list[Part], objects: Mapping[str, bytes]) -> bytes:
        if self._store is not None and self._writer is not None:
            shared = {path: self._objects.get(path, objects.get(path, b"")) for path in agreed.shared}
            older = [name for name in self._store.checkpoints() if name.step == self._step]
            self._writer.commit(parts, shared)
            self._writer = None
            for name in older:
                self._store.remove(name)
        return b""

    def _abort(self) -> None:
        """Rank 0 removes what is written; the error that led here matters more than one of this."""
        if self._writer is not None:
            with contextlib.suppress(CkptdError, OSError):
                self._writer.abort()


def _first_holder(digests: Sequence[Mapping[str, bytes]], path: str) -> int:
    return next(rank for rank, values in enumerate(digests) if path in values)


def _shared_part(
    agreed: _Agreement, checked: Sequence[_Checked], rank: int, checksums: npt.NDArray[np.uint32]
) -> Catalog:
    """What `rank` writes of its chunks, with checksums, once what others hold alike is left out."""
    filled = []
    for writer, (catalog, answer) in enumerate(zip(agreed.catalogs, checked, strict=True)):
        crc = np.zeros(len(catalog), np.uint32)
        crc[catalog.rank != ALL_RANKS] = np.frombuffer(answer.crc, _CRC)
        filled.append(catalog.replaced(crc=checksums if writer == rank else crc))
    return share_rows(filled)[rank]


def pieces_of(sources: Sequence[Source]) -> list[Piece]:
    """What the save plan needs to know of sources."""
    return [Piece(s.key, s.dtype, s.shape, s.box.offsets, s.box.sizes, s.share.value) for s in sources]


class SourceReader:
    """Reads boxes of logical tensors out of the sources that hold them, as packed bytes, and their checksums.

    CPU tensors are read by address, others through a copy on the CPU. The tensors must not change meanwhile.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources: dict[str, list[Source]] = {}
        for source in sources:
            self._sources.setdefault(source.key, []).append(source)

    def read(self, key: str, box: Box, into: memoryview) -> None:
        """Fills `into` with the elements of `box`, row-major."""
        if not box.elements:
            return
        source = self._holder(key, box)
        if source.tensor.device.type != "cpu":
            into[:] = _on_cpu(source, box)
            return
        address, strides, width = _place(source, box)
        packed = [stride * width for stride in contiguous_strides(box.sizes)]
        _copy([address], [address_of(into)], [box.sizes], [strides], [packed], [width])

    def checksums(self, catalog: Catalog) -> npt.NDArray[np.uint32]:
        """The CRC32C of each chunk's raw bytes."""
        crc = np.zeros(len(catalog), np.uint32)
        rows, addresses, sizes, strides, widths = [], [], [], [], []
        dimensions = catalog.offsets.shape[1]
        for row in np.flatnonzero(catalog.raw).tolist():
            box = catalog.box(row)
            source = self._holder(catalog.tensors[catalog.tensor[row]].key, box)
            if source.tensor.device.type != "cpu":
                crc[row] = crc32c(_on_cpu(source, box))
                continue
            address, stride, width = _place(source, box)
            rows.append(row)
            addresses.append(address)
            sizes.append((*box.sizes, *(1,) * (dimensions - len(box.sizes))))
            strides.append((*stride, *(0,) * (dimensions - len(stride))))
            widths.append(width)
        if rows:
            crc[rows] = _copy(addresses, [0] * len(rows), sizes, strides, strides, widths, default_threads())
        return crc

    def _holder(self, key: str, box: Box) -> Source:
        """The source that holds all of `box`; the save plan takes chunks from pieces, so there is one."""
        sources = self._sources[key]
        return sources[0] if len(sources) == 1 else next(s for s in sources if s.box.intersect(box) == box)


def _place(source: Source, box: Box) -> tuple[int, tuple[int, ...], int]:
    """Address of a box's first element in a CPU tensor, its strides in bytes, and its bytes per element."""
    width = source.tensor.element_size()
    strides = tuple(stride * width for stride in source.tensor.stride())
    local = (o - first for o, first in zip(box.offsets, source.box.offsets, strict=True))
    return source.tensor.data_ptr() + sum(o * s for o, s in zip(local, strides, strict=True)), strides, width


def _on_cpu(source: Source, box: Box) -> memoryview:
    """The packed bytes of a box of a tensor that is not on the CPU."""
    local = zip(box.offsets, box.sizes, source.box.offsets, strict=True)
    part = source.tensor[tuple(slice(o - first, o - first + size) for o, size, first in local)]
    packed = torch.empty(box.sizes, dtype=part.dtype)
    packed.copy_(part)
    return packed.reshape(-1).view(torch.uint8).numpy().data


def _copy(
    sources: Sequence[int],
    targets: Sequence[int],
    sizes: Sequence[Sequence[int]],
    source_strides: Sequence[Sequence[int]],
    target_strides: Sequence[Sequence[int]],
    widths: Sequence[int],
    threads: int = 1,
) -> npt.NDArray[np.uint32]:
    """Copies boxes (a target of 0: only their checksums) and returns their CRCs."""
    count = len(sources)
    crc = np.zeros(count, np.uint32)

    def columns(values: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        return np.array(values, np.int64).reshape(count, -1)

    copy_boxes(
        np.array(sources, np.uint64),
        np.array(targets, np.uint64),
        columns(sizes),
        columns(source_strides),
        columns(target_strides),
        np.array(widths, np.int64),
        crc=crc,
        threads=threads,
    )
    return crc
