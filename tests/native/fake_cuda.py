"""The fake CUDA driver (fake_cuda.cpp), compiled once and handled from Python; main memory plays the device's."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
NAMES = (
    "capture_implicitly capturing fail ignore_waits kernel memory prefer reset run start stop stream calls live queued "
    "log misuse"
)


def compile_fake(folder: Path) -> Path:
    """The library; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler for the fake CUDA driver")
    library = folder / "libfake_cuda.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})
    return library


class Fake:
    """Controls of the fake driver; `fake_cuda.cpp` says what each does."""

    def __init__(self, library: Path, devices: int = 1) -> None:
        self.library = str(library)
        handle = ctypes.CDLL(self.library)
        self._functions: dict[str, Any] = {name: getattr(handle, f"fake_{name}") for name in NAMES.split()}
        pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        for name, arguments, result in (
            ("run", [ctypes.c_uint64, ctypes.c_long], ctypes.c_int),
            ("start", [ctypes.c_uint64], None),
            ("stream", [ctypes.c_int], pointer),
            ("kernel", [pointer, pointer, pointer, size], None),
            ("prefer", [pointer, ctypes.c_int], None),
            ("capturing", [pointer, ctypes.c_int], None),
            ("fail", [text, ctypes.c_long, ctypes.c_int, ctypes.c_int], None),
            ("memory", [pointer, size], None),
            ("calls", [text], ctypes.c_long),
            ("live", [], ctypes.c_long),
            ("queued", [], ctypes.c_long),
            ("log", [], text),
            ("misuse", [], text),
        ):
            self._functions[name].argtypes, self._functions[name].restype = arguments, result
        self.reset(devices)

    def reset(self, devices: int = 1) -> None:
        self._functions["reset"](devices)

    def stream(self, device: int = 0) -> int:
        """A stream of the test's own on a device."""
        return int(self._functions["stream"](device))

    def kernel(self, stream: int, target: int, data: bytes) -> None:
        """Queues a write of `data` to the address `target`."""
        self._functions["kernel"](stream, target, data, len(data))

    def run(self, seed: int = 0, most: int = 10**9) -> int:
        """Does what is queued, at most so many operations; how many."""
        return int(self._functions["run"](seed, most))

    def start(self, seed: int = 0) -> None:
        """Does what is queued, in a thread, until `stop`."""
        self._functions["start"](seed)

    def stop(self) -> None:
        self._functions["stop"]()

    def prefer(self, stream: int | None, preference: int) -> None:
        """None: the streams of copies."""
        self._functions["prefer"](stream, preference)

    def capturing(self, stream: int, capturing: bool) -> None:
        self._functions["capturing"](stream, capturing)

    def capture_implicitly(self, implicit: bool) -> None:
        self._functions["capture_implicitly"](implicit)

    def ignore_waits(self, ignore: bool) -> None:
        self._functions["ignore_waits"](ignore)

    def fail(self, function: str, nth: int = 1, *, sticky: bool = False) -> None:
        self._functions["fail"](function.encode(), nth, 1, sticky)

    def memory(self, address: int, size: int) -> None:
        self._functions["memory"](address, size)

    def calls(self, function: str = "") -> int:
        return int(self._functions["calls"](function.encode()))

    @property
    def live(self) -> int:
        """Handles and memory that nobody has given back."""
        return int(self._functions["live"]())

    @property
    def queued(self) -> int:
        return int(self._functions["queued"]())

    @property
    def log(self) -> list[str]:
        return self._functions["log"]().decode().split()

    @property
    def misuse(self) -> str:
        """The first thing that a driver must not be asked, if it was."""
        return self._functions["misuse"]().decode()


def library() -> Path:
    """The library, compiled once in a process."""
    if not _compiled:
        _compiled.append(compile_fake(Path(tempfile.mkdtemp(prefix="ckptd-fake-cuda-"))))
    return _compiled[0]


_compiled: list[Path] = []
