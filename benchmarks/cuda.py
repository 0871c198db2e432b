"""Capture on a CUDA device: `python -m benchmarks.cuda`. Prints Markdown, writes JSON; without a device it says so and
exits with status 2.

Measured in one process, interleaved, medians of several rounds:

- throughput of a GPT-like stack of layers with AdamW, with a snapshot at every step and without ckptd;
- how fast a snapshot is captured, checksums included, beside one copy of the same bytes to pinned memory;
- what queueing a capture costs the training thread per tensor, for many small tensors, plain and as DTensors;
- host memory of the trainer and its daemon, beside the state.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptd
from benchmarks.memory import marked, occupied

MARK = "CKPTD_RUNTIME_DIR"
WARM_STEPS = 5


class Block(nn.Module):
    """Attention's and the feed-forward layer's matrices, with norms and biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixing = nn.Linear(width, 4 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value, gate = self.mixing(self.norm(x)).chunk(4, -1)
        mixed = nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        x = x + mixed * torch.sigmoid(gate)
        result: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return result


class Training:
    """A model of about `parameters` parameters and fused AdamW: 12 bytes of state a parameter."""

    def __init__(self, parameters: int, tokens: int) -> None:
        torch.manual_seed(0)
        self._width = 1024
        blocks = max(1, parameters // (12 * self._width**2))
        self.model = nn.Sequential(*(Block(self._width) for _ in range(blocks))).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self._x = torch.randn(max(1, tokens // 256), 256, self._width, device="cuda")

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self._x).square().mean()
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> list[torch.Tensor]:
        moments = [self.optimizer.state[p][name] for p in self.model.parameters() for name in ("exp_avg", "exp_avg_sq")]
        return [*(p.detach() for p in self.model.parameters()), *moments]


def around(state: dict[str, Any], **options: Any) -> ckptd.Checkpointer:
    options = {"job": "benchmark", "snapshot_every": 1, "flush_every": None, "resume": "never", **options}
    return ckptd.Checkpointer(state, None, **options)


def timed(steps: int, step: Callable[[], object]) -> float:
    """Seconds a step, the device's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def throughput(parameters: int, tokens: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step in rounds without and with a snapshot at every step, and what came of the snapshots."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    counts: dict[str, Any] = {}
    host_bytes = 0
    training = Training(parameters, tokens)
    for _ in range(WARM_STEPS):
        training.step()
    for _ in range(rounds):
        for kind in found:
            with around(training.state) if kind == "with" else nullcontext() as checkpointer:

                def step(checkpointer: ckptd.Checkpointer | None = checkpointer) -> None:
                    training.step()
                    if checkpointer is not None:
                        checkpointer.step()

                timed(WARM_STEPS, step)
                if checkpointer is not None:
                    checkpointer.snapshot()
                    before = checkpointer.statistics()
                found[kind].append(timed(steps, step))
                if checkpointer is not None:
                    after = checkpointer.statistics()
                    counts = {name: after[name] - before[name] for name in ("snapshots_captured", "snapshots_skipped")}
                    counts["skip_reasons"] = after["skip_reasons"]
                    host_bytes = occupied([os.getpid(), *marked(MARK, os.environ[MARK])])
    without, with_ = (statistics.median(found[kind]) for kind in ("without", "with"))
    state_bytes = sum(tensor.nbytes for tensor in training.tensors())
    return {
        "state_bytes": state_bytes,
        "step_s_without": without,
        "step_s_with": with_,
        "throughput_kept": without / with_,
        "steps": steps,
        **counts,
        "host_bytes": host_bytes,
    }


def rate(parameters: int, rounds: int) -> dict[str, Any]:
    """Seconds from a boundary until the outcome of the capture is said, beside one pinned copy of the same bytes."""
    training = Training(parameters, 256)
    training.step()
    tensors = training.tensors()
    pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]

    def plain() -> None:
        for source, target in zip(tensors, pinned, strict=True):
            target.copy_(source, non_blocking=True)

    captures, copies = [], []
    with around(training.state) as checkpointer:
        for _ in range(rounds):
            training.step()
            torch.cuda.synchronize()
            captured = checkpointer.statistics()["snapshots_captured"]
            started = time.perf_counter()
            checkpointer.step()
            checkpointer.before_update()
            while checkpointer.statistics()["snapshots_captured"] == captured:
                if time.perf_counter() - started > 1.0:
                    break  # no slot was free, nothing was captured at this boundary
                time.sleep(0)
            else:
                captures.append(time.perf_counter() - started)
            checkpointer.snapshot()
            copies.append(timed(1, plain))
    capture_s, copy_s = statistics.median(captures), statistics.median(copies)
    state_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "capture_s": capture_s,
        "pinned_copy_s": copy_s,
        "capture_gb_per_s": state_bytes / capture_s / 1e9,
        "pinned_copy_gb_per_s": state_bytes / copy_s / 1e9,
        "of_a_pinned_copy": copy_s / capture_s,
    }


def issue(count: int, rounds: int, *, distributed: bool) -> dict[str, Any]:
    """Microseconds of the training thread per tensor for one capture of `count` small tensors."""
    tensors = [nn.Parameter(torch.zeros(16, device="cuda")) for _ in range(count // 2)]
    if distributed:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        if not dist.is_initialized():
            dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        mesh = init_device_mesh("cuda", (1,))
        tensors = [nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)])) for tensor in tensors]
    model = nn.ParameterList(tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stalls = []
    with around({"model": model, "optimizer": optimizer}) as checkpointer:
        for _ in range(rounds + WARM_STEPS):
            optimizer.step()
            captured = checkpointer.statistics()["snapshots_captured"]
            checkpointer.step()
            checkpointer.snapshot()
            if checkpointer.statistics()["snapshots_captured"] > captured:
                stalls.append(checkpointer.statistics()["stall_s_last"])
    stall_s = statistics.median(stalls[WARM_STEPS // 2 :])
    return {"tensors": count, "stall_s": stall_s, "microseconds_a_tensor": 1e6 * stall_s / count}


def machine() -> dict[str, str]:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.stdout.split("\n")[0],
        "torch": torch.__version__,
        "cores": str(os.cpu_count()),
    }


def markdown(found: dict[str, Any]) -> str:
    """The table of a run."""
    through, capture = found["throughput"], found["rate"]
    lines = [
        f"{found['machine']['device']}, driver {found['machine']['driver']}, torch {found['machine']['torch']}, "
        f"{found['machine']['cores']} cores; {through['state_bytes'] / 1e9:.2f} GB of state",
        "",
        "| | |",
        "|---|---|",
        f"| step without / with a snapshot at every step | {1e3 * through['step_s_without']:.1f} / "
        f"{1e3 * through['step_s_with']:.1f} ms |",
        f"| throughput kept | {through['throughput_kept']:.3f} |",
        f"| snapshots captured / skipped in {through['steps']} steps | {through['snapshots_captured']} / "
        f"{through['snapshots_skipped']} |",
        f"| capture with checksums | {capture['capture_gb_per_s']:.1f} GB/s |",
        f"| one copy to pinned memory | {capture['pinned_copy_gb_per_s']:.1f} GB/s |",
        f"| capture as a fraction of that | {capture['of_a_pinned_copy']:.2f} |",
        f"| host memory | {through['host_bytes'] / 1e9:.2f} GB |",
    ]
    for name in ("plain", "distributed"):
        each = found["issue"][name]
        lines.append(
            f"| boundary with {each['tensors']} {name} tensors | {1e3 * each['stall_s']:.1f} ms, "
            f"{each['microseconds_a_tensor']:.2f} microseconds a tensor |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=int, default=8 * 256, help="of a step")
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=50_000, help="small ones")
    parser.add_argument("--output", type=Path, default=Path("bench-results/cuda.json"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ckptd-bench-") as folder:
        os.environ[MARK] = folder
        found: dict[str, Any] = {"machine": machine()}
        found["throughput"] = throughput(asked.parameters, asked.tokens, asked.steps, asked.rounds)
        gc.collect()
        found["rate"] = rate(asked.parameters, 3 * asked.rounds)
        gc.collect()
        found["issue"] = {
            name: issue(asked.tensors, asked.rounds, distributed=name == "distributed")
            for name in ("plain", "distributed")
        }
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(found, indent=1))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
