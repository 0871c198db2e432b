"""Hostile and damaged checkpoints: each gives an error that names the thing, before anything large is allocated.

One builder per hostile file. Builders get a sound checkpoint, change it, and reseal COMMIT, so that what they plant is
reached: checksums stop accidents, not intent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CkptdError, CorruptionError, FormatError, NotFoundError, VersionError
from ckptd.format import manifest, objects
from ckptd.format.parquet_profile import ROW_GROUP_ROWS
from ckptd.tiers.store import Store, StoredCheckpoint, open_checkpoint
from ckptd.tiers.store.names import checkpoint
from tests.store.samples import identity, tensors, write

NAME = identity(7)
MOST_MEMORY = 96 * 1024 * 1024
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """The directory of a sound checkpoint."""
    store = Store.open(tmp_path / "store", create=True)
    write(store, NAME, tensors())
    return tmp_path / "store" / checkpoint(NAME)


def load(directory: Path) -> None:
    """Everything a loader does."""
    with StoredCheckpoint(Store.open(directory.parent).back_end, directory.name) as stored:
        for encoded in stored.objects().values():
            objects.decode(encoded)
        catalog = stored.catalog()
        for row in catalog:
            stored.read(row, memoryview(bytearray(int(catalog.raw[row]))))


def part_path(directory: Path) -> Path:
    return directory / "manifest.parquet" / "w00000.parquet"


def data_path(directory: Path) -> Path:
    return directory / "data" / "w00000-00000.ckd"


def reseal(directory: Path, **changes: Any) -> None:
    """Rewrites COMMIT so that it agrees with the files as they are now, and with `changes`."""
    members = json.loads((directory / "COMMIT").read_bytes())
    del members["sha256"]
    for listed, path in (
        (members["parts"][0], part_path(directory)),
        (members["objects"], directory / "objects.msgpack"),
    ):
        listed["size"] = path.stat().st_size
        listed["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    members["parts"][0]["data"] = [data_path(directory).stat().st_size]
    for name, value in changes.items():
        where = members["parts"][0] if name in members["parts"][0] else members
        where[name] = value
    seal(directory, members)


def seal(directory: Path, members: dict[str, Any]) -> None:
    body = json.dumps(members, separators=(",", ":")).encode()[:-1]
    (directory / "COMMIT").write_bytes(body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')


Builder = Callable[[Path], None]


def rewritten(directory: Path, change: Callable[[dict[str, list[Any]]], None], **writing: Any) -> None:
    """The manifest with its columns changed, written as `manifest` writes it unless `writing` says otherwise."""
    columns = pq.read_table(part_path(directory)).to_pydict()
    change(columns)
    replace_manifest(directory, columns, **writing)


def replace_manifest(directory: Path, columns: dict[str, Any], **writing: Any) -> None:
    rows = len(columns["key"])
    schema = writing.pop("schema", manifest._SCHEMA)
    options: dict[str, Any] = {
        "compression": dict.fromkeys([*manifest._ENCODED, *manifest._NUMBERS], "zstd") | {"crc32c": "none"},
        "use_dictionary": manifest._ENCODED,
        "column_encoding": {"crc32c": "PLAIN"},
        "store_schema": False,
        "write_statistics": False,
        "row_group_size": ROW_GROUP_ROWS,
    }
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), part_path(directory), **(options | writing))
    reseal(directory, rows=rows)


def setting(column: str, row: int, value: Any) -> Builder:
    def build(directory: Path) -> None:
        rewritten(directory, lambda columns: columns[column].__setitem__(row, value))

    return build


def first_filled(columns: dict[str, list[Any]]) -> int:
    return next(i for i, raw in enumerate(columns["raw"]) if raw)


def overlap(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["file_offset"][-1] -= 64

    rewritten(directory, change)


def gap(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        for i, raw in enumerate(columns["raw"]):
            if raw and i >= 3:
                columns["file_offset"][i] += 64

    with data_path(directory).open("ab") as file:
        file.write(bytes(64))
    rewritten(directory, change)


def bytes_after_the_last_chunk(directory: Path) -> None:
    with data_path(directory).open("ab") as file:
        file.write(b"x")
    reseal(directory)


def duplicated_tensor(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        for values in columns.values():
            values.append(values[0])

    rewritten(directory, change)


def tie_that_differs(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["file_offset"][3] = columns["file_offset"][2]

    rewritten(directory, change)


def chunk_of_a_terabyte(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        i = first_filled(columns)
        columns["shape"][i] = columns["sizes"][i] = [2**38]
        columns["offsets"][i] = [0]
        columns["raw"][i] = 2**40

    rewritten(directory, change)


def sizes_whose_product_wraps_around(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["key"].append("zz")
        columns["dtype"].append("uint8")
        columns["shape"].append([2**32, 2**32])
        columns["sizes"].append([2**32, 2**32])
        columns["offsets"].append([0, 0])
        columns["rank"].append(None)
        for name in ("writer", "file", "file_offset", "stored", "raw", "codec", "crc32c"):
            columns[name].append(0)

    rewritten(directory, change)


def shape_of_an_exabyte(directory: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["shape"] = [[2**40, 2**40] if len(shape) == 2 and shape[0] else shape for shape in columns["shape"]]

    rewritten(directory, change)


def offset_that_wraps_around(directory: Path) -> None:
    setting("file_offset", 1, 2**63 - 32)(directory)


def keys_of_a_megabyte(directory: Path) -> None:
    """Each key shares almost all of its bytes with the one before: delta encoding folds them into nothing."""
    rows = 300
    one = {name: values[1:2] for name, values in pq.read_table(part_path(directory)).to_pydict().items()}
    columns = {name: values * rows for name, values in one.items()}
    columns["key"] = ["k" * 100_000 + f"{i:06d}" for i in range(rows)]
    replace_manifest(
        directory,
        columns,
        use_dictionary=False,
        column_encoding={"key": "DELTA_BYTE_ARRAY", "crc32c": "PLAIN"},
    )


def page_that_unfolds(directory: Path) -> None:
    """One key of 32 MB, all the same letter: a few kilobytes of zstd."""
    rewritten(directory, lambda columns: columns["key"].__setitem__(-1, "z" * 2**25))


def keys_that_unfold_together(directory: Path) -> None:
    rows = 12_000
    one = {name: values[1:2] for name, values in pq.read_table(part_path(directory)).to_pydict().items()}
    columns = {name: values * rows for name, values in one.items()}
    columns["key"] = [f"{i:06d}" + "k" * 9000 for i in range(rows)]
    replace_manifest(directory, columns, use_dictionary=False, column_encoding={"crc32c": "PLAIN"})


def rows_without_bytes(directory: Path) -> None:
    """Many equal rows in a few kilobytes of dictionary and run lengths, crc32c included."""
    rows = 300_000
    one = pq.read_table(part_path(directory)).slice(0, 1)
    columns = {
        name: pa.chunked_array([column.chunk(0)] * 1)
        for name, column in zip(one.column_names, one.columns, strict=True)
    }
    table = pa.table({name: column.take(pa.array(np.zeros(rows, np.int64))) for name, column in columns.items()})
    sink = io.BytesIO()
    pq.write_table(
        table.cast(manifest._SCHEMA), sink, compression="zstd", store_schema=False, row_group_size=ROW_GROUP_ROWS
    )
    part_path(directory).write_bytes(sink.getvalue())
    reseal(directory, rows=rows)


def more_rows_than_commit_says(directory: Path) -> None:
    reseal(directory, rows=1)


def more_rows_than_anyone_has(directory: Path) -> None:
    reseal(directory, rows=2**40)


def another_schema(directory: Path) -> None:
    table = pq.read_table(part_path(directory))
    pq.write_table(table.drop_columns(["crc32c"]), part_path(directory), store_schema=False)
    reseal(directory)


def arrow_schema_inside(directory: Path) -> None:
    rewritten(directory, lambda columns: None, store_schema=True)


def footer_that_lies(directory: Path) -> None:
    data = bytearray(part_path(directory).read_bytes())
    data[-8:-4] = (2**31 - 1).to_bytes(4, "little")
    part_path(directory).write_bytes(data)
    reseal(directory)


def zstd_bomb(directory: Path) -> None:
    """A frame of a few KB that declares 64 MB, in place of a compressed chunk."""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(2**26))
    replace_chunk(directory, bomb)


def zstd_that_declares_too_little(directory: Path) -> None:
    columns = pq.read_table(part_path(directory)).to_pydict()
    row = next(i for i, codec in enumerate(columns["codec"]) if codec == 1)
    long = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(columns["raw"][row] + 1))
    replace_chunk(directory, long)


def replace_chunk(directory: Path, stored: bytes) -> None:
    """Puts `stored` where a zstd chunk is, as far as it fits, and says that it is all there."""
    columns = pq.read_table(part_path(directory)).to_pydict()
    row = next(i for i, codec in enumerate(columns["codec"]) if codec == 1)
    start, size = columns["file_offset"][row], columns["stored"][row]
    data = bytearray(data_path(directory).read_bytes())
    data[start : start + size] = stored[:size].ljust(size, b"\0")
    data_path(directory).write_bytes(data)


def nested_objects(directory: Path) -> None:
    (directory / "objects.msgpack").write_bytes(b"\x81\xa1x" + b"\x91" * 10_000_000 + b"\xc0")
    reseal(directory)


def nested_extensions(directory: Path) -> None:
    value = b"\x90"
    for _ in range(200):
        value = b"\x91\xc9" + len(value).to_bytes(4, "big") + b"\x01" + value
    (directory / "objects.msgpack").write_bytes(b"\x81\xa1x" + value)
    reseal(directory)


def array_of_four_billion(directory: Path) -> None:
    (directory / "objects.msgpack").write_bytes(b"\x81\xa1x\xc7\x05\x01\xdd\xff\xff\xff\xff")
    reseal(directory)


def objects_that_are_a_list(directory: Path) -> None:
    (directory / "objects.msgpack").write_bytes(b"\x90")
    reseal(directory)


def pickled_object(directory: Path) -> None:
    (directory / "objects.msgpack").write_bytes(b"\x81\xa1x\xc7\x03\x7fabc")
    reseal(directory)


def nested_commit(directory: Path) -> None:
    (directory / "COMMIT").write_bytes(b'{"format":' + b"[" * 1_000_000)


def path_in_commit(directory: Path) -> None:
    members = json.loads((directory / "COMMIT").read_bytes())
    del members["sha256"]
    members["parts"][0]["file"] = "../../../etc/passwd"
    seal(directory, members)


def writer_that_is_a_path(directory: Path) -> None:
    reseal(directory, writer="../0")


def negative_length(directory: Path) -> None:
    reseal(directory, data=[-1])


def parts_twice(directory: Path) -> None:
    members = json.loads((directory / "COMMIT").read_bytes())
    del members["sha256"]
    members["parts"] *= 2
    seal(directory, members)


def commit_of_another_step(directory: Path) -> None:
    reseal(directory, step=8)


def epoch_out_of_range(directory: Path) -> None:
    reseal(directory, epoch=[1, "../../../../../../"])


def linked_data(directory: Path) -> None:
    data = data_path(directory)
    data.rename(directory.parent / "elsewhere")
    data.symlink_to(directory.parent / "elsewhere")


def linked_directory(directory: Path) -> None:
    (directory / "data").rename(directory.parent / "elsewhere")
    (directory / "data").symlink_to(directory.parent / "elsewhere")


def linked_commit(directory: Path) -> None:
    (directory / "COMMIT").rename(directory.parent / "elsewhere")
    (directory / "COMMIT").symlink_to(directory.parent / "elsewhere")


def data_is_a_pipe(directory: Path) -> None:
    data_path(directory).unlink()
    os.mkfifo(data_path(directory))


ATTACKS: dict[Builder, str] = {
    overlap: "overlaps",
    gap: "leaves a gap",
    bytes_after_the_last_chunk: "chunks end at",
    duplicated_tensor: "comes after",
    tie_that_differs: "shares its place",
    chunk_of_a_terabyte: "at most 16777216 bytes",
    sizes_whose_product_wraps_around: "is not a shape",
    shape_of_an_exabyte: "is not a shape",
    offset_that_wraps_around: "out of range",
    keys_of_a_megabyte: "not allowed",
    page_that_unfolds: "page of",
    keys_that_unfold_together: "unfold to more",
    rows_without_bytes: "at least 4 bytes a row",
    more_rows_than_commit_says: "expected 1 rows",
    more_rows_than_anyone_has: "COMMIT",
    another_schema: "not those of a manifest",
    arrow_schema_inside: "key-value metadata",
    footer_that_lies: "not a Parquet file",
    zstd_bomb: "its header says 67108864",
    zstd_that_declares_too_little: "zstd frame",
    nested_objects: "not a map|nested",
    nested_extensions: "nested more than 64",
    array_of_four_billion: "4294967295 items announced",
    objects_that_are_a_list: "not a map",
    pickled_object: "extension 127 is unknown",
    nested_commit: "not JSON",
    path_in_commit: "unknown field `file`",
    writer_that_is_a_path: "Expected `int`",
    negative_length: ">= 0",
    parts_twice: "rising writer",
    commit_of_another_step: "renamed",
    epoch_out_of_range: "out of range",
    linked_data: "links and special files",
    linked_directory: "links and special files",
    linked_commit: "links and special files",
    data_is_a_pipe: "regular file",
    setting("key", 0, ""): "a key of 0 bytes",
    setting("dtype", 0, "float33"): "float33",
    setting("offsets", 1, [1]): "outside shape",
    setting("offsets", 1, [-1]): "outside shape",
    setting("offsets", 1, [0, 0]): "differ in length",
    setting("sizes", 1, [2**62]): "at most 16777216",
    setting("shape", 1, [0] * 65): "differ|dimensions|shape",
    setting("rank", 1, -1): "negative rank",
    setting("writer", 1, 1): "expected writer 0",
    setting("file", 1, 1): "one of 1 files",
    setting("file", 1, -1): "one of 1 files",
    setting("stored", 1, 0): "stored bytes",
    setting("stored", 1, 2**60): "stored bytes",
    setting("raw", 1, 1): "its box has",
    setting("codec", 1, 9): "expected a codec",
}


NAMES = [f"{number}-{attack.__name__}" for number, attack in enumerate(ATTACKS)]


@pytest.mark.parametrize(("attack", "message"), ATTACKS.items(), ids=NAMES)
def test_attacks_are_refused_by_name(victim: Path, attack: Builder, message: str) -> None:
    attack(victim)
    with pytest.raises(FormatError, match=message):
        load(victim)
    assert _verified(victim), "verify finds nothing"


LOADER = """
import resource, sys
from pathlib import Path
from ckptd.core.errors import FormatError
from tests.attacks.test_checkpoints import load
load(Path(sys.argv[1]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
for directory in sys.argv[3:]:
    try:
        load(Path(directory))
    except FormatError:
        print("refused")
    except BaseException as error:
        print(f"{directory}: {error!r}")
"""


def test_attacks_are_refused_in_little_memory(victim: Path, tmp_path: Path) -> None:
    """One process with little room meets all of them; allocating before checking would end it."""
    directories = []
    for name, attack in zip(NAMES, ATTACKS, strict=True):
        root = tmp_path / name
        shutil.copytree(victim.parent, root)
        attack(root / victim.name)
        directories.append(str(root / victim.name))
    command = [sys.executable, "-c", LOADER, str(victim), str(MOST_MEMORY), *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)
    assert done.stdout.splitlines() == ["refused"] * len(directories), done.stderr


def _verified(directory: Path) -> list[str]:
    try:
        with open_checkpoint(directory) as stored:
            problems = stored.verify()
            for path, encoded in stored.objects().items() if not problems else ():
                try:
                    objects.decode(encoded)
                except FormatError as error:
                    problems.append(f"{path}: {error}")
            return problems
    except CkptdError as error:
        return [str(error)]


@pytest.mark.parametrize("name", ["COMMIT", "objects.msgpack", "manifest.parquet/w00000.parquet"])
def test_every_bit_flip_in_metadata_is_corruption(victim: Path, name: str) -> None:
    path = victim / name
    sound = path.read_bytes()
    bits = range(len(sound) * 8)
    for bit in bits if len(bits) < 400 else np.random.default_rng(0).choice(len(bits), 400, replace=False).tolist():
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(FormatError):
            load(victim)


def test_every_bit_flip_in_a_chunk_is_corruption(victim: Path) -> None:
    catalog = open_checkpoint(victim).catalog()
    sound = data_path(victim).read_bytes()
    generator = np.random.default_rng(1)
    for row in np.flatnonzero(catalog.raw).tolist():
        for byte in generator.integers(0, int(catalog.stored[row]), 10).tolist():
            flipped = bytearray(sound)
            flipped[int(catalog.file_offset[row]) + byte] ^= 1 << generator.integers(8)
            data_path(victim).write_bytes(flipped)
            with open_checkpoint(victim) as stored:
                into = bytearray(int(catalog.raw[row]))
                try:
                    stored.read(row, memoryview(into))
                except CorruptionError:
                    pass
                else:  # a bit of zstd that does not matter
                    data_path(victim).write_bytes(sound)
                    genuine = bytearray(len(into))
                    stored.read(row, memoryview(genuine))
                    assert into == genuine


@pytest.mark.parametrize("name", ["objects.msgpack", "manifest.parquet/w00000.parquet", "data/w00000-00000.ckd"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer"])
def test_damaged_files_are_named(victim: Path, name: str, damage: str) -> None:
    _damage(victim / name, damage)
    with pytest.raises(FormatError, match=name.split("/")[-1]):
        load(victim)
    problems = open_checkpoint(victim).verify()
    assert any(name.split("/")[-1] in problem for problem in problems)


def _damage(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": data[:-1], "longer": data + b"\0"}[damage])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", FormatError),
        (b"{", FormatError),
        (b"[1]", FormatError),
        (b'{"format":"pytorch"}', FormatError),
        (b'{"version":1}', FormatError),
        (b"\xff\xfe", FormatError),
        (b'{"format":"ckptd checkpoint","version":1}', CorruptionError),
    ],
)
def test_foreign_commits(victim: Path, content: bytes, error: type[CkptdError]) -> None:
    (victim / "COMMIT").write_bytes(content)
    with pytest.raises(error, match="COMMIT"):
        load(victim)
    store = Store.open(victim.parent)
    assert store.checkpoints() == []
    assert [name for name, _ in store.broken()] == [victim.name]
    assert store.clean() == []


def test_a_truncated_commit_is_refused_at_every_length(victim: Path) -> None:
    sound = (victim / "COMMIT").read_bytes()
    for length in range(len(sound)):
        (victim / "COMMIT").write_bytes(sound[:length])
        with pytest.raises(FormatError):
            load(victim)


def test_a_newer_version_is_named_and_kept(victim: Path) -> None:
    reseal(victim, version=2)
    with pytest.raises(VersionError, match="format version"):
        load(victim)
    store = Store.open(victim.parent)
    assert store.checkpoints() == []
    assert "version" in store.broken()[0][1]
    with pytest.raises(VersionError):
        store.writer(NAME, "job")
    assert store.clean() == []
    assert victim.exists()


def test_a_missing_commit_is_no_checkpoint(victim: Path) -> None:
    (victim / "COMMIT").unlink()
    with pytest.raises(NotFoundError, match="COMMIT"):
        open_checkpoint(victim)
    with pytest.raises(NotFoundError, match="no committed checkpoint; found step"):
        open_checkpoint(victim.parent)


def test_random_damage_to_a_resealed_manifest_never_escapes(victim: Path) -> None:
    """With digests out of the way, Parquet itself is fed damage: refused, or decoded to rows that keep the rules."""
    sound = part_path(victim).read_bytes()
    generator = np.random.default_rng(2)
    refused = 0
    for _ in range(300):
        data = bytearray(sound)
        for position in generator.integers(0, len(data), generator.integers(1, 4)).tolist():
            data[position] = int(generator.integers(256))
        try:
            catalog = manifest.from_parquet(bytes(data), open_rows(sound))
        except FormatError:
            refused += 1
        else:
            assert isinstance(catalog, Catalog)
            assert len(catalog) == open_rows(sound)
    assert refused > 50


def open_rows(data: bytes) -> int:
    return int(pq.read_metadata(io.BytesIO(data)).num_rows)
