"""State dicts as users of torch.distributed.checkpoint build them, and what to ask of a save or a load."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ckptd.dcp import StorageReader, StorageWriter
from tests.api.models import Model


class Application:
    """A model and its optimizer, that has taken `steps` steps; `wrap` shards the model first."""

    def __init__(self, seed: int, steps: int = 2, wrap: Callable[[nn.Module], object] = lambda model: None) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01 * (seed + 1))
        self.train(steps)

    def train(self, steps: int) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(7, 3, generator=generator)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, path: Path, **options: Any) -> None:
        save(self.state(), storage_writer=StorageWriter(path, **options))

    def load(self, path: Path) -> None:
        state = self.state()
        load(state, storage_reader=StorageReader(path))
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def mixed() -> dict[str, Any]:
    """Everything that a state dict may hold: nested, in lists, of all kinds; a tensor of several chunks."""
    generator = torch.Generator().manual_seed(5)
    return {
        "weights": {"large": torch.randn(2500, 2000, generator=generator), "slashed/name": torch.arange(3)},
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "strided": torch.arange(20)[::3],
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "list": [torch.ones(2), {"inner": torch.arange(2), "name": "x"}, [torch.zeros(1)]],
        "plain": [1, 2, 3],
        "tuple": (1, (2.5, None), torch.arange(4), {"deep": [torch.ones(1)]}),
        "random": (3, tuple(range(2**31, 2**31 + 5)), None),
        "array": np.arange(6).reshape(2, 3),
        "kinds": {"dtype": torch.float16, "device": torch.device("cpu"), "size": torch.Size([2, 3]), "set": {1, 2}},
        "counter": collections.Counter({"a": 2}),
        "text": "ü",
        "huge": 2**100,
        "nothing": None,
    }


def blank(state: Any) -> Any:
    """The same structure with other values, to be loaded into."""
    if isinstance(state, torch.Tensor):
        return torch.full_like(state, 7)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list) and any(isinstance(value, (torch.Tensor, dict, list)) for value in state):
        return [blank(value) for value in state]
    return "blank"


def equal(one: Any, other: Any) -> bool:
    """Equal in type, structure, dtype and bits; dicts of any kind are alike, since DCP makes no difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def copied(state: Any) -> Any:
    return copy.deepcopy(state)


def failure(work: Callable[[], object]) -> dict[int, BaseException]:
    """Rank -> error of a save or load that fails on some ranks."""
    failed: CheckpointException | None = None
    try:
        work()
    except CheckpointException as error:
        failed = error
    assert failed is not None, "it did not fail"
    found = {rank: cause for rank, (cause, _) in failed.failures.items()}
    assert all(str(cause) in str(failed) for cause in found.values()), "its text says all"
    for cause in found.values():  # its frames hold the writer
        cause.__traceback__ = cause.__cause__ = cause.__context__ = None
    failed.__traceback__ = None
    return found


def directories(store: Path) -> list[str]:
    """Checkpoints in a store, whole or not."""
    return sorted(path.name for path in store.iterdir() if path.name.startswith("step-"))
