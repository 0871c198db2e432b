"""Manifest parts and layouts: any catalog comes back, in the profile of the document, cheaply."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.catalog import ALL_RANKS, BYTEPLANES_ZSTD, COLUMNS, RAW, ZSTD, Catalog
from ckptd.core.errors import FormatError
from ckptd.core.types import DTYPES, itemsize
from ckptd.format import manifest
from ckptd.format.layout import aligned, check_layout
from ckptd.format.manifest import from_parquet, to_parquet
from ckptd.format.parquet_profile import ROW_GROUP_ROWS

KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    """Tensors of any dtype and shape, cut anywhere, with any numbers in the other columns."""
    keys = draw(st.lists(KEYS, unique=True, max_size=6))
    infos, tensor, boxes = [], [], []
    for index, key in enumerate(keys):
        shape = tuple(draw(st.lists(st.integers(0, 50), max_size=4)))
        infos.append((key, draw(st.sampled_from(list(DTYPES))), shape))
        for _ in range(draw(st.integers(1, 3))):
            offsets = [draw(st.integers(0, size)) for size in shape]
            tensor.append(index)
            boxes.append((offsets, [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]))
    width = max((len(info[2]) for info in infos), default=0)
    rows = len(tensor)

    def numbers(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows))

    return Catalog.build(
        infos,
        tensor,
        np.array([offsets + [0] * (width - len(offsets)) for offsets, _ in boxes]).reshape(rows, width),
        np.array([sizes + [1] * (width - len(sizes)) for _, sizes in boxes]).reshape(rows, width),
        rank=numbers(ALL_RANKS, 5),
        crc=numbers(0, 2**32 - 1),
        writer=numbers(0, 10**6),
        file=numbers(0, 1000),
        file_offset=numbers(0, 2**50),
        stored=numbers(0, 2**24),
        codec=numbers(0, 2),
    )


def assert_same(one: Catalog, other: Catalog) -> None:
    assert one.tensors == other.tensors
    for name in ("tensor", "offsets", "sizes", *COLUMNS):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@given(catalogs())
@settings(max_examples=100, deadline=None)
def test_round_trip(catalog: Catalog) -> None:
    assert_same(from_parquet(to_parquet(catalog), len(catalog)), catalog)


def long_catalog(rows: int) -> Catalog:
    """One long tensor around the borders of row groups, among others."""
    tensor = np.concatenate([[0], np.ones(rows - 2, int), [2]])
    infos = [("a", "int8", (1, 1)), ("b", "float32", (rows,)), ("c", "int64", ())]
    offsets = np.stack([np.where(tensor == 1, np.arange(rows) - 1, 0), np.zeros(rows, int)], axis=1)
    return Catalog.build(
        infos, tensor, offsets, np.ones((rows, 2), int), crc=np.arange(rows), file_offset=np.arange(rows)
    )


@pytest.mark.parametrize("rows", [ROW_GROUP_ROWS - 1, ROW_GROUP_ROWS, ROW_GROUP_ROWS + 1, 2 * ROW_GROUP_ROWS + 5])
def test_row_groups(rows: int) -> None:
    catalog = long_catalog(rows)
    data = to_parquet(catalog)
    metadata = pq.read_metadata(io.BytesIO(data))
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [ROW_GROUP_ROWS] * (rows // ROW_GROUP_ROWS) + (
        [rows % ROW_GROUP_ROWS] if rows % ROW_GROUP_ROWS else []
    )
    assert_same(from_parquet(data, rows), catalog)
    with pytest.raises(FormatError, match="expected"):
        from_parquet(data, rows - 1)


def test_long_keys_keep_the_profile() -> None:
    """Keys that differ, at their longest: the dictionary overflows into plain pages."""
    rows = 5000
    infos = [(f"{i:05d}" + "k" * 1019, "uint8", (1,)) for i in range(rows)]
    catalog = Catalog.build(infos, range(rows), np.zeros((rows, 1)), np.ones((rows, 1)))
    assert_same(from_parquet(to_parquet(catalog), rows), catalog)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [("k" * 1025, (1,), "a key of 1025 bytes"), ("\ud800", (1,), "surrogates"), ("k", (2**62, 2), "not a shape")],
)
def test_what_the_format_cannot_hold_is_refused_when_written(key: str, shape: tuple[int, ...], message: str) -> None:
    catalog = Catalog.build([(key, "uint8", shape)], [0], [[0] * len(shape)], [[1] * len(shape)])
    with pytest.raises(FormatError, match=message):
        to_parquet(catalog)


def test_the_parquet_is_what_the_document_says() -> None:
    data = to_parquet(long_catalog(100))
    metadata = pq.read_metadata(io.BytesIO(data))
    columns = {metadata.schema.column(i).path: metadata.schema.column(i) for i in range(metadata.num_columns)}
    physical = {path: column.physical_type for path, column in columns.items()}
    assert physical == {
        "key": "BYTE_ARRAY",
        "dtype": "BYTE_ARRAY",
        **{f"{name}.list.element": "INT64" for name in ("shape", "offsets", "sizes")},
        **dict.fromkeys(["rank", "writer", "file", "codec", "crc32c"], "INT32"),
        **dict.fromkeys(["file_offset", "stored", "raw"], "INT64"),
    }
    assert [path for path, column in columns.items() if column.max_definition_level and "list" not in path] == ["rank"]
    assert metadata.metadata is None
    crc = metadata.row_group(0).column(list(columns).index("crc32c"))
    assert (crc.compression, set(crc.encodings) - {"RLE"}) == ("UNCOMPRESSED", {"PLAIN"})


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_foreign_bytes(data: bytes) -> None:
    for candidate in (data, b"PAR1" + data + b"PAR1"):
        with pytest.raises(FormatError):
            from_parquet(candidate, 1)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes(data: st.DataObject) -> None:
    """Whatever Parquet makes of damage, it is refused or keeps the catalog's rules."""
    sound = bytearray(to_parquet(long_catalog(20)))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    try:
        catalog = from_parquet(bytes(sound), 20)
    except FormatError:
        return
    assert len(catalog) == 20


def placed(places: list[tuple[int, int, int, int]], **columns: Any) -> Catalog:
    """Chunks (file, file_offset, stored, raw) of one tensor of bytes."""
    file, offset, stored, raw = (np.array(column) for column in zip(*places, strict=True))
    codec = np.where((raw == stored), RAW, ZSTD)
    made = {"file": file, "file_offset": offset, "stored": stored, "codec": codec, "writer": np.full(len(raw), 3)}
    boxes = raw.reshape(-1, 1)
    return Catalog.build(
        [("x", columns.pop("dtype", "uint8"), (2**25,))],
        np.zeros(len(raw), int),
        np.zeros_like(boxes),
        boxes,
        **(made | columns),
    )


MIB = 2**20
GOOD = [(0, 0, 10, 20), (0, 64, 65, 65), (0, 192, 1, 7), (0, 4096, MIB, MIB), (1, 0, 2 * MIB, 3 * MIB), (0, 0, 10, 20)]


def test_a_sound_layout_in_any_order() -> None:
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(GOOD))
        check_layout(placed([GOOD[i] for i in order]), 3, [4096 + MIB, 2 * MIB])
    check_layout(placed([(0, 0, 0, 0)]), 3, [])


@pytest.mark.parametrize(
    ("places", "lengths", "columns"),
    [
        ([(0, 0, 10, 20)], [10], {"writer": [4]}),
        ([(0, 0, 10, 20)], [11], {}),
        ([(0, 0, 10, 20)], [10, 5], {}),
        ([(0, 0, 10, 20)], [], {}),
        ([(1, 0, 10, 20)], [10], {}),
        ([(0, 64, 10, 20)], [74], {}),
        ([(0, 0, 10, 20), (0, 10, 10, 20)], [20], {}),
        ([(0, 0, 10, 20), (0, 128, 10, 20)], [138], {}),
        ([(0, 0, 70, 80), (0, 64, 10, 20)], [74], {}),
        ([(0, 0, 10, 20), (0, 64, MIB, MIB)], [64 + MIB], {}),
        ([(0, 0, 10, 20), (0, 0, 10, 21)], [10], {}),
        ([(0, 0, 10, 20), (0, 0, 10, 20)], [10], {"crc": [1, 2]}),
        ([(0, 0, 30, 20)], [30], {}),
        ([(0, 0, 0, 20)], [0], {}),
        ([(0, 64, 0, 0)], [], {}),
        ([(0, 0, 0, 0)], [], {"crc": [1]}),
        ([(0, 0, 10, 20)], [10], {"codec": [RAW]}),
        ([(0, 0, 10, 20)], [10], {"codec": [3]}),
        ([(0, 0, 10, 20)], [10], {"codec": [BYTEPLANES_ZSTD]}),
    ],
)
def test_unsound_layouts(places: list[tuple[int, int, int, int]], lengths: list[int], columns: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        check_layout(placed(places, **columns), 3, lengths)


def test_alignment() -> None:
    assert [aligned(p, s) for p, s in [(0, 1), (1, 1), (64, 1), (65, MIB - 1), (65, MIB), (4096, MIB)]] == [
        0,
        64,
        64,
        128,
        4096,
        4096,
    ]


def test_every_dtype_of_the_package_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    for name in DTYPES:
        assert name in text
        assert itemsize(name) in (1, 2, 4, 8, 16)
    for name in manifest._SCHEMA.names:
        assert f"| {name} |" in text
