"""Resharding from store to store: the same values, laid out for the target; killed anywhere and run again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError, CorruptionError, StoreError
from ckptd.operations.diff import diff
from ckptd.operations.reshard import Outcome, plan_reshard, reshard
from ckptd.plan import recut
from ckptd.plan.layout import Layout, Mesh, shards
from ckptd.tiers.store import PartWriter, Store, open_checkpoint
from tests.operations.stores import FIRST, flip, write
from tests.reshard.layouts import layouts

MESH = Mesh.parse("dp=2,tp=4,pp=2")
RULES = """
[[placement]]
keys = "*.w"
shard = [{ mesh = "tp", dim = 1 }, { mesh = "dp", dim = 0 }]
[[stage]]
mesh = "pp"
keys = "*layers.{layer}.*"
"""
LAYOUT = Layout.parse(RULES, MESH)


def run(source: Path, target: Path, layout: Layout = LAYOUT, **options: Any) -> Outcome:
    with open_checkpoint(source) as checkpoint:
        return reshard(checkpoint, str(target), layout, **options)


def check(source: Path, target: Path) -> None:
    """`target` is a store of one whole checkpoint, which equals `source`, and of nothing else."""
    store = Store.open(target)
    assert len(store.checkpoints()) == 1
    assert [entry.name for entry in target.iterdir()] == [Path(open_checkpoint(target).location).name]
    with open_checkpoint(source) as before, open_checkpoint(target) as after:
        assert after.verify() == []
        assert diff(before, after).equal
        assert after.objects() == before.objects()
        assert (after.id.step, after.job) == (before.id.step, before.job)
        assert after.id.epoch.nonce != before.id.epoch.nonce


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two layers, a bias that rank 1 has a value of its own for, a scalar, an empty tensor, generators, objects."""
    weights = np.random.default_rng(0).standard_normal((64, 48)).astype("f4")
    tensors = {
        "model/layers.0.w": weights,
        "model/layers.1.w": weights * 2,
        "model/b": np.arange(10.0),
        "model/s": np.array(3.0),
        "model/e": np.zeros((0, 3)),
        "objects/rng/python@0": np.arange(9, dtype="u1"),
        "objects/rng/python@1": np.arange(900, dtype="u1"),
    }
    own = {("model/b", 1): np.arange(10.0) + 1}
    return write(tmp_path / "source", 7, tensors, {"scheduler": {"last_epoch": 7}}, own=own, chunk_bytes=1000)


def test_the_target_is_laid_out_as_the_rules_say(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "target")
    check(source, tmp_path / "target")
    assert (outcome.existed, outcome.reused) == (False, 0)
    with open_checkpoint(tmp_path / "target") as checkpoint:
        catalog = checkpoint.catalog()
        placed, _ = LAYOUT.place(recut.placeable(catalog))
        for one in placed:
            rows = [row for row in catalog.rows(one.info.key) if catalog.rank[row] == -1]
            boxes = [(box.offsets, box.sizes) for box in map(catalog.box, rows)]
            wanted = [tuple(map(tuple, pair)) for pair in zip(*(c.tolist() for c in shards(one, MESH)), strict=True)]
            assert boxes == wanted, one.info.key
        # One stage to a writer: a rank reads no file of a stage that is not its own.
        writers = [{int(catalog.writer[row]) for row in catalog.rows(f"model/layers.{layer}.w")} for layer in (0, 1)]
        assert not writers[0] & writers[1]
        own = [row for row in catalog.rows("model/b") if catalog.rank[row] == 1]
        assert [catalog.box(row).sizes for row in own] == [(10,)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([40, 300, 5000]), st.data())
def test_any_state_survives_any_layout(seed: int, chunk_bytes: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    tensors = {
        f"model/{i}": generator.standard_normal(data.draw(st.lists(st.integers(0, 9), max_size=3))).astype("f4")
        for i in range(3)
    }
    layout = data.draw(layouts([TensorInfo(key, "float32", value.shape) for key, value in tensors.items()]))
    with tempfile.TemporaryDirectory() as place:
        source = write(Path(place) / "a", 1, tensors, {"x": 1}, chunk_bytes=chunk_bytes)
        run(source, Path(place) / "b", layout)
        check(source, Path(place) / "b")
        # And back to whole tensors from there.
        run(Path(place) / "b", Path(place) / "c", Layout(Mesh.parse("")))
        check(source, Path(place) / "c")


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    value = np.random.default_rng(0).standard_normal((64, 64)).astype("f4")
    source = write(tmp_path / "source", 1, {"a": value})
    with open_checkpoint(source) as checkpoint:
        tied = checkpoint.catalog()
        renamed = tied.build([("b", "float32", (64, 64))], tied.tensor, tied.offsets, tied.sizes, crc=tied.crc)
        both = tied.merge([tied, renamed])
        store = Store.open(tmp_path / "tied", create=True)
        writer = store.writer(checkpoint.id, "job")
        writer.commit([writer.part(0).write(both, lambda row, into: checkpoint.read(0, into))], {})
    run(tmp_path / "tied", tmp_path / "target", Layout.parse(RULES.replace("*.w", "*"), MESH))
    check(tmp_path / "tied", tmp_path / "target")
    with open_checkpoint(tmp_path / "target") as after:
        assert after.commit.data_bytes < 1.1 * value.nbytes
        assert len(after.catalog()) == 16


# --- names


def test_the_same_run_finds_its_checkpoint_another_is_refused(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "target")
    again = run(source, tmp_path / "target", memory=2**29)
    assert again.existed
    assert (again.id, again.location) == (first.id, first.location)
    with pytest.raises(StoreError, match="is committed there already; choose another store"):
        run(source, tmp_path / "target", Layout(MESH))
    with pytest.raises(StoreError, match="is committed there already"):
        run(source, source.parent)
    with pytest.raises(ConfigError, match="directory of a checkpoint"):
        run(source, source)


def test_a_store_with_other_steps_gets_one_more(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "target", 3, {"x": np.zeros(3)})
    outcome = run(source, tmp_path / "target")
    assert outcome.id.epoch.number == FIRST.number + 1
    assert Store.open(tmp_path / "target").newest() == outcome.id


# --- interrupted, full, corrupted


class Killed(BaseException):
    """Ends a run at some call of the operating system, as a signal would."""


@contextlib.contextmanager
def ending_at(call: int, failure: BaseException | None = None) -> Iterator[list[int]]:
    """The `call`-th call that changes the disk is not made, but ends the run. Gives how many calls there were."""
    made = [0]
    names = ("fsync", "rename", "mkdir", "unlink", "rmdir", "writev", "ftruncate")
    real = {name: getattr(os, name) for name in names}
    real["fsync"] = lambda descriptor: None  # nobody loses power here

    def counted(name: str) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            made[0] += 1
            if made[0] == call:
                raise failure or Killed
            return real[name](*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(name))
        yield made


def test_killed_at_any_call_and_run_again(source: Path, tmp_path: Path) -> None:
    layout = Layout(MESH, LAYOUT.placements)
    with ending_at(-1) as made:
        run(source, tmp_path / "whole", layout)
    reused = set()
    for call in range(1, made[0] + 1):
        target = tmp_path / f"target-{call}"
        with ending_at(call), pytest.raises(Killed):
            run(source, target, layout)
        if target.exists() and Store.open(target).checkpoints():
            with open_checkpoint(target) as committed:
                assert committed.verify() == []
        with ending_at(-1):
            outcome = run(source, target, layout)
        check(source, target)
        reused.add(len(outcome.plan.parts) if outcome.existed else outcome.reused)
    assert reused == set(range(len(outcome.plan.parts) + 1))


def test_a_run_that_was_killed_twice(source: Path, tmp_path: Path) -> None:
    """The second run is killed while it clears up after the first, or later."""
    for call in (1, 2, 5, 9, 14):
        target = tmp_path / f"target-{call}"
        for last in (30, call):
            with ending_at(last), pytest.raises(Killed):
                run(source, target)
        run(source, target)
        check(source, target)


def test_a_killed_process(source: Path, tmp_path: Path) -> None:
    """SIGKILL right before COMMIT gets its name."""
    (tmp_path / "rules.toml").write_text(RULES)
    script = (
        "import os, signal, sys; from ckptd.cli.main import main;"
        "os.rename = lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL); main()"
    )
    command = ["reshard", source, tmp_path / "target", "--mesh", str(MESH), "--layout", tmp_path / "rules.toml"]
    ended = subprocess.run([sys.executable, "-c", script, *map(str, command)], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert Store.open(tmp_path / "target").checkpoints() == []
    outcome = run(source, tmp_path / "target")
    assert outcome.reused == len(outcome.plan.parts) == 4
    check(source, tmp_path / "target")


def test_a_full_disk_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with ending_at(30, full), pytest.raises(StoreError, match="ENOSPC"):
        run(source, tmp_path / "target")
    outcome = run(source, tmp_path / "target")
    assert outcome.reused > 0
    check(source, tmp_path / "target")


def test_a_finished_part_that_was_damaged_is_written_again(source: Path, tmp_path: Path) -> None:
    with ending_at(45), pytest.raises(Killed):
        run(source, tmp_path / "target")
    flip(sorted((tmp_path / "target").glob("step-*/manifest.parquet/*"))[0], 100)
    run(source, tmp_path / "target")
    check(source, tmp_path / "target")


def test_a_damaged_source_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    flip(next(source.glob("data/*")), 5000)
    with pytest.raises(CorruptionError, match="CRC32C"):
        run(source, tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


def test_two_at_a_time_are_refused(source: Path, tmp_path: Path) -> None:
    with ending_at(30), pytest.raises(Killed):
        run(source, tmp_path / "target")
    (journal,) = (tmp_path / "target").glob(".unfinished-*")
    descriptor = os.open(journal, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another process is writing"):
        run(source, tmp_path / "target")
    os.close(descriptor)
    run(source, tmp_path / "target")
    check(source, tmp_path / "target")


def test_a_store_of_objects(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is renamed or locked, a run goes on as well."""
    target = f"file+object://{tmp_path / 'target'}"
    write_part = PartWriter.write
    begun = []

    def write_two(writer: PartWriter, *arguments: Any, **options: Any) -> Any:
        begun.append(writer)
        if len(begun) == 3:
            raise Killed
        return write_part(writer, *arguments, **options)

    with open_checkpoint(source) as checkpoint:
        monkeypatch.setattr(PartWriter, "write", write_two)
        with pytest.raises(Killed):
            reshard(checkpoint, target, LAYOUT)
        assert Store.open(target).checkpoints() == []
        assert reshard(checkpoint, target, LAYOUT).reused == 2
        with open_checkpoint(target) as after:
            assert after.verify() == []
            assert diff(checkpoint, after).equal
    assert [path.name[:5] for path in (tmp_path / "target").iterdir()] == ["step-"]


# --- plan, memory


def test_the_plan_is_what_is_done(source: Path, tmp_path: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        plan = plan_reshard(checkpoint, LAYOUT)
        assert not (tmp_path / "target").exists()
    assert plan == run(source, tmp_path / "target").plan
    with open_checkpoint(tmp_path / "target") as after:
        catalog = after.catalog()
        assert plan.chunks == len(catalog)
        assert [part.writer for part in plan.parts] == [part.writer for part in after.commit.parts]
        assert [part.chunks for part in plan.parts] == [part.rows for part in after.commit.parts]
        assert plan.bytes == int(catalog.raw.sum())
    # A layer's weights over dp and tp, and everything that no rule places.
    assert plan.rank_bytes == (64 * 48 * 4 // 8 + 80 + 8,) * 2


MEASURED = """
import sys
import ckptd.cli.main, ckptd.operations.reshard, ckptd.operations.diff
from ckptd.plan.layout import Layout, Mesh
from ckptd.tiers.store import open_checkpoint

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

source, target, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
layout = Layout.parse('[[placement]]\\nkeys = "*"\\nshard = { mesh = "tp", dim = 1 }', Mesh.parse("tp=4"))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with open_checkpoint(source) as checkpoint:
    ckptd.operations.reshard.reshard(checkpoint, target, layout, memory=memory)
    print(status("VmHWM") - before, len(checkpoint.catalog()))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A checkpoint larger than the memory, every source chunk of which has a part in every target chunk."""
    memory = 320 * 1024**2
    whole = np.random.default_rng(0).integers(0, 256, (4096, 4096), np.uint8)
    source = write(tmp_path / "source", 1, {f"model/{i}": np.roll(whole, i) for i in range(21)}, chunk_bytes=2**20)
    with open_checkpoint(source) as checkpoint:
        assert int(checkpoint.catalog().raw.sum()) > memory
    command = [sys.executable, "-c", MEASURED, source, tmp_path / "target", str(memory)]
    done = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    peak, chunks = map(int, done.stdout.split())
    assert peak <= memory + 150 * chunks
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "target") as after:
        assert diff(before, after).equal
