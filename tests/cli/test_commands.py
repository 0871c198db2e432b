"""Every reading command on small stores: text, JSON, exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptd.cli.main import app
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.format.objects import encode
from ckptd.tiers.store import Store
from tests.operations.stores import FIRST, SECOND, flip, newer, write


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two epochs: steps 10 and 20 of the first, which is dead from 10 on; step 12 of the second."""
    place = tmp_path / "store"
    weights = np.arange(2048, dtype="f4").reshape(64, 32)
    objects = {"scheduler": {"last_epoch": 10, "base_lrs": [0.1]}}
    rng = np.frombuffer(encode((1, float("nan"))), np.uint8)
    write(place, 10, {"model/w": weights, "model/b": np.zeros(32)}, objects)
    write(place, 20, {"model/w": weights + 2, "model/b": np.zeros(32)}, objects)
    opened = Store.open(place)
    opened.write_record(EpochRecord(FIRST))
    opened.write_record(EpochRecord(SECOND, SnapshotId(FIRST, 10)))
    tensors = {"model/w": weights + 1, "model/b": np.zeros(32), "objects/rng/python@0": rng}
    write(
        place, 12, tensors, {"scheduler": {"last_epoch": 12, "base_lrs": [0.1]}, "groups": [{"lr": 0.5}]}, epoch=SECOND
    )
    return place


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def document(*arguments: str | Path) -> tuple[int, Any]:
    code, out, err = call(*arguments, "--json")
    assert err == ""
    return code, json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def directory(store: Path, step: int) -> Path:
    return next(store.glob(f"step-{step:08d}.*"))


# --- ls


def test_ls(store: Path) -> None:
    code, out, err = call("ls", store)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [(row[0], row[1], row[-2], row[-1]) for row in rows] == [
        ("12", "2", "live", directory(store, 12).name),
        ("20", "1", "dead", directory(store, 20).name),
        ("10", "1", "live", directory(store, 10).name),
    ]


def test_ls_json(store: Path) -> None:
    code, found = document("ls", store)
    assert code == 0
    assert (found["store"], found["broken"], found["uncommitted"]) == (str(store), [], [])
    first = found["checkpoints"][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first.pop("created"))
    assert first.pop("bytes") > 8192 / 4
    assert first == {
        "name": directory(store, 12).name,
        "step": 12,
        "epoch": str(SECOND),
        "job": "job-1",
        "live": True,
        "chunks": 3,
        "writers": 1,
    }
    assert document("ls", store)[1]["checkpoints"][1:] == found["checkpoints"][1:]


def test_ls_says_which_are_broken_and_why(store: Path) -> None:
    """Everything else is still listed; the exit status is 1. A leftover alone is not a failure."""
    (directory(store, 20) / "COMMIT").unlink()
    assert call("ls", store)[0] == 0
    newer(directory(store, 10))
    code, out, _ = call("ls", store)
    assert code == 1
    assert f"uncommitted {directory(store, 20).name}: " in out
    assert re.search(rf"^broken {directory(store, 10).name}: .*version.*2", out, re.MULTILINE)
    assert directory(store, 12).name in out
    code, found = document("ls", store)
    assert code == 1
    assert found["uncommitted"] == [directory(store, 20).name]
    assert [broken["name"] for broken in found["broken"]] == [directory(store, 10).name]
    assert len(found["checkpoints"]) == 1


def test_ls_of_an_empty_store(tmp_path: Path) -> None:
    assert call("ls", tmp_path) == (0, f"no checkpoints in {tmp_path}\n", "")
    assert document("ls", tmp_path)[1]["checkpoints"] == []


# --- show


def test_show(store: Path) -> None:
    code, out, _ = call("show", store, "--objects")
    assert code == 0
    assert f"checkpoint  {directory(store, 12).name}\n" in out
    assert "job         job-1\n" in out
    assert f"step        12 (epoch {SECOND})\n" in out
    assert "2 tensors, 3 objects, 3 chunks, 1 writer\n" in out
    assert re.search(r"^model/w +float32 +\[64, 32\] +1 +8\.0 KiB +\d\.\d KiB +\d+\.\d\dx", out, re.MULTILINE)
    assert "last_epoch: 12" in out
    assert out.index("groups\n") < out.index("0\n", out.index("groups")) < out.index("lr: 0.5")
    assert "rng/python@0: (1, nan)" in out


def test_show_json(store: Path) -> None:
    code, found = document("show", directory(store, 10), "--objects", "--tensors", "*/w")
    assert code == 0
    assert (found["step"], found["epoch"], found["job"], found["format"]) == (10, str(FIRST), "job-1", 1)
    assert found["totals"]["tensors"] == 2
    (tensor,) = found["tensors"]
    stored = tensor.pop("stored")
    assert tensor.pop("ratio") == round(8192 / stored, 4)
    assert tensor == {
        "key": "model/w",
        "dtype": "float32",
        "shape": [64, 32],
        "chunks": 1,
        "bytes": 8192,
        "ranks": [],
    }
    assert found["objects"] == {"scheduler": {"last_epoch": 10, "base_lrs": [0.1]}}
    assert "objects" not in document("show", store)[1]
    assert document("show", store, "--objects")[1]["objects"]["rng/python@0"] == [1, "nan"]


def test_show_a_hostile_key(tmp_path: Path) -> None:
    write(tmp_path / "s", 1, {"model/\x1b[2J[red]\nx": np.zeros(1)}, {"o\x07": "\x1b]0;title\x07"})
    code, out, _ = call("show", tmp_path / "s", "--objects")
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "model/\\x1b[2J[red]\\nx" in out


# --- verify


def test_verify(store: Path) -> None:
    code, out, _ = call("verify", store, "--all")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", directory(store, 12).name],
        ["ok", directory(store, 20).name],
        ["ok", directory(store, 10).name],
    ]
    assert call("verify", store)[1].splitlines()[0].split()[:2] == ["ok", directory(store, 12).name]


def test_verify_names_every_problem(store: Path) -> None:
    broken = directory(store, 20)
    flip(next((broken / "data").iterdir()), 300)
    assert call("verify", store)[0] == 0
    code, out, _ = call("verify", store, "--all")
    assert code == 1
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert [line[0] for line in lines] == ["ok", "BROKEN", "ok"]
    assert lines[1][1] == broken.name
    assert "model/w" in lines[1][2]
    code, found = document("verify", broken)
    assert code == 1
    assert found["ok"] is False
    assert [(c["name"], c["ok"], len(c["problems"])) for c in found["checkpoints"]] == [(broken.name, False, 1)]


# --- diff


def test_diff(store: Path) -> None:
    code, out, _ = call("diff", directory(store, 10), store)
    assert code == 1
    assert out.splitlines() == [
        "bytes differ    model/w: 2048 elements of float32 [64, 32], max abs difference 1",
        "object differs  groups: (absent) -> [{'lr': 0.5}]",
        "object differs  rng/python@0: (absent) -> (1, nan)",
        "object differs  scheduler/last_epoch: 10 -> 12",
    ]
    assert call("diff", store, store) == (0, "equal: 2 tensors and all objects\n", "")


def test_diff_json(store: Path, tmp_path: Path) -> None:
    write(tmp_path / "t", 1, {"model/w": np.full((64, 32), np.nan, "f4"), "model/b": np.zeros(31), "new": np.zeros(1)})
    code, found = document("diff", directory(store, 10), tmp_path / "t")
    assert code == 1
    assert found == {
        "equal": False,
        "compared": 1,
        "only_source": [],
        "only_target": ["new"],
        "changed": [
            {
                "key": "model/b",
                "source": {"dtype": "float64", "shape": [32]},
                "target": {"dtype": "float64", "shape": [31]},
            }
        ],
        "tensors": [
            {
                "key": "model/w",
                "dtype": "float32",
                "shape": [64, 32],
                "elements": 2048,
                "max_abs": "nan",
                "ranks": [],
            }
        ],
        "objects": [
            {"path": "scheduler", "source": "{'base_lrs': [0.1], 'last_epoch': 10}", "target": None},
        ],
    }
    assert document("diff", store, store) == (
        0,
        {
            "equal": True,
            "compared": 2,
            "only_source": [],
            "only_target": [],
            "changed": [],
            "tensors": [],
            "objects": [],
        },
    )


# --- prune


def test_prune_wants_the_word(store: Path) -> None:
    """A running job prunes for itself; a person has to say that there is none."""
    before = sorted(store.rglob("*"))
    code, out, err = call("prune", store, "--keep", "1")
    assert (code, out) == (2, "")
    assert "--offline" in err
    assert call("prune", store, "--keep", "0", "--offline")[0] == 2
    assert sorted(store.rglob("*")) == before


def test_prune(store: Path) -> None:
    write(store, 30, {"w": np.zeros(1)}, epoch=SECOND)
    leftover = directory(store, 30)
    (leftover / "COMMIT").unlink()
    names = [directory(store, step).name for step in (20, 10)]
    expected = {
        "store": str(store),
        "removed": False,
        "kept": [directory(store, 12).name],
        "checkpoints": names,
        "leftovers": [leftover.name],
    }
    before = sorted(store.rglob("*"))
    assert document("prune", store, "--keep", "1", "--dry-run", "--offline") == (0, expected)
    assert sorted(store.rglob("*")) == before
    code, out, _ = call("prune", store, "--keep", "1", "--offline")
    assert code == 0
    assert out.splitlines() == [
        *(f"removed checkpoint {name}" for name in names),
        f"removed leftover   {leftover.name}",
        "removed 2 checkpoints and 1 leftover; kept: 1",
    ]
    assert [path.name for path in store.glob("step-*")] == expected["kept"]
    assert document("prune", store, "--keep", "1", "--offline")[1]["checkpoints"] == []


# --- what is wrong with the arguments


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_place_that_is_none(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on stderr that names the thing; nothing on stdout; with --json too."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    file = tmp_path / "file"
    file.write_text("x")
    for place in (tmp_path / "absent", file, "s3://bucket/run"):
        for flags in ((), ("--json",)):
            code, out, err = call(command, place, *flags)
            assert (code, out) == (1, "")
            assert err.startswith("Error: ")
            assert err.count("\n") == 1
            assert str(place) in err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_store_without_checkpoints(command: str, tmp_path: Path) -> None:
    code, out, err = call(command, tmp_path)
    assert (code, out) == (1, "")
    assert f"{tmp_path}: no committed checkpoint" in err


def test_show_and_diff_of_a_broken_checkpoint(store: Path) -> None:
    broken = directory(store, 10)
    flip(next((broken / "manifest.parquet").iterdir()), 50)
    for arguments in (("show", broken), ("diff", broken, store), ("diff", store, broken)):
        code, out, err = call(*arguments)
        assert (code, out) == (1, "")
        assert re.fullmatch(r"Error: .*w00000\.parquet: .*SHA-256.*\n", err)
    newer(broken)
    assert "version" in call("show", broken)[2]


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("ls",), ("ls", "x", "--nonsense"), ("diff", "x"), ("prune", "x"), ("prune", "x", "--keep", "y"),
     ("daemon",), ("daemon", "--job", "x", "--store", "y")],
)  # fmt: skip
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err
    assert "Error: " in err


def test_version_and_help() -> None:
    import ckptd

    assert call("--version") == (0, f"ckptd {ckptd.__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    for command in ("daemon", "status", "stop", "flush", "ls", "show", "verify", "diff", "prune"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)
        code, text, _ = call(command, "-h")
        assert code == 0
        assert f"{command} " in text
    for command in ("status", "ls", "show", "verify", "diff", "prune"):
        assert "--json" in call(command, "--help")[1]
