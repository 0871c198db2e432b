"""A checkpoint as other people's files: which of its tensors and objects, under which names, and streaming them out.

Owns selection and the stream of chunks: whole tensors in row-major order, in bounded memory (`operations.recut`), of
values that serve every rank. What is written appears under its name when all of it is there: it is made beside it and
renamed. Files for torch contain pickle, which only torch can spell; safetensors need neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import ConfigError, NotFoundError, StoreError
from ckptd.core.types import itemsize, split_key
from ckptd.format import objects as encoding
from ckptd.interop import dcp_files, safetensors, torch_files
from ckptd.interop.trees import join, references, without_references
from ckptd.operations.recut import DEFAULT_MEMORY, Assembler, Room, Slots
from ckptd.operations.reshard import Progress
from ckptd.plan.layout import Layout, Mesh
from ckptd.plan.recut import Unit, assembly_of, parts_of, placeable
from ckptd.tiers.store import StoredCheckpoint

DEFAULT_PREFIX = "model/"
DEFAULT_SHARD_BYTES = 5 * 1024**3

DEVICES = "_devices"
"""Last element of the paths of objects that say where tensors of a value were: of use to ckptd alone."""

PICKLE_NOTE = "contains pickle, as this format does: let nobody load it who does not trust its writer"


@dataclasses.dataclass
class Selection:
    """What is exported: tensors by the rest of their key, encoded objects by the rest of their path."""

    tensors: dict[str, TensorInfo]
    objects: dict[str, bytes]
    prefix: str

    @property
    def bytes(self) -> int:
        return sum(_bytes(info) for info in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and what was not: names with the reason."""

    location: str
    tensors: int
    objects: int
    bytes: int
    pickle: bool
    left_out: list[str]


def select(checkpoint: StoredCheckpoint, prefix: str = DEFAULT_PREFIX) -> Selection:
    """Tensors and objects whose names begin with `prefix` (a whole path element; empty: all). NotFoundError if there
    are no such tensors."""
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    infos = placeable(checkpoint.catalog())
    tensors = {info.key[len(prefix) :]: info for info in infos if info.key.startswith(prefix)}
    if not tensors:
        tops = sorted({info.key.split("/")[0] for info in infos})
        raise NotFoundError(f"{checkpoint.location}: no tensor under {prefix!r}; there is {', '.join(tops[:20])}")
    objects = {path[len(prefix) :]: value for path, value in checkpoint.objects().items() if path.startswith(prefix)}
    return Selection(dict(sorted(tensors.items())), objects, prefix)


def export(
    checkpoint: StoredCheckpoint,
    target: str,
    kind: str,
    *,
    prefix: str = DEFAULT_PREFIX,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Exported:
    """Writes a part of a checkpoint to `target`, which must not exist: a directory, for torch a file."""
    selection = select(checkpoint, prefix)
    stream = Stream(checkpoint, selection, Room.of(memory), progress)
    try:
        with _fresh(target) as place:
            left_out, objects = _WRITERS[kind](selection, stream, place, shard_bytes)
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from None
    return Exported(
        os.path.abspath(target), len(selection.tensors), objects, selection.bytes, kind != "safetensors", left_out
    )


class Stream:
    """The chunks of the selected tensors, tensor by tensor in the order of their keys, each in row-major order."""

    def __init__(
        self, checkpoint: StoredCheckpoint, selection: Selection, room: Room, progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._selection = selection
        self._room = room
        self._progress = progress

    def chunks(self) -> Iterator[tuple[str, Box, memoryview]]:
        """(name, box, bytes), the bytes good until the next is asked for. FormatError before the first if elements
        are missing; CorruptionError."""
        catalog = self._checkpoint.catalog()
        names = {info.key: name for name, info in self._selection.tensors.items()}
        mesh = Mesh.parse("")
        placed, _ = Layout(mesh).place(sorted(self._selection.tensors.values()))
        units = [Unit((one.info,), ALL_RANKS, (), one, None) for one in placed]
        slots = Slots(self._room.slot_bytes)
        done, total = 0, self._selection.bytes
        parts = list(parts_of(units, catalog, mesh))
        for part in parts:
            assembly_of(part, units, catalog, mesh, self._room.slot_bytes, self._checkpoint.location)
        for part in parts:
            assembly = assembly_of(part, units, catalog, mesh, self._room.slot_bytes, self._checkpoint.location)
            assembler = Assembler(assembly, catalog, self._checkpoint.read, slots)
            for row, data in _fetched(assembly.catalog, assembler, self._room.threads):
                key = assembly.catalog.tensors[assembly.catalog.tensor[row]].key
                yield names[key], assembly.catalog.box(row), data
                done += len(data)
                if self._progress is not None:
                    self._progress(done, total)


def _fetched(target: Catalog, assembler: Assembler, threads: int) -> Iterator[tuple[int, memoryview]]:
    """Every row of a part, in order, with its bytes; the next ones are fetched meanwhile."""

    def fetch(row: int, into: memoryview) -> memoryview:
        assembler.read(int(target.file_offset[row]), into)
        return into

    pending: deque[tuple[int, Future[memoryview]]] = deque()
    executor = ThreadPoolExecutor(threads, thread_name_prefix="ckptd-export")
    try:
        for row in target:
            if len(pending) > threads:
                first, future = pending.popleft()
                yield first, future.result()
            pending.append((row, executor.submit(fetch, row, memoryview(bytearray(int(target.raw[row]))))))
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _write_safetensors(selection: Selection, stream: Stream, place: str, shard_bytes: int) -> tuple[list[str], int]:
    tensors = _named(selection.tensors)
    shards = safetensors.plan_shards({name: selection.tensors[key] for name, key in tensors.items()}, shard_bytes)
    names = {key: name for name, key in tensors.items()}
    os.mkdir(place)
    with contextlib.ExitStack() as stack:
        where: dict[str, tuple[io.BufferedWriter, int]] = {}
        files = []
        for shard in shards:
            file = stack.enter_context(open(os.path.join(place, shard.name), "xb"))
            file.truncate(shard.size)
            file.write(shard.head)
            where |= {name: (file, offset) for name, offset in shard.offsets.items()}
            files.append(file)
        for key, _, data in stream.chunks():
            file, offset = where[names[key]]
            file.seek(offset)
            file.write(data)
            where[names[key]] = file, offset + len(data)
        for file in files:
            _sync(file)
    if len(shards) > 1:
        with open(os.path.join(place, "model" + safetensors.INDEX_SUFFIX), "xb") as file:
            file.write(safetensors.index_of(shards, {name: selection.tensors[key] for name, key in tensors.items()}))
            _sync(file)
    return [f"{path}: safetensors holds tensors only" for path in sorted(selection.objects)], 0


def _named(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Name with dots -> rest of the key; ConfigError where two would be called alike."""
    named: dict[str, str] = {}
    for key in tensors:
        name = ".".join(split_key(key))
        if named.setdefault(name, key) != key:
            raise ConfigError(f"{named[name]!r} and {key!r} would both be called {name!r}; export less, with --prefix")
    return named


def _write_dcp(selection: Selection, stream: Stream, place: str, shard_bytes: int) -> tuple[list[str], int]:
    os.mkdir(place)
    writer = dcp_files.DirectoryWriter(place, shard_bytes)
    values, left_out = _torch_values(selection)
    paths: dict[str, tuple[str | int, ...]] = {key: tuple(split_key(key)) for key in selection.tensors}
    leaves = [leaf for path, value in values.items() for leaf in _leaves(tuple(split_key(path)), value)]
    for path, value in leaves:
        if isinstance(value, encoding.Ref):
            paths[value.key.removeprefix(selection.prefix)] = path
        else:
            writer.object(path, value)
    for key, info in selection.tensors.items():
        writer.tensor(paths[key], info.dtype, info.shape)
    for key, box, data in stream.chunks():
        writer.chunk(paths[key], selection.tensors[key].dtype, box, data)
    writer.finish()
    for name in os.listdir(place):
        with open(os.path.join(place, name), "rb") as file:
            os.fsync(file.fileno())
    return left_out, len(leaves)


def _leaves(path: tuple[str | int, ...], value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The entries that DCP makes of a value: dicts are taken apart, and lists that hold dicts or tensors."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner)
    elif isinstance(value, list) and not _terminal(value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, index), inner)
    else:
        yield path, value


def _terminal(value: Any) -> bool:
    """Whether DCP stores it as one object."""
    if isinstance(value, list):
        return not any(isinstance(inner, encoding.Ref) or not _terminal(inner) for inner in value)
    return not isinstance(value, dict)


def _write_torch(selection: Selection, stream: Stream, place: str, shard_bytes: int) -> tuple[list[str], int]:
    values, left_out = _torch_values(selection)
    tensors = {key: torch_files.Placeholder(info.dtype, info.shape) for key, info in selection.tensors.items()}
    pickled = torch_files.pickle_value(join(tensors, values, selection.prefix))
    begun = None
    with torch_files.ArchiveWriter(place, pickled) as archive:
        for key, _, data in stream.chunks():
            if key != begun:
                archive.begin(tensors[key].record, _bytes(selection.tensors[key]))
                begun = key
            archive.write(data)
    with open(place, "rb") as file:
        os.fsync(file.fileno())
    return left_out, len(values)


def _torch_values(selection: Selection) -> tuple[dict[str, Any], list[str]]:
    """(path -> value as torch has it, what cannot be exported and why). References to tensors stay."""
    from ckptd.tensors.values import restore

    values: dict[str, Any] = {}
    left_out = []
    for path, data in sorted(selection.objects.items()):
        value = encoding.decode(data, restore=restore)
        lost = [key for key in references(value) if key.removeprefix(selection.prefix) not in selection.tensors]
        if split_key(path)[-1] == DEVICES:
            continue
        if lost:
            left_out.append(f"{path}: refers to {lost[0]!r}, which is not exported")
        elif (reason := _unloadable(without_references(value))) is not None:
            left_out.append(f"{path}: torch.load(weights_only=True) would refuse it: {reason}")
        else:
            values[path] = value
    return values, left_out


def _unloadable(value: Any) -> str | None:
    """Why torch would not load a value with weights_only=True; None if it does."""
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    try:
        torch.load(stream, weights_only=True)
    except Exception as error:
        return str(error).splitlines()[0]
    return None


@contextlib.contextmanager
def _fresh(target: str) -> Iterator[str]:
    """A place beside `target` that becomes it if the body succeeds. ConfigError if `target` is there."""
    path = os.path.abspath(target)
    if os.path.lexists(path):
        raise ConfigError(f"{target}: exists; choose another place, or remove it")
    place = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.ckptd-export")
    _discard(place)
    try:
        yield place
        os.rename(place, path)
    except BaseException:
        _discard(place)
        raise
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _discard(place: str) -> None:
    """Removes what an export that was ended has left."""
    if os.path.isdir(place) and not os.path.islink(place):
        shutil.rmtree(place)
    elif os.path.lexists(place):
        os.unlink(place)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * itemsize(info.dtype)


_Writer = Callable[[Selection, Stream, str, int], tuple[list[str], int]]
_WRITERS: dict[str, _Writer] = {"safetensors": _write_safetensors, "dcp": _write_dcp, "torch": _write_torch}
FORMATS = tuple(_WRITERS)
