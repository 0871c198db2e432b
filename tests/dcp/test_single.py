"""save and load in one process: every kind of entry, exchange with ckptd and with DCP's own files, options."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import ckptd
from ckptd.core.types import DTYPES
from ckptd.dcp import StorageReader, StorageWriter
from ckptd.tiers.store import StoredCheckpoint
from tests.api.models import application, content, same, train
from tests.dcp.states import Application, blank, copied, directories, equal, failure, mixed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def unflattened() -> DefaultLoadPlanner:
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


@pytest.mark.parametrize("scheme", ["", "file+object://"])
def test_everything_comes_back(tmp_path: Path, scheme: str) -> None:
    """From a file system, and from a store of objects."""
    place = f"{scheme}{tmp_path}"
    state = mixed()
    save(state, storage_writer=StorageWriter(place, step=3, thread_count=2))
    loaded = blank(state)
    load(loaded, storage_reader=StorageReader(place, thread_count=2))
    assert equal(loaded, state)
    ckptd.open(place).verify()
    assert ckptd.open(place).step == 3
    assert len(list(tmp_path.iterdir())) == 1, "the token is gone"


def test_as_the_file_system_writer(tmp_path: Path) -> None:
    """The same state dict, saved and loaded both ways, comes back equal."""
    state = mixed()
    save(state, storage_writer=StorageWriter(tmp_path / "ours"))
    save(state, storage_writer=FileSystemWriter(tmp_path / "theirs"))
    ours, theirs = blank(state), blank(state)
    load(ours, storage_reader=StorageReader(tmp_path / "ours"))
    load(theirs, storage_reader=FileSystemReader(tmp_path / "theirs"))
    assert equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_dtypes(tmp_path: Path, name: str) -> None:
    """Bit by bit, also where the target is not contiguous."""
    dtype = getattr(torch, name)
    bits = torch.randint(0, 2 if name == "bool" else 256, (6, 4 * dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype)
    save({"w": tensor}, storage_writer=StorageWriter(tmp_path))
    straight, turned = torch.zeros(6, 4, dtype=dtype), torch.zeros(4, 6, dtype=dtype).T
    load({"w": straight}, storage_reader=StorageReader(tmp_path))
    load({"w": turned}, storage_reader=StorageReader(tmp_path))
    assert torch.equal(straight.view(torch.uint8), bits)
    assert torch.equal(turned.contiguous().view(torch.uint8), bits)


def test_no_pickle_in_any_file(tmp_path: Path) -> None:
    """Neither a file of torch.save nor a pickle anywhere, whatever the state dict holds."""
    state = mixed() | Application(1).state()
    del state["weights"]["large"]  # random bytes look like anything
    save(state, storage_writer=StorageWriter(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        data = path.read_bytes()
        assert not zipfile.is_zipfile(io.BytesIO(data))
        assert not _pickles(data), f"{path} holds a pickle"
    assert _pickles(b"xx" + pickle.dumps({"a": 1})), "the check sees pickles"


def _pickles(data: bytes) -> bool:
    """Whether a pickle of protocol 2 or later, from its opcode PROTO to STOP, stands anywhere in `data`."""
    for protocol in (2, 3, 4, 5):
        start = data.find(bytes([0x80, protocol]))
        while start >= 0:
            try:
                if len(list(pickletools.genops(data[start : start + 2000]))) > 2:
                    return True
            except Exception:  # not a pickle
                pass
            start = data.find(bytes([0x80, protocol]), start + 1)
    return False


def test_a_checkpoint_of_dcp_is_one_of_ckptd(tmp_path: Path) -> None:
    """Weights, optimizer state and hyperparameters go on in ckptd.load, bit by bit."""
    saved = Application(1)
    saved.save(tmp_path, step=2)
    other = application(2)
    del other["scheduler"]
    assert ckptd.load(other, tmp_path) == 2
    expected = saved.optimizer.state_dict()
    assert same(other["optimizer"].state_dict()["state"], expected["state"])
    assert other["optimizer"].param_groups[0]["lr"] == expected["param_groups"][0]["lr"]
    assert same(dict(other["model"].state_dict()), dict(saved.model.state_dict()))
    assert list(ckptd.open(tmp_path).objects) == ["optimizer/param_groups"]


def test_a_checkpoint_of_ckptd_is_one_of_dcp(tmp_path: Path) -> None:
    """DCP finds the entries of ckptd.save under its own names, the schedule and plain data too."""
    state = application(1)
    train(state, 3)
    state |= {"data": {"seen": 12, "order": [torch.arange(3), {"epoch": 1}]}, "pair": (torch.ones(2), 1)}
    ckptd.save(state, tmp_path, step=3)
    loaded = Application(2)
    loaded.load(tmp_path)
    expected = content(state)
    found = loaded.optimizer.state_dict()
    for index, values in found["state"].items():
        assert all(torch.equal(value, expected[f"optimizer/{index}/{name}"]) for name, value in values.items())
    assert same(found["param_groups"][0]["lr"], expected["groups"][0]["lr"])
    rest = {
        "data": {"seen": 0, "order": [torch.zeros(3, dtype=torch.int64), {"epoch": 0}]},
        "pair": None,
        "scheduler": dict.fromkeys(state["scheduler"].state_dict()),
    }
    load(rest, storage_reader=StorageReader(tmp_path))
    assert equal(rest["data"], state["data"])
    assert equal(rest["pair"], state["pair"])
    assert rest["scheduler"] == state["scheduler"].state_dict()


def test_keys_of_ckptd_are_found_too(tmp_path: Path) -> None:
    """What is not listed: a tensor by its key, an object that DCP takes apart as a whole."""
    ckptd.save({"model": torch.nn.Linear(2, 1), "data": {"a": 1, "b": {"c": 2}}}, tmp_path)
    entries = StorageReader(tmp_path).read_metadata().state_dict_metadata
    assert list(entries) == ["model.bias", "model.weight", "data.a", "data.b.c"]
    assert isinstance(entries["model/weight"], TensorStorageMetadata)
    assert isinstance(entries.get("data"), BytesStorageMetadata)
    assert "model/nothing" not in entries
    state: dict[str, Any] = {"model/weight": torch.zeros(1, 2), "data": None}
    load(state, storage_reader=StorageReader(tmp_path), planner=unflattened())
    assert state["data"] == {"a": 1, "b": {"c": 2}}
    assert torch.equal(state["model/weight"], ckptd.open(tmp_path).read("model/weight"))


def test_large_shards_are_cut(tmp_path: Path) -> None:
    """DCP writes one item of 20 MB; the metadata has our chunks, and a part of it is read without the others."""
    save({"w": torch.randn(2500, 2000)}, storage_writer=StorageWriter(tmp_path))
    entry = StorageReader(tmp_path).read_metadata().state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert [tuple(chunk.sizes) for chunk in entry.chunks] == [(1250, 2000), (1250, 2000)]


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"a": torch.ones(8), "b": torch.ones(8), "n": 1}, storage_writer=StorageWriter(tmp_path))
    read: list[int] = []
    original = StoredCheckpoint.read
    monkeypatch.setattr(StoredCheckpoint, "read", lambda s, row, into: (read.append(row), original(s, row, into)))
    load({"b": torch.zeros(8)}, storage_reader=StorageReader(tmp_path))
    assert read == [1]


def test_a_whole_state_dict_without_a_model(tmp_path: Path) -> None:
    """DCP rebuilds the state dict, lists included, from the metadata: its paths are complete."""
    state = mixed()
    save(state, checkpoint_id=tmp_path / "store", storage_writer=StorageWriter(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    assert equal(_load_state_dict_from_keys(storage_reader=StorageReader(tmp_path / "store")), state)
    reader = StorageReader(tmp_path / "elsewhere")
    found = _load_state_dict_from_keys({"tuple"}, checkpoint_id=tmp_path / "store", storage_reader=reader)
    assert equal(found, {"tuple": state["tuple"]})


def test_unflattened(tmp_path: Path) -> None:
    """A planner that does not flatten: nested values are whole objects, small tensors in them included."""
    state = {"w": torch.arange(3.0), "nested": {"n": [1, {"t": torch.ones(2)}]}}
    save(state, storage_writer=StorageWriter(tmp_path), planner=DefaultSavePlanner(flatten_state_dict=False))
    loaded: dict[str, Any] = {"w": torch.zeros(3), "nested": None}
    load(loaded, storage_reader=StorageReader(tmp_path), planner=unflattened())
    assert equal(loaded, state)


class Strange(SavePlanner):
    """A planner with nothing but what the interface asks for; it halves what it saves."""

    def __init__(self) -> None:
        self._inner = DefaultSavePlanner()
        for name in ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan"):
            setattr(self, name, getattr(self._inner, name))

    set_up_planner = create_local_plan = create_global_plan = finish_plan = None  # type: ignore[assignment]

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = self._inner.resolve_data(write_item)
        return found if write_item.type == WriteItemType.BYTE_IO else found / 2


def test_a_planner_of_ones_own(tmp_path: Path) -> None:
    state = {"w": torch.arange(4.0), "n": {"a": [1, "x"]}}
    save(state, storage_writer=StorageWriter(tmp_path), planner=Strange())
    loaded: dict[str, Any] = {"w": torch.zeros(4), "n": {"a": None}}
    load(loaded, storage_reader=StorageReader(tmp_path))
    assert equal(loaded, {"w": torch.arange(4.0) / 2, "n": {"a": [1, "x"]}})


def test_steps(tmp_path: Path) -> None:
    """A store holds many; a writer serves several saves; the newest is read unless a step is asked for."""
    writer = StorageWriter(tmp_path)
    for step in (5, 6):
        writer.step = step
        save({"n": step}, storage_writer=writer)
    state = {"n": 0}
    load(state, storage_reader=StorageReader(tmp_path))
    assert state == {"n": 6}
    load(state, storage_reader=StorageReader(tmp_path, step=5))
    assert state == {"n": 5}
    load(state, storage_reader=StorageReader(tmp_path / directories(tmp_path)[1]))
    assert state == {"n": 6}


def test_overwrite(tmp_path: Path) -> None:
    """The same step again: replaced by default, as FileSystemWriter does, or refused."""
    save({"n": 1}, storage_writer=StorageWriter(tmp_path, step=5))
    save({"n": 2}, storage_writer=StorageWriter(tmp_path, step=6))
    save({"n": 3}, storage_writer=StorageWriter(tmp_path, step=5))
    assert len(directories(tmp_path)) == 2
    errors = failure(lambda: save({"n": 4}, storage_writer=StorageWriter(tmp_path, step=5, overwrite=False)))
    assert isinstance(errors[0], ckptd.StoreError)
    assert "is committed already" in str(errors[0])
    state = {"n": 0}
    load(state, storage_reader=StorageReader(tmp_path, step=5))
    assert state == {"n": 3}


def test_async_save(tmp_path: Path) -> None:
    """What was staged is what is saved, whatever training does meanwhile."""
    state = mixed()
    expected = copied(state)
    response = async_save(state, storage_writer=StorageWriter(tmp_path, step=1))
    state["weights"]["large"].zero_()
    response.result()
    loaded = blank(expected)
    load(loaded, storage_reader=StorageReader(tmp_path))
    assert equal(loaded, expected)


def test_instances_can_be_pickled(tmp_path: Path) -> None:
    """A process of async_save gets the writer so; also one that has saved, or failed to."""
    writer = StorageWriter(tmp_path, step=2, overwrite=False)
    save({"n": 1}, storage_writer=writer)
    failure(lambda: save({"n": 1}, storage_writer=writer))
    sent = pickle.loads(pickle.dumps(writer))
    assert (sent.path, sent.step, sent.overwrite) == (tmp_path, 2, False)
    reader = StorageReader(tmp_path)
    load({"n": 0}, storage_reader=reader)
    assert pickle.loads(pickle.dumps(reader)).path == tmp_path


def test_converting_with_the_tools_of_torch(tmp_path: Path) -> None:
    """dcp_to_torch_save knows only DCP's files; a reader of ours gives it the same state dict."""
    state = {"w": torch.arange(3), "list": [{"a": 1}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"))
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "file.pt")
    save(state, storage_writer=StorageWriter(tmp_path / "ours"))
    theirs = torch.load(tmp_path / "file.pt", weights_only=False)
    assert equal(_load_state_dict_from_keys(storage_reader=StorageReader(tmp_path / "ours")), theirs)


def test_a_plan_without_items(tmp_path: Path) -> None:
    save({}, storage_writer=StorageWriter(tmp_path))
    assert StorageReader(tmp_path).read_metadata().state_dict_metadata == {}
    assert SavePlan([]).items == []
