"""Modules as sources: the names and tensors of parameters and persistent buffers.

A parameter is known by identity; its name is the path of attributes from the module of the mapping, without the
wrappers DDP, DataParallel, FSDP, compile and activation checkpointing. Modules under FSDP may show unsharded
parameters at a boundary (after a forward without backward); the sharded ones are asked from FSDP itself, which moves
nothing: FSDP2's are DTensors, FSDP1's ranges of flat tensors. Tied tensors have one canonical key, the first; the
others are aliases. Nothing here changes a module but `reshard`, before a restore.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ckptd.core.errors import ConfigError
from ckptd.core.types import join_key
from ckptd.trainer import state_fsdp1
from ckptd.trainer.state_flat import Flat, FlatRange, flat_sources
from ckptd.trainer.state_fsdp1 import FlatRecord
from ckptd.trainer.state_tensors import Share, Source, is_dtensor, local_of, sources_of

EXTRA = "_extra_state"
_WRAPPER_NAMES = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclasses.dataclass(slots=True)
class Entry:
    """One parameter or persistent buffer at one place: `tensor` is what its module owns (sharded, under FSDP2), and
    what optimizers know. `flat`: where its elements are, under FSDP1."""

    path: str
    name: str
    key: str
    tensor: torch.Tensor
    parameter: bool
    flat: FlatRecord | None = None

    @property
    def local(self) -> torch.Tensor:
        """The tensor whose memory this rank owns."""
        return local_of(self.tensor) if self.flat is None else self.flat.data()


class Modules:
    """The modules of a mapping, by path, as they are at construction of this object.

    `declared`: identities of parameters that are stored otherwise."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], declared: Collection[int] = ()) -> None:
        self._modules = modules
        self._declared = declared
        self._sharded = _sharded_parameters(modules)
        self._flat = state_fsdp1.flat_records(root for _, root in modules)
        self._visited: list[tuple[str, str, nn.Module]] = [
            (path, prefix, module) for path, root in modules for prefix, module in _walk(root, "", path, ())
        ]
        self._fsdp: list[tuple[Any, Any, torch.Tensor]] = []
        self._places = [entry for visited in self._visited for entry in self._own(*visited)]
        self.entries: list[Entry] = []
        """Canonical ones."""
        self.aliases: dict[str, str] = {}
        """Key of a tied tensor -> its canonical key."""
        self._tie()

    def _tie(self) -> None:
        first: dict[object, str] = {}
        for entry in self._places:
            canonical = first.setdefault(_identity(entry), entry.key)
            if canonical == entry.key:
                self.entries.append(entry)
            else:
                self.aliases[entry.key] = canonical
        repeated = [key for key, count in Counter(entry.key for entry in self.entries).items() if count > 1]
        if repeated:
            raise ConfigError(f"{repeated[0]}: two tensors have this name; rename one of the modules")

    def _own(self, path: str, prefix: str, module: nn.Module) -> Iterator[Entry]:
        flat = self._flat.get(id(module), {})
        for name, record in flat.items():
            yield Entry(path, prefix + name, f"{path}/{join_key(prefix + name)}", record.parameter, True, record)
        for name, parameter in module._parameters.items():
            if parameter is None or name in flat or id(parameter) in self._declared:
                continue
            if getattr(parameter, "_is_flat_param", False):  # FSDP1's, whose parts are in `flat`
                continue
            sharded = self._sharded.get((id(module), name))
            if sharded is not None:
                parameter = sharded.sharded_param
                self._fsdp.append((sharded, parameter, local_of(parameter)))
            if nn.parameter.is_lazy(parameter):
                raise ConfigError(f"{path}/{prefix}{name}: has no shape yet; run a forward before checkpointing")
            yield _entry(path, prefix + name, parameter, True)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield _entry(path, prefix + name, buffer, False)

    def names(self) -> dict[int, str]:
        """Identity of each parameter -> its name in keys of optimizer state: its FQN, or `<module path>.<fqn>` for
        those whose FQN stands for several parameters of the mapping."""
        return {id(entry.tensor): name for entry, name in self._named() if entry.flat is None}

    def flats(self) -> dict[int, Flat]:
        """Identity of each flat parameter -> what it stands for, by the same names."""
        found: dict[int, list[FlatRange]] = {}
        parameters: dict[int, torch.Tensor] = {}
        for entry, name in self._named():
            if entry.flat is not None:
                found.setdefault(id(entry.tensor), []).append(entry.flat.range(name))
                parameters[id(entry.tensor)] = entry.tensor
        return {identity: Flat(parameters[identity], tuple(ranges)) for identity, ranges in found.items()}

    def tied_names(self) -> dict[str, str]:
        """Second name of a tied parameter -> its name in keys of optimizer state."""
        first = {_owner(entry): name for entry, name in self._named()}
        names = {(entry.path, entry.name): first[_owner(entry)] for entry in self._places if entry.parameter}
        taken = Counter(name for _, name in names)
        return {name: first for (_, name), first in names.items() if taken[name] == 1 and name != first}

    def _named(self) -> list[tuple[Entry, str]]:
        """The parameters, each once, and their names in keys of optimizer state."""
        found: dict[object, Entry] = {}
        for entry in self._places:
            if entry.parameter:
                found.setdefault(_owner(entry), entry)
        count = Counter(entry.name for entry in found.values())
        return [
            (entry, entry.name if count[entry.name] == 1 else f"{entry.path.replace('/', '.')}.{entry.name}")
            for entry in found.values()
        ]

    def sources(self, windowed: set[int]) -> list[Source]:
        """Canonical sources; `windowed` holds the identities of the parameters that optimizers step."""
        made: list[Source] = []
        for entry in self.entries:
            tensor = entry.tensor
            share = Share.REPLICATED if entry.parameter else Share.PER_RANK
            stepped = id(tensor) in windowed and tensor.requires_grad
            if entry.flat is not None:
                held = entry.flat.range(entry.name)
                made += flat_sources(entry.key, entry.local, held, Share.SHARDED, windowed=stepped)
            else:
                made += sources_of(entry.key, tensor, share, windowed=stepped)
        return made

    def extras(self) -> list[tuple[nn.Module, str]]:
        """The modules that define an extra state, and the path of its object."""
        found: dict[int, tuple[nn.Module, str]] = {}
        for path, prefix, module in self._visited:
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                elements = (EXTRA, prefix.removesuffix(".")) if prefix else (EXTRA,)
                found.setdefault(id(module), (module, f"{path}/{join_key(*elements)}"))
        return list(found.values())

    def watch(self) -> ModulesWatch:
        """What to compare later, to see that the modules still own the same tensors."""
        modules = list({id(module): module for _, _, module in self._visited}.values())
        managed = {module for module, _ in self._sharded} | self._flat.keys()
        tables: list[Mapping[str, Any]] = []
        for module in modules:
            tables += [module._buffers, module._modules]
            if id(module) not in managed:
                tables.append(module._parameters)
        flat = {id(entry.tensor): entry for entry in self.entries if entry.flat is not None}
        return ModulesWatch(
            [(table, list(table.values())) for table in tables if table],
            [table for table in tables if not table],
            self._fsdp,
            [(entry.flat, entry.local.data_ptr()) for entry in flat.values() if entry.flat is not None],
            [entry.tensor for entry in self.entries if entry.parameter],
            [entry.tensor.requires_grad for entry in self.entries if entry.parameter],
        )

    def reshard(self) -> None:
        """Gives FSDP modules their sharded parameters back, so that a forward gathers what was restored."""
        state_fsdp1.reshard(root for _, root in self._modules)
        for _, _, module in self._visited:
            if hasattr(module, "_get_fsdp_state"):
                sharding: Any = module
                sharding.reshard()


@dataclasses.dataclass(slots=True)
class ModulesWatch:
    """The tables of modules and what stood in them."""

    filled: list[tuple[Mapping[str, Any], list[Any]]]
    empty: list[Mapping[str, Any]]
    fsdp: list[tuple[Any, Any, torch.Tensor]]
    flat: list[tuple[FlatRecord, int]]
    parameters: list[torch.Tensor]
    trained: list[bool]

    def unchanged(self) -> bool:
        return (
            not any(self.empty)
            and all(same(table.values(), values) for table, values in self.filled)
            and all(f.sharded_param is p and p._local_tensor is local for f, p, local in self.fsdp)
            and all(record.data().data_ptr() == pointer for record, pointer in self.flat)
            and [parameter.requires_grad for parameter in self.parameters] == self.trained
        )


def same(found: Any, expected: Sequence[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(found) == len(expected) and all(map(operator.is_, found, expected))


def _entry(path: str, name: str, tensor: torch.Tensor, parameter: bool) -> Entry:
    return Entry(path, name, f"{path}/{join_key(name)}", tensor, parameter)


def _identity(entry: Entry) -> object:
    """Equal for tensors that are one: the same object, or the same memory seen in the same way."""
    if entry.flat is not None:
        return entry.flat.identity
    tensor = local_of(entry.tensor)
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    if address == 0:  # empty, without values, or not dense
        return id(entry.tensor)
    return (entry.parameter, address, tensor.dtype, tensor.shape, tensor.stride(), entry.tensor.shape)


def _owner(entry: Entry) -> object:
    """Equal for the places of one parameter as optimizers know it, or of one part of a flat parameter."""
    return id(entry.tensor) if entry.flat is None else entry.flat.identity


def _walk(module: nn.Module, prefix: str, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    """(prefix, module) of a module and all below it, each place of a shared module, wrappers without a name."""
    yield prefix, module
    above = (*above, id(module))
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        wrapped = name in _WRAPPER_NAMES or (name == "module" and isinstance(module, _WRAPPERS))
        yield from _walk(child, prefix if wrapped else f"{prefix}{name}.", path, above)


def _sharded_parameters(modules: Sequence[tuple[str, nn.Module]]) -> dict[tuple[int, str], Any]:
    """(identity of a module, name of a parameter) -> the FSDP2 record that owns its sharded parameter."""
    found: dict[tuple[int, str], Any] = {}
    for _, root in modules:
        for module in root.modules():
            if not hasattr(module, "_get_fsdp_state"):
                continue
            sharding: Any = module
            state = sharding._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # torch before 2.13 has one group at most
                groups = [group for group in (state._fsdp_param_group,) if group is not None]
            for record in (record for group in groups for record in group.fsdp_params):
                info = record._module_info
                found[id(info.module), info.param_name] = record
                for shared, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                    found[id(shared), name] = record
    return {place: record for place, record in found.items() if is_dtensor(record.sharded_param)}
