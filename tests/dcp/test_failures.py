"""Saves and loads that fail: what is raised, and what is left behind."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import ckptd
from ckptd.dcp import StorageReader, StorageWriter
from ckptd.tiers.store import CheckpointWriter, PartWriter, Store
from tests.dcp.states import directories, failure

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def damage(store: Path, pattern: str) -> Path:
    """Flips a bit in the middle of the one file that matches."""
    (path,) = store.glob(f"step-*/{pattern}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def saved(store: Path) -> dict[str, Any]:
    state = {"w": torch.arange(1000.0), "v": torch.ones(3), "n": {"a": 1}}
    save(state, storage_writer=StorageWriter(store))
    return {"w": torch.full((1000,), 7.0), "v": torch.zeros(3), "n": {"a": 0}}


def test_a_damaged_chunk(tmp_path: Path) -> None:
    state = saved(tmp_path)
    path = damage(tmp_path, "data/*")
    errors = failure(lambda: load(state, storage_reader=StorageReader(tmp_path)))
    assert isinstance(errors[0], ckptd.CorruptionError)
    assert str(path) in str(errors[0])
    assert "tensor 'w'" in str(errors[0])
    assert "partly overwritten" in str(errors[0])


@pytest.mark.parametrize("pattern", ["manifest.parquet/*", "objects.msgpack", "COMMIT"])
def test_a_damaged_table(tmp_path: Path, pattern: str) -> None:
    """Found before a tensor is touched, and as the error it is, not as missing metadata."""
    state = saved(tmp_path)
    path = damage(tmp_path, pattern)
    errors = failure(lambda: load(state, storage_reader=StorageReader(path.parents[len(Path(pattern).parts) - 1])))
    assert isinstance(errors[0], ckptd.CorruptionError)
    assert bool((state["w"] == 7).all())


def test_nothing_there(tmp_path: Path) -> None:
    errors = failure(lambda: load({"n": 0}, storage_reader=StorageReader(tmp_path / "none")))
    assert isinstance(errors[0], ckptd.NotFoundError)
    saved(tmp_path)
    errors = failure(lambda: load({"n": 0}, storage_reader=StorageReader(tmp_path, step=4)))
    assert isinstance(errors[0], ckptd.NotFoundError)
    assert "step 4" in str(errors[0])
    metadata = StorageReader(tmp_path / "none").read_metadata()
    with pytest.raises(ckptd.NotFoundError):
        "w" in metadata.state_dict_metadata  # noqa: B015


def test_another_dtype(tmp_path: Path) -> None:
    """Not silent: nothing is converted unless asked for, and nothing written before all is known to fit."""
    state = saved(tmp_path)
    state["v"] = torch.zeros(3, dtype=torch.float64)
    errors = failure(lambda: load(state, storage_reader=StorageReader(tmp_path)))
    assert isinstance(errors[0], ckptd.MismatchError)
    assert "v: float32 in the checkpoint, float64 here" in str(errors[0])
    assert bool((state["w"] == 7).all())
    load(state, storage_reader=StorageReader(tmp_path, cast=True))
    assert state["v"].tolist() == [1.0, 1.0, 1.0]
    assert state["v"].dtype == torch.float64


def test_another_shape_or_name(tmp_path: Path) -> None:
    """DCP's own planner finds these, before anything is read."""
    saved(tmp_path)
    errors = failure(lambda: load({"v": torch.zeros(4)}, storage_reader=StorageReader(tmp_path)))
    assert "Size mismatch" in str(errors[0])
    errors = failure(lambda: load({"u": torch.zeros(3)}, storage_reader=StorageReader(tmp_path)))
    assert "Missing key" in str(errors[0])


class Opaque:
    """An object that only pickle could store."""


UNUSABLE = {
    "object": (Opaque(), "Opaque"),
    "nested": ((1, [Opaque()]), "1/0"),
    "sparse": (torch.eye(3).to_sparse(), "layout"),
    "meta": (torch.zeros(3, device="meta"), "meta device"),
    "file": (io.BytesIO(b"x"), "BytesIO"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_stored(tmp_path: Path, kind: str) -> None:
    value, told = UNUSABLE[kind]
    state = {"w": torch.ones(3), "outer": {"inner": value}}
    errors = failure(lambda: save(state, storage_writer=StorageWriter(tmp_path)))
    assert isinstance(errors[0], ckptd.ConfigError)
    assert "outer.inner" in str(errors[0])
    assert told in str(errors[0])
    gc.collect()
    assert directories(tmp_path) == []


@pytest.mark.parametrize(("owner", "method"), [(PartWriter, "write"), (CheckpointWriter, "commit")])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """Nothing is committed, the checkpoint before is there, what was written goes, and the writer can be used again."""
    writer = StorageWriter(tmp_path, step=1)
    save({"n": 1, "w": torch.ones(3)}, storage_writer=writer)

    def full(*_: object, **__: object) -> None:
        raise ckptd.StoreError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, full)
        errors = failure(lambda: save({"n": 2, "w": torch.ones(3)}, storage_writer=writer))
    assert isinstance(errors[0], ckptd.StoreError)
    state = {"n": 0}
    load(state, storage_reader=StorageReader(tmp_path))
    assert state == {"n": 1}
    save({"n": 3, "w": torch.ones(3)}, storage_writer=writer)
    assert len(directories(tmp_path)) == 1
    load(state, storage_reader=StorageReader(tmp_path))
    assert state == {"n": 3}


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another rank's failure leaves behind on the coordinator goes with the writer."""
    writers = [StorageWriter(tmp_path)]
    monkeypatch.setattr(PartWriter, "write", lambda *_, **__: 1 / 0)
    errors = failure(lambda: save({"w": torch.ones(3)}, storage_writer=writers[0]))
    assert isinstance(errors[0], ZeroDivisionError)
    assert len(directories(tmp_path)) == 1
    assert Store.open(tmp_path).checkpoints() == []
    writers.clear()
    gc.collect()
    assert directories(tmp_path) == []


@pytest.mark.slow
def test_a_process_that_ends_after_a_failure(tmp_path: Path) -> None:
    """It cleans up, but a child that it has forked does not."""
    program = f"""
import os, sys
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from ckptd.dcp import StorageWriter
from ckptd.tiers.store import PartWriter
PartWriter.write = lambda *_, **__: 1 / 0
writer = StorageWriter({str(tmp_path)!r})
try:
    save({{"w": torch.ones(3)}}, storage_writer=writer)
except BaseException:
    pass
child = os.fork()
if child:
    os.waitpid(child, 0)
    print(len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("step-")]))
sys.exit()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1"], done.stderr
    assert directories(tmp_path) == []


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(enable_plan_caching=True)
    errors = failure(lambda: save({"n": 1}, storage_writer=StorageWriter(tmp_path), planner=planner))
    assert "enable_plan_caching" in str(errors[0])
    with pytest.raises(ckptd.ConfigError, match="use_collectives"):
        save({"n": 1}, storage_writer=StorageWriter(tmp_path), use_collectives=False)
    with pytest.raises(ckptd.ConfigError, match="step=-1"):
        StorageWriter(tmp_path, step=-1)
    with pytest.raises(ckptd.ConfigError, match="thread_count=0"):
        StorageWriter(tmp_path, thread_count=0)
    errors = failure(lambda: save({"objects": {"w": torch.ones(1)}}, storage_writer=StorageWriter(tmp_path)))
    assert "ckptd's own" in str(errors[0])
    gc.collect()
    assert os.listdir(tmp_path) == []
