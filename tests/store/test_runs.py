"""Neighbouring chunks are read together, and decode to the same as alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CorruptionError, FormatError
from ckptd.format.layout import LARGE_BYTES, SMALL_ALIGNMENT
from ckptd.format.objects import encode
from ckptd.tiers.store import Store, StoredCheckpoint
from ckptd.tiers.store.posix import PosixInput
from ckptd.tiers.store.runs import RUN_BYTES, in_place_order, run_starts
from tests.store.samples import Memory, identity


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[StoredCheckpoint]:
    """Chunks of every codec, small ones and two of more than a megabyte, in one data file."""
    generator = np.random.default_rng(1)
    held = {f"small.{i:02}": ("float32", np.linspace(i, i + 1, 300 + i, dtype=np.float32)) for i in range(50)}
    held |= {f"noise.{i}": ("uint8", generator.integers(0, 256, 77 + i, np.uint8)) for i in range(5)}
    held |= {f"large.{i}": ("int64", np.arange(150_000) * i) for i in range(2)}
    store = Store.open(str(tmp_path), create=True)
    memory = Memory(held, chunk_bytes=2**24)
    writer = store.writer(identity(1), "a job")
    writer.commit([writer.part(0).write(memory.catalog, memory.read, threads=1)], {"n": encode(1)})
    with store.reader(identity(1)) as reader:
        yield reader


def columns(sizes: list[int], gaps: list[int]) -> Catalog:
    """Raw chunks in one file, with gaps before each."""
    ends = np.cumsum(np.array(sizes) + np.array(gaps))
    return Catalog.build(
        [(f"t{row:05}", "uint8", (size,)) for row, size in enumerate(sizes)],
        np.arange(len(sizes)),
        np.zeros((len(sizes), 1)),
        np.array(sizes).reshape(-1, 1),
        file_offset=ends - sizes,
    )


def runs_of(catalog: Catalog) -> list[list[int]]:
    order = in_place_order(catalog, np.arange(len(catalog)))
    return [run.tolist() for run in np.split(order, run_starts(catalog, order)[1:])]


def test_what_makes_a_run() -> None:
    small, large = 1000, LARGE_BYTES
    assert runs_of(columns([small] * 3, [0, 5, SMALL_ALIGNMENT - 1])) == [[0, 1, 2]]
    assert runs_of(columns([small] * 3, [0, SMALL_ALIGNMENT, 0])) == [[0], [1, 2]]
    assert runs_of(columns([small, large, small, small], [0] * 4)) == [[0], [1], [2, 3]]
    many = columns([LARGE_BYTES - 1] * 40, [0] * 40)
    runs = runs_of(many)
    assert all(len(run) * LARGE_BYTES <= RUN_BYTES for run in runs)
    assert len(runs) <= 8
    assert [row for run in runs for row in run] == list(range(40))


def test_runs_hold_each_row_once_and_decode_to_what_it_is(
    stored: StoredCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = stored.catalog()
    alone = {}
    for row in catalog:
        alone[row] = bytearray(int(catalog.raw[row]))
        stored.read(row, memoryview(alone[row]))
    requests: list[int] = []
    original = PosixInput.read_into

    def counted(self: PosixInput, offset: int, into: memoryview) -> None:
        requests.append(into.nbytes)
        original(self, offset, into)

    monkeypatch.setattr(PosixInput, "read_into", counted)
    runs = stored.runs(np.arange(len(catalog))[::-1])
    assert sorted(row for run in runs for row in run) == list(range(len(catalog)))
    assert len(runs) <= 5
    for run in runs:
        into = [bytearray(int(catalog.raw[row])) for row in run]
        stored.read_run(run, [memoryview(buffer) for buffer in into])
        assert into == [alone[row] for row in run]
    assert len(requests) == len(runs)
    assert sum(requests) <= catalog.stored.sum() + SMALL_ALIGNMENT * len(catalog)


def test_what_one_reader_fetched_another_decodes_and_distrusts(stored: StoredCheckpoint) -> None:
    catalog = stored.catalog()
    run = max(stored.runs(np.arange(len(catalog))), key=len)
    assert len(run) > 40
    fetched = memoryview(bytearray(stored.stored_bytes(run)))
    stored.fetch(run, fetched)
    into = [memoryview(bytearray(int(catalog.raw[row]))) for row in run]
    stored.decode(run, fetched, into)
    victim = run[20]
    fetched[int(catalog.file_offset[victim] - catalog.file_offset[run[0]] + catalog.stored[victim] // 2)] ^= 1
    with pytest.raises(CorruptionError, match=catalog.tensors[catalog.tensor[victim]].key):
        stored.decode(run, fetched, into)


def test_metadata_is_passed_on_and_believed_no_more_than_a_file(stored: StoredCheckpoint, tmp_path: Path) -> None:
    given = stored.metadata()
    store = Store.open(str(tmp_path))
    for path in tmp_path.glob("step-*/manifest.parquet/*"):
        path.unlink()
    with store.reader(identity(1)) as other:
        other.adopt(given)
        assert len(other.catalog()) == len(stored.catalog())
        assert other.objects() == stored.objects()
    damaged = bytearray(given)
    damaged[-100] ^= 1
    with store.reader(identity(1)) as other:
        other.adopt(bytes(damaged))
        with pytest.raises(CorruptionError, match="not that in COMMIT"):
            other.catalog()
    with store.reader(identity(1)) as other:
        with pytest.raises(FormatError):
            other.adopt(b"nonsense")
        with pytest.raises(CorruptionError, match="COMMIT lists it"):
            other.catalog()
