"""`ckptd export` and `ckptd import`: text, JSON, what is noted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptd.cli.main import app
from ckptd.tiers.store import open_checkpoint
from tests.operations.stores import write


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tensors = {"model/w": np.arange(4096, dtype="f4").reshape(64, 64), "model/b": np.zeros(4), "ema/w": np.ones(2)}
    write(tmp_path / "store", 5, tensors, {"model/extra": {"x": 1}}, chunk_bytes=4096)
    return tmp_path / "store"


def test_there_and_back(store: Path, tmp_path: Path) -> None:
    code, out, err = call("export", store, tmp_path / "out")
    assert (code, err) == (0, "Note: left out extra: safetensors holds tensors only\n")
    assert out == f"exported 2 tensors, 16.0 KiB: {tmp_path / 'out'}\n"
    (tmp_path / "rules.toml").write_text('[[placement]]\nkeys = "*.typo"\nreplicate = true\n')
    options = ("--step", "5", "--mesh", "tp=2", "--layout", tmp_path / "rules.toml")
    code, out, _ = call("import", tmp_path / "out", tmp_path / "again", *options, "--dry-run")
    assert (code, out.splitlines()[0]) == (0, "found       safetensors, 0 objects")
    assert not (tmp_path / "again").exists()
    code, out, err = call("import", tmp_path / "out", tmp_path / "again", *options)
    location = open_checkpoint(tmp_path / "again").location
    assert (code, out) == (0, f"imported safetensors, 16.0 KiB in 2 chunks, 1 part: {location}\n")
    assert err == "Note: no tensor matches placement 1 (*.typo)\n"
    assert open_checkpoint(tmp_path / "again").id.step == 5
    code, out, _ = call("diff", store, tmp_path / "again", "--json")
    assert json.loads(out)["only_source"] == ["ema/w"]
    assert json.loads(out)["tensors"] == []
    code, out, _ = call("import", tmp_path / "out", tmp_path / "again", *options)
    assert (code, out) == (0, f"already there, whole: {location}\n")


@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_pickle_is_named(kind: str, store: Path, tmp_path: Path) -> None:
    code, out, err = call("export", store, tmp_path / "out", "--format", kind)
    assert (code, out) == (0, f"exported 2 tensors and 1 object, 16.0 KiB: {tmp_path / 'out'}\n")
    assert err.startswith(f"Note: {tmp_path / 'out'} contains pickle")
    code, out, _ = call("import", tmp_path / "out", tmp_path / "again", "--json")
    document = json.loads(out)
    assert (code, document["format"], document["objects"]) == (0, kind, 1)
    assert document["plan"]["tensors"] == 2
    code, out, _ = call("import", tmp_path / "out", tmp_path / "only", "--tensors-only", "--name", "x", "--json")
    assert (code, json.loads(out)["objects"]) == (0, 0)


def test_json_of_an_export(store: Path, tmp_path: Path) -> None:
    code, out, _ = call("export", store, tmp_path / "out", "--json", "--prefix", "ema", "--shard-size", "1K")
    assert (code, json.loads(out)) == (
        0,
        {
            "location": str(tmp_path / "out"),
            "tensors": 1,
            "objects": 0,
            "bytes": 16,
            "contains_pickle": False,
            "left_out": [],
        },
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "store", "store"), 1, "exists"),
        (("export", "store", "out", "--prefix", "none"), 1, "no tensor under 'none/'; there is ema, model"),
        (("export", "store", "none/out"), 1, "cannot be written"),
        (("export", "store", "out", "--format", "onnx"), 2, "onnx"),
        (("export", "store", "out", "--shard-size", "big"), 2, "not a size"),
        (("import", "store", "out"), 1, "expected a .safetensors file"),
        (("import", "none", "out"), 1, "no such file"),
    ],
)
def test_what_is_refused(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
