"""Files of torch.save in and out: views as they are saved, what torch.load makes of ours, and files that lie."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptd
from ckptd.core.box import CHUNK_BYTES
from ckptd.core.errors import CkptdError, FormatError
from ckptd.interop import pieces
from ckptd.interop.exporting import Exported, export
from ckptd.tiers.store import open_checkpoint
from tests.interop.foreign import DTYPES, imported, looked_into, same, some
from tests.interop.test_pickles import EXECUTING
from tests.operations.stores import write


def out(store: Path, target: Path, **options: Any) -> Exported:
    with open_checkpoint(store) as checkpoint:
        return export(checkpoint, str(target), "torch", **options)


def views() -> dict[str, torch.Tensor]:
    base = some(torch.float32, 8, 6)
    return {
        "plain": base,
        "transposed": base.T,
        "rows": base[2:5],
        "columns": base[:, 1:4],
        "steps": base[::3, ::2],
        "permuted": some(torch.int16, 2, 3, 4).permute(2, 0, 1),
        "one": base[3, 3],
        "none": base[4:4],
        "parameter": torch.nn.Parameter(some(torch.float32, 3)),
        **{f"dtype {dtype}": some(dtype, 2, 5) for dtype in DTYPES},
    }


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 24])
def test_views_are_read_as_they_were_saved(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes: strided views are cut into many chunks."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", chunk_bytes)
    torch.save(views(), tmp_path / "x.pt")
    found = imported(tmp_path / "x.pt", tmp_path / "store")
    assert {key: same(found.read(key), views()[key.removeprefix("model/")].detach()) for key in found.tensors} == {
        f"model/{name}": True for name in views()
    }


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = some(torch.float32, 64, 64)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "x.pt")
    imported(tmp_path / "x.pt", tmp_path / "store")
    with open_checkpoint(tmp_path / "store") as checkpoint:
        places = checkpoint.catalog().file_offset
        assert places[0] == places[1] != places[2]


def test_a_training_state(tmp_path: Path) -> None:
    """Nested values, as people save them, are named as ckptd names its own."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 4, "factors": [0.5, torch.tensor([2.0])]},
        "epoch": 4,
        "shape": torch.Size([2, 3]),
        "kinds": (torch.bfloat16, torch.device("cpu"), None, {1, 2}),
    }
    torch.save(state, tmp_path / "x.pt")
    found = imported(tmp_path / "x.pt", tmp_path / "store", name="")
    assert same(found.read("model/weight"), model.weight.detach())
    assert same(found.read("optimizer/state/0/exp_avg"), optimizer.state_dict()["state"][0]["exp_avg"])
    assert found.read("scheduler/factors/1").tolist() == [2.0]
    assert found.objects["optimizer/param_groups"] == optimizer.state_dict()["param_groups"]
    assert found.objects["scheduler/last_epoch"] == 4
    assert found.objects["scheduler/factors"][1].key == "scheduler/factors/1"
    assert (found.objects["epoch"], found.objects["shape"]) == (4, torch.Size([2, 3]))
    assert found.objects["kinds"] == state["kinds"]
    assert ckptd.load({"model": (fresh := torch.nn.Linear(3, 2))}, tmp_path / "store") == 0
    assert same(fresh.weight.detach(), model.weight.detach())
    only = imported(tmp_path / "x.pt", tmp_path / "only", name="", objects=False)
    assert (list(only.tensors), dict(only.objects)) == (list(found.tensors), {})


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    tensors = {f"{dtype}": some(dtype, 3, 5) for dtype in DTYPES} | {
        "scalar": some(torch.float64),
        "none": some(torch.int64, 0, 2),
    }
    ckptd.save({"model": tensors}, tmp_path / "store")
    done = out(tmp_path / "store", tmp_path / "x.pt")
    assert (done.tensors, done.pickle) == (len(tensors), True)
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert {name: same(found[name], tensor) for name, tensor in tensors.items()} == dict.fromkeys(tensors, True)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
    again = imported(tmp_path / "x.pt", tmp_path / "again")
    assert all(same(again.read(f"model/{name}"), tensor) for name, tensor in tensors.items())


def test_everything_of_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "counts": collections.Counter("aab"), "array": np.arange(3)}
    ckptd.save(state, tmp_path / "store")
    done = out(tmp_path / "store", tmp_path / "x.pt", prefix="")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert [reason.split(":")[0] for reason in done.left_out] == ["array"]
    assert all(same(found["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert found["optimizer"]["param_groups"][0]["lr"] == torch.tensor(0.5)
    assert found["optimizer"]["param_groups"][0]["params"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    assert same(found["optimizer"]["state"]["0.weight"]["exp_avg"], exp_avg)
    assert found["counts"] == collections.Counter("aab")


def test_large_records_are_aligned(tmp_path: Path) -> None:
    write(tmp_path / "store", 1, {f"model/{i}": np.arange(100 + i, dtype="u1") for i in range(5)})
    out(tmp_path / "store", tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert all(found[str(i)].data_ptr() % 64 == 0 for i in range(5))


# --- files that lie


def remade(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Writes a file of torch.save with its records passed through `change`: dict of name -> bytes."""
    stream = io.BytesIO()
    torch.save({"w": some(torch.float32, 4, 4), "v": some(torch.float32, 4)}, stream)
    with zipfile.ZipFile(stream) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


def pickled(change: Any) -> Any:
    def apply(records: dict[str, bytes]) -> None:
        records["data.pkl"] = change(records["data.pkl"])

    return apply


def view_pickle(storage: str, count: int, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickle of {"w": a view}, with whatever numbers."""

    class Storage:
        pass

    class View:
        def __reduce__(self) -> tuple[Any, ...]:
            arguments = (Storage(), offset, sizes, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Storage):
                return "storage", torch.FloatStorage, storage, "cpu", count
            return None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"w": View()})
    return stream.getvalue()


def viewing(*numbers: Any) -> Any:
    return pickled(lambda _: view_pickle(*numbers))


LIES: dict[str, tuple[Any, str]] = {
    "no pickle": (lambda records: records.pop("data.pkl"), "0 records data.pkl"),
    "no data": (lambda records: records.pop("data/0"), "no record 0"),
    "short data": (lambda records: records.update({"data/0": bytes(60)}), "of which 60 are there"),
    "big-endian": (lambda records: records.update(byteorder=b"big"), "not little-endian"),
    "half a pickle": (pickled(lambda data: data[:-20]), "a pickle that"),
    "storage larger than its record": (viewing("0", 17, 0, (17,), (1,)), "of which 64 are there"),
    "view beyond its storage": (viewing("0", 16, 1, (4, 4), (4, 1)), "reaches to byte 68 of a storage of 64"),
    "stride beyond its storage": (viewing("0", 16, 0, (2, 2), (99, 1)), "reaches to byte 404"),
    "negative offset": (viewing("0", 16, -1, (2,), (1,)), "reaches to byte 4"),
    "negative stride": (viewing("0", 16, 0, (4,), (-1,)), "strides [-1]"),
    "negative size": (viewing("0", 16, 0, (-4,), (1,)), "negative"),
    "sizes without strides": (viewing("0", 16, 0, (4, 4), (1,)), "sizes (4, 4) and strides (1,)"),
    "expanded": (viewing("0", 16, 0, (2**40, 4), (0, 1)), "share memory"),
    "overlapping windows": (viewing("0", 16, 0, (4, 8), (1, 1)), "share memory"),
    "huge sizes": (viewing("0", 16, 0, (2**61, 0, 2**61), (1, 1, 1)), None),
    "negative storage": (viewing("0", -1, 0, (4,), (1,)), "a storage of -1 elements"),
    "record that is a path": (viewing("../0", 16, 0, (4,), (1,)), "not named by a number"),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused(lie: str, tmp_path: Path) -> None:
    change, reason = LIES[lie]
    remade(tmp_path / "x.pt", change)
    if reason is None:
        assert len(looked_into(tmp_path / "x.pt").origin.catalog) == 1  # of no elements
        return
    with pytest.raises(FormatError, match=r"x\.pt") as caught:
        looked_into(tmp_path / "x.pt")
    assert reason in str(caught.value)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """A zip bomb is a compressed record; torch.save never writes one."""
    remade(tmp_path / "x.pt", lambda records: records.update({"data/0": bytes(2**24)}), zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        looked_into(tmp_path / "x.pt")


@pytest.mark.parametrize("attack", EXECUTING)
def test_nothing_is_executed(attack: str, tmp_path: Path) -> None:
    remade(tmp_path / "x.pt", pickled(lambda _: EXECUTING[attack](tmp_path / "mark", 2)))
    with pytest.raises(FormatError, match=r"x\.pt: "):
        looked_into(tmp_path / "x.pt")
    assert not (tmp_path / "mark").exists()


def test_truncated_and_changed_files(tmp_path: Path) -> None:
    """Cut anywhere, and with any byte of the archive's structure changed: an error of ours, or a file that is read."""
    torch.save({"w": some(torch.float32, 4)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(4, len(whole) - 1, 37):
        (tmp_path / "y.pt").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            looked_into(tmp_path / "y.pt")
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(generator.integers(4, len(whole)))] = int(generator.integers(256))
        (tmp_path / "y.pt").write_bytes(damaged)
        try:
            looked_into(tmp_path / "y.pt")
        except CkptdError:
            continue


def test_the_old_format_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"in its zip format"):
        looked_into(tmp_path / "x.pt")


def test_values_that_hold_themselves(tmp_path: Path) -> None:
    ring: list[Any] = []
    ring.append(ring)
    laughs: Any = ["ha"]
    for _ in range(50):
        laughs = [laughs, laughs]
    for value in (ring, laughs):
        with open(tmp_path / "x.pt", "wb") as file:
            torch.save({"v": value}, file)
        with pytest.raises(FormatError, match="nested more than"):
            looked_into(tmp_path / "x.pt")
    assert os.path.getsize(tmp_path / "x.pt") < 4096
