"""`ckptd` as a real process: what it loads, how it ends, and with a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptd.cli.main import app
from ckptd.core.errors import DaemonError
from ckptd.core.types import Job
from ckptd.daemon.address import Address, address_of, connect
from ckptd.tiers.store import Store
from tests.operations.stores import write

LIMIT_S = 60


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The runtime directory of a node of its own."""
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("CKPTD_NODE", "node-a")
    return tmp_path / "runtime"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "store", 1, {f"model/{i:04}": np.array(float(i)) for i in range(2000)}, {"x": 1})
    return tmp_path / "store"


def start(*arguments: str | Path, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ckptd.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """A command as a process of its own."""
    with start(*arguments) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out.decode(), err.decode()


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """A command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


LOADED = """
import json, sys
from typer.testing import CliRunner
from ckptd.cli.main import app
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, (command, result.output)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(*commands: list[str]) -> set[str]:
    """Top-level modules in a process that has run `commands`."""
    script = [sys.executable, "-c", LOADED, json.dumps(commands)]
    done = subprocess.run(script, capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return set(done.stdout.decode().split())


def test_no_command_loads_torch(store: Path) -> None:
    """Importing torch costs a second and 230 MB, in a tool that is called beside a training job."""
    place = str(store)
    modules = loaded(
        ["ls", place],
        ["show", place, "--objects"],
        ["verify", place, "--all"],
        ["diff", place, place],
        ["prune", place, "--keep", "1", "--offline"],
        ["status"],
    )
    assert {"ckptd", "numpy", "pyarrow"} <= modules
    assert "torch" not in modules


def test_help_loads_next_to_nothing() -> None:
    modules = loaded(["--help"])
    assert "typer" in modules
    assert not modules & {"torch", "numpy", "pyarrow", "rich", "msgspec", "asyncio", "cryptography"}


@pytest.mark.parametrize("arguments", [("ls",), ("show", "--json")])
def test_a_reader_that_leaves_is_not_talked_about(store: Path, arguments: tuple[str, ...]) -> None:
    """Of a short output (written as the process ends) and of a long one (written on the way)."""
    read, wrote = os.pipe()
    os.close(read)
    try:
        process = start(arguments[0], store, *arguments[1:], stdout=wrote)
    finally:
        os.close(wrote)
    with process:
        _, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (1, b"")


def test_errors_are_one_line(tmp_path: Path) -> None:
    code, out, err = run("ls", tmp_path / "absent")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_letters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "größe", 1, {"größe": np.zeros(1)})
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = run("show", tmp_path / "größe")
    assert (code, err) == (0, "")
    assert "gr\\xf6\\xdfe" in out


# --- with a real daemon


@contextlib.contextmanager
def daemon(address: Address, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """`ckptd daemon` in the foreground, once it listens; stopped with the test."""
    process = start("daemon", *arguments)
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while not listens(address):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield process
    finally:
        # Never by a kill: its keeper, which outlives the test, would start another one.
        call("stop", address.job.name)
        process.communicate(timeout=LIMIT_S)


def listens(address: Address) -> bool:
    try:
        connect(address).close()
    except (OSError, DaemonError):
        return False
    return True


def test_status_and_stop_of_a_real_daemon(runtime: Path) -> None:
    """It runs in the foreground; stopped, it ends with status 0 and leaves nothing in the runtime directory."""
    address = address_of(Job("job-1"))
    with daemon(address, "--job", "job-1") as process:
        code, out, err = run("status", "job-1", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["node"] == "node-a"
        assert found["runtime_dir"] == str(runtime)
        (job,) = found["jobs"]
        assert (job["job"], job["digest"], job["pid"]) == ("job-1", Job("job-1").digest, process.pid)
        assert job["problems"] == []
        assert job["newest"] == {"captured": None, "sealed": None, "protected": None, "durable": None}
        for key in ("epoch", "store", "ranks", "slots", "memory_bytes", "flush", "counters", "last_error"):
            assert key in job
        code, out, _ = call("status")
        assert code == 0
        assert out.startswith(f"job       job-1 (daemon pid {process.pid}, ")
        code, out, err = call("flush", "--job", "job-1")
        assert (code, out) == (1, "")
        assert err.startswith("Error: ")
        assert run("stop") == (0, f"stopped job job-1 (pid {process.pid})\n", "")
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0
    code, out, _ = call("status")
    assert (code, out.partition(" (")[0]) == (0, "no jobs on node node-a")
    assert not runtime.exists()


def test_a_second_daemon_refuses() -> None:
    with daemon(address_of(Job("job-1")), "--job", "job-1"):
        assert run("daemon", "--job", "job-1")[0] == 1


@pytest.mark.parametrize("by", ["store", "job"])
def test_prune_is_refused_while_the_daemon_runs(tmp_path: Path, by: str) -> None:
    """Told by the name that a job takes from its store, or by the job that the checkpoints name."""
    for step in (1, 2):
        write(tmp_path / "store", step, {"w": np.zeros(1)}, job="named")
    before = sorted((tmp_path / "store").rglob("*"))
    name = Store.open(tmp_path / "store").uri if by == "store" else "named"
    with daemon(address_of(Job(name)), f"--{by}", name) as process:
        code, out, err = call("prune", tmp_path / "store", "--keep", "1", "--offline")
        assert (code, out) == (1, "")
        assert f"pid {process.pid}" in err
        assert call("prune", tmp_path / "store", "--keep", "1", "--dry-run")[0] == 0
        assert sorted((tmp_path / "store").rglob("*")) == before
    assert call("prune", tmp_path / "store", "--keep", "1", "--offline")[0] == 0
    assert sorted((tmp_path / "store").rglob("*")) != before


def test_prune_beside_the_daemon_of_another_job(tmp_path: Path) -> None:
    write(tmp_path / "store", 1, {"w": np.zeros(1)}, job="named")
    with daemon(address_of(Job("unrelated")), "--job", "unrelated"):
        assert call("prune", tmp_path / "store", "--keep", "1", "--offline")[0] == 0


def test_what_a_killed_daemon_left(tmp_path: Path) -> None:
    """Daemon and keeper were killed: named by status as a reason to look, nothing to stop, no obstacle to prune."""
    write(tmp_path / "store", 1, {"w": np.zeros(1)}, job="job-1")
    address_of(Job("job-1")).create()
    code, out, err = call("status")
    assert (code, err) == (1, "")
    assert "job       job-1 (no daemon answers" in out
    assert "PROBLEM" in out
    assert [job["job"] for job in json.loads(call("status", "--json")[1])["jobs"]] == ["job-1"]
    assert call("stop", "job-1") == (1, "", "Error: no daemon of job 'job-1' here\n")
    assert call("prune", tmp_path / "store", "--keep", "1", "--offline")[0] == 0
