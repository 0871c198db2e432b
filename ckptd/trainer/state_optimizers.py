"""Optimizers as sources and objects, without `state_dict`: state by the names of parameters, never by position.

Owns the keys below an optimizer's path:
    state/<fqn>/<name>        a tensor of a parameter's state
    state/<fqn>               object: the rest of that state, if any (may refer to tensors, `state/<fqn>/<name>/<i>`)
    param_groups              object: the groups, `params` as names; tensor hyperparameters are param_groups/<i>/<name>
    other                     object: entries of the state that belong to no parameter, if any
    placement                 object: names of state tensors that are not where a restore would put them by default
The state of a flat parameter (state_flat.py) is stored under the names of the logical tensors in it, as if each had
been a parameter; what is one number for all of them (`step`) under each name.
Reading takes no step and creates no state. A restore prepares whole new entries and swaps them in at the end, so that
a failed one leaves the state as it was; dtypes are the checkpoint's (`load_state_dict` would cast to the parameter's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError, MismatchError
from ckptd.core.types import join_key, split_key
from ckptd.tensors.values import torch_dtype
from ckptd.trainer.state_flat import Flat, flat_sources
from ckptd.trainer.state_modules import same
from ckptd.trainer.state_tensors import Share, Source, is_dtensor, local_of, shard_sources, sources_of
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

    `names` gives the name of each parameter by identity, `flats` what flat ones stand for; a parameter in neither is a
    ConfigError. `tied`: second names of parameters -> their names.
    """

    def __init__(
        self,
        path: str,
        optimizer: Optimizer,
        names: Mapping[int, str],
        flats: Mapping[int, Flat],
        tied: Mapping[str, str],
    ) -> None:
        self.path = path
        self._optimizer = optimizer
        self._names = names
        self._flats = flats
        self._holder: Optimizer = optimizer.optim if _partitioned(optimizer) else optimizer  # type: ignore[attr-defined]
        self._share = Share.REPLICATED if self._holder is optimizer else Share.SHARDED
        self._placement: dict[str, str] = {}
        self._rests: list[tuple[str, Any, list[Any] | None]] = []
        self._pending: dict[torch.Tensor, Any] = {}
        self._other: Any = {}
        self._groups: list[dict[str, Any]] = []
        self._equal: dict[str, list[torch.Tensor]] = {}
        check_named(path, optimizer, {*names, *flats})
        own = {name for parameter in parameters(optimizer) for name in self._names_of(parameter)}
        self._tied = {second: first for second, first in tied.items() if first in own and second not in own}
        self._own_names = own | self._tied.keys()

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
            rest = entry
            if isinstance(entry, dict):
                flat = self._flats.get(id(parameter))
                rest = self._read(parameter, entry, made) if flat is None else self._read_flat(flat, entry, made)
                watch.add_entry(entry, rest)
            if rest or not isinstance(rest, dict):
                names = list(rest) if isinstance(rest, dict) else None
                self._rests += [(self._prefix(name), entry, names) for name in self._names_of(parameter)]
                watch.add_rest(rest)
        return made, watch

    def aliases(self, tied: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
        """Keys of this optimizer's state under second names of tied parameters -> those of `keys` they stand for."""
        known = self._state_keys(keys)
        return {
            f"{self._prefix(second)}/{join_key(name)}": key
            for second, first in tied.items()
            for name, key in known.get(first, ())
        }

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

    def _names_of(self, parameter: torch.Tensor) -> list[str]:
        """The names of what a parameter stands for: one, unless it is flat."""
        flat = self._flats.get(id(parameter))
        if flat is not None:
            return flat.names
        name = self._names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"{self.path}: has state of a parameter of shape {tuple(parameter.shape)} that is in no module of "
                "the mapping; add its module"
            )
        return [name]

    def _prefix(self, name: str) -> str:
        return f"{self.path}/state/{join_key(name)}"

    def _read(self, parameter: Any, entry: dict[Any, Any], made: list[Source]) -> dict[Any, Any]:
        """Adds the sources of one parameter's state; returns what of it is not a tensor by a text name."""
        prefix = self._prefix(*self._names_of(parameter))
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

    def _read_flat(self, flat: Flat, entry: dict[Any, Any], made: list[Source]) -> dict[Any, Any]:
        """As `_read`, for a flat parameter: its numbers under each name, its flat tensors range by range."""
        rest = {}
        for name, value in entry.items():
            if type(name) is not str or not isinstance(value, torch.Tensor):
                rest[name] = value
                continue
            if value.ndim and not flat.holds(value):
                raise ConfigError(
                    f"{self.path}: {name!r} of the flat parameter of {', '.join(flat.names[:3])} has shape "
                    f"{tuple(value.shape)}, which is neither the parameter's nor a single number; such state means "
                    "something to one layout only, use an optimizer that works element by element"
                )
            if not value.ndim:
                if _placement(flat.parameter, value) is not None:
                    self._placement[name] = DEVICE
                for owner in flat.names:
                    made += sources_of(f"{self._prefix(owner)}/{join_key(name)}", value, self._share, windowed=True)
                continue
            for held in flat.ranges:
                key = f"{self._prefix(held.name)}/{join_key(name)}"
                made += flat_sources(key, value, held, Share.SHARDED, windowed=True)
        if pack(rest, self.path, self._share).tensors:
            raise ConfigError(
                f"{self.path}: state of the flat parameter of {', '.join(flat.names[:3])} has tensors inside other "
                "values; use an optimizer that works element by element"
            )
        return rest

    def _pack_groups(self) -> Packed:
        groups = []
        for group in self._optimizer.param_groups:
            values = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            names = [name for parameter in group["params"] for name in self._names_of(parameter)]
            groups.append({"params": names, **values})
        return pack(groups, f"{self.path}/param_groups", Share.REPLICATED)

    def targets(self, tensors: Mapping[str, TensorInfo], objects: Mapping[str, bytes]) -> list[Source]:
        """Prepares entries for all that the checkpoint has of this rank's parameters; what to fill."""
        made = self._prepare_groups(tensors, objects)
        path = f"{self.path}/placement"
        placement = decode(objects[path]) if path in objects else {}
        by_name = {
            name: [(state, tensors[key]) for state, key in states] for name, states in self._state_keys(tensors).items()
        }
        for second, first in self._tied.items():
            if first not in by_name and second in by_name:
                by_name[first] = by_name[second]
        self._pending, self._equal = {}, {}
        for group in self._holder.param_groups:
            for parameter in group["params"]:
                entry = self._prepare(parameter, group, by_name, placement, made)
                if self._stateful(parameter):
                    entry = self._add_rests(entry, parameter, tensors, objects, made)
                self._pending[parameter] = entry
        self._other = {}
        if f"{self.path}/other" in objects:
            parameter = self._holder.param_groups[0]["params"][0]
            self._other = self._unpack(f"{self.path}/other", parameter, tensors, objects, made)
        return made

    def _state_keys(self, keys: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
        """Name of a parameter -> (name, key) of its state among `keys`, what is inside objects left out."""
        prefix = f"{self.path}/state/"
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            if key.startswith(prefix):
                elements = split_key(key[len(prefix) :]) if "\\" in key else key[len(prefix) :].split("/")
                if len(elements) == 2:
                    found.setdefault(elements[0], {})[elements[1]] = key
        return {name: list(states.items()) for name, states in found.items()}

    def _prepare(
        self,
        parameter: Any,
        group: Mapping[str, Any],
        by_name: Mapping[str, list[tuple[str, TensorInfo]]],
        placement: Mapping[str, str],
        made: list[Source],
    ) -> Any:
        """The state of one parameter, its tensors to be filled through what is added to `made`."""
        current = self._holder.state.get(parameter)
        now = current if isinstance(current, dict) else {}
        flat = self._flats.get(id(parameter))
        if flat is not None:
            return self._prepare_flat(flat, now, group, by_name, placement, made) if self._stateful(parameter) else {}
        entry: dict[Any, Any] = {}
        (owner,) = self._names_of(parameter)
        for name, info in by_name.get(owner, ()):
            local = placement.get(name) == LOCAL and is_dtensor(parameter) and info.shape == tuple(parameter.shape)
            expected = tuple(local_of(parameter).shape) if local else info.shape
            found = _reused(now.get(name), info, expected)
            if found is None and local:
                found = torch.empty_like(local_of(parameter).detach(), dtype=torch_dtype(info.dtype))
            elif found is None:
                found = _new(parameter, name, info, group, placement.get(name))
            entry[name] = found
            if local:
                made += shard_sources(info.key, found, parameter, windowed=True)
            else:
                made += sources_of(info.key, found, self._share, windowed=True)
        return entry

    def _stateful(self, parameter: torch.Tensor) -> bool:
        """Whether this rank has state of it: not of a flat parameter whose elements are all on other ranks."""
        return id(parameter) not in self._flats or parameter.numel() > 0

    def _add_rests(
        self,
        entry: dict[Any, Any],
        parameter: torch.Tensor,
        tensors: Mapping[str, TensorInfo],
        objects: Mapping[str, bytes],
        made: list[Source],
    ) -> Any:
        """`entry` with what of the state is stored as objects, which flat parameters have under several names."""
        names = self._names_of(parameter)
        names += [
            second for second, first in self._tied.items() if first in names and self._prefix(first) not in objects
        ]
        prefixes = [prefix for prefix in map(self._prefix, names) if prefix in objects]
        if any(objects[prefix] != objects[prefixes[0]] for prefix in prefixes):
            raise MismatchError(
                f"{prefixes[0]}: one flat parameter holds tensors whose values here differ in the checkpoint: "
                f"{', '.join(prefixes[:3])}"
            )
        for prefix in prefixes[:1]:
            rest = self._unpack(prefix, parameter, tensors, objects, made)
            if not isinstance(rest, dict):
                return rest
            entry = {**entry, **rest}
        return entry

    def _prepare_flat(
        self,
        flat: Flat,
        now: Mapping[Any, Any],
        group: Mapping[str, Any],
        by_name: Mapping[str, list[tuple[str, TensorInfo]]],
        placement: Mapping[str, str],
        made: list[Source],
    ) -> dict[Any, Any]:
        """As `_prepare`, for a flat parameter: what its tensors have as one number is one number here too."""
        states = {owner: dict(by_name.get(owner, ())) for owner in flat.names}
        entry: dict[Any, Any] = {}
        for name in dict.fromkeys(name for state in states.values() for name in state):
            infos = {owner: state[name] for owner, state in states.items() if name in state}
            first = next(iter(infos.values()))
            if all(info.shape == () for info in infos.values()):
                numbers = [_new(flat.parameter, name, info, group, placement.get(name)) for info in infos.values()]
                for info, number in zip(infos.values(), numbers, strict=True):
                    made += sources_of(info.key, number, self._share, windowed=True)
                self._equal[first.key] = numbers
                entry[name] = numbers[0]
                continue
            found = _reused(now.get(name), first, tuple(flat.parameter.shape))
            if found is None:
                found = torch.zeros_like(flat.parameter.detach(), dtype=torch_dtype(first.dtype))
            for held in flat.ranges:
                if held.start < held.stop and (held.name not in infos or infos[held.name].shape != held.shape):
                    shape = list(infos[held.name].shape) if held.name in infos else "nothing"
                    raise MismatchError(
                        f"{self._prefix(held.name)}/{join_key(name)}: {shape} in the checkpoint, "
                        f"{list(held.shape)} here, where one flat parameter holds it with {', '.join(infos)}; "
                        "FullyShardedDataParallel with use_orig_params=True has state of each parameter apart"
                    )
                if held.name in infos:
                    made += flat_sources(infos[held.name].key, found, held, Share.SHARDED, windowed=True)
            entry[name] = found
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
        others = [
            unpack(other, objects, tensors, lambda info: torch.empty(0), Share.REPLICATED).value
            for other in sorted(objects)
            if other.startswith(f"{path}@")
        ]
        self._groups = self._match(found.value, others)
        return found.sources

    def _match(self, saved: Any, others: Sequence[Any]) -> list[dict[str, Any]]:
        """The stored hyperparameters for each group: those of the group that names its parameters.

        `saved` are this rank's groups, `others` those of other ranks, which under pipeline or expert parallelism had
        other parameters; groups that were apart there and are one here must have the same hyperparameters.
        """
        matched = []
        for index, group in enumerate(self._optimizer.param_groups):
            names = {name for parameter in group["params"] for name in self._names_of(parameter)}
            found = [other for other in saved if not names.isdisjoint(self._first_names(other))]
            if not names.issubset(name for other in found for name in self._first_names(other)):
                found += [
                    other for ranks in others for other in ranks if not names.isdisjoint(self._first_names(other))
                ]
            if not found and len(saved) == len(self._optimizer.param_groups):
                found = [saved[index]]
            distinct = _distinct(found)
            if len(distinct) != 1:
                raise MismatchError(
                    f"{self.path}/param_groups/{index}: its parameters are in {len(distinct)} groups of the checkpoint "
                    f"with different hyperparameters, which has {len(saved)} groups (here: "
                    f"{len(self._optimizer.param_groups)}); build the optimizer with the same groups"
                )
            matched.append(distinct[0])
        return matched

    def _first_names(self, group: Mapping[str, Any]) -> list[str]:
        return [self._tied.get(name, name) for name in group["params"]]

    def finish(self) -> None:
        """Swaps the prepared state in; state that the checkpoint does not have is dropped.

        Raises MismatchError where tensors of one flat parameter differ in what it can have only once.
        """
        for path, numbers in self._equal.items():
            if any(not torch.equal(number, numbers[0]) for number in numbers):
                raise MismatchError(
                    f"{path}: one flat parameter holds tensors for which the checkpoint has "
                    f"{sorted({number.item() for number in numbers})}; FullyShardedDataParallel with "
                    "use_orig_params=True has state of each parameter apart"
                )
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
        self._pending, self._other, self._groups, self._equal = {}, {}, [], {}

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


def check_named(path: str, optimizer: Optimizer, named: Collection[int]) -> None:
    """Raises ConfigError if the optimizer has a parameter whose identity is not among `named`."""
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in named:
                raise ConfigError(
                    f"{path}: parameter {position} of group {index}, shape {tuple(parameter.shape)}, is in no module "
                    "of the state; add its module (and build the optimizer after fully_shard, to, or tying weights)"
                )


def _distinct(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups without those that differ from an earlier one in their parameters alone."""
    kept: list[dict[str, Any]] = []
    seen = []
    for group in groups:
        values = {name: value for name, value in group.items() if name != "params"}
        plain = {name: None if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        if plain not in seen:
            seen.append(plain)
            kept.append(group)
    return kept


def _reused(found: Any, info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The present state tensor, if it can hold what the checkpoint has."""
    fits = isinstance(found, torch.Tensor) and found.dtype == torch_dtype(info.dtype) and tuple(found.shape) == shape
    return found if fits else None


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
