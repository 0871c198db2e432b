"""Trace files: whole JSON at any time, bounded, and never in the way of whoever reports something."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ckptd.observe import trace as module
from ckptd.observe.trace import Trace, path_of

NAME = "rank-0"
UNTIL_S = 30.0


def events(folder: Path, name: str = NAME) -> list[dict[str, Any]]:
    """All but those that only give names, as any JSON reader finds them."""
    found: list[dict[str, Any]] = json.loads(path_of(str(folder), name).read_text())
    return [event for event in found if event["ph"] != "M"]


def until(folder: Path, number: int) -> None:
    """Waits for that many events to be written; a write may be under way."""
    deadline = time.monotonic() + UNTIL_S
    found = -1
    while found < number:
        assert time.monotonic() < deadline, "nothing is written"
        time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = len(events(folder))


def begun(folder: Path, name: str = NAME) -> Trace:
    trace = Trace(name)
    trace.begin(str(folder))
    return trace


def test_what_is_reported_is_in_the_file(tmp_path: Path) -> None:
    """Spans in microseconds since 1970, moments, counters; names of process and threads."""
    trace, before = begun(tmp_path / "new" / "folder"), time.time()
    at = time.perf_counter()
    trace.span("copy", at, at + 0.25, step=3, bytes=100)
    trace.moment("sealed", step=3)
    trace.count("bytes", eager=1, lazy=2)
    with contextlib.suppress(KeyError), trace.spanning("flush", step=3) as values:
        values["more"] = 1
        raise KeyError("why")
    trace.close()
    copy, sealed, counted, flush = events(tmp_path / "new" / "folder")
    assert (copy["ph"], copy["name"], copy["dur"], copy["args"]) == ("X", "copy", 250_000, {"step": 3, "bytes": 100})
    assert 1e6 * (before - 1) < copy["ts"] < 1e6 * (time.time() + 1)
    assert (sealed["ph"], sealed["s"], sealed["args"]) == ("i", "p", {"step": 3})
    assert (counted["ph"], counted["args"]) == ("C", {"eager": 1, "lazy": 2})
    assert flush["args"] == {"step": 3, "more": 1, "error": "KeyError: 'why'"}
    named = [e["args"]["name"] for e in json.loads(path_of(str(tmp_path / "new" / "folder"), NAME).read_text())[:2]]
    assert named == [threading.current_thread().name, NAME] or named == [NAME, threading.current_thread().name]
    assert {copy["pid"], sealed["pid"]} == {os.getpid()}


def test_each_thread_name_is_one_track(tmp_path: Path) -> None:
    """A window has a new thread for every snapshot; a thousand tracks would show nothing."""
    trace = begun(tmp_path)
    for _ in range(20):
        thread = threading.Thread(target=trace.moment, args=("here",), name="window")
        thread.start()
        thread.join()
    trace.moment("here")
    trace.close()
    assert len({event["tid"] for event in events(tmp_path)}) == 2


def test_whole_after_every_write_and_after_sigkill(tmp_path: Path) -> None:
    """The next process of that name goes on where the killed one has stopped."""
    program = (
        "import sys, time; from ckptd.observe.trace import Trace\n"
        f"trace = Trace({NAME!r}); trace.begin(sys.argv[1])\n"
        "while True: trace.moment('alive', text='x' * 50); time.sleep(0.001)"
    )
    for least in (100, 300):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        try:
            until(tmp_path, least)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait(UNTIL_S)
        assert len(events(tmp_path)) >= least
    assert len({event["pid"] for event in events(tmp_path)}) == 2


def test_a_file_that_is_no_trace_is_begun_anew(tmp_path: Path) -> None:
    path_of(str(tmp_path), NAME).write_bytes(b'[\n{"name": "torn')
    trace = begun(tmp_path)
    trace.moment("here")
    trace.close()
    assert [event["name"] for event in events(tmp_path)] == ["here"]


def test_it_stops_at_its_bound_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    trace = begun(tmp_path)
    for number in range(1000):
        trace.moment("many", number=number)
    trace.close()
    assert path_of(str(tmp_path), NAME).stat().st_size <= 10_000
    assert events(tmp_path)[-1]["name"] == "the trace is full"
    assert len(events(tmp_path)) > 20
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    again = begun(tmp_path)
    again.moment("one more")
    again.close()
    assert path_of(str(tmp_path), NAME).stat().st_size <= 10_000
    events(tmp_path)


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs costs no memory; how much was left out is said."""
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    monkeypatch.setattr(module, "WRITE_S", 60.0)
    trace = begun(tmp_path)
    for _ in range(100):
        trace.moment("many")
    trace.close()
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "name": "events left out"}
    assert len(events(tmp_path)) + events(tmp_path)[-1]["args"]["number"] == 101


@pytest.mark.parametrize("place", ["/dev/null/folder", "/proc/nothing", "folder with a file"])
def test_what_cannot_be_written_is_one_warning(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reports notices nothing."""
    if not place.startswith("/"):
        path_of(str(tmp_path), NAME).mkdir()
        place = str(tmp_path)
    trace = begun(Path(place))
    for _ in range(10):
        trace.moment("here")
    trace.close()
    trace.moment("later")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_full_disk_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = begun(tmp_path)
    trace.moment("before")
    until(tmp_path, 1)
    real = os.pwrite

    def half(descriptor: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", real)
        return real(descriptor, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", half)
    trace.moment("lost")
    trace.close()
    assert [event["name"] for event in events(tmp_path)] == ["before"]
    assert len(caplog.records) == 1


def test_two_processes_do_not_share_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A zombie and its successor: the one that came first goes on."""
    first, second = begun(tmp_path), None
    try:
        first.moment("first")
        until(tmp_path, 1)
        second = begun(tmp_path)
        second.moment("second")
        second.close()
    finally:
        first.close()
    assert [event["name"] for event in events(tmp_path)] == ["first"]
    assert "another process" in caplog.text


def test_names_are_no_paths(tmp_path: Path) -> None:
    assert path_of("/d", "daemon-../../etc/x y").name == "daemon-.._.._etc_x_y.json"
    trace = begun(tmp_path, "daemon-a/b")
    trace.moment("here")
    trace.close()
    assert [event["name"] for event in events(tmp_path, "daemon-a/b")] == ["here"]


def test_nothing_is_traced_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Also once it has ended; and it may go elsewhere."""
    trace = Trace(NAME)
    trace.moment("before")
    trace.begin(None)
    trace.begin(str(tmp_path / "one"))
    trace.begin(str(tmp_path / "one"))
    trace.moment("one")
    trace.begin(str(tmp_path / "two"))
    trace.moment("two")
    trace.begin(None)
    trace.moment("after")
    assert [event["name"] for event in events(tmp_path / "one")] == ["one"]
    assert [event["name"] for event in events(tmp_path / "two")] == ["two"]
