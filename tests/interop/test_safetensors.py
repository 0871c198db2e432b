"""safetensors in and out: files made by hand from the format's description, round trips, and files that lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptd
from ckptd.core.errors import CkptdError, ConfigError, FormatError, NotFoundError
from ckptd.interop import pieces
from ckptd.interop.exporting import export
from ckptd.plan.layout import Layout, Mesh
from ckptd.tiers.store import open_checkpoint
from tests.interop.foreign import DTYPES, entry, imported, looked_into, safetensors_bytes, same, some
from tests.operations.stores import flip, write


def parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a file, read as the format's page says."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def saved(tensors: dict[str, torch.Tensor], store: Path) -> Path:
    ckptd.save({"model": tensors, "epoch": 3}, store)
    return store


def out(store: Path, target: Path, kind: str = "safetensors", **options: Any) -> Any:
    with open_checkpoint(store) as checkpoint:
        return export(checkpoint, str(target), kind, **options)


def test_a_file_made_by_hand(tmp_path: Path) -> None:
    data = np.arange(6, dtype="<f4").tobytes() + bytes([1, 0, 1]) + b"\x80\x3f"
    header = {
        "b": entry("BOOL", [3], 24, 27),
        "__metadata__": {"made by": "hand"},
        "w": entry("F32", [2, 3], 0, 24),
        "h/x": entry("BF16", [], 27, 29),
        "e": entry("I64", [0, 5], 0, 0),
    }
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, data))
    found = imported(tmp_path / "x.safetensors", tmp_path / "store")
    assert list(found.tensors) == ["model/b", "model/e", "model/h\\/x", "model/w"]
    assert found.read("model/w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.read("model/b").tolist() == [True, False, True]
    assert found.read("model/h\\/x") == torch.tensor(1, dtype=torch.bfloat16)
    assert found.read("model/e").shape == (0, 5)


def test_export_and_import(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": some(dtype, 3, i + 1) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": some(torch.float32), "empty": some(torch.float32, 0, 4)}
    store = saved(tensors, tmp_path / "store")
    done = out(store, tmp_path / "out")
    assert (done.tensors, done.pickle) == (len(tensors), False)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    header, data = parsed(tmp_path / "out" / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(tuple(member["data_offsets"]) for member in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data)
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
    for name, member in header.items():
        first, last = member["data_offsets"]
        assert (
            data[first:last] == tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() or first == last
        )
        assert first % max(tensors[name].itemsize, 1) == 0
    found = imported(tmp_path / "out", tmp_path / "again")
    assert {key: same(found.read(key), tensors[key.removeprefix("model/")]) for key in found.tensors} == {
        f"model/{name}": True for name in tensors
    }


def test_several_files_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": some(torch.float32, 100) + i for i in range(5)}
    store = saved(tensors, tmp_path / "store")
    out(store, tmp_path / "out", shard_bytes=900)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "model.safetensors.index.json"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"] == {f"t{i}": names[i // 2] for i in range(5)}
    for place in (tmp_path / "out", tmp_path / "out" / "model.safetensors.index.json"):
        found = imported(place, tmp_path / f"again-{place.name}")
        assert all(same(found.read(f"model/{name}"), tensor) for name, tensor in tensors.items())


def test_a_part_of_a_checkpoint_under_other_names(tmp_path: Path) -> None:
    ckptd.save({"a": {"x": torch.ones(2)}, "b": {"y": torch.zeros(3), "z": [1]}}, tmp_path / "store")
    assert out(tmp_path / "store", tmp_path / "all", prefix="").tensors == 2
    assert set(parsed(tmp_path / "all" / "model.safetensors")[0]) == {"__metadata__", "a.x", "b.y"}
    done = out(tmp_path / "store", tmp_path / "b", prefix="b")
    assert set(parsed(tmp_path / "b" / "model.safetensors")[0]) == {"__metadata__", "y"}
    assert done.left_out == ["z: safetensors holds tensors only"] or done.left_out == []
    found = imported(tmp_path / "b", tmp_path / "again", name="")
    assert list(found.tensors) == ["y"]
    with pytest.raises(NotFoundError, match=r"no tensor under 'model/'; there is a, b"):
        out(tmp_path / "store", tmp_path / "c")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    store = saved({"x": torch.ones(2, dtype=torch.complex128)}, tmp_path / "store")
    with pytest.raises(ConfigError, match="safetensors lacks, such as 'x' "):
        out(store, tmp_path / "out")
    write(tmp_path / "alike", 1, {"model/a.b": np.zeros(2), "model/a/b": np.zeros(2)})
    with pytest.raises(ConfigError, match=r"would both be called 'a\.b'"):
        out(tmp_path / "alike", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        out(store, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alike", "store", "there"]


def test_a_damaged_checkpoint_exports_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "store", 1, {"model/w": np.random.default_rng(0).standard_normal(4000)}, chunk_bytes=4000)
    flip(next(source.glob("data/*")), 9000)
    with pytest.raises(FormatError, match="CRC32C"):
        out(tmp_path / "store", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_leftovers_of_an_export_that_was_killed(tmp_path: Path) -> None:
    store = saved({"x": torch.ones(2)}, tmp_path / "store")
    (tmp_path / ".out.ckptd-export").mkdir()
    (tmp_path / ".out.ckptd-export" / "half").write_bytes(b"x")
    out(store, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_tensors_through_any_chunks(data: st.DataObject) -> None:
    """Chunked at random, exported, imported with a layout: the same, element by element."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tensors = {
        f"model/{i}": generator.integers(0, 2**31, data.draw(st.lists(st.integers(0, 9), max_size=3))).astype(dtype)
        for i, dtype in enumerate(data.draw(st.lists(st.sampled_from(["uint8", "int32", "float64"]), min_size=1)))
    }
    layout = Layout.parse(
        '[[placement]]\nkeys = "*"\nshard = { mesh = "tp", dim = 0 }', Mesh.parse(f"tp={data.draw(st.integers(1, 5))}")
    )
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "a", 1, tensors, chunk_bytes=data.draw(st.sampled_from([16, 100, 10_000])))
        out(Path(place) / "a", Path(place) / "b", shard_bytes=data.draw(st.sampled_from([50, 500, 50_000])))
        found = imported(Path(place) / "b", Path(place) / "c", layout=layout)
        assert sorted(found.tensors) == sorted(tensors)
        for key, value in tensors.items():
            np.testing.assert_array_equal(found.read(key).numpy(), value)


# --- files that lie

GOOD = entry("F32", [2, 3], 0, 24)
FLOATS = bytes(24)

ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "only a length": (safetensors_bytes(b"")[:7], "not a safetensors file"),
    "huge header": (safetensors_bytes({}, length=2**63), "a header of 9223372036854775808 bytes"),
    "header beyond the limit": (safetensors_bytes({}, length=100_000_001), "at most 100000000"),
    "header beyond the file": (safetensors_bytes({}, length=300), "a header of 300 bytes in a file of 10"),
    "not JSON": (safetensors_bytes(b"{'a': 1}"), "its header"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "its header"),
    "a list": (safetensors_bytes([1]), "its header"),
    "deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "its header"),
    "huge number": (safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "its header"),
    "a name twice": (
        safetensors_bytes(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "twice",
    ),
    "unknown member": (safetensors_bytes({"a": {**GOOD, "file": "/etc/passwd"}}, FLOATS), "its header"),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"a": 1}}), "its header"),
    "negative offset": (safetensors_bytes({"a": entry("F32", [2, 3], -24, 0)}, FLOATS), "has bytes -24 to 0"),
    "offsets beyond the file": (safetensors_bytes({"a": entry("U8", [900], 0, 900)}, FLOATS), "tensors end at byte"),
    "overlap": (
        safetensors_bytes({"a": GOOD, "b": entry("F32", [2, 3], 12, 36)}, bytes(36)),
        "tensor 'b': has bytes 12 to 36; expected 24 to 48",
    ),
    "same bytes": (safetensors_bytes({"a": GOOD, "b": GOOD}, FLOATS), "tensor 'b'"),
    "gap": (safetensors_bytes({"a": GOOD, "b": entry("U8", [1], 25, 26)}, bytes(26)), "tensor 'b'"),
    "bytes that nobody has": (safetensors_bytes({"a": GOOD}, bytes(25)), "tensors end at byte"),
    "cut short": (safetensors_bytes({"a": GOOD}, bytes(23)), "tensors end at byte"),
    "dtype of another size": (safetensors_bytes({"a": entry("F64", [2, 3], 0, 24)}, FLOATS), "48 bytes for its shape"),
    "unknown dtype": (safetensors_bytes({"a": entry("F31", [2, 3], 0, 24)}, FLOATS), "dtype 'F31' is unknown"),
    "negative size": (safetensors_bytes({"a": entry("F32", [-2, -3], 0, 24)}, FLOATS), "shape with a -2"),
    "sizes that wrap around": (
        safetensors_bytes({"a": entry("F32", [2**32, 2**32, 6], 0, 24)}, FLOATS),
        "more than 2^62 bytes",
    ),
    "100 dimensions": (safetensors_bytes({"a": entry("U8", [1] * 100, 0, 1)}, b"x"), "is not a shape"),
    "a long name": (safetensors_bytes({"a" * 2000: GOOD}, FLOATS), "a name of 2006 bytes"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800":' + json.dumps(GOOD).encode() + b"}", FLOATS), "no UTF-8"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_files_that_lie_are_refused(attack: str, tmp_path: Path) -> None:
    content, reason = ATTACKS[attack]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.safetensors") as caught:
        looked_into(tmp_path / "x.safetensors")
    assert reason in str(caught.value)


def test_a_bool_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02"))
    with pytest.raises(FormatError, match="bytes other than 0 and 1"):
        imported(tmp_path / "x.safetensors", tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../x.safetensors"}, "expected one in the same directory"),
        ({"a": "/x.safetensors"}, "expected one in the same directory"),
        ({"a": "x.bin"}, "expected one in the same directory"),
        ({"a": "none.safetensors"}, "no such file"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "lists 1 tensors that no file has, such as 'b'"),
        ({"a": "y.safetensors", "c": "x.safetensors"}, "says tensor 'a' is in 'y.safetensors'"),
        ({"a": 1}, "not an index"),
    ],
)
def test_indexes_that_lie_are_refused(weight_map: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": GOOD}, FLOATS))
    (tmp_path / "y.safetensors").write_bytes(safetensors_bytes({"c": GOOD}, FLOATS))
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CkptdError, match=str(tmp_path)) as caught:
        looked_into(tmp_path)
    assert reason in str(caught.value)


def test_special_files_and_other_things(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="regular file"):
        looked_into(tmp_path / "x.safetensors")
    (tmp_path / "other").mkdir()
    with pytest.raises(FormatError, match=r"expected a \.safetensors file"):
        looked_into(tmp_path / "other")
    with pytest.raises(NotFoundError):
        looked_into(tmp_path / "none")
    (tmp_path / "o.safetensors").write_bytes(safetensors_bytes({"objects/x@0": GOOD}, FLOATS))
    with pytest.raises(ConfigError, match="under another name"):
        looked_into(tmp_path / "o.safetensors", name="objects")


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry("U8", [1000], 0, 1000)}, bytes(1000)))
    monkeypatch.setattr(pieces, "_check", lambda piece, files: os.truncate(path, 600))
    with pytest.raises(FormatError, match="cut short"):
        imported(path, tmp_path / "store")


def test_torch_is_not_loaded(tmp_path: Path) -> None:
    """Reading any of the formats, and writing safetensors, is the work of a process without torch."""
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": GOOD}, FLOATS))
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pt")
    out(saved({"a": torch.ones(2, 3)}, tmp_path / "store"), tmp_path / "x.dcp", "dcp")
    script = (
        "import sys; from ckptd.cli.main import app\n"
        "for name in ('x.pt', 'x.dcp', 'x.safetensors'):\n"
        "    app(['import', name, 'from-' + name], standalone_mode=False)\n"
        "app(['export', 'from-x.safetensors', 'out'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=tmp_path)
    assert parsed(tmp_path / "out" / "model.safetensors")[1] == FLOATS
