"""`python -m benchmarks.erasure`: encoding and decoding of gathered pieces, beside plain ISA-L on the same buffers.

Prints rates in GB of data (k segments) per second, the median of the rounds, and ours over plain ISA-L: the median of
the ratios of neighbours in time, so that a noisy minute hits both. Plain is one `ec_encode_data` a row, whole pieces.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyeclib

from ckptd.core import native
from ckptd.core.config import parse_size


class Buffers:
    """Rows of k data pieces and m parities, each piece somewhere else in memory, as they come from other nodes."""

    def __init__(self, k: int, m: int, rows: int, piece_bytes: int) -> None:
        random = np.random.default_rng(0)
        self.k, self.m, self.rows, self.piece_bytes = k, m, rows, piece_bytes
        self.memory = random.integers(0, 2**63, rows * (k + m) * piece_bytes // 8, np.int64).view(np.uint8)
        places = random.permutation(rows * (k + m)).reshape(rows, k + m)
        addresses = self.memory.ctypes.data + places * piece_bytes
        self.sources = np.ascontiguousarray(addresses[:, :k]).astype(np.uint64)
        self.targets = np.ascontiguousarray(addresses[:, k:]).astype(np.uint64)
        self.sizes = np.full((rows, k), piece_bytes, np.int64)
        self.lengths = np.full(rows, piece_bytes, np.int64)
        self.crc = np.zeros((rows, m), np.uint32)

    @property
    def data_bytes(self) -> int:
        """Bytes of data in all rows."""
        return self.rows * self.k * self.piece_bytes

    def encode(self, **options: object) -> None:
        """Ours: all rows in one call."""
        native.erasure_encode(self.sources, self.sizes, self.targets, self.lengths, **options)  # type: ignore[arg-type]

    def decode(self, lost: int, threads: int) -> None:
        """Ours: the first `lost` data segments of every row, into themselves, from all that is left."""
        present = [*range(lost, self.k), *range(self.k, self.k + lost)]
        sources = np.hstack([self.sources[:, lost:], self.targets[:, :lost]])
        targets = np.ascontiguousarray(self.sources[:, :lost])
        native.erasure_decode(
            present, range(lost), np.ascontiguousarray(sources), self.sizes, targets, self.lengths, threads=threads
        )


class Plain:
    """ISA-L called directly, with tables made beforehand."""

    def __init__(self, buffers: Buffers) -> None:
        path = sorted(Path(pyeclib.__file__).parents[1].glob("pyeclib.libs/libisal*.so*"))[0]
        self.library = ctypes.CDLL(str(path))
        self.buffers = buffers
        k, m = buffers.k, buffers.m
        matrix = (ctypes.c_ubyte * ((k + m) * k))()
        self.library.gf_gen_cauchy1_matrix(matrix, k + m, k)
        self.tables = (ctypes.c_ubyte * (32 * k * m))()
        self.library.ec_init_tables(k, m, ctypes.byref(matrix, k * k), self.tables)
        self.pointers = [
            ((ctypes.c_void_p * k)(*sources), (ctypes.c_void_p * m)(*targets))
            for sources, targets in zip(buffers.sources.tolist(), buffers.targets.tolist(), strict=True)
        ]

    def encode(self) -> None:
        """Row by row."""
        k, m, length = self.buffers.k, self.buffers.m, self.buffers.piece_bytes
        for sources, targets in self.pointers:
            self.library.ec_encode_data(length, k, m, self.tables, sources, targets)


def seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(buffers: Buffers, rounds: int, threads: int) -> dict[str, list[float]]:
    """name -> seconds of each round, all contenders in turn."""
    plain = Plain(buffers)
    contenders: dict[str, Callable[[], None]] = {
        "plain ISA-L": plain.encode,
        "encode": buffers.encode,
        "encode, CRC": lambda: buffers.encode(crc=buffers.crc),
        f"encode, {threads} threads": lambda: buffers.encode(threads=threads),
    }
    for lost in range(1, min(buffers.k, buffers.m) + 1):
        contenders[f"decode {lost}"] = lambda lost=lost: buffers.decode(lost, 1)  # type: ignore[misc]
    contenders["portable"] = lambda: buffers.encode(portable=True)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    plain.encode()
    expected = buffers.memory.copy()
    for call in contenders.values():
        call()
        if not np.array_equal(buffers.memory, expected):
            raise SystemExit("the bytes differ from those of plain ISA-L")
    for _ in range(rounds):
        for name, call in contenders.items():
            found[name].append(seconds(call))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.erasure", description=__doc__)
    parser.add_argument("codes", nargs="*", default=["1+1", "2+1", "4+1", "4+2", "6+3"], help="K+M ...")
    parser.add_argument("--piece", type=parse_size, default=4 * 2**20, help="bytes of a piece (default 4 MiB)")
    parser.add_argument("--memory", type=parse_size, default=256 * 2**20, help="bytes of all pieces (default 256 MiB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; GB of data per second (over plain ISA-L)")
    for code in options.codes:
        k, m = map(int, code.split("+"))
        buffers = Buffers(k, m, max(options.memory // ((k + m) * options.piece), 1), options.piece)
        found = measure(buffers, options.rounds, options.threads)
        plain = found["plain ISA-L"]
        cells = []
        for name, times in found.items():
            rate = buffers.data_bytes / statistics.median(times) / 1e9
            ratio = statistics.median(base / own for base, own in zip(plain, times, strict=True))
            cells.append(f"{name} {rate:.2f} ({ratio:.0%})")
        print(f"{code}: {'; '.join(cells)}", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
