"""What ranks hold in common: which per-rank tensors and objects are stored once, and how a rank finds its own.

Owns one rule, used by a synchronous save and by the flush of a snapshot alike, and its inverse for loading:

- Tensors: the rows of the lowest rank that holds a key serve every rank (ALL_RANKS). Another rank's rows are dropped
  where all their checksums equal these, else they stay and override them for that rank.
- Objects: the value of the lowest rank that holds a path is in the shared table. Another rank's differing value is a
  uint8 tensor `objects/<path>@<rank>`. Objects under `rng/` are always per rank, the lowest one's too.

Own values mean something only to the same number of ranks. In another world every rank takes the shared ones, and the
generators of rank 0, with an object at ANOTHER_WORLD that says so: whoever sets generators derives one for each rank.

Where several nodes write one checkpoint, none knows what the ranks of the others hold. What is known beforehand
(`known_alone`) each writes for good; what depends on the others is written apart, equal values of a node's ranks once
(`tie_equal`), and what is then stored in vain is left out by who has heard of all (`share_stored`).

Groups of optimizers (`.../param_groups`) are found by the names in them: a rank gets all that differ, those of other
ranks at `<path>@<rank>`. Pure; values are bytes whose content is not looked into.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import FormatError
from ckptd.core.native import crc32c
from ckptd.plan.load import Want, plan_load
from ckptd.plan.save import place

OBJECTS_PREFIX = "objects/"
RNG_PREFIX = "rng/"

ANOTHER_WORLD = f"{RNG_PREFIX}another_world"
"""Path of the object that a rank of another world gets besides: a `Newcomer`."""

BY_NAME = "/param_groups"
"""Ends the paths of objects of which a rank gets every distinct value."""

OBJECTS_FILE = 1
"""`file` column of rows whose bytes are objects rather than tensors of the slot (file 0)."""

Read = Callable[[int, memoryview], None]
"""Fills a buffer with the raw bytes of a row of a catalog; called by several threads at once."""
View = Callable[[int, memoryview], memoryview]
"""The raw bytes of a row of a catalog, not verified: where they are, or copied to the buffer given, which is as long.
Called by several threads at once."""
Rows = npt.NDArray[np.int64]


class Newcomer(msgspec.Struct, array_like=True, frozen=True):
    """Rank `rank` of `world` ranks, which are not as many as saved; `differing` are the paths whose values were not the
    same on all of those (the global generators apart)."""

    rank: int
    world: int
    differing: list[str]


def share_objects(objects: Sequence[Mapping[str, bytes]]) -> tuple[dict[str, bytes], dict[tuple[str, int], bytes]]:
    """(shared, per rank) from each rank's path -> value. Values may as well be digests: only equality matters."""
    shared: dict[str, bytes] = {}
    own: dict[tuple[str, int], bytes] = {}
    for rank, values in enumerate(objects):
        for path, value in values.items():
            if path.startswith(RNG_PREFIX) or shared.setdefault(path, value) != value:
                own[path, rank] = value
    return shared, own


def share_rows(catalogs: Sequence[Catalog]) -> list[Catalog]:
    """The catalogs without the rows that need not be stored; those that serve every rank are marked ALL_RANKS.

    Rows for one rank (`rank` column) are compared by key and CRC, which must be filled in.
    """
    own = [_own_tensors(catalog) for catalog in catalogs]
    lowest = _lowest(own)
    shared = []
    for catalog, tensors in zip(catalogs, own, strict=True):
        kept = np.ones(len(catalog), bool)
        ranks = catalog.rank.copy()
        for (key, rank), (rows, checksums) in tensors.items():
            origin, expected = lowest[key]
            if rank == origin:
                ranks[rows] = ALL_RANKS
            elif checksums == expected:
                kept[rows] = False
        changed = catalog.replaced(rank=ranks)
        shared.append(changed if kept.all() else changed.select(np.flatnonzero(kept)))
    return shared


def holders(catalogs: Sequence[Catalog]) -> dict[str, list[tuple[int, Rows]]]:
    """Of each key that catalogs hold for one rank: the positions of those whose value is the one that `share_rows`
    marks ALL_RANKS, and its rows there, which in all of them are the same boxes in the same order."""
    own = [_own_tensors(catalog) for catalog in catalogs]
    lowest = _lowest(own)
    found: dict[str, list[tuple[int, Rows]]] = {key: [] for key in lowest}
    for position, tensors in enumerate(own):
        for (key, _), (rows, checksums) in tensors.items():
            if checksums == lowest[key][1]:
                found[key].append((position, rows))
    return found


def _lowest(own: Sequence[Mapping[tuple[str, int], tuple[Rows, bytes]]]) -> dict[str, tuple[int, bytes]]:
    """Of each key the lowest rank that holds it, and the checksums there."""
    lowest: dict[str, tuple[int, bytes]] = {}
    for tensors in own:
        for (key, rank), (_, checksums) in tensors.items():
            lowest[key] = min(lowest.get(key, (rank, checksums)), (rank, checksums))
    return lowest


def share_stored(catalogs: Sequence[Catalog]) -> list[Catalog]:
    """As `share_rows`, of rows that are stored already, one catalog for each writer: one that stores nothing that is
    needed becomes empty, and of others every place that is taken keeps a row."""
    found = []
    for stored, needed in zip(catalogs, share_rows(catalogs), strict=True):
        if len(needed):
            uncovered = np.flatnonzero((stored.raw > 0) & ~_among(_places(stored), _places(needed)))
            if len(uncovered):
                _, first = np.unique(_places(stored)[uncovered], axis=0, return_index=True)
                needed = Catalog.merge([needed, stored.select(np.sort(uncovered[first]))])
        found.append(needed)
    return found


def tie_equal(catalog: Catalog) -> Catalog:
    """The rows of ranks whose tensors equal those of the lowest rank here, at the places of that rank's."""
    columns = {name: getattr(catalog, name).copy() for name in ("writer", "file", "file_offset")}
    first: dict[tuple[str, bytes], Rows] = {}
    for (key, _), (rows, checksums) in _own_tensors(catalog).items():
        boxes = catalog.offsets[rows].tobytes() + catalog.sizes[rows].tobytes()
        origin = first.setdefault((key, checksums + boxes), rows)
        for column in columns.values():
            column[rows] = column[origin]
    return catalog.replaced(**columns)


def known_alone(
    objects: Mapping[int, Mapping[str, bytes]],
) -> tuple[dict[tuple[str, int], bytes], dict[int, dict[str, bytes]]]:
    """Objects by rank, apart: what is each rank's own whatever others hold, as in `share_objects`; and all else."""
    own = {(p, rank): v for rank, values in objects.items() for p, v in values.items() if p.startswith(RNG_PREFIX)}
    rest = {rank: {p: v for p, v in values.items() if (p, rank) not in own} for rank, values in objects.items()}
    return own, rest


def _places(catalog: Catalog) -> npt.NDArray[np.int64]:
    return np.stack([catalog.writer, catalog.file, catalog.file_offset], axis=1).astype(np.int64)


def _among(wanted: npt.NDArray[np.int64], known: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the wanted places are known."""
    _, number = np.unique(np.concatenate([known, wanted]), axis=0, return_inverse=True)
    number = number.reshape(-1)
    return np.isin(number[len(known) :], number[: len(known)])


def _own_tensors(catalog: Catalog) -> dict[tuple[str, int], tuple[Rows, bytes]]:
    """(key, rank) -> (rows, their CRCs as bytes) of the tensors that a catalog holds for one rank only."""
    rows = np.flatnonzero(catalog.rank != ALL_RANKS)
    rows = rows[np.lexsort((rows, catalog.rank[rows], catalog.tensor[rows]))]
    pairs = np.stack([catalog.tensor[rows], catalog.rank[rows]], axis=1)
    starts = np.flatnonzero((np.diff(pairs, axis=0, prepend=-2) != 0).any(axis=1))
    found = {}
    for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
        run = rows[start:stop]
        key, rank = catalog.tensors[catalog.tensor[run[0]]].key, int(catalog.rank[run[0]])
        found[key, rank] = run, catalog.crc[run].tobytes()
    return found


def with_aliases(catalog: Catalog, aliases: Mapping[str, str]) -> Catalog:
    """The catalog with rows under second keys of tied tensors (second key -> first key), at the same places."""
    parts = [catalog]
    for second, first in sorted(aliases.items()):
        if first not in catalog or second in catalog:
            continue
        part = catalog.select(np.asarray(catalog.rows(first)))
        info = part.tensors[0]
        parts.append(_renamed(part, TensorInfo(second, info.dtype, info.shape)))
    return Catalog.merge(parts) if len(parts) > 1 else catalog


def _renamed(catalog: Catalog, info: TensorInfo) -> Catalog:
    """A catalog of one tensor under another name."""
    columns = ("rank", "raw", "crc", "writer", "file", "file_offset", "stored", "codec")
    return Catalog.build(
        [info], catalog.tensor, catalog.offsets, catalog.sizes, **{name: getattr(catalog, name) for name in columns}
    )


def object_key(path: str, rank: int) -> str:
    """The key of one rank's own value of an object."""
    return f"{OBJECTS_PREFIX}{path}@{rank}"


def object_rows(values: Mapping[tuple[str, int], bytes], *, writer: int) -> tuple[Catalog, bytes]:
    """Rows for per-rank objects, to be merged into the catalog of the part that `writer` writes, and their bytes.

    A row whose `file` is OBJECTS_FILE has its bytes in the second value at `file_offset`.
    """
    infos: list[TensorInfo] = []
    chunks: list[tuple[int, Box, bytes]] = []
    for path, rank in sorted(values):
        info = TensorInfo(object_key(path, rank), "uint8", (len(values[path, rank]),))
        for box in cut(Box.whole(info.shape), 1):
            chunks.append((len(infos), box, values[path, rank][box.offsets[0] : box.offsets[0] + box.sizes[0]]))
        infos.append(info)
    offsets, total = place([len(data) for _, _, data in chunks])
    content = bytearray(total)
    for offset, (_, _, data) in zip(offsets.tolist(), chunks, strict=True):
        content[offset : offset + len(data)] = data
    count, width = len(chunks), int(bool(chunks))
    catalog = Catalog.build(
        infos,
        [tensor for tensor, _, _ in chunks],
        np.array([box.offsets for _, box, _ in chunks], np.int64).reshape(count, width),
        np.array([box.sizes for _, box, _ in chunks], np.int64).reshape(count, width),
        crc=[crc32c(data) for _, _, data in chunks],
        writer=np.full(count, writer),
        file=np.full(count, OBJECTS_FILE),
        file_offset=offsets,
    )
    return catalog, bytes(content)


def objects_for(
    rank: int,
    shared: Mapping[str, bytes],
    catalog: Catalog,
    read: Read,
    *,
    world: int | None = None,
    rng: bool = True,
) -> dict[str, bytes]:
    """Path -> value of every object as `rank` of `world` ranks (None: as many as were saved) sees it; without `rng`
    the global generators are left out, and not read."""
    values = dict(shared)
    owned = list(_own_objects(catalog))
    saved = saved_world(catalog)
    same_world = world is None or world == saved
    seen: set[tuple[str, bytes]] = set()
    for path, owner, key in owned:
        if path.startswith(RNG_PREFIX):
            if rng and owner == (rank if same_world else 0):
                values[path] = read_bytes(catalog, key, read)
            continue
        if owner == rank and same_world:
            values[path] = read_bytes(catalog, key, read)
        if path.endswith(BY_NAME):
            content = path, catalog.crc[list(catalog.rows(key))].tobytes()
            if content not in seen:
                values[f"{path}@{owner}"] = read_bytes(catalog, key, read)
            seen.add(content)
    if not same_world and saved:
        differing = sorted({path for path, _, _ in owned if not path.startswith(RNG_PREFIX)})
        values[ANOTHER_WORLD] = msgspec.msgpack.encode(Newcomer(rank, world or 0, differing))
    return values


def without_rank(path: str) -> str:
    """The path of an object of which `objects_for` gives other ranks' values too."""
    plain, _, rank = path.rpartition("@")
    return plain if rank.isdigit() and plain.endswith(BY_NAME) else path


def saved_world(catalog: Catalog) -> int:
    """How many ranks saved a checkpoint, as their generators' states tell; 0 where none are in it."""
    return max((rank + 1 for path, rank, _ in _own_objects(catalog) if path.startswith(RNG_PREFIX)), default=0)


def serving_rank(catalog: Catalog, rank: int, world: int) -> int:
    """Whose values of per-rank tensors `rank` of `world` ranks takes: its own, or in another world ALL_RANKS."""
    return rank if world == saved_world(catalog) else ALL_RANKS


def tensor_infos(catalog: Catalog) -> dict[str, TensorInfo]:
    """The tensors of the state, without those that hold per-rank objects."""
    return {info.key: info for info in catalog.tensors if not info.key.startswith(OBJECTS_PREFIX)}


def _own_objects(catalog: Catalog) -> Iterator[tuple[str, int, str]]:
    """(path, rank, key) of every per-rank object; FormatError for a key that is not one."""
    for info in catalog.tensors:
        if not info.key.startswith(OBJECTS_PREFIX):
            continue
        path, separator, rank = info.key[len(OBJECTS_PREFIX) :].rpartition("@")
        if not separator or not rank.isascii() or not rank.isdigit() or len(rank) > 9:
            raise FormatError(f"tensor {info.key!r}: expected {OBJECTS_PREFIX}<path>@<rank>")
        yield path, int(rank), info.key


def read_bytes(catalog: Catalog, key: str, read: Read) -> bytes:
    """The bytes of a one-dimensional uint8 tensor; MismatchError where it is not one or has gaps."""
    shape = catalog.info(key).shape
    plan = plan_load(catalog, [Want(key, "uint8", (sum(shape),), Box.whole((sum(shape),)))], rank=ALL_RANKS)
    content = bytearray(sum(shape))
    for row, offset, size in zip(plan.row.tolist(), plan.offsets[:, 0], plan.sizes[:, 0], strict=True):
        start = int(offset - catalog.offsets[row, 0])
        chunk = bytearray(int(catalog.raw[row]))
        read(row, memoryview(chunk))
        content[offset : offset + size] = chunk[start : start + size]
    return bytes(content)
