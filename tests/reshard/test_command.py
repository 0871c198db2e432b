"""`ckptd reshard`: plan and result, as text and JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptd.cli.main import app
from ckptd.tiers.store import open_checkpoint
from tests.operations.stores import write

RULES = """
[[placement]]
keys = "model/w"
shard = { mesh = "tp", dim = 1 }
[[placement]]
keys = "*typo*"
replicate = true
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "rules.toml").write_text(RULES)
    tensors = {"model/w": np.arange(4096.0).reshape(64, 64), "model/b": np.zeros(4)}
    return write(tmp_path / "source", 5, tensors, {"x": 1}, chunk_bytes=4096)


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_dry_run(source: Path, tmp_path: Path) -> None:
    options = ("--mesh", "tp=4", "--layout", tmp_path / "rules.toml", "--dry-run")
    code, out, err = call("reshard", source, tmp_path / "target", *options)
    assert (code, err) == (0, "Note: no tensor matches placement 2 (*typo*)\n")
    assert not (tmp_path / "target").exists()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["mesh", "tp=4;", "a", "rank", "loads", "8.0", "KiB", "of", "tensors"]
    assert lines[1][:6] == ["writes", "2", "tensors", "in", "5", "chunks,"]
    assert out.splitlines()[2] == "reads       9 chunks, decoded 9 times in all, none more than 1 times"
    assert lines[-1] == ["0", "all", "2", "5", "32.0", "KiB", "9"]
    code, out, _ = call("reshard", source, tmp_path / "target", *options, "--json")
    document = json.loads(out)
    assert (code, document["mesh"], document["ranks"], document["chunks"]) == (0, "tp=4", 4, 5)
    assert document["rank_bytes"] == {"least": 8224, "most": 8224}
    assert document["unused_rules"] == ["placement 2 (*typo*)"]
    assert document["parts"] == [{"writer": 0, "stage": [-1], "tensors": 2, "chunks": 5, "bytes": 32800, "decodes": 9}]


def test_reshard(source: Path, tmp_path: Path) -> None:
    options = ("--mesh", "tp=4", "--layout", tmp_path / "rules.toml", "--memory", "400M")
    code, out, _ = call("reshard", source, tmp_path / "target", *options)
    location = open_checkpoint(tmp_path / "target").location
    assert (code, out) == (0, f"resharded 32.0 KiB in 5 chunks, 1 part: {location}\n")
    assert call("diff", source, tmp_path / "target")[0] == 0
    code, out, _ = call("reshard", source, tmp_path / "target", *options)
    assert (code, out) == (0, f"already there, whole: {location}\n")
    code, out, _ = call("reshard", source, tmp_path / "target", *options, "--json")
    document = json.loads(out)
    assert (code, document["checkpoint"], document["existed"]) == (0, location, True)


def test_without_rules_tensors_are_whole(source: Path, tmp_path: Path) -> None:
    assert call("reshard", source, tmp_path / "target")[0] == 0
    with open_checkpoint(tmp_path / "target") as checkpoint:
        assert len(checkpoint.catalog()) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--mesh", "tp"), 1, "Error: mesh 'tp'"),
        (("--layout", "none.toml"), 1, "Error: layout none.toml: cannot be read"),
        (("--layout", "rules.toml"), 1, "'tp': not a dimension of the mesh 1 rank"),
        (("--memory", "100M"), 1, "expected at least 335544320 (320M)"),
        (("--memory", "much"), 2, "not a size"),
    ],
)
def test_what_is_refused(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = call("reshard", source, tmp_path / "target", *options)
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "target").exists()
