"""Training processes that may be killed: forked from a server that has torch loaded, so that each starts in no time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 60.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "ckptd.trainer.checkpointer", "tests.checkpointer.cases"]
)


class Ended(NamedTuple):
    """How a process ended: its exit status (-n: killed by signal n), what its function returned, what it said."""

    status: int
    value: Any
    stderr: str


class Child:
    """A process that runs `function(*arguments)` of a test module in the environment given."""

    def __init__(
        self, environment: Mapping[str, str], log: Path, function: Callable[..., Any], *arguments: Any
    ) -> None:
        self._log = log
        self.pipe, there = _context.Pipe()
        self._process = _context.Process(
            target=_main, args=(dict(environment), str(log), there, function, arguments), daemon=False
        )
        self._process.start()
        there.close()
        self._value: Any = None

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def receive(self) -> Any:
        """What the function sends through its pipe (`report`)."""
        assert self.pipe.poll(TIMEOUT_S), f"the child says nothing\n{self._log.read_text()}"
        kind, value = self.pipe.recv()
        assert kind == "report", f"{kind}: {value}"
        return value

    def send(self, value: Any) -> None:
        """Something for the function to `await_parent`."""
        self.pipe.send(value)

    def end(self) -> Ended:
        """Waits for its end; fails the test where it hangs or raises."""
        failure = None
        while wait([self.pipe, self._process.sentinel], TIMEOUT_S) == [self.pipe] or self.pipe.poll():
            try:
                kind, value = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                break
            if kind == "error":
                failure = value
            if kind == "value":
                self._value = value
        self._process.join(TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"the child hangs\n{self._log.read_text()}")
        assert failure is None, f"the child failed: {failure}\n{self._log.read_text()}"
        return Ended(self._process.exitcode, self._value, self._log.read_text())


_pipe: Connection | None = None


def report(value: Any) -> None:
    """Sends something to the test while the function goes on."""
    assert _pipe is not None
    _pipe.send(("report", value))


def await_parent() -> Any:
    """Waits for the test to say something."""
    assert _pipe is not None
    assert _pipe.poll(TIMEOUT_S), "the test says nothing"
    return _pipe.recv()


def _main(
    environment: dict[str, str], log: str, pipe: Connection, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    global _pipe
    _pipe = pipe
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for its data loaders, as in a training
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("value", function(*arguments)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        sys.exit(1)


def run(environment: Mapping[str, str], log: Path, function: Callable[..., Any], *arguments: Any) -> Ended:
    """A child from start to end."""
    return Child(environment, log, function, *arguments).end()
