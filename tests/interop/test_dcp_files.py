"""Directories of torch.distributed.checkpoint in and out: what its own writer makes, what its own reader takes, and
directories that lie."""

from __future__ import annotations

import collections
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ckptd
from ckptd.core.errors import CkptdError, ConfigError, FormatError
from ckptd.interop.exporting import Exported, export
from ckptd.operations.diff import diff
from ckptd.plan import recut
from ckptd.tiers.store import open_checkpoint
from tests.interop.foreign import DTYPES, imported, looked_into, same, some
from tests.interop.test_pickles import EXECUTING


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def out(store: Path, target: Path, **options: Any) -> Exported:
    with open_checkpoint(store) as checkpoint:
        return export(checkpoint, str(target), "dcp", **options)


def state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "dtypes": {str(dtype): some(dtype, 2, 5) for dtype in DTYPES},
        "views": {
            "transposed": some(torch.float32, 4, 3).T,
            "part": some(torch.float32, 9)[2:7],
            "none": torch.ones(0, 2),
        },
        "list": [1, torch.ones(2), {"x": "y"}],
        "epoch": 4,
        "counts": (1, torch.bfloat16),
    }


def test_what_dcp_writes(tmp_path: Path) -> None:
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path / "dcp")
    found = imported(tmp_path / "dcp", tmp_path / "store", name="")
    for group in ("model", "dtypes", "views"):
        for name, tensor in saved[group].items():
            assert same(found.read(f"{group}/{name}"), tensor), name
    assert same(found.read("optimizer/state/0/exp_avg"), saved["optimizer"]["state"][0]["exp_avg"])
    assert found.read("list/1").tolist() == [1, 1]
    assert found.objects["optimizer/param_groups"] == saved["optimizer"]["param_groups"]
    assert (found.objects["list"][0], found.objects["list"][2]) == (1, {"x": "y"})
    assert (found.objects["epoch"], found.objects["counts"]) == (4, saved["counts"])
    only = imported(tmp_path / "dcp", tmp_path / "only", name="x", objects=False)
    assert (sorted(only.tensors), dict(only.objects)) == (sorted(f"x/{key}" for key in found.tensors), {})


class Sharding(DefaultSavePlanner):
    """Saves a matrix as ranks of a mesh would: in boxes, some of them laid out column by column."""

    def __init__(self, tensor: torch.Tensor, boxes: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self._tensor = tensor
        self._boxes = boxes

    def create_local_plan(self) -> SavePlan:
        properties = TensorProperties(dtype=self._tensor.dtype)
        items = [
            WriteItem(
                MetadataIndex("w", torch.Size((row, column)), index),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size((row, column)), torch.Size((rows, columns))),
                    properties,
                    self._tensor.size(),
                ),
            )
            for index, (row, column, rows, columns) in enumerate(self._boxes)
        ]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        from torch.distributed.checkpoint.default_planner import create_default_global_save_plan

        return create_default_global_save_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Any:
        row, column, rows, columns = self._boxes[write_item.index.index or 0]
        part = self._tensor[row : row + rows, column : column + columns]
        return part.T.contiguous().T if column else part.contiguous()


BOXES = [(0, 0, 4, 6), (4, 0, 2, 6), (0, 6, 6, 3)]


def test_shards_of_any_kind(tmp_path: Path) -> None:
    whole = some(torch.float32, 6, 9)
    dcp.save({"w": whole}, checkpoint_id=tmp_path / "dcp", planner=Sharding(whole, BOXES))
    assert same(imported(tmp_path / "dcp", tmp_path / "store").read("model/w"), whole)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    whole = some(torch.float32, 6, 9)
    dcp.save({"w": whole}, checkpoint_id=tmp_path / "dcp", planner=Sharding(whole, BOXES))

    def drop(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks.pop(1)

    change(tmp_path / "dcp", drop)
    with pytest.raises(FormatError, match=r"model/w: no chunk holds elements \[4:6, 0:6\]"):
        imported(tmp_path / "dcp", tmp_path / "store")
    assert not list((tmp_path / "store").glob("step-*"))


def test_dcp_loads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recut, "CHUNK_BYTES", 64)  # several chunks of a tensor
    tensors = {f"{dtype}": some(dtype, 5, 7) for dtype in DTYPES} | {
        "scalar": some(torch.float64),
        "none": torch.ones(0, 2),
    }
    ckptd.save({"model": tensors}, tmp_path / "store")
    done = out(tmp_path / "store", tmp_path / "dcp", shard_bytes=20_000)
    assert (done.tensors, done.pickle) == (len(tensors), True)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) > 1
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(fresh, checkpoint_id=tmp_path / "dcp")
    assert {name: same(fresh[name], tensors[name]) for name in tensors} == dict.fromkeys(tensors, True)
    again = imported(tmp_path / "dcp", tmp_path / "again")
    assert all(same(again.read(f"model/{name}"), tensor) for name, tensor in tensors.items())


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * steps)
    for _ in range(steps):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_job_of_dcp_goes_on_with_ckptd(tmp_path: Path) -> None:
    """The names of get_state_dict are ckptd's own, so that ckptd.load fills a job from what DCP wrote."""
    model, optimizer = trained(2)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "dcp")
    imported(tmp_path / "dcp", tmp_path / "store", name="")
    other, fresh = trained(1)
    ckptd.load({"model": other, "optimizer": fresh}, tmp_path / "store")
    assert same(other.weight.detach(), model.weight.detach())
    assert fresh.param_groups[0]["lr"] == 0.2
    assert same(fresh.state[other.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    assert same(fresh.state[other.bias]["step"], optimizer.state[model.bias]["step"])


def test_everything_of_a_checkpoint(tmp_path: Path) -> None:
    """A job of ckptd goes on with DCP: what set_state_dict wants is there, by DCP's names."""
    model, optimizer = trained(2)
    ckptd.save({"model": model, "optimizer": optimizer, "tags": {"a": [1, "x"]}}, tmp_path / "store")
    out(tmp_path / "store", tmp_path / "dcp", prefix="")
    other, fresh = trained(1)
    model_state, optimizer_state = get_state_dict(other, fresh)
    loaded = {"model": model_state, "optimizer": optimizer_state, "tags": {"a": []}}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    set_state_dict(other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert same(other.weight.detach(), model.weight.detach())
    assert fresh.param_groups[0]["lr"] == 0.2
    assert same(fresh.state[other.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    again = imported(tmp_path / "dcp", tmp_path / "again", name="")
    with open_checkpoint(tmp_path / "store") as before, open_checkpoint(tmp_path / "again") as after:
        difference = diff(before, after)
        assert (difference.only_source, difference.only_target, difference.changed, difference.tensors) == ([],) * 4
        # Generators stay behind; DCP takes dicts apart, and their entries stay so.
        assert {value.path.partition("/")[0] for value in difference.objects} == {"rng", "tags"}
    assert again.objects["tags/a"] == [1, "x"]


def test_names_that_would_be_alike(tmp_path: Path) -> None:
    ckptd.save({"model": {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}}, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"two entries would be called 'a\.b'"):
        out(tmp_path / "store", tmp_path / "dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# --- directories that lie


def change(directory: Path, edit: Callable[[Metadata], Any]) -> None:
    """Edits the metadata as a hostile writer could."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def info(metadata: Metadata, name: str = "w") -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def place(**fields: Any) -> Callable[[Metadata], None]:
    return lambda metadata: info(metadata).__dict__.update(fields)


def tensor(**fields: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.state_dict_metadata["w"].__dict__.update(fields)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def dtype_lie(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.float64


def swapped(metadata: Metadata) -> None:
    first, second = info(metadata, "w"), info(metadata, "v")
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__


def planned(*path: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.planner_data.update(w=path)


LIES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "path out of the directory": (place(relative_path="../x"), "expected a file of the directory"),
    "absolute path": (place(relative_path="/etc/passwd"), "expected a file of the directory"),
    "the directory": (place(relative_path=".."), "expected a file of the directory"),
    "no such file": (place(relative_path="none.distcp"), "no such file"),
    "negative offset": (place(offset=-5), "says it has bytes -5"),
    "length beyond the file": (place(length=2**60), "says it has bytes"),
    "negative length": (place(length=-1), "says it has bytes"),
    "offset that is no number": (place(offset=1.5), "not placed"),
    "transformed": (place(transform_descriptors=["zstd"]), "was transformed"),
    "overlap": (lambda metadata: info(metadata, "v").__dict__.update(offset=info(metadata).offset + 1), "overlaps"),
    "dtype that is another": (dtype_lie, ".metadata says torch.float64"),
    "dtype that is none": (
        lambda metadata: metadata.state_dict_metadata["w"].properties.__dict__.update(dtype="float32"),
        "dense tensor of a known dtype",
    ),
    "another tensor": (swapped, ".metadata says"),
    "no chunks": (tensor(chunks=[]), "has no chunks"),
    "chunk outside": (tensor(chunks=[chunk((3, 0), (4, 4))]), "lies outside of shape [4, 4]"),
    "chunk of other dimensions": (tensor(chunks=[chunk((0,), (4,))]), "lies outside of shape"),
    "chunk that is stored nowhere": (tensor(chunks=[chunk((2, 0), (2, 4))]), "does not say where offsets (2, 0)"),
    "a larger shape": (tensor(size=torch.Size((8, 4))), "no chunk holds elements"),
    "a shape of 2^80": (tensor(size=torch.Size((2**40, 2**40))), "is not a shape"),
    "chunks that are no list": (tensor(chunks=7), "not metadata that can be read"),
    "bytes that are a tensor": (
        lambda metadata: metadata.state_dict_metadata.update(w=BytesStorageMetadata()),
        "does not say where offsets None",
    ),
    "an unknown kind": (lambda metadata: metadata.state_dict_metadata.update(w=[1]), "neither a tensor nor an object"),
    "no storage_data": (lambda metadata: metadata.__dict__.update(storage_data=None), "storage_data is no dict"),
    "a place inside a tensor": (planned("v", "w"), "planner_data: two entries"),
    "a place inside an object": (planned("o", 1), "planner_data: "),
    "a place that is taken": (planned("v"), "two entries lie at the place"),
    "a list of 2^60": (planned("l", 2**60), "an impossible place"),
    "a list of gaps": (planned("l", 2**19), "of which most is missing"),
    "a negative place": (planned("l", -1), "an impossible place"),
    "a deep place": (planned(*["x"] * 5000), "nested more than"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    dcp.save({"w": some(torch.float32, 4, 4), "v": some(torch.int16, 5), "o": 3}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.mark.parametrize("lie", LIES)
def test_directories_that_lie_are_refused(lie: str, directory: Path, tmp_path: Path) -> None:
    edit, reason = LIES[lie]
    change(directory, edit)
    with pytest.raises(CkptdError) as caught:
        imported(directory, tmp_path / "store")
    assert str(directory) in str(caught.value)
    assert reason.replace("torch.", "") in str(caught.value)


@pytest.mark.parametrize("attack", EXECUTING)
def test_nothing_is_executed(attack: str, directory: Path, tmp_path: Path) -> None:
    (directory / ".metadata").write_bytes(EXECUTING[attack](tmp_path / "mark", 4))
    with pytest.raises(FormatError, match=r"\.metadata: "):
        looked_into(directory)
    assert not (tmp_path / "mark").exists()


class Dropper:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


@dataclasses.dataclass
class Hidden:
    """Something that only pickle could load."""

    value: int


def test_objects_that_would_execute(tmp_path: Path) -> None:
    """In the metadata, beside it where nobody looks, and as an object: each is refused, none executed."""
    mark = tmp_path / "mark"
    dcp.save({"w": torch.ones(2), "o": Dropper(mark)}, checkpoint_id=tmp_path / "object")
    with pytest.raises(FormatError, match=r"object 'o': names posix\.system, which is not admitted"):
        looked_into(tmp_path / "object")
    assert len(looked_into(tmp_path / "object", objects=False).origin.catalog) == 1
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "planner")
    change(tmp_path / "planner", lambda metadata: metadata.planner_data.update(x=Dropper(mark)))
    with pytest.raises(FormatError, match="not admitted"):
        looked_into(tmp_path / "planner")
    dcp.save({"w": torch.ones(2), "o": Hidden(1)}, checkpoint_id=tmp_path / "hidden")
    with pytest.raises(FormatError, match=r"Hidden, which is not admitted"):
        looked_into(tmp_path / "hidden")
    assert not mark.exists()


def test_truncated_directories(directory: Path) -> None:
    whole = (directory / ".metadata").read_bytes()
    for length in range(0, len(whole), 61):
        (directory / ".metadata").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            looked_into(directory)
    (directory / ".metadata").write_bytes(whole)
    data = directory / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(FormatError, match="says it has bytes"):
        looked_into(directory)


def test_counters_and_ordered_dicts(tmp_path: Path) -> None:
    value = (collections.Counter("aab"), collections.OrderedDict(z=1, y=2))
    dcp.save({"w": torch.ones(2), "o": value}, checkpoint_id=tmp_path / "dcp")
    assert imported(tmp_path / "dcp", tmp_path / "store", name="").objects["o"] == value
