"""What trains in a benchmark: a residual feed-forward network with AdamW, of a chosen size of state.

The state is parameters and both moments of AdamW in float32: 12 bytes a parameter. With more than one rank it is
sharded by FSDP2. Owns no files and no clocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BYTES_PER_PARAMETER = 12
WIDTH = 1024


class Block(nn.Module):
    """Two square layers and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.outer(torch.nn.functional.gelu(self.inner(x)))
        return x + residual


class Workload:
    """A model, its optimizer, and one training step; the whole state is `state_bytes` large over all ranks."""

    def __init__(self, state_bytes: int, batch: int) -> None:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        torch.manual_seed(1)
        blocks = max(1, round(state_bytes / BYTES_PER_PARAMETER / (2 * WIDTH * WIDTH)))
        self.model = nn.Sequential(*(Block(WIDTH) for _ in range(blocks)))
        if ranks > 1:
            for block in self.model:
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._generator = torch.Generator().manual_seed(2 + rank)
        self._batch = batch

    def step(self) -> None:
        """Forward, backward, update."""
        x = torch.randn(self._batch, WIDTH, generator=self._generator)
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        if dist.get_world_size() > 1:
            dist.barrier()  # a step ends for all ranks together, as it does where a loss is averaged

    def tensors(self) -> Iterator[torch.Tensor]:
        """The local part of every tensor that a checkpoint must hold (one-element step counters apart)."""
        for parameter in self.model.parameters():
            moments = self.optimizer.state[parameter]
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()

    def local_bytes(self) -> int:
        """Bytes of state this rank holds."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def fingerprint(self) -> list[int]:
        """A number a tensor that changes with nearly every change of its bits; to see that a load gave it back."""
        return [int(tensor.view(torch.int32).sum(dtype=torch.int64)) for tensor in self.tensors()]

    def wipe(self) -> None:
        """Zero the state, so that a load that does nothing is seen."""
        for tensor in self.tensors():
            tensor.zero_()
