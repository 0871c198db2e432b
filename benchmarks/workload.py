"""What trains in a benchmark: a GPT with AdamW, of a chosen size of state, sharded by FSDP2 over more than one rank.

The state is parameters and both moments of AdamW in float32: 12 bytes a parameter; 1.2 GB are 99 million parameters.
Training is deterministic: no dropout, and the tokens of a step are drawn from its number, so that whoever has the
weights and moments of a step has all of it. Owns no files and no clocks, and needs torch alone: peers import it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BYTES_PER_PARAMETER = 12
VOCABULARY = 256
WIDTHS = (768, 512, 256, 128)
LEAST_LAYERS = 4


def shape(state_bytes: int) -> tuple[int, int]:
    """(layers, width) of the GPT whose state is about this large: the widest with LEAST_LAYERS, if there is one."""
    parameters = state_bytes / BYTES_PER_PARAMETER
    sizes = [(max(1, round(parameters / (12 * width * width))), width) for width in WIDTHS]
    return next((size for size in sizes if size[0] >= LEAST_LAYERS), sizes[-1])


class GPT(nn.Module):
    """Tokens (batch, time) -> logits (batch, time, VOCABULARY)."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, **options) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


class Workload:
    """A model, its optimizer, and its training steps. Raises RuntimeError where there is no process group."""

    def __init__(self, state_bytes: int, batch: int, context: int = 256, seed: int = 1) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.ranks))
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed)
        self._batch, self._context, self._seed = batch, context, seed
        self.model = GPT(*shape(state_bytes), context)
        if self.ranks > 1:
            for layer in self.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, number: int, before_update: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, update; `before_update` is called just before the weights change."""
        generator = torch.Generator().manual_seed((self._seed << 40) + (number << 10) + self.rank)
        tokens = torch.randint(VOCABULARY, (self._batch, self._context + 1), generator=generator)
        self.optimizer.zero_grad()
        logits = self.model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        before_update()
        self.optimizer.step()

    def create_moments(self) -> None:
        """The state of AdamW before its first step: for ways of loading that fill what is there."""
        for parameter in self.model.parameters():
            if not self.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def tensors(self) -> Iterator[torch.Tensor]:
        """The local part of every tensor that a checkpoint must hold (one-element step counters apart)."""
        for parameter in self.model.parameters():
            moments = self.optimizer.state[parameter]
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()

    def local_state(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, the live local parts, step counters too: for ways that know plain tensors only."""
        found = {}
        for name, parameter in self.model.named_parameters():
            for kind, tensor in {"weight": parameter, **self.optimizer.state[parameter]}.items():
                found[f"{name}.{kind}"] = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        return found

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
