"""What `ckptd status`, `stop` and `flush` make of a daemon's answer; the daemon is a fake here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from ckptd.cli.flush import absolute
from ckptd.cli.main import app
from ckptd.cli.stop import find_lost
from ckptd.core.errors import DaemonError, DeadlineError, NotFoundError, StoreError
from ckptd.core.types import Job
from ckptd.daemon.address import Address

WELL: dict[str, Any] = {
    "job": "/ckpts/run-1",
    "digest": Job("/ckpts/run-1").digest,
    "pid": 4242,
    "node": "node-a",
    "epoch": "3-00000000000000aa",
    "store": "/ckpts/run-1",
    "ranks": [
        {"rank": 0, "pid": 100, "alive": True, "connected": True, "step": 512},
        {"rank": 1, "pid": 101, "alive": True, "connected": True, "step": 511},
    ],
    "newest": {"captured": 512, "sealed": 511, "protected": None, "durable": 500},
    "slots": [
        {"rank": 0, "slot": 0, "state": "held", "step": 511, "bytes": 2**20},
        {"rank": 0, "slot": 1, "state": "free", "step": None, "bytes": 2**20},
    ],
    "memory_bytes": 2**21,
    "flush": {"step": 511, "done_bytes": 2**19, "total_bytes": 2**20},
    "counters": {"sealed": 500, "flushed": 1},
    "last_error": None,
    "lingering_s": None,
}


class FakeControl:
    """A daemon by its answers; every attribute of the class is set by the test."""

    answers: ClassVar[dict[str, Any]] = {}
    calls: ClassVar[list[tuple[str, object]]] = []
    flushed: Any = 511

    def __init__(self, address: Address) -> None:
        self._name = address.job.name

    @classmethod
    def connect(cls, job: str | None = None) -> FakeControl:
        name = job if job is not None else next(iter(cls.answers), "")
        if name not in cls.answers:
            raise NotFoundError(f"no daemon of job {name!r} here")
        return cls(Address(Job(name), Path("/nowhere")))

    def status(self) -> dict[str, Any]:
        answer = self.answers[self._name]
        if isinstance(answer, Exception):
            raise answer
        return copy.deepcopy(answer)

    def stop(self) -> None:
        self.calls.append(("stop", self._name))

    def flush(self, to: str | None = None) -> int | None:
        self.calls.append(("flush", to))
        if isinstance(self.flushed, Exception):
            raise self.flushed
        return self.flushed

    def close(self) -> None:
        pass


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeControl]:
    """Daemons of this node by job name; answers may be exceptions."""

    class Daemons(FakeControl):
        answers: ClassVar[dict[str, Any]] = {}
        calls: ClassVar[list[tuple[str, object]]] = []

    monkeypatch.setattr("ckptd.daemon.client.Control", Daemons)
    monkeypatch.setattr(
        "ckptd.daemon.address.addresses", lambda: [Address(Job(name), tmp_path) for name in Daemons.answers]
    )
    return Daemons


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_a_job_that_is_well(daemons: type[FakeControl]) -> None:
    daemons.answers["/ckpts/run-1"] = WELL
    code, out, err = call("status")
    assert (code, err) == (0, "")
    for expected in (
        "/ckpts/run-1 (daemon pid 4242",
        "3-00000000000000aa on node node-a",
        "0 (pid 100, connected, step 512); 1 (pid 101, connected, step 511)",
        "captured 512, sealed 511, protected -, durable 500",
        "rank 0/0 held 511, rank 0/1 free",
        "2.0 MiB",
        "step 511: 512.0 KiB of 1.0 MiB (50 %)",
        "1 flushed, 500 sealed",
    ):
        assert expected in out
    assert "PROBLEM" not in out


def test_a_job_that_is_not(daemons: type[FakeControl]) -> None:
    """A dead rank and an error: each named, exit status 1, in text and in JSON."""
    answer = copy.deepcopy(WELL)
    answer["ranks"][1] |= {"alive": False, "connected": False}
    answer |= {
        "last_error": "flush of step 500:\n/ckpts/run-1: write: No space left on device (ENOSPC)",
        "flush": None,
        "lingering_s": 65.0,
    }
    daemons.answers |= {"/ckpts/run-1": answer, "other": WELL | {"job": "other"}}
    code, out, _ = call("status")
    assert code == 1
    assert "PROBLEM   rank 1 is dead\n" in out
    assert "PROBLEM   last error: flush of step 500:; /ckpts/run-1: write: No space left on device (ENOSPC)\n" in out
    assert "no rank for 1m 5s" in out
    assert out.count("PROBLEM") == 2
    code, out, _ = call("status", "--json")
    assert code == 1
    jobs = json.loads(out)["jobs"]
    assert [len(job["problems"]) for job in jobs] == [2, 0]
    assert jobs[0]["ranks"] == answer["ranks"]


def test_a_job_on_several_nodes(daemons: type[FakeControl]) -> None:
    """Who is not reached and what cannot be done is named, with its reason, and is gone when it is over."""
    answer = WELL | {
        "nodes": 4,
        "parity": 2,
        "parity_bytes": 2**19,
        "not_reached": [{"node": "node-c", "for_s": 65.0, "why": "node node-c at 10.0.0.3:7: did not answer"}],
        "failing": ["Encode of 3-00000000000000aa@512: no memory"],
    }
    daemons.answers["/ckpts/run-1"] = answer
    code, out, _ = call("status")
    assert code == 1
    assert "nodes     4, of which each group may lose 2\n" in out
    assert "memory    2.0 MiB, and 512.0 KiB of parities\n" in out
    lost = "PROBLEM   node node-c is not reached for 1m 5s, and nothing is protected: "
    assert f"{lost}node node-c at 10.0.0.3:7: did not answer\n" in out
    assert "PROBLEM   protection fails: Encode of 3-00000000000000aa@512: no memory\n" in out
    daemons.answers["/ckpts/run-1"] = answer | {"not_reached": [], "failing": []}
    assert call("status")[0] == 0


@pytest.mark.parametrize(
    "error", [DaemonError("no daemon of job 'x' on this node: refused"), DeadlineError("no answer")]
)
def test_a_daemon_that_does_not_answer_hides_no_other(daemons: type[FakeControl], error: Exception) -> None:
    daemons.answers |= {"frozen": error, "/ckpts/run-1": WELL}
    code, out, _ = call("status")
    assert code == 1
    assert f"the daemon does not answer: {error}" in out
    assert "durable 500" in out


def test_a_job_that_just_began(daemons: type[FakeControl]) -> None:
    """Before the first Begin most fields are empty."""
    daemons.answers["new"] = {
        "job": "new", "digest": "0", "pid": 1, "node": "n", "epoch": None, "store": None, "ranks": [],
        "newest": dict.fromkeys(("captured", "sealed", "protected", "durable")), "slots": [], "memory_bytes": 0,
        "flush": None, "counters": {}, "last_error": None, "lingering_s": None,
    }  # fmt: skip
    code, out, _ = call("status", "new")
    assert code == 0
    assert "none yet" in out
    assert "not told yet" in out
    assert "none connected" in out


def test_no_jobs(daemons: type[FakeControl]) -> None:
    code, out, _ = call("status")
    assert code == 0
    assert out.startswith("no jobs on node ")
    assert json.loads(call("status", "--json")[1])["jobs"] == []
    assert call("status", "nobody") == (1, "", "Error: no daemon of job 'nobody' here\n")


def test_stop_says_what_was_only_in_memory(daemons: type[FakeControl]) -> None:
    daemons.answers["/ckpts/run-1"] = WELL
    code, out, err = call("stop")
    assert (code, out) == (0, "stopped job /ckpts/run-1 (pid 4242)\n")
    assert err == "Note: step 511 was only in memory and is gone; durable is step 500\n"
    assert daemons.calls == [("stop", "/ckpts/run-1")]


@pytest.mark.parametrize(
    ("sealed", "durable", "lost"),
    [(None, None, False), (5, None, True), (5, 4, True), (5, 5, False), (None, 5, False)],
)
def test_what_a_stop_loses(sealed: int | None, durable: int | None, lost: bool) -> None:
    assert (find_lost({"newest": {"sealed": sealed, "durable": durable}}) is not None) == lost


def test_flush_prints_the_step(daemons: type[FakeControl], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The daemon has another working directory, so a relative path is made absolute here."""
    monkeypatch.chdir(tmp_path)
    daemons.answers["j"] = WELL
    assert call("flush", "--job", "j", "--to", "rescue") == (0, "511\n", "")
    assert call("flush") == (0, "511\n", "")
    assert daemons.calls == [("flush", str(tmp_path / "rescue")), ("flush", None)]
    assert absolute("s3://bucket/run") == "s3://bucket/run"


def test_flush_that_fails(daemons: type[FakeControl]) -> None:
    daemons.answers["j"] = WELL
    daemons.flushed = StoreError("/full: write: No space left on device (ENOSPC)")
    assert call("flush") == (1, "", "Error: /full: write: No space left on device (ENOSPC)\n")
    daemons.flushed = None
    code, out, err = call("flush")
    assert (code, out) == (1, "")
    assert "no sealed snapshot" in err
