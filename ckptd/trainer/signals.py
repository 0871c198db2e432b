"""SIGTERM: the newest sealed snapshot becomes durable before the process ends, if the grace time allows.

A main thread inside a collective runs Python's handlers seconds late, so the signal is read through the wakeup fd by a
thread, and training goes on meanwhile. When it is done, what would have happened without ckptd happens: a previous
Python handler runs in the main thread, or the default action ends the process.

Invariant: the handler never waits. It may run inside any lock of the main thread, which what it waited for would need.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

from ckptd.core.errors import CkptdError

log = logging.getLogger("ckptd.signals")


class Terminator:
    """Installed from construction to `end`. Does nothing outside the main thread, where Python allows no handlers."""

    def __init__(self, drain: Callable[[float], None], grace_s: float) -> None:
        """`drain(grace_s)` is called once, on a thread, when SIGTERM comes."""
        self._drain, self._grace_s = drain, grace_s
        self._done = threading.Event()
        self._deferred = self._told = False
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            return
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        self._thread = threading.Thread(target=self._listen, name="ckptd-sigterm", daemon=True)
        self._thread.start()
        _installed.add(self)

    def leave_child(self) -> None:
        """In a forked child: a SIGTERM there concerns the child alone, and must not reach our wakeup fd."""
        with contextlib.suppress(ValueError, TypeError):
            signal.set_wakeup_fd(self._previous_wakeup)
            signal.signal(signal.SIGTERM, self._previous)

    def end(self) -> None:
        """Puts back what was there before."""
        if not self._installed:
            return
        self._installed = False
        _installed.discard(self)
        if threading.current_thread() is threading.main_thread():
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(signal.SIGTERM, self._previous)
                signal.set_wakeup_fd(self._previous_wakeup)
        self._write.close()
        self._thread.join(1.0)
        self._read.close()

    def _listen(self) -> None:
        while True:
            received = self._read.recv(64)
            if not received:
                return
            if self._previous_wakeup >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous_wakeup, received)
            if signal.SIGTERM in received:
                break
        try:
            self._drain(self._grace_s)
        except CkptdError as error:
            log.warning("SIGTERM: %s", error)
        self._done.set()
        if self._previous is signal.SIG_DFL:
            _default(signal.SIGTERM)
        elif self._deferred and not self._told:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread, whenever it gets there: perhaps before all is done, and then again."""
        self._deferred = True  # before it looks: so this thread or the other sees what the other one has done
        if not self._done.is_set() or self._told:
            return
        self._told = True
        with contextlib.suppress(TypeError):  # one that C has set
            signal.signal(signal.SIGTERM, self._previous)
        if callable(self._previous):
            self._previous(number, frame)


_installed: set[Terminator] = set()
_forking = threading.local()


def _before_fork() -> None:
    """Until a child has our handler no more, a SIGTERM for it waits: the wakeup fd that it inherits is ours."""
    if _installed:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_child() -> None:
    for terminator in list(_installed):
        terminator.leave_child()
    _installed.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _default(number: int) -> None:
    """Dies of the signal. From a thread, Python cannot put back the default action; C can."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(int(number), None)
    os.kill(os.getpid(), number)
