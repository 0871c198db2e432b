"""One rank's application in some layout: its state, a step, and what ckptd is not asked for: how to see it whole.

`gathered` puts the logical tensors together by means of torch or of arithmetic, never by ckptd's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tests.layouts.model import TOKENS, Model, loss_of, shapes

SCRAMBLED = 777.0
RATE = 0.011


@dataclasses.dataclass
class Application:
    """`model` is what `step` runs, `state` what ckptd gets. `backward` gives the loss on every rank."""

    state: dict[str, Any]
    model: nn.Module
    backward: Callable[[], float]
    gathered: Callable[[], dict[str, torch.Tensor]]
    extra: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def step(self) -> float:
        loss = self.backward()
        optimizer = self.state["optimizer"]
        optimizer.step()
        optimizer.zero_grad()
        self.state["scheduler"].step()
        self.state["counters"]["tokens"] += TOKENS.numel()
        return loss

    def local(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state as it lies on this rank, padding included."""
        found = {name: local_of(p) for name, p in self.model.named_parameters()}
        found |= {f"buffer {name}": buffer for name, buffer in self.model.named_buffers()}
        found |= {f"extra {i}": tensor.detach() for i, tensor in enumerate(self.extra)}
        for number, entry in enumerate(inner(self.state["optimizer"]).state.values()):
            found |= {f"{name} {number}": local_of(value) for name, value in entry.items()}
        return found

    def scramble(self) -> None:
        with torch.no_grad():
            for tensor in self.local().values():
                tensor.fill_(SCRAMBLED)
        for group in self.state["optimizer"].param_groups:
            group["lr"], group["weight_decay"] = 99.0, 99.0
        self.state["scheduler"].last_epoch = 99
        self.state["counters"]["tokens"] = -1

    def numbers(self) -> list[Any]:
        """What is no tensor."""
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "foreach", "param_names")}
            for group in self.state["optimizer"].param_groups
        ]
        return [*groups, self.state["scheduler"].last_epoch, dict(self.state["counters"])]


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that has the state: inside a ZeroRedundancyOptimizer."""
    found = getattr(optimizer, "optim", optimizer)
    return found if isinstance(found, torch.optim.Optimizer) else optimizer


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def optimisation(parameters: Any, foreach: bool | None = None) -> dict[str, Any]:
    """An optimizer with hyperparameters that are nobody's default, a schedule, and plain data."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.8, 0.95), weight_decay=0.02, foreach=foreach)
    return with_schedule(optimizer)


def with_schedule(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    return {"optimizer": optimizer, "scheduler": schedule, "counters": {"tokens": 0}}


def parameters_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield parameter_name(name), parameter


def parameter_name(name: str) -> str:
    """The name in the unwrapped module."""
    return name.replace("module.", "").replace("_fsdp_wrapped_", "")


def together(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What all ranks have."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, tensor in part.items():
            known = merged.setdefault(key, tensor)
            assert torch.equal(known, tensor), f"{key} differs between ranks"
    return merged


def gathered_by_parameter(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Where each parameter is a tensor or a DTensor."""
    own: dict[str, torch.Tensor] = {}
    state = inner(optimizer).state
    for name, parameter in parameters_of(model):
        own[f"model/{name}"] = whole(parameter)
        for kind, value in state.get(parameter, {}).items():
            own[f"{kind}/{name}"] = whole(value)
    for name, buffer in model.named_buffers():
        own[f"model/{parameter_name(name)}"] = buffer.clone()
    return together(own)


def gathered_by_fsdp1(shards: int, model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Runs of flat parameters end to end over the first `shards` ranks, cut by the sizes of what was flattened.

    With `use_orig_params` every parameter is flat on its own, perhaps not on all ranks. FSDP1's own
    `optim_state_dict` gives, on the CPU, the last moment under the names of all.
    """
    own: dict[str, torch.Tensor] = {}
    for name, parameter in parameters_of(model):
        own[f"model/{name}"] = parameter.detach()
        own |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    found: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for part in parts[:shards] for key in part):
        kind, name = key.split("/")
        held = [part[key] for part in parts[:shards] if key in part]
        unit = [n for n in shapes() if n == name or (name.endswith("_flat_param") and n.startswith(name[:-11]))]
        if name == "_flat_param":  # the root's, without the layers', which have flat parameters of their own
            unit = [n for n in unit if not n.startswith("layers.")]
        if not held[0].ndim:
            found |= {f"{kind}/{n}": held[0] for n in unit}
            continue
        flat, at = torch.cat([part.flatten() for part in held]), 0
        for n in unit:
            found[f"{kind}/{n}"] = flat[at : at + shapes()[n].numel()].view(shapes()[n])
            at += shapes()[n].numel()
    return found | {f"model/{parameter_name(n)}": b.clone() for n, b in model.named_buffers()}


def application(
    model: nn.Module, state: dict[str, Any], gathered: Callable[[nn.Module, Any], dict[str, torch.Tensor]]
) -> Application:
    """One whose model runs as a whole on every rank."""

    def backward() -> float:
        loss = loss_of(model(TOKENS))
        loss.backward()
        return float(loss.detach())

    return Application({"model": model, **state}, model, backward, lambda: gathered(model, state["optimizer"]))


def one_process() -> Application:
    torch.manual_seed(0)
    model = Model()
    return application(model, optimisation(model.parameters()), gathered_by_parameter)
