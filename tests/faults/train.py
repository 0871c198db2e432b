"""A small deterministic training job for the fault tests: the same numbers whether it is interrupted or not.

    train.py RESULT [--plain] [--steps N] [--pace S] [--parallel none|ddp|fsdp] [--store PATH] [--options JSON]

Appends to RESULT, as JSON lines: what was restored, each step, and at the end the hash of the weights and the
statistics. `--plain` is the same training without ckptd.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sitecustomize import moment
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ckptd

WIDTH = 64


def build(parallel: str) -> tuple[nn.Module, nn.Module]:
    """(the model to train, the module whose weights count)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 1))
    if parallel == "ddp":
        return DistributedDataParallel(model), model
    if parallel == "fsdp":
        fully_shard(model[0])
        fully_shard(model)
    return model, model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, counts: dict[str, Any]) -> float:
    """One step that depends on every kind of state: weights, moments, schedule, generators, plain data."""
    x = torch.randn(8, WIDTH) * (1 + random.random())
    counts["drawn"] += 8
    loss: torch.Tensor = (model(x) - x.sum(1, keepdim=True) / (1 + counts["drawn"] % 7)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    moment("backward")
    optimizer.step()
    scheduler.step()
    return loss.item()


def fingerprint(module: nn.Module, optimizer: torch.optim.Optimizer, counts: dict[str, Any]) -> str:
    """Hash of everything that training has changed, the same on every rank where it is sharded."""
    digest = hashlib.sha256(json.dumps(counts).encode())
    states = (optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"])
    moments = [value for state in states for _, value in sorted(state.items())]
    for tensor in [*module.state_dict().values(), *moments]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(whole.detach().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def warm_up() -> None:
    """Has torch import what it imports late."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight])
    optimizer.zero_grad()
    optimizer.step()
    assert ckptd.Checkpointer


class Plain:
    """Stands for a Checkpointer that does nothing."""

    def steps(self, stop: int) -> Iterator[int]:
        yield from range(1, stop + 1)

    def statistics(self) -> dict[str, Any]:
        return {"restored": None}


def checkpointer(state: dict[str, Any], arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    if arguments.plain:
        return contextlib.nullcontext(Plain())
    return ckptd.Checkpointer(state, store=arguments.store, **json.loads(arguments.options))


def forked_child() -> None:
    """Stands for a DataLoader worker: forked, it holds every descriptor of this process open."""
    if os.fork() == 0:
        while True:
            time.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--parallel", choices=("none", "ddp", "fsdp"), default="none")
    parser.add_argument("--store")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--ballast", type=int, default=0, help="bytes of state that training does not use")
    parser.add_argument("--grow", type=int, default=0, help="the step at which the state outgrows its slots")
    parser.add_argument(
        "--insist", type=int, nargs="*", default=[], help="bodies of this process before which to snapshot"
    )
    parser.add_argument("--fork", action="store_true", help="leave a forked child behind")
    parser.add_argument("--open-files", type=int, default=0, help="descriptors to hold before ckptd has any")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(arguments.open_files)]
    if arguments.parallel != "none":
        rendezvous = os.environ.get("TEST_RENDEZVOUS")
        dist.init_process_group(
            "gloo",
            init_method=None if rendezvous is None else f"file://{rendezvous}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    random.seed(rank)

    def say(**event: Any) -> None:
        with arguments.result.open("a") as file:
            file.write(json.dumps({"rank": rank, "pid": os.getpid(), "parent": os.getppid(), **event}) + "\n")

    model, module = build(arguments.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.9)
    counts = {"drawn": 0}
    torch.manual_seed(100 + rank)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "counts": counts}
    if arguments.ballast:
        noise = torch.Generator().manual_seed(2)
        state["ballast"] = torch.randint(0, 256, (arguments.ballast,), dtype=torch.uint8, generator=noise)
    say(started=True)
    with checkpointer(state, arguments) as ckpt:
        for body, step in enumerate(ckpt.steps(arguments.steps), 1):
            if body in arguments.insist:
                assert ckpt.snapshot() == step - 1
            if arguments.fork and step == 1:
                forked_child()
            if step == arguments.grow:
                counts["grown"] = "x" * 500_000
            moment("step")
            loss = train_step(model, optimizer, scheduler, counts)
            descriptors = len(os.listdir("/proc/self/fd"))
            say(step=step, world=world, loss=loss, restored=ckpt.statistics()["restored"], descriptors=descriptors)
            time.sleep(arguments.pace)
        statistics = ckpt.statistics()
    say(finished=True, hash=fingerprint(module, optimizer, counts), statistics=statistics)
    assert len(held) == arguments.open_files
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
