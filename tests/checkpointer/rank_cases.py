"""Trainings of several ranks for test_ranks.py: run by torchrun, killed twice, compared with undisturbed ones.

    torchrun --nproc-per-node 2 --max-restarts 2 -m tests.checkpointer.rank_cases FOLDER

First start: "eager" runs until rank 1 is killed. First restart: it ends, and "lazy" runs until rank 0 is killed. Second
restart: "eager" comes back from its store, "lazy" ends, and all is compared with the same training without ckptd.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptd
from tests.checkpointer.cases import KILL_AT, KILL_FROM, PACE_S, STEPS, Case, digest, loss_of, network, seed

KILLER = {"eager": 1, "lazy": 0}


def ddp() -> Case:
    """BatchNorm's buffers differ between ranks at each boundary; unused buffers are not even alike."""
    model = network()
    model.register_buffer("own", torch.full((3,), float(dist.get_rank())))
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return stepped(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2))


def fsdp(width: int) -> Case:
    """FSDP2; an odd width gives the ranks unequal shards, and one of them nothing of a bias of one element."""
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 1, bias=True), nn.Linear(1, 4))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return stepped(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Case:
    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Case({"model": model, "optimizer": optimizer}, step)


def world() -> dict[str, Case]:
    """All trainings, each rank with random numbers of its own."""
    seed(0)
    cases = {"ddp": ddp(), "even": fsdp(8), "uneven": fsdp(7)}
    seed(1 + dist.get_rank())
    return cases


def train(folder: Path, capture: str, dies: bool) -> dict[str, Any]:
    """One run with ckptd, to its end or until it is killed."""
    cases = world()
    state = {name: case.state for name, case in cases.items()}
    losses = {}
    options: dict[str, Any] = {"capture": capture, "audit": True, "snapshot_every": 1, "flush_every": 10}
    with ckptd.Checkpointer(state, store=folder / capture, job=capture, **options) as checkpointer:
        for number in checkpointer.steps(STEPS):
            if dies:
                die(checkpointer, number, capture)
            losses[number] = [case.step() for case in cases.values()]
            time.sleep(PACE_S)
        statistics = checkpointer.statistics()
    return {"digest": digest(state), "losses": losses, "statistics": statistics}


def die(checkpointer: ckptd.Checkpointer, number: int, capture: str) -> None:
    """SIGKILL to one rank, once there is something to restore."""
    if number == KILL_AT:
        checkpointer.snapshot()
    sealed = checkpointer.statistics()["snapshots_sealed"]
    if number >= KILL_FROM and sealed >= 2 - (number >= KILL_AT) and dist.get_rank() == KILLER[capture]:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """See the module docstring."""
    folder, start = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"eager": train(folder, "eager", dies=start == 0)}
    (folder / f"start-{start}-{dist.get_rank()}.json").write_text(json.dumps(found))
    found["lazy"] = train(folder, "lazy", dies=start == 1)
    cases = world()
    losses = {number: [case.step() for case in cases.values()] for number in range(1, STEPS + 1)}
    found["plain"] = {"digest": digest({name: case.state for name, case in cases.items()}), "losses": losses}
    (folder / f"end-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
