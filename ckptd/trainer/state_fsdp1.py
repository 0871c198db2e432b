"""FullyShardedDataParallel (FSDP1): which part of which parameter lies where in this rank's flat shard.

FSDP1 concatenates the parameters of a module, pads, and gives each rank one equal run of the whole. With
`use_orig_params` a parameter that an optimizer sees is a flat view of its part of that run, perhaps an empty one;
without, the optimizer sees the run itself. Here both become ranges of flat tensors, under the names of the unwrapped
module. The bytes are those of the shard that FSDP1 keeps (`_local_shard`), never of what a forward has gathered.

Reads FSDP1's private tables and changes none of them; `reshard` alone calls FSDP1, before a restore.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ckptd.core.errors import ConfigError
from ckptd.trainer.state_flat import FlatRange


@dataclasses.dataclass(frozen=True, slots=True)
class FlatRecord:
    """One logical parameter of an FSDP1 module: number `index` of those in the flat parameter of `handle`."""

    handle: Any
    index: int

    @property
    def identity(self) -> object:
        """Equal for the names of a tied parameter."""
        return (id(self.handle), self.index)

    @property
    def parameter(self) -> torch.Tensor:
        """What optimizers know it by."""
        flat = self.handle.flat_param
        found: torch.Tensor = flat._params[self.index] if self.handle._use_orig_params else flat
        return found

    def data(self) -> torch.Tensor:
        """The flat tensor that holds this rank's part: the parameter's own view of the shard, or the shard."""
        flat = self.handle.flat_param
        shard: torch.Tensor = getattr(flat, "_local_shard", flat).detach()
        if not self.handle._use_orig_params:
            return shard
        held = flat._shard_param_infos[self.index]
        size = held.numel_in_shard or 0
        if self.parameter.shape == (size,) and not self.handle._skipped_use_sharded_views:
            return self.parameter.detach()  # also where the program has put another tensor in
        start = held.offset_in_shard or 0
        return shard[start : start + size]

    def range(self, name: str) -> FlatRange:
        """What of the parameter `name` lies where in `data`."""
        flat = self.handle.flat_param
        held, shape = flat._shard_param_infos[self.index], tuple(flat._shapes[self.index])
        order: tuple[int, ...] = ()
        if not flat._contiguities[self.index]:  # flattened as it lay in memory, as with channels_last
            strides = flat._strides[self.index]
            order = tuple(sorted(range(len(shape)), key=lambda dimension: -strides[dimension]))
        if not held.in_shard:
            return FlatRange(name, shape, 0, 0, 0, order)
        start, offset = held.intra_param_start_idx, 0 if self.handle._use_orig_params else held.offset_in_shard
        return FlatRange(name, shape, start, start + held.numel_in_shard, offset, order)


def flat_records(roots: Iterable[nn.Module]) -> dict[int, dict[str, FlatRecord]]:
    """Identity of a module -> its parameters by name, of all that FSDP1 keeps flat below `roots`.

    Raises ConfigError for flat parameters made of DTensors.
    """
    found: dict[int, dict[str, FlatRecord]] = {}
    for module in _wrappers(roots):
        handle = getattr(module, "_handle", None)
        if handle is None or (handle._use_orig_params and not handle.uses_sharded_strategy):
            continue  # nothing, or whole tensors
        flat = handle.flat_param
        if any(extension is not None for extension in flat._param_extensions):
            raise ConfigError(
                f"FullyShardedDataParallel over tensor-parallel parameters ({', '.join(flat._fqns[:3])}, ...) cannot "
                "be stored; use fully_shard (FSDP2) with tensor parallelism"
            )
        places = {}
        for index, info in enumerate(flat._param_infos):
            found.setdefault(id(info.module), {})[info.param_name] = FlatRecord(handle, index)
            places[id(info.module), info.param_name] = index
        for tied in flat._shared_param_infos:
            index = places[id(tied.prim_module), tied.prim_param_name]
            found.setdefault(id(tied.module), {})[tied.param_name] = FlatRecord(handle, index)
    return found


def reshard(roots: Iterable[nn.Module]) -> None:
    """Frees what forwards have gathered, so that the next one gathers what was restored."""
    for module in _wrappers(roots):
        handle = getattr(module, "_handle", None)
        if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def _wrappers(roots: Iterable[nn.Module]) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [m for root in roots for m in root.modules() if isinstance(m, fsdp.FullyShardedDataParallel)]
