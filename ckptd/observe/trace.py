"""Traces: what happened when, as files for chrome://tracing and https://ui.perfetto.dev.

Owns one file a process: an array of events in Chrome's trace format. Who reports an event only puts it into a queue; a
thread writes.

Invariants
- The file is whole JSON after each write, also after SIGKILL: a write replaces the closing bracket by events and a new
  one. A later process of the same name goes on in the same file.
- It has at most MAX_BYTES, the queue at most MAX_WAITING events; what is left out is said.
- Nothing here slows its caller down or raises: what cannot be written ends the trace, with one warning.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger("ckptd.trace")

MAX_BYTES = 64 * 1024 * 1024
MAX_WAITING = 10_000
WRITE_S = 0.2
"""How long events may wait to be written."""

CLOSE_S = 5.0
"""How long a disk may take for the last ones."""

_CLOSED = b"\n]\n"
_LAST_WORDS = 1024
"""Bytes kept for the event that says that the file is full."""

_encode = msgspec.json.Encoder().encode


class Trace:
    """See the module docstring. Times are those of `time.perf_counter()`; in the file they are microseconds since 1970,
    so that files of several processes and nodes lie side by side, as well as their clocks agree."""

    def __init__(self, name: str) -> None:
        """`name`: of this process, `rank-0` or `daemon-<node>`. Nothing is traced before `begin`."""
        self._name = name
        self._directory: str | None = None
        self._since_1970_s = time.time() - time.perf_counter()
        self._waiting: collections.deque[dict[str, Any]] = collections.deque()
        self._left_out = 0
        self._tracks: dict[str, int] = {}
        self._active = False
        self._ending = threading.Event()
        self._writer: threading.Thread | None = None

    def begin(self, directory: str | None) -> None:
        """From now on events go to a file in `directory`, if there is one."""
        if directory == self._directory:
            return
        self.close()
        self._directory = directory
        if directory is None:
            return
        self._active, self._tracks, self._ending = True, {}, threading.Event()
        self._put("process_name", "M", None, {"name": self._name})
        arguments = (path_of(directory, self._name), self._ending)
        self._writer = threading.Thread(target=self._write_all, args=arguments, name="ckptd-trace", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Writes what waits; nothing is traced any more. Idempotent."""
        self._active, self._directory = False, None
        self._ending.set()
        if self._writer is not None:
            self._writer.join(CLOSE_S)
            self._writer = None

    def span(self, name: str, began: float, ended: float, **values: Any) -> None:
        """Something that the calling thread did from `began` to `ended`."""
        self._put(name, "X", began, values, dur=round(1e6 * max(ended - began, 0.0)))

    @contextlib.contextmanager
    def spanning(self, name: str, **values: Any) -> Iterator[dict[str, Any]]:
        """A span over the body, which may add values; also of a body that raises."""
        began = time.perf_counter()
        try:
            yield values
        except BaseException as error:
            values["error"] = f"{type(error).__name__}: {error}"[:500]
            raise
        finally:
            self.span(name, began, time.perf_counter(), **values)

    def moment(self, name: str, **values: Any) -> None:
        """Something that has just happened."""
        self._put(name, "i", time.perf_counter(), values, s="p")

    def count(self, name: str, **values: float) -> None:
        """Numbers as they are now, drawn over time."""
        self._put(name, "C", time.perf_counter(), values)

    def _put(self, name: str, phase: str, at: float | None, values: Mapping[str, Any], **more: Any) -> None:
        if not self._active:
            return
        track = threading.current_thread().name  # rather than its id: each window has a thread of its own
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks) + 1
            self._put("thread_name", "M", None, {"name": track})
        if len(self._waiting) >= MAX_WAITING:
            self._left_out += 1
            return
        ts = 0 if at is None else round(1e6 * (self._since_1970_s + at))
        event = {"name": name, "ph": phase, "pid": os.getpid(), "tid": self._tracks[track], "ts": ts, "args": values}
        self._waiting.append(event | more)

    # --- the writing thread

    def _write_all(self, path: Path, ending: threading.Event) -> None:
        try:
            with contextlib.closing(_File(path)) as file:
                while not ending.wait(WRITE_S):
                    self._write(file)
                self._write(file)
        except (OSError, ValueError) as error:
            log.warning("%s: the trace ends here: %s", path, error)
        self._active = False
        self._waiting.clear()

    def _write(self, file: _File) -> None:
        events = []
        while self._waiting:
            events.append(_encode(self._waiting.popleft()))
        left_out, self._left_out = self._left_out, 0
        if left_out:
            events.append(_said("events left out", number=left_out))
        file.append(events)


class _File:
    """An array of events that is whole after each `append`. Raises OSError, ValueError."""

    def __init__(self, path: Path) -> None:
        """Goes on at the end of a file that is whole; in the place of any other there is a new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(path):
            new = path.with_suffix(f".{os.getpid()}")
            new.write_bytes(b"[" + _CLOSED)
            new.replace(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError("another process writes to it") from None
        self._end = os.fstat(self._descriptor).st_size - len(_CLOSED)

    def append(self, events: list[bytes]) -> None:
        """One write: there is no moment at which the array is not closed."""
        room = MAX_BYTES - _LAST_WORDS - self._end
        fitting = 0
        while fitting < len(events) and room >= len(events[fitting]) + 2:
            room -= len(events[fitting]) + 2
            fitting += 1
        full = fitting < len(events)
        events = [*events[:fitting], _said("the trace is full", max_bytes=MAX_BYTES)] if full else events
        if not events:
            return
        begun = (b",\n" if self._end > 1 else b"\n") + b",\n".join(events)
        data = begun + _CLOSED
        try:
            if os.pwrite(self._descriptor, data, self._end) != len(data):
                raise OSError("written in part only")
        except OSError:
            self._mend()
            raise
        self._end += len(begun)
        if full:
            raise ValueError(f"it has {MAX_BYTES} bytes, which is the most")

    def _mend(self) -> None:
        """After a write that failed half-way the array ends where it was whole."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._end)
            os.pwrite(self._descriptor, _CLOSED, self._end)

    def close(self) -> None:
        os.close(self._descriptor)


def path_of(directory: str, name: str) -> Path:
    """The file of a process of that name."""
    return Path(directory) / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def _is_whole(path: Path) -> bool:
    """Whether a file ends as a trace does."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size > len(_CLOSED) and os.pread(file.fileno(), len(_CLOSED), size - len(_CLOSED)) == _CLOSED
    except FileNotFoundError:
        return False


def _said(name: str, **values: int) -> bytes:
    """What the trace says of itself."""
    now = round(1e6 * time.time())
    return _encode({"name": name, "ph": "i", "s": "p", "pid": os.getpid(), "tid": 0, "ts": now, "args": values})
