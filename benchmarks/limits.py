"""`python -m benchmarks.limits`: each path of one rank beside the least that the machine takes for the same bytes.

Capture and restore beside a plain copy by as many threads, a flush beside the disk and the codec by as many workers,
what is stored beside what is captured, and what a capture costs for each of very many tensors. Ours and the limit take
turns, so that a noisy minute hits both; figures are medians over the rounds, ratios medians of neighbours in time.
Writes `limits.md` and `limits.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.config import parse_size
from ckptd.core.types import Epoch, SnapshotId
from ckptd.daemon.flush import Stores, _workers
from ckptd.format.chunk import encode_chunk
from ckptd.format.objects import pack_table
from ckptd.plan.save import plan_save
from ckptd.tiers.arena import Slot, SnapshotReader, layout
from ckptd.trainer import collective
from ckptd.trainer.copying import CopyJobs
from ckptd.trainer.restoring import restore_state
from ckptd.trainer.saving import pieces_of
from ckptd.trainer.state import AppState

SNAPSHOT = SnapshotId(Epoch(1, "0" * 16), 1)
WIDTH = 1024
BYTES_PER_PARAMETER = 12
TRAINED = 20
"""Steps of AdamW before anything is compressed: moments of a fresh optimizer would be zeros."""

PARTS = ("memory", "flush", "stored", "tensors")

DIRECT_BYTES = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table. `ratio`: ours over the limit, as rates; or whatever the goal speaks of."""

    what: str
    ours: str
    limit: str
    ratio: float
    goal: str
    reached: bool


class Net(nn.Module):
    """Square layers whose gradients are not all alike."""

    def __init__(self, state_bytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = max(1, round(state_bytes / BYTES_PER_PARAMETER / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x)) / len(self.layers)
        return x


def trained(state_bytes: int, dtype: torch.dtype = torch.float32) -> AppState:
    """Model and optimizer after some steps."""
    torch.manual_seed(1)
    model = Net(state_bytes, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        x = torch.randn(64, WIDTH, dtype=dtype)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    return AppState({"model": model, "optimizer": optimizer})


class Captured:
    """The state of one rank and a slot for it."""

    def __init__(self, app: AppState, threads: int) -> None:
        self.app, self.threads = app, threads
        sources, aliases = app.sources(), app.aliases()
        catalog = plan_save([pieces_of(sources)])[0]
        self.objects = pack_table(app.objects())
        geometry, table = layout(0, catalog, 2 * len(self.objects) + 4096)
        self.slot = Slot.create(geometry, table)
        self.address = self.slot.map()
        self.jobs = CopyJobs(catalog, sources, aliases)
        self.bytes = int(catalog.raw.sum())
        self.crcs = np.zeros(len(catalog), np.uint32)

    def capture(self) -> None:
        """As at a boundary."""
        assert self.app.unchanged()
        assert self.jobs.refresh()
        self.jobs.copy(self.jobs.rows, self.address, self.crcs, self.threads)
        self.jobs.spread(self.crcs)

    def memory(self) -> memoryview:
        """The bytes of the slot."""
        return memoryview((ctypes.c_char * self.slot.geometry.data_bytes).from_address(self.address)).cast("B")

    def commit(self) -> None:
        """The slot holds a whole snapshot."""
        self.slot.begin()
        self.capture()
        self.slot.commit(SNAPSHOT, self.crcs, self.objects)

    def close(self) -> None:
        self.slot.close()


class Plain:
    """The same bytes, in one piece, copied by torch on as many threads."""

    def __init__(self, captured: Captured) -> None:
        memory = (ctypes.c_char * captured.slot.geometry.data_bytes).from_address(captured.address)
        self.slot = torch.frombuffer(memory, dtype=torch.uint8)
        self.source = torch.randint(0, 256, (len(self.slot),), dtype=torch.uint8)

    def out(self) -> None:
        """Into the slot."""
        self.slot.copy_(self.source)

    def back(self) -> None:
        """Out of it."""
        self.source.copy_(self.slot)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each, round by round; the first round warms up and does not count."""
    found = [[timed(work) for work in works] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*found[1:], strict=True)]


def compared(what: str, size: int, ours: Sequence[float], limit: Sequence[float], least: float, noun: str) -> Line:
    """Rates in GB/s, and how near ours comes to the limit."""
    ratio = statistics.median(b / a for a, b in zip(ours, limit, strict=True))
    rate = lambda seconds: f"{size / statistics.median(seconds) / 1e9:.2f} GB/s"  # noqa: E731
    return Line(what, rate(ours), f"{noun} {rate(limit)}", ratio, f">= {least:.2f}", ratio >= least)


# --- what is measured


def memory(state_bytes: int, rounds: int, threads: int) -> Iterator[Line]:
    """Capture, and restoring from the slot."""
    captured = Captured(trained(state_bytes), threads)
    plain = Plain(captured)
    ours, copied = in_turn(rounds, captured.capture, plain.out)
    yield compared("capture with checksums", captured.bytes, ours, copied, 0.9, "plain copy")
    captured.commit()
    group = collective.world()

    def restore() -> None:
        with contextlib.closing(SnapshotReader(SNAPSHOT, [captured.slot.duplicate()])) as reader:
            restore_state(captured.app, group, reader)

    ours, copied = in_turn(rounds, restore, plain.back)
    yield compared("restore from memory", captured.bytes, ours, copied, 0.8, "plain copy")
    captured.close()


def flush(state_bytes: int, rounds: int, threads: int, folder: Path) -> Iterator[Line]:
    """From the slot to a committed checkpoint."""
    captured = Captured(trained(state_bytes), threads)
    captured.commit()
    workers, numbers = _workers(), iter(range(10**6))
    stored: list[int] = []

    def write() -> None:
        store = folder / f"store-{next(numbers)}"
        stores = Stores("limits")
        stores.write(SNAPSHOT, str(store), [captured.slot.duplicate()], 0, 1)
        stores.commit(SNAPSHOT, str(store), 1)
        stored.append(sum(path.stat().st_size for path in store.rglob("*.ckd")))

    def codec() -> None:
        """The chunks, compressed and thrown away."""
        catalog = captured.jobs.catalog
        memory = captured.memory()
        local = threading.local()

        def encode(row: int) -> None:
            if not hasattr(local, "into"):
                local.into = memoryview(mmap.mmap(-1, CHUNK_BYTES))
            offset, size = int(catalog.file_offset[row]), int(catalog.raw[row])
            encode_chunk(memory[offset : offset + size], catalog.tensors[catalog.tensor[row]].dtype, local.into)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(encode, range(len(catalog))))

    def disk() -> None:
        """As many bytes as are stored, in one file, past the page cache and synced."""
        block = memoryview(np.random.default_rng(0).integers(0, 256, DIRECT_BYTES + 4096, np.uint8))
        start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % 4096
        block = block[start : start + DIRECT_BYTES]
        path = folder / f"plain-{next(numbers)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600)
        try:
            for _ in range(-(-(stored[-1] if stored else captured.bytes) // DIRECT_BYTES)):
                os.write(descriptor, block)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.unlink()

    ours, codecs, disks = in_turn(rounds, write, codec, disk)
    limit = [max(pair) for pair in zip(codecs, disks, strict=True)]
    noun = "codec" if statistics.median(codecs) > statistics.median(disks) else "disk"
    yield compared(f"flush, {workers} worker(s)", captured.bytes, ours, limit, 0.9, noun)
    ratio = stored[-1] / captured.bytes
    raw = f"{captured.bytes / 1e9:.3f} GB"
    yield Line("stored, fp32 after 20 steps", f"{stored[-1] / 1e9:.3f} GB", raw, ratio, "<= 0.87", ratio <= 0.87)
    captured.close()


def half(state_bytes: int, threads: int) -> Iterator[Line]:
    """What weights in bf16 take, compressed."""
    captured = Captured(trained(state_bytes, torch.bfloat16), threads)
    captured.capture()
    catalog, raw, stored = captured.jobs.catalog, 0, 0
    into = memoryview(bytearray(CHUNK_BYTES))
    memory = captured.memory()
    for row in range(len(catalog)):
        tensor = catalog.tensors[catalog.tensor[row]]
        if tensor.key.startswith("model/"):
            offset, size = int(catalog.file_offset[row]), int(catalog.raw[row])
            raw += size
            stored += encode_chunk(memory[offset : offset + size], tensor.dtype, into).stored.nbytes
    captured.close()
    ratio = stored / raw
    yield Line(
        "stored, bf16 weights after 20 steps",
        f"{stored / 1e9:.3f} GB",
        f"{raw / 1e9:.3f} GB",
        ratio,
        "<= 0.72",
        ratio <= 0.72,
    )


def many(count: int, rounds: int, threads: int, *, sharded: bool) -> Iterator[Line]:
    """What a capture takes for each of very many small tensors: parameters, and three of AdamW for each."""
    values = [torch.randn(16) for _ in range(count // 4)]
    if sharded:
        mesh = init_device_mesh("cpu", (1,))
        values = [DTensor.from_local(value, mesh, [Replicate()]) for value in values]
    model = nn.ParameterList(values)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=not sharded)
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    app = AppState({"model": model, "optimizer": optimizer})
    captured = Captured(app, threads)
    (seconds,) = in_turn(rounds, captured.capture)
    captured.close()
    microseconds, most = statistics.median(seconds) / count * 1e6, 6.0 if sharded else 2.0
    yield Line(
        f"capture of {count:,} {'DTensors' if sharded else 'tensors'}, each",
        f"{microseconds:.2f} µs",
        "",
        microseconds,
        f"<= {most:.0f} µs",
        microseconds <= most,
    )


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = ["| | ours | limit | ratio | goal | |", "|---|--:|--:|--:|--:|---|"]
    for line in lines:
        rows.append(
            f"| {line.what} | {line.ours} | {line.limit} | {line.ratio:.2f} | {line.goal} | "
            f"{'' if line.reached else 'missed'} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--state", type=parse_size, default=10**9, metavar="SIZE", help="bytes of state (default 1e9)")
    parser.add_argument("--tensors", type=int, default=50_000, help="for the cost of each (default 50,000)")
    parser.add_argument("--rounds", type=int, default=7, help="of each (default 7)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; can be repeated")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="for the results and for files")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    options.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="limits-", dir=options.output))
    parts, lines = options.only or PARTS, list[Line]()
    try:
        if "memory" in parts:
            lines += memory(options.state, options.rounds, threads)
        if "flush" in parts:
            lines += flush(options.state, max(1, options.rounds // 2), threads, folder)
        if "stored" in parts:
            lines += half(options.state // 4, threads)
        if "tensors" in parts:
            lines += many(options.tensors, options.rounds, threads, sharded=False)
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            lines += many(options.tensors, options.rounds, threads, sharded=True)
            dist.destroy_process_group()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(lines))
    (options.output / "limits.md").write_text(table(lines))
    (options.output / "limits.json").write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()
