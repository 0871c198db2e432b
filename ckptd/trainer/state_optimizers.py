"""Optimizers as sources and objects, without `state_dict`: state by the names of parameters, never by position.

Owns the keys below an optimizer's path:
    state/<fqn>/<name>        a tensor of a parameter's state
    state/<fqn>               object: the rest of that state, if any (may refer to tensors, `state/<fqn>/<name>/<i>`)
    param_groups              object: the groups, `params` as names; tensor hyperparameters are param_groups/<i>/<name>
    other                     object: entries of the state that belong to no parameter, if any
    placement                 object: names of state tensors that are not where a restore would put them by default
Reading takes no step and creates no state. A restore prepares whole new entries and swaps them in at the end, so that
a failed one leaves the state as it was; dtypes are the checkpoint's (`load_state_dict` would cast to the parameter's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError, MismatchError
from ckptd.core.types import join_key, split_key
from ckptd.trainer.state_modules import same
from ckptd.trainer.state_tensors import Share, Source, is_dtensor, local_of, shard_sources, sources_of, torch_dtype
from ckptd.trainer.state_values import Packed, decode, maker, pack, unpack

_HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable", "differentiable", "param_names"})
"""Hyperparameters that choose an implementation: the running program's are kept at a restore."""

LOCAL, DEVICE, REPLICATED = "local", "device", "replicated"
"""Placements other than the default: a plain tensor with the local shard of a DTensor parameter; a 0-dimensional
tensor on the parameter's device; a DTensor of another shape than the parameter's, replicated."""


def understood(optimizer: Optimizer) -> bool:
    """Whether its state lies as torch's own optimizers have it; others are stored through their state_dict."""
    kind = type(optimizer)
    own = kind.state_dict is Optimizer.state_dict and kind.load_state_dict is Optimizer.load_state_dict
    return own or _partitioned(optimizer)


def _partitioned(optimizer: Optimizer) -> bool:
    """ZeroRedundancyOptimizer: each rank has the state of its own parameters in an optimizer inside."""
    if type(optimizer).__name__ != "ZeroRedundancyOptimizer":
        return False
    inner = getattr(optimizer, "optim", None)
    return isinstance(inner, Optimizer) and understood(inner)


class OptimizerState:
    """One optimizer of the mapping, as it is at construction of this object.

    `names` gives the name of each parameter by identity; a parameter without one is a ConfigError.
    """

    def __init__(self, path: str, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self.path = path
        self._optimizer = optimizer
        self._names = names
        self._holder: Optimizer = optimizer.optim if _partitioned(optimizer) else optimizer  # type: ignore[attr-defined]
        self._share = Share.REPLICATED if self._holder is optimizer else Share.SHARDED
        self._placement: dict[str, str] = {}
        self._rests: list[tuple[str, Any, list[Any] | None]] = []
        self._pending: dict[torch.Tensor, Any] = {}
        self._other: Any = {}
        self._groups: list[dict[str, Any]] = []
        check_named(path, optimizer, names)
        self._own_names = {names[id(parameter)] for parameter in parameters(optimizer)}

    def sources(self) -> tuple[list[Source], Watch]:
        """Sources of plain state tensors, and what to compare later."""
        made: list[Source] = []
        self._placement, self._rests = {}, []
        watch = Watch(self._optimizer, self._holder, [], list(self._holder.state.values()))
        watch.groups = [list(group["params"]) for group in self._optimizer.param_groups]
        for parameter, entry in self._holder.state.items():
            if not isinstance(parameter, torch.Tensor):
                watch.add_rest(entry)
                continue
            prefix = f"{self.path}/state/{join_key(self._name(parameter))}"
            rest = entry
            if isinstance(entry, dict):
                rest = self._read(prefix, parameter, entry, made)
                watch.add_entry(entry, rest)
            if rest or not isinstance(rest, dict):
                self._rests.append((prefix, entry, list(rest) if isinstance(rest, dict) else None))
                watch.add_rest(rest)
        return made, watch

    def packed(self) -> list[Packed]:
        """The values beside the tensors of the last `sources`, read afresh."""
        made = [self._pack_groups()]
        for prefix, entry, names in self._rests:
            value = entry if names is None else {name: entry[name] for name in names}
            made.append(pack(value, prefix, self._share, windowed=True))
        other = {key: value for key, value in self._holder.state.items() if not isinstance(key, torch.Tensor)}
        if other:
            made.append(pack(other, f"{self.path}/other", self._share, windowed=True))
        if self._placement:
            made.append(Packed(f"{self.path}/placement", self._placement, {}, []))
        return made

    def _name(self, parameter: torch.Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"{self.path}: has state of a parameter of shape {tuple(parameter.shape)} that is in no module of "
                "the mapping; add its module"
            )
        return name

    def _read(self, prefix: str, parameter: Any, entry: dict[Any, Any], made: list[Source]) -> dict[Any, Any]:
        """Adds the sources of one parameter's state; returns what of it is not a tensor by a text name."""
        rest = {}
        for name, value in entry.items():
            if type(name) is not str or not isinstance(value, torch.Tensor):
                rest[name] = value
                continue
            key = f"{prefix}/{join_key(name)}"
            where = _placement(parameter, value)
            if where is not None:
                self._placement[name] = where
            if where == LOCAL:
                made += shard_sources(key, value, parameter, windowed=True)
            else:
                made += sources_of(key, value, self._share, windowed=True)
        return rest

    def _pack_groups(self) -> Packed:
        groups = []
        for group in self._optimizer.param_groups:
            values = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            groups.append({"params": [self._names[id(p)] for p in group["params"]], **values})
        return pack(groups, f"{self.path}/param_groups", Share.REPLICATED)

    def targets(self, tensors: Mapping[str, TensorInfo], objects: Mapping[str, bytes]) -> list[Source]:
        """Prepares entries for all that the checkpoint has of this rank's parameters; what to fill."""
        made = self._prepare_groups(tensors, objects)
        path = f"{self.path}/placement"
        placement = decode(objects[path]) if path in objects else {}
        by_name = self._state_keys(tensors)
        self._pending = {}
        for group in self._holder.param_groups:
            for parameter in group["params"]:
                name = self._names[id(parameter)]
                prefix = f"{self.path}/state/{join_key(name)}"
                entry = self._prepare(parameter, group, prefix, by_name.get(name, ()), placement, made)
                if prefix in objects:
                    rest = self._unpack(prefix, parameter, tensors, objects, made)
                    entry = {**entry, **rest} if isinstance(rest, dict) else rest
                self._pending[parameter] = entry
        self._other = {}
        if f"{self.path}/other" in objects:
            parameter = self._holder.param_groups[0]["params"][0]
            self._other = self._unpack(f"{self.path}/other", parameter, tensors, objects, made)
        return made

    def _state_keys(self, tensors: Mapping[str, TensorInfo]) -> dict[str, list[tuple[str, TensorInfo]]]:
        """Name of a parameter -> names and tensors of its state in the checkpoint, those inside objects left out."""
        prefix = f"{self.path}/state/"
        found: dict[str, list[tuple[str, TensorInfo]]] = {}
        for key, info in tensors.items():
            if key.startswith(prefix):
                elements = split_key(key[len(prefix) :]) if "\\" in key else key[len(prefix) :].split("/")
                if len(elements) == 2:
                    found.setdefault(elements[0], []).append((elements[1], info))
        return found

    def _prepare(
        self,
        parameter: Any,
        group: Mapping[str, Any],
        prefix: str,
        state: Iterable[tuple[str, TensorInfo]],
        placement: Mapping[str, str],
        made: list[Source],
    ) -> Any:
        current = self._holder.state.get(parameter)
        now = current if isinstance(current, dict) else {}
        entry: dict[Any, Any] = {}
        for name, info in state:
            local = placement.get(name) == LOCAL and is_dtensor(parameter) and info.shape == tuple(parameter.shape)
            found = now.get(name)
            expected = tuple(local_of(parameter).shape) if local else info.shape
            dtype = torch_dtype(info.dtype)
            if not isinstance(found, torch.Tensor) or found.dtype != dtype or tuple(found.shape) != expected:
                if local:
                    found = torch.empty_like(local_of(parameter).detach(), dtype=dtype)
                else:
                    found = _new(parameter, name, info, group, placement.get(name))
            entry[name] = found
            if local:
                made += shard_sources(info.key, found, parameter, windowed=True)
            else:
                made += sources_of(info.key, found, self._share, windowed=True)
        return entry

    def _unpack(
        self,
        path: str,
        parameter: Any,
        tensors: Mapping[str, TensorInfo],
        objects: Mapping[str, bytes],
        made: list[Source],
    ) -> Any:
        def make(info: TensorInfo) -> torch.Tensor:
            return _new(parameter, "", info, {}, DEVICE)

        found = unpack(path, objects, tensors, make, self._share)
        made += found.sources
        return found.value

    def _prepare_groups(self, tensors: Mapping[str, TensorInfo], objects: Mapping[str, bytes]) -> list[Source]:
        path = f"{self.path}/param_groups"
        self._groups = []
        if path not in objects:
            return []
        now = self._pack_groups().tensors
        place = maker(path, objects, now, reuse=False)

        def make(info: TensorInfo) -> torch.Tensor:
            found = now.get(info.key)
            fits = found is not None and found.dtype == torch_dtype(info.dtype) and tuple(found.shape) == info.shape
            return found if found is not None and fits else place(info)

        found = unpack(path, objects, tensors, make, Share.REPLICATED)
        self._groups = self._match(found.value)
        return found.sources

    def _match(self, saved: Any) -> list[dict[str, Any]]:
        """The stored group for each group: the one that names any of its parameters (ranks may hold fewer)."""
        matched = []
        groups = self._optimizer.param_groups
        for index, group in enumerate(groups):
            names = {self._names[id(p)] for p in group["params"]}
            found = [other for other in saved if not names.isdisjoint(other["params"])]
            if not found and len(saved) == len(groups):
                found = [saved[index]]
            if len(found) != 1:
                raise MismatchError(
                    f"{self.path}/param_groups/{index}: its parameters are in {len(found)} groups of the checkpoint, "
                    f"which has {len(saved)} groups (here: {len(groups)}); build the optimizer with the same groups"
                )
            matched.append(found[0])
        return matched

    def finish(self) -> None:
        """Swaps the prepared state in; state that the checkpoint does not have is dropped."""
        state = self._holder.state
        for key in [key for key in state if not isinstance(key, torch.Tensor) or key not in self._pending]:
            del state[key]
        for parameter, entry in self._pending.items():
            current = state.get(parameter)
            if not entry and isinstance(entry, dict):
                state.pop(parameter, None)
            elif isinstance(current, dict) and isinstance(entry, dict):
                current.clear()
                current.update(entry)
            else:
                state[parameter] = entry
        state.update(self._other)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=False):
            for name, value in saved.items():
                if name != "params" and name not in _HOW_NOT_WHAT:
                    _set_hyperparameter(group, name, value)
        self._pending, self._other, self._groups = {}, {}, []

    def owns(self, key: str) -> bool:
        """Whether a key below this optimizer's path is one it knows."""
        elements = split_key(key[len(self.path) + 1 :])
        if elements[0] != "state":
            return elements[0] in ("param_groups", "other", "placement")
        return len(elements) > 1 and elements[1] in self._own_names


@dataclasses.dataclass(slots=True)
class Watch:
    """What stood in an optimizer: cheap to compare. Groups' hyperparameters and objects are read afresh elsewhere."""

    optimizer: Optimizer
    holder: Optimizer
    groups: list[list[torch.Tensor]]
    state: list[Any]
    entries: list[tuple[dict[Any, Any], list[Any]]] = dataclasses.field(default_factory=list)
    mixed: list[tuple[dict[Any, Any], dict[Any, torch.Tensor]]] = dataclasses.field(default_factory=list)
    opaque: bool = False

    def add_entry(self, entry: dict[Any, Any], rest: dict[Any, Any]) -> None:
        """State of one parameter, and what of it is not a plain tensor."""
        if rest:
            self.mixed.append((entry, {name: value for name, value in entry.items() if name not in rest}))
        else:
            self.entries.append((entry, list(entry.values())))

    def add_rest(self, rest: Any) -> None:
        """State that is not a plain tensor: where it may come to hold tensors, only a new walk tells."""
        values = rest.values() if isinstance(rest, dict) else [rest]
        self.opaque |= not all(value is None or isinstance(value, (bool, int, float, str)) for value in values)

    def unchanged(self) -> bool:
        """Whether groups hold the same parameters and the state the same tensors."""
        groups = self.optimizer.param_groups
        return (
            not self.opaque
            and len(groups) == len(self.groups)
            and all(same(group["params"], known) for group, known in zip(groups, self.groups, strict=True))
            and same(self.holder.state.values(), self.state)
            and all(same(entry.values(), known) for entry, known in self.entries)
            and all(_same_tensors(entry, known) for entry, known in self.mixed)
        )


def _same_tensors(entry: Mapping[Any, Any], known: Mapping[Any, torch.Tensor]) -> bool:
    found = {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}
    return found.keys() == known.keys() and all(value is known[name] for name, value in found.items())


def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_named(path: str, optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Raises ConfigError if the optimizer has a parameter without a name."""
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise ConfigError(
                    f"{path}: parameter {position} of group {index}, shape {tuple(parameter.shape)}, is in no module "
                    "of the state; add its module (and build the optimizer after fully_shard, to, or tying weights)"
                )


def _placement(parameter: Any, value: torch.Tensor) -> str | None:
    """Where a state tensor is, if a restore could not guess it."""
    if is_dtensor(value):
        return REPLICATED if value.shape != parameter.shape else None
    if value.ndim == 0:
        on_device = value.device.type != "cpu" and value.device == parameter.device
        return DEVICE if on_device else None
    return LOCAL if is_dtensor(parameter) and value.shape == local_of(parameter).shape else None


def _new(parameter: Any, name: str, info: TensorInfo, group: Mapping[str, Any], where: str | None) -> torch.Tensor:
    """An empty state tensor: like the parameter if it has its shape, but in the checkpoint's dtype; steps and other
    0-dimensional ones on the CPU, unless stored from the device or the group is fused or capturable."""
    dtype = torch_dtype(info.dtype)
    if info.shape == () and (name == "step" or parameter.ndim > 0):
        needs_device = name == "step" and (group.get("fused") or group.get("capturable"))
        return torch.empty((), dtype=dtype, device=parameter.device if needs_device or where == DEVICE else "cpu")
    if info.shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if where == REPLICATED and is_dtensor(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        local = torch.empty(info.shape, dtype=dtype, device=parameter.device)
        mesh = parameter.device_mesh
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return torch.empty(info.shape, dtype=dtype, device=parameter.device)


def _set_hyperparameter(group: dict[str, Any], name: str, value: Any) -> None:
    """In place, also where a number of the checkpoint meets a tensor that compiled or captured code reads."""
    current = group.get(name)
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float)):
        with torch.no_grad():
            current.fill_(value)
    else:
        group[name] = value
