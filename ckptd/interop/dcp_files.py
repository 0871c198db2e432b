"""Directories of torch.distributed.checkpoint's FileSystemWriter: read without torch and without unpickling; written so
that torch.distributed.checkpoint.load reads them.

`.metadata` is a pickle of names, shapes, chunks and where they lie; `*.distcp` are payloads of torch.save, one after
another. Reading takes both as data (`pickles`): a chunk is a box of a tensor, whose bytes are found in the payload and
read by position. Entries are put back into the nesting that DCP flattened (`planner_data`), so their names are ckptd's.
Writing makes a payload of every chunk. What is written contains pickle by nature: whoever exports is told.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ckptd.core.box import Box
from ckptd.core.errors import ConfigError, FormatError
from ckptd.format.objects import DtypeValue
from ckptd.interop.pickles import METADATA_GLOBALS, Instance, Pairs, TensorView, read_pickle, sizes_of
from ckptd.interop.pieces import Files, ForeignFile, Piece, refuse_overlaps
from ckptd.interop.torch_files import piece_of, read_archive
from ckptd.interop.trees import MAX_DEPTH

METADATA = ".metadata"
MAX_LIST = 2**20

_FILE = re.compile(r"[^/\\\0]{1,255}")


class Place(NamedTuple):
    """Where a payload lies."""

    file: int
    offset: int
    size: int


@dataclasses.dataclass(eq=False)
class ChunkedTensor:
    """A tensor of the metadata: its chunks, and the payload of each."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[Box, Place]]


@dataclasses.dataclass(eq=False)
class InnerTensor:
    """A tensor inside a value that is not one, with the piece that it is, key apart."""

    piece: Piece


def is_dcp(path: str) -> bool:
    """Whether a path is such a directory."""
    return os.path.isfile(os.path.join(path, METADATA))


def read(path: str, files: Files, *, objects: bool) -> tuple[dict[str, Any], int]:
    """(the nested state dict, with `ChunkedTensor` and `InnerTensor` for tensors; bytes of the pickles that spell it).

    Without `objects`, tensors alone.
    """
    metadata_file = ForeignFile(os.path.join(path, METADATA))
    try:
        data = metadata_file.read(0, metadata_file.size)
    finally:
        metadata_file.close()
    metadata = _instance(read_pickle(data, METADATA_GLOBALS, metadata_file.path), "Metadata", metadata_file.path)
    try:
        reader = _Reader(path, metadata, files)
        return reader.tree(objects), len(data) + reader.pickle_bytes
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{metadata_file.path}: not metadata that can be read: {error}") from None


def is_tensor(value: Any) -> bool:
    """Whether a leaf of `read` is a tensor."""
    return isinstance(value, (ChunkedTensor, InnerTensor))


def pieces_of(key: str, tensor: Any, files: Files) -> Iterator[Piece]:
    """The pieces of a tensor of `read`, under its key. FormatError where a payload is not what the metadata says."""
    if isinstance(tensor, InnerTensor):
        yield tensor.piece._replace(key=key)
        return
    for box, place in tensor.chunks:
        what = f"{files[place.file].path}: chunk {list(box.offsets)} of {tensor.name!r}"
        archive = read_archive(files[place.file], place.offset, place.size, what)
        if not isinstance(archive.value, TensorView):
            raise FormatError(f"{what}: expected a tensor, found a {type(archive.value).__name__}")
        piece = piece_of(archive.value, key, archive, place.file, what)
        if (piece.dtype, piece.shape) != (tensor.dtype, box.sizes):
            raise FormatError(
                f"{what}: {METADATA} says {tensor.dtype} {list(box.sizes)}, found {piece.dtype} {list(piece.shape)}"
            )
        yield piece._replace(shape=tensor.shape, box=box)


class _Reader:
    """One directory, its metadata read."""

    def __init__(self, path: str, metadata: Instance, files: Files) -> None:
        self._path = path
        self._files = files
        self.pickle_bytes = 0
        self._entries = metadata.state["state_dict_metadata"]
        self._planner = metadata.state.get("planner_data")
        if not isinstance(self._entries, Pairs) or self._entries.others:
            raise FormatError(f"{path}: state_dict_metadata is no dict of names")
        self._places = self._find_places(metadata.state["storage_data"])

    def tree(self, objects: bool) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for name, entry in self._entries.items():
            if type(name) is not str:
                raise FormatError(f"{self._path}: an entry whose name is not text")
            if isinstance(entry, Instance) and entry.name == "TensorStorageMetadata":
                self._put(root, name, self._tensor(name, entry.state))
            elif isinstance(entry, Instance) and entry.name == "BytesStorageMetadata":
                if objects:
                    self._put(root, name, self._object(name))
            else:
                raise FormatError(f"{self._path}: {name!r} is neither a tensor nor an object")
        return {name: _without_gaps(value, self._path) for name, value in root.items()}

    def _tensor(self, name: str, state: Mapping[str, Any]) -> ChunkedTensor:
        properties = _instance(state["properties"], "TensorProperties", name)
        dtype, layout = properties.state["dtype"], properties.state.get("layout", "torch.strided")
        if not isinstance(dtype, DtypeValue) or layout != "torch.strided":
            raise FormatError(f"{self._path}: {name!r}: expected a dense tensor of a known dtype")
        shape = sizes_of(state["size"])
        chunks = []
        for chunk in state["chunks"]:
            found = _instance(chunk, "ChunkStorageMetadata", name).state
            box = Box(sizes_of(found["offsets"]), sizes_of(found["sizes"]))
            if not box.inside(shape):
                raise FormatError(f"{self._path}: {name!r}: {box} lies outside of shape {list(shape)}")
            chunks.append((box, self._place(name, box.offsets)))
        if not chunks:
            raise FormatError(f"{self._path}: {name!r}: has no chunks")
        return ChunkedTensor(name, dtype.name, shape, chunks)

    def _object(self, name: str) -> Any:
        place = self._place(name, None)
        what = f"{self._files[place.file].path}: object {name!r}"
        archive = read_archive(self._files[place.file], place.offset, place.size, what)

        self.pickle_bytes += archive.pickle_bytes
        made: dict[int, Any] = {}

        def inner(value: Any, depth: int) -> Any:
            """`value` with its tensors as pieces. What is used twice is made once, or it might unfold without end."""
            if depth > MAX_DEPTH:
                raise FormatError(f"{what}: nested more than {MAX_DEPTH} deep")
            if not isinstance(value, (TensorView, Pairs, list, tuple)):
                return value
            if id(value) not in made:
                made[id(value)] = convert(value, depth + 1)
            return made[id(value)]

        def convert(value: Any, depth: int) -> Any:
            if isinstance(value, TensorView):
                return InnerTensor(piece_of(value, name, archive, place.file, what))
            if isinstance(value, Pairs):
                pairs = type(value)()
                pairs.update((key, inner(item, depth)) for key, item in value.items())
                pairs.others = [(key, inner(item, depth)) for key, item in value.others]
                return pairs
            return type(value)(inner(item, depth) for item in value)

        return inner(archive.value, 0)

    def _find_places(self, stored: Any) -> dict[tuple[str, str], Place]:
        """(name, offsets as text) -> payload. Text, since its hash cannot be foreseen."""
        if not isinstance(stored, Pairs):
            raise FormatError(f"{self._path}: storage_data is no dict")
        places: dict[tuple[str, str], Place] = {}
        for index, info in stored.others:
            index, info = _instance(index, "MetadataIndex", self._path), _instance(info, "_StorageInfo", self._path)
            name, offset = index.state["fqn"], index.state.get("offset")
            file, start, size = (info.state[field] for field in ("relative_path", "offset", "length"))
            if type(name) is not str or type(start) is not int or type(size) is not int:
                raise FormatError(f"{self._path}: an entry of storage_data that is not named or not placed")
            if type(file) is not str or not _FILE.fullmatch(file) or file in (".", ".."):
                raise FormatError(
                    f"{self._path}: {name!r} lies in {str(file)[:80]!r}; expected a file of the directory"
                )
            if info.state.get("transform_descriptors"):
                raise FormatError(
                    f"{self._path}: {name!r} was transformed when it was written; only plain files are read"
                )
            number = self._files.add(os.path.join(self._path, file))
            self._files[number].check(start, size)
            places[name, _text(None if offset is None else sizes_of(offset))] = Place(number, start, size)
        refuse_overlaps(places.values(), self._files)
        return places

    def _place(self, name: str, offsets: tuple[int, ...] | None) -> Place:
        found = self._places.get((name, _text(offsets)))
        if found is None:
            raise FormatError(f"{self._path}: {name!r}: {METADATA} does not say where offsets {offsets} are stored")
        return found

    def _put(self, root: dict[str, Any], name: str, value: Any) -> None:
        """Puts an entry where it was before DCP flattened the state dict."""
        planned = self._planner.get(name) if isinstance(self._planner, Pairs) else None
        path = planned if isinstance(planned, tuple) and planned else (name,)
        if len(path) > MAX_DEPTH:
            raise FormatError(f"{self._path}: planner_data: {name!r} is nested more than {MAX_DEPTH} deep")
        container: Any = root
        for element, following in zip(path, (*path[1:], None), strict=True):
            if type(element) not in (int, str) or (type(element) is int and not 0 <= element < MAX_LIST):
                raise FormatError(f"{self._path}: planner_data: {name!r} lies at an impossible place")
            if isinstance(container, _List) != (type(element) is int) or not isinstance(container, dict):
                raise FormatError(f"{self._path}: planner_data: {name!r} lies inside of another entry")
            if following is None:
                if element in container:
                    raise FormatError(f"{self._path}: planner_data: two entries lie at the place of {name!r}")
                container[element] = value
            else:
                container = container.setdefault(element, _List() if type(following) is int else {})


class _List(dict[int, Any]):
    """A list that is being put together."""


def _without_gaps(value: Any, what: str) -> Any:
    """Lists in place of `_List`; what DCP makes no entry of, such as an empty dict, is one."""
    if isinstance(value, _List):
        if value and max(value) >= 16 * (len(value) + 16):
            raise FormatError(f"{what}: planner_data: a list of which most is missing")
        return [_without_gaps(value.get(i, {}), what) for i in range(max(value) + 1)]
    if type(value) is dict:
        return {key: _without_gaps(inner, what) for key, inner in value.items()}
    return value


def _text(offsets: tuple[int, ...] | None) -> str:
    return "-" if offsets is None else ",".join(map(str, offsets))


def _instance(value: Any, name: str, what: str) -> Instance:
    if not isinstance(value, Instance) or value.name != name:
        raise FormatError(f"{what}: expected a {name}, found a {getattr(value, 'name', type(value).__name__)}")
    return value


@dataclasses.dataclass
class DirectoryWriter:
    """Writes the payloads of a directory, and then its metadata."""

    path: str
    file_bytes: int = 5 * 1024**3

    def __post_init__(self) -> None:
        self._number = -1
        self._file: io.BufferedWriter | None = None
        self._stored: dict[Any, Any] = {}
        self._entries: dict[str, Any] = {}
        self._paths: dict[str, tuple[str | int, ...]] = {}

    def tensor(self, path: tuple[str | int, ...], dtype: str, shape: tuple[int, ...]) -> None:
        """Announces a tensor, whose chunks follow."""
        import torch
        from torch.distributed.checkpoint import metadata

        from ckptd.tensors.values import torch_dtype

        properties = metadata.TensorProperties(dtype=torch_dtype(dtype))
        self._add(path, metadata.TensorStorageMetadata(properties, torch.Size(shape), []))

    def chunk(self, path: tuple[str | int, ...], dtype: str, box: Box, data: memoryview) -> None:
        """Writes one chunk of an announced tensor."""
        import torch
        from torch.distributed.checkpoint import metadata

        from ckptd.tensors.values import torch_dtype

        name = name_of(path)
        flat = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
        payload = self._payload(flat.view(torch_dtype(dtype)).reshape(box.sizes))
        entry = self._entries[name]
        offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
        self._stored[metadata.MetadataIndex(name, offsets, len(entry.chunks))] = payload
        entry.chunks.append(metadata.ChunkStorageMetadata(offsets, sizes))

    def object(self, path: tuple[str | int, ...], value: Any) -> None:
        """Writes a value that is not a tensor."""
        from torch.distributed.checkpoint import metadata

        self._add(path, metadata.BytesStorageMetadata())
        self._stored[metadata.MetadataIndex(name_of(path))] = self._payload(value)

    def finish(self) -> None:
        """Writes the metadata, last."""
        import pickle

        from torch.distributed.checkpoint import metadata

        self._close()
        known = {field.name for field in dataclasses.fields(metadata.Metadata)}
        given: dict[str, Any] = {
            "state_dict_metadata": self._entries,
            "planner_data": self._paths,
            "storage_data": self._stored,
            "storage_meta": metadata.StorageMeta(),
            "version": "1.0.0",
        }
        made = metadata.Metadata(**{name: value for name, value in given.items() if name in known})
        with open(os.path.join(self.path, METADATA), "xb") as file:
            pickle.dump(made, file)

    def _add(self, path: tuple[str | int, ...], entry: Any) -> None:
        name = name_of(path)
        if name in self._entries:
            raise ConfigError(f"two entries would be called {name!r}; export less, with --prefix")
        self._entries[name] = entry
        self._paths[name] = path

    def _payload(self, value: Any) -> Any:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        stream = io.BytesIO()
        torch.save(value, stream)
        if self._file is None or self._file.tell() + stream.tell() > self.file_bytes:
            self._close()
            self._number += 1
            self._file = open(os.path.join(self.path, self._file_name()), "xb")  # noqa: SIM115
        start = self._file.tell()
        self._file.write(stream.getbuffer())
        return _StorageInfo(self._file_name(), start, stream.tell())

    def _file_name(self) -> str:
        return f"__0_{self._number}.distcp"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def name_of(path: tuple[str | int, ...]) -> str:
    """What DCP calls the entry at a path."""
    return ".".join(map(str, path))
