"""Faults from inside: imported by every Python process that has this folder on its PYTHONPATH (trainers and the daemon;
the keeper runs isolated and is killed from outside). Product code has no hooks: named functions are wrapped when their
module is imported.

CKPTD_TEST_FAULTS names a JSON file with a list of faults (tests/faults/lab.py). A fault is armed while the file
`armed` exists: one that fires once removes it, which only one process can; a lasting one fires while it is there.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

HOLD_POLL_S = 0.002


def role() -> str:
    """What this process is to a fault: daemon, or a rank's trainer."""
    return "daemon" if "ckptd.daemon" in sys.orig_argv else f"rank{os.environ.get('RANK', '0')}"


def processes(runtimes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(pid, role) of every process that works with one of these runtime directories: keeper, daemon, trainer."""
    wanted = {f"CKPTD_RUNTIME_DIR={runtime}".encode() for runtime in runtimes}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted.isdisjoint(file.read().split(b"\0")):
                    continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"keeper.py") for word in command):
            yield int(name), "keeper"
        else:
            yield int(name), "daemon" if b"ckptd.daemon" in command else "trainer"


def kill(runtimes: Sequence[str], roles: Sequence[str], number: int = signal.SIGKILL) -> list[int]:
    """Ends the processes of some roles at one moment: none sees the other's end. Returns their pids."""
    pids = [pid for pid, found in processes(runtimes) if found in roles]
    for pid in pids if number == signal.SIGKILL else ():
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, number)
    return pids


class Fault:
    """One planned fault, and how often its point was passed in this process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.point: str = plan["point"]
        self.when: str = plan["when"]
        self.action: str = plan["action"]
        self.call: int = plan["call"]
        self.match: str = plan["match"]
        self.process: str = plan["process"]
        self.armed: str = plan["armed"]
        self.lasting: bool = plan["lasting"]
        self._passed = 0

    def passes(self, text: str) -> None:
        """The point is passed once more, with arguments that read as `text`."""
        if self.process not in ("any", role()) or not re.search(self.match, text) or not os.path.exists(self.armed):
            return
        self._passed += 1
        if self.lasting:
            if self._passed >= self.call:
                self._act(text)
        elif self._passed == self.call:
            if self.action == "hold":
                _leave_mark(self.armed + ".held")
                while os.path.exists(self.armed):
                    time.sleep(HOLD_POLL_S)
            elif self._take():
                self._act(text)

    def altered(self, result: Any) -> Any:
        """What comes out of the point instead of `result`."""
        if self.process not in ("any", role()) or not os.path.exists(self.armed):
            return result
        module, _, name = self.action.removeprefix("alter ").partition(":")
        return getattr(importlib.import_module(module), name)(result)

    def _take(self) -> bool:
        try:
            os.unlink(self.armed)
        except FileNotFoundError:
            return False
        return True

    def _act(self, text: str) -> None:
        if self.action in ("EIO", "ENOSPC"):
            number = getattr(errno, self.action)
            raise OSError(number, os.strerror(number))
        if self.action == "note":
            with open(self.armed + ".notes", "a") as file:
                file.write(text + "\n")
            return
        verb, *roles = self.action.split()
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[verb]
        if roles:
            kill([os.environ["CKPTD_RUNTIME_DIR"]], roles, number)
        else:
            os.kill(os.getpid(), number)


def _leave_mark(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def _planned() -> list[Fault]:
    path = os.environ.get("CKPTD_TEST_FAULTS")
    if not path:
        return []
    with open(path) as file:
        return [Fault(plan) for plan in json.load(file)]


FAULTS: list[Fault] = []


def moment(name: str) -> None:
    """A point that a training script names itself."""
    for fault in FAULTS:
        if fault.point == name:
            fault.passes("")


def _text(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Arguments as far as faults choose by them: short ones, the path of a file object, path and inode of a
    descriptor."""
    words = [str(getattr(arguments[0], "_path", ""))] if arguments else []
    for argument in [*arguments, *named.values()]:
        if isinstance(argument, (str, tuple)):
            words.append(str(argument))
        elif type(argument) is int:
            with contextlib.suppress(OSError):
                words.append(f"{os.readlink(f'/proc/self/fd/{argument}')} inode {os.fstat(argument).st_ino}")
    return " ".join(words)


def _wrapped(function: Callable[..., Any], faults: list[Fault]) -> Callable[..., Any]:
    @functools.wraps(function)
    def passing(*arguments: Any, **named: Any) -> Any:
        text = _text(arguments, named)
        for fault in faults:
            if fault.when == "before" and not fault.action.startswith("alter "):
                fault.passes(text)
        result = function(*arguments, **named)
        for fault in faults:
            if fault.action.startswith("alter "):
                result = fault.altered(result)
            elif fault.when == "after":
                fault.passes(text)
        return result

    return passing


def _wrap(module: ModuleType, faults: list[Fault]) -> None:
    """Wraps the points in one module, and sets what is to be another value."""
    for point in dict.fromkeys(fault.point for fault in faults):
        *path, name = point.partition(":")[2].split(".")
        owner = functools.reduce(getattr, path, module)
        chosen = [fault for fault in faults if fault.point == point]
        if chosen[0].action.startswith("set "):
            if chosen[0].process in ("any", role()) and os.path.exists(chosen[0].armed):
                setattr(owner, name, json.loads(chosen[0].action.removeprefix("set ")))
        else:
            setattr(owner, name, _wrapped(getattr(owner, name), chosen))


def _faults_in(module: str) -> list[Fault]:
    return [fault for fault in FAULTS if fault.point.partition(":")[0] == module]


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then wraps what faults are planned for."""

    def __init__(self, loader: importlib.abc.Loader, faults: list[Fault]) -> None:
        self._loader, self._faults = loader, faults

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _wrap(module, self._faults)


class _Finder(importlib.abc.MetaPathFinder):
    """Puts `_Loader` before the modules that faults are planned for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        faults = _faults_in(name)
        if not faults:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, faults)
        return spec


def install() -> None:
    """Makes the planned faults happen: in modules that are here, and in those that will be imported."""
    FAULTS[:] = _planned()
    for name in {fault.point.partition(":")[0] for fault in FAULTS} & set(sys.modules):
        _wrap(sys.modules[name], _faults_in(name))
    if FAULTS:
        sys.meta_path.insert(0, _Finder())


install()
