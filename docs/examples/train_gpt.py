"""Train a byte-level GPT with FSDP2 and ckptd, on the source code of Python's standard library.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or restarts may meet stale addresses (pytorch#135712)
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 docs/examples/train_gpt.py --store /tmp/gpt

Kill a rank (or all, or unplug the machine between two flushes) and start it again: it goes on where it was, bit for
bit. What ckptd needs of a training script is in `main`: the state in a mapping, and the loop over `ckpt.steps`.
Without torchrun it trains in one process. `--no-ckptd` is the same training without checkpoints.

Every rank appends JSON lines to `<progress>/rank-<rank>.jsonl`: one at the start, one a step (rank 0), one at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import ckptd

# --- model ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a GPT. `batch` is sequences per rank and step."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int


SIZES = {
    "1M": Size(layers=4, heads=4, width=144, context=64, batch=4),
    "10M": Size(layers=6, heads=6, width=384, context=128, batch=2),
    "30M": Size(layers=9, heads=8, width=512, context=128, batch=4),
    "100M": Size(layers=14, heads=12, width=768, context=128, batch=4),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads = size.heads
        self.dropout = dropout
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.projection = nn.Linear(size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention and a feed-forward network, each with a residual."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size, dropout)
        self.feed_forward_norm = nn.LayerNorm(size.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Byte-level GPT, output layer tied to the token embedding: tokens (batch, time) -> logits (batch, time, 256)."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(size, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.output = nn.Linear(size.width, 256, bias=False)
        self.apply(self._initialise)
        self.output.weight = self.tokens.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


# --- data -------------------------------------------------------------------------------------------------------------


class StandardLibrary:
    """Windows of the standard library's own source, in an order shuffled anew for each pass.

    Its state is one number, the windows used so far by all ranks together, so that it suits any world size.
    """

    def __init__(self, size: Size, rank: int, world_size: int, seed: int) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
        wanted = [file for file in files if file.parent.name not in ("site-packages", "test", "idlelib")]
        text = b"".join(file.read_bytes() for file in wanted)
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.windows = (len(self.bytes) - 1) // size.context
        self.used = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of this rank, each (batch, context)."""
        first = self.used + self.rank * self.size.batch
        windows = [self._window(first + i) for i in range(self.size.batch)]
        self.used += self.world_size * self.size.batch
        batch = torch.stack(windows).long()
        return batch[:, :-1], batch[:, 1:]

    def _window(self, index: int) -> torch.Tensor:
        start = int(self._order(index // self.windows)[index % self.windows]) * self.size.context
        return self.bytes[start : start + self.size.context + 1]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one data set lives as long as the process
    def _order(self, turn: int) -> torch.Tensor:
        return torch.randperm(self.windows, generator=torch.Generator().manual_seed(self.seed + turn))

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.used = state["used"]


# --- training ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warmup: int = 10) -> float:
    """Linear warm-up, then a cosine to a tenth; a factor of the peak rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, data: Any
) -> float:
    """One optimizer step; the loss averaged over ranks."""
    inputs, targets = data.next_batch()
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    total = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of whole tensors in the order of their names; gathers DTensors (collective)."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(f"{name} {full.dtype} {tuple(full.shape)}\n".encode())
        sha.update(full.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def open_log(directory: Path | None, rank: int) -> Callable[..., None]:
    """A function that appends one JSON line to this rank's log; it prints instead where there is no directory."""
    if directory is None:
        file = sys.stdout
    else:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / f"rank-{rank}.jsonl", "a")  # noqa: SIM115 - open until the process ends

    def log(**fields: object) -> None:
        print(json.dumps({"time": time.time(), **fields}), file=file, flush=True)

    return log


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", choices=SIZES, default="10M", help="size of the model (default 10M)")
    parser.add_argument("--steps", type=int, default=100, help="steps in all, over every restart")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", default=None, help="where checkpoints go; without it, memory only")
    parser.add_argument("--flush-every", type=int, default=500, help="steps between checkpoints in the store")
    parser.add_argument("--progress", type=Path, default=None, help="directory of the JSON lines; without it, printed")
    parser.add_argument("--weights", action="store_true", help="log a checksum of the weights after every step")
    parser.add_argument("--no-ckptd", action="store_true", help="the same training without checkpoints")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    log = open_log(options.progress, rank)
    log(event="start", rank=rank, pid=os.getpid(), restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    size = SIZES[options.parameters]
    torch.manual_seed(options.seed)  # the same weights everywhere ...
    model = GPT(size)
    torch.manual_seed(options.seed + 1 + rank)  # ... and dropout of its own on each rank
    if dist.is_initialized():
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, options.steps))
    data = StandardLibrary(size, rank, world_size, options.seed)

    def weights() -> dict[str, str]:
        return {"weights": digest(model.state_dict())} if options.weights else {}

    if options.no_ckptd:
        for step in range(1, options.steps + 1):
            loss, found = train_step(model, optimizer, scheduler, data), weights()
            if rank == 0:
                log(event="step", step=step, loss=loss, **found)
        statistics = None
    else:
        with ckptd.Checkpointer(
            {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data},
            store=options.store,
            flush_every=options.flush_every,
        ) as ckpt:
            if options.weights:
                log(event="restored", step=ckpt.restore(), **weights())
            for step in ckpt.steps(options.steps):
                loss, found = train_step(model, optimizer, scheduler, data), weights()
                if rank == 0:
                    log(event="step", step=step, loss=loss, statistics=ckpt.statistics(), **found)
            statistics = ckpt.statistics()

    log(event="end", weights=digest(model.state_dict()), statistics=statistics)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
