"""Recutting in memory: any chunks to any layout, element by element, each chunk decoded once per batch."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import ConfigError, CorruptionError, FormatError
from ckptd.operations.recut import LEAST_MEMORY, Assembler, Room, Slots
from ckptd.plan import recut
from ckptd.plan.layout import Layout, Mesh
from tests.operations.stores import chunks
from tests.reshard.layouts import layouts

DTYPES = ("uint8", "int16", "float32", "complex128")
SLOT = 4096


def assemble(catalog: Catalog, read: object, layout: Layout, threads: int = 1) -> tuple[list[Catalog], list[bytes]]:
    """Every part's rows with the bytes of each, as the writer of a part would ask for them."""
    placed, _ = layout.place(recut.placeable(catalog))
    units = recut.units_of(catalog, placed, layout.mesh)
    slots = Slots(SLOT)
    catalogs, data = [], []
    for part in recut.parts_of(units, catalog, layout.mesh):
        assembly = recut.assembly_of(part, units, catalog, layout.mesh, SLOT, "the source")
        assembler = Assembler(assembly, catalog, read, slots)  # type: ignore[arg-type]

        def fetch(row: int, assembly: recut.Assembly = assembly, assembler: Assembler = assembler) -> bytes:
            into = bytearray(int(assembly.catalog.raw[row]))
            if into:
                assembler.read(int(assembly.catalog.file_offset[row]), memoryview(into))
            return bytes(into)

        # Ties have one chunk, which is fetched once.
        first = {int(chunk): row for row, chunk in reversed(list(enumerate(assembly.catalog.file_offset)))}
        with ThreadPoolExecutor(threads) as executor:
            made = dict(zip(sorted(first.values()), executor.map(fetch, sorted(first.values())), strict=True))
        catalogs.append(assembly.catalog)
        data += [made[first[int(chunk)]] for chunk in assembly.catalog.file_offset]
    return catalogs, data


def rebuilt(catalogs: list[Catalog], data: list[bytes]) -> dict[tuple[str, int], np.ndarray]:
    """(key, rank) -> value, from rows whose boxes must cover it exactly once."""
    values: dict[tuple[str, int], np.ndarray] = {}
    covered: dict[tuple[str, int], np.ndarray] = {}
    rows = [(catalog, row) for catalog in catalogs for row in catalog]
    for (catalog, row), content in zip(rows, data, strict=True):
        info, box = catalog.tensors[catalog.tensor[row]], catalog.box(row)
        name = info.key, int(catalog.rank[row])
        value = values.setdefault(name, np.zeros(info.shape, info.dtype))
        inside = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        value[inside] = np.frombuffer(content, info.dtype).reshape(box.sizes)
        covered.setdefault(name, np.zeros(info.shape, int))[inside] += 1
    assert all((count == 1).all() for count in covered.values())
    return values


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
        tensors[f"model/{number}"] = generator.integers(0, 255, shape).astype(draw(st.sampled_from(DTYPES)))
    own = {("model/0", rank): tensors["model/0"] + 1 for rank in draw(st.sets(st.integers(0, 3), max_size=2))}
    return tensors, own


@settings(max_examples=120, deadline=None)
@given(states(), st.sampled_from([16, 48, 200, 1000, 4000]), st.sampled_from([1, 5, 10_000]), st.data())
def test_every_element_arrives(
    state: tuple[dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]],
    chunk_bytes: int,
    part_chunks: int,
    data: st.DataObject,
) -> None:
    tensors, own = state
    catalog, contents = chunks(tensors, own, chunk_bytes)
    layout = data.draw(layouts([TensorInfo(key, str(v.dtype), v.shape) for key, v in tensors.items()]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recut, "PART_CHUNKS", part_chunks)
        patch.setattr(recut, "CHUNK_BYTES", SLOT // 3)
        found = rebuilt(*assemble(catalog, lambda row, into: into.__setitem__(slice(None), contents[row]), layout))
    expected = {(key, ALL_RANKS): value for key, value in tensors.items()} | own
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, str(name))


def rows_to_columns(count: int) -> tuple[dict[str, np.ndarray], Layout]:
    """A tensor whose every source chunk has a part in every target chunk."""
    values = {"w": np.arange(64 * 64, dtype="f4").reshape(64, 64)}
    rules = '[[placement]]\nkeys = "w"\nshard = { mesh = "tp", dim = 1 }'
    return values, Layout.parse(rules, Mesh.parse(f"tp={count}"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_chunk_is_decoded_once_per_batch(threads: int) -> None:
    """16 KiB in four batches of 4 KiB: each of 16 source chunks is decoded four times, not 16 times."""
    values, layout = rows_to_columns(16)
    catalog, contents = chunks(values, {}, 1024)
    decoded: Counter[int] = Counter()
    lock = threading.Lock()

    def read(row: int, into: memoryview) -> None:
        with lock:
            decoded[row] += 1
        into[:] = contents[row]

    found = rebuilt(*assemble(catalog, read, layout, threads))
    np.testing.assert_array_equal(found["w", ALL_RANKS], values["w"])
    assert set(decoded.values()) == {4}
    placed, _ = layout.place(recut.placeable(catalog))
    units = recut.units_of(catalog, placed, layout.mesh)
    (part,) = recut.parts_of(units, catalog, layout.mesh)
    planned = recut.assembly_of(part, units, catalog, layout.mesh, SLOT, "the source").decodes()
    assert Counter(planned.tolist()) == decoded


def test_a_slot_is_not_filled_again_before_it_is_empty() -> None:
    """Somebody asks for batch 2 while chunks of batch 0, in the same slot, have not been fetched."""
    values, layout = rows_to_columns(16)
    catalog, contents = chunks(values, {}, 1024)
    placed, _ = layout.place(recut.placeable(catalog))
    units = recut.units_of(catalog, placed, layout.mesh)
    (part,) = recut.parts_of(units, catalog, layout.mesh)
    assembly = recut.assembly_of(part, units, catalog, layout.mesh, SLOT, "the source")
    early = threading.Event()
    late: list[threading.Thread] = []

    def read(row: int, into: memoryview) -> None:
        if threading.current_thread() in late:
            early.set()
        into[:] = contents[row]

    assembler = Assembler(assembly, catalog, read, Slots(SLOT))
    found = {chunk: bytearray(1024) for chunk in range(16)}

    def fetch(*wanted: int) -> None:
        for chunk in wanted:
            assembler.read(chunk, memoryview(found[chunk]))

    fetch(0, 1, 2, 4, 5, 6, 7)
    late.append(threading.Thread(target=fetch, args=(8, 9, 10, 11)))
    late[0].start()
    assert not early.wait(0.2)
    fetch(3)
    late[0].join(60)
    fetch(12, 13, 14, 15)
    for chunk, data in found.items():
        np.testing.assert_array_equal(
            np.frombuffer(data, "f4").reshape(64, 4), values["w"][:, 4 * chunk : 4 * chunk + 4]
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_all_threads_are_told_of_a_chunk_that_cannot_be_read(threads: int) -> None:
    values, layout = rows_to_columns(16)
    catalog, contents = chunks(values, {}, 1024)

    def read(row: int, into: memoryview) -> None:
        if row == 9:
            raise CorruptionError("chunk 9 is damaged")
        into[:] = contents[row]

    with pytest.raises(CorruptionError, match="chunk 9"):
        assemble(catalog, read, layout, threads)


def test_a_source_with_a_gap_is_refused_before_anything_is_read() -> None:
    catalog, _ = chunks({"w": np.arange(600.0)}, {}, 1024)
    holey = catalog.select(np.array([0, 2, 3]))
    with pytest.raises(FormatError, match=r"the source: not a whole checkpoint: w: no chunk holds elements \[1"):
        assemble(holey, lambda row, into: pytest.fail("was read"), Layout(Mesh.parse("")))


def test_ties_stay_ties_where_both_are_laid_out_alike() -> None:
    """`b` has the places of `a`; `c` is another tensor of the same bytes."""
    value = np.arange(64, dtype="f4").reshape(8, 8)
    catalog, contents = chunks({"a": value, "b": value, "c": value}, {}, 128)
    places = catalog.file_offset.copy()
    places[catalog.rows("b").start : catalog.rows("b").stop] = places[catalog.rows("a").start : catalog.rows("a").stop]
    tied = catalog.replaced(file_offset=places)

    def stored(rules: str) -> tuple[int, int]:
        (made,), data = assemble(
            tied,
            lambda row, into: into.__setitem__(slice(None), contents[row]),
            Layout.parse(rules, Mesh.parse("tp=2")),
        )
        for found in rebuilt([made], data).values():
            np.testing.assert_array_equal(found, value)
        return len(made), len(np.unique(made.file_offset))

    assert stored('[[placement]]\nkeys = "*"\nshard = { mesh = "tp", dim = 1 }') == (6, 4)
    assert stored('[[placement]]\nkeys = "b"\nshard = { mesh = "tp", dim = 1 }') == (4, 4)


def test_room() -> None:
    for memory in (LEAST_MEMORY, 2**29, 2**30, 2**33):
        for threads in range(1, 9):
            room = Room.of(memory, threads)
            chunk = 16 * 1024**2
            used = 2 * room.slot_bytes + (room.threads + 2) * 2 * chunk + room.threads * 3 * chunk
            assert used < memory
            assert room.slot_bytes >= (room.threads + 3) * chunk
    with pytest.raises(ConfigError, match="320M"):
        Room.of(LEAST_MEMORY - 1)
