"""The application state: a mapping of modules, optimizers and the rest <-> sources of tensors, and objects.

Owns the keys: `<name>/<fqn>` for parameters and persistent buffers, `<name>/state/<fqn>/<name>` below optimizers, the
path inside the value for everything else; objects stand at the path of their value. Keys are those of the logical
tensors, whatever layout holds them. Reading changes nothing: no
optimizer steps, no random numbers, no collectives. What it reads belongs to one moment, so at a boundary call
`unchanged` (or `sources`), then `objects`, before training goes on.

A restore has two halves: `targets` says what to fill and changes nothing but the placement of FSDP2 parameters;
`finish` puts everything in place. Between them, tensors of the state that are filled hold mixed values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import CkptdError, ConfigError
from ckptd.core.types import join_key
from ckptd.plan.share import without_rank
from ckptd.trainer import rng as generators
from ckptd.trainer.state_flat import Flat, FlatRange, flat_sources
from ckptd.trainer.state_loaders import is_loader, is_unstarted_loader, load_loader, unstarted_state
from ckptd.trainer.state_modules import Modules, ModulesWatch
from ckptd.trainer.state_optimizers import OptimizerState, Watch, check_named, parameters, understood
from ckptd.trainer.state_tensors import Share, Source, is_dtensor, local_of, sources_of
from ckptd.trainer.state_tree import Kind, Node, grow
from ckptd.trainer.state_values import Packed, decode, encode, maker, needs_current, pack, settle, unpack

__all__ = ["AppState", "Share", "Source"]

log = logging.getLogger("ckptd.state")


class AppState:
    """The state of one rank's application. Raises ConfigError, naming the path, for a state that cannot be stored."""

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        self._state = state
        self._walk: _Walk | None = None
        self._boundary: list[Packed] | None = None
        self._restore: _Restore | None = None
        walk = _Walk(state)
        for leaf in walk.leaves:
            if leaf.kind is Kind.DATA:
                pack(leaf.value, leaf.path, Share.REPLICATED).objects()

    def sources(self) -> list[Source]:
        """All tensors of the state, canonical keys only, in an order that depends on the state alone."""
        walk = _Walk(self._state)
        self._boundary = walk.read()
        self._walk = walk
        return walk.sources

    def unchanged(self) -> bool:
        """Whether the list last returned by `sources` holds for this moment too.

        Cheap: compares identities and addresses. State dicts, plain data and hyperparameters are read afresh; where
        their tensors are laid out as before, the list is brought up to date in place.
        """
        if self._walk is None or not self._walk.unchanged():
            return False
        self._boundary = self._walk.renew()
        return self._boundary is not None

    def aliases(self) -> dict[str, str]:
        """Second and further keys of tied tensors -> the canonical key, which is the first in order of the mapping.

        Those of their optimizer state are among them, once `sources` has read it: under pipeline parallelism another
        stage may know the tensor by that name.
        """
        walk = self._walk or _Walk(self._state)
        found = {**walk.modules.aliases, **walk.flat_aliases()}
        for optimizer in walk.optimizers.values() if walk.tied else ():
            found |= optimizer.aliases(walk.tied, [source.key for source in walk.sources])
        return found

    def frozen(self) -> frozenset[str]:
        """Keys of parameters of modules that need no gradient. Who takes them for constant must watch them: an average
        of weights needs none either."""
        entries = (self._walk or _Walk(self._state)).modules.entries
        return frozenset(entry.key for entry in entries if entry.parameter and not entry.tensor.requires_grad)

    def objects(self) -> dict[str, bytes]:
        """Path -> encoded value of all that is not a tensor, the global generators included (`rng/...`).

        Uses what the last `sources` or `unchanged` read, once; without one, reads now.
        """
        boundary = self._boundary
        if boundary is None:
            self.sources()
            boundary = self._boundary
        self._boundary = None
        assert boundary is not None
        assert self._walk is not None
        made: dict[str, bytes] = {}
        for packed in boundary:
            made.update(packed.objects())
        for leaf in self._walk.leaves:
            if leaf.kind is Kind.GENERATOR:
                made[leaf.path] = encode(generators.state_of(leaf.value), leaf.path)
        made.update(generators.objects())
        return made

    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the mapping, in its order."""
        return (self._walk or _Walk(self._state)).all_optimizers()

    def required(self) -> frozenset[str]:
        """Keys of tensors and paths of objects that a checkpoint must have for this state.

        Optimizer state is never among them: a checkpoint without any is one from before the first step. See
        `missing` for what this comes to with tied keys.
        """
        walk = _Walk(self._state)
        keys = {entry.key for entry in walk.modules.entries} | {place for _, place in walk.modules.extras()}
        for leaf in walk.leaves:
            if leaf.path in walk.optimizers:
                keys.add(f"{leaf.path}/param_groups")
            elif leaf.kind is Kind.FLAT:
                keys |= {key for key, _, held in _flat_parts(leaf) if held.start < held.stop}
            elif leaf.kind is not Kind.MODULE:
                keys.add(leaf.path)
        return frozenset(keys)

    def missing(self, tensors: Iterable[str], objects: Iterable[str]) -> list[str]:
        """Required keys and paths that a checkpoint with these does not have, under no name of a tied tensor."""
        present = {*tensors, *objects}
        tied = {canonical for alias, canonical in self.aliases().items() if alias in present}
        return sorted(self.required() - present - tied)

    def unexpected(self, keys: Iterable[str]) -> list[str]:
        """Those keys and paths of a checkpoint, under top-level names of this state, that nothing here asks for.

        A rank with a part of the model sees the other parts' keys as unexpected: intersect over ranks.
        """
        return _Walk(self._state).unexpected(keys)

    def targets(self, tensors: Mapping[str, TensorInfo], objects: Mapping[str, bytes]) -> list[Source]:
        """Prepares a restore from a checkpoint with these tensors and objects (this rank's values): what to fill.

        Creates missing optimizer state and tensors for state dicts, aside, with the checkpoint's dtypes. Required
        tensors are listed even where the checkpoint does not have them. Raises MismatchError and FormatError.
        """
        self._walk, self._boundary = None, None
        self._restore = _Restore(_Walk(self._state), tensors, objects)
        return self._restore.sources

    def finish(self, objects: Mapping[str, bytes], *, rng: bool) -> None:
        """After the targets are filled: hyperparameters, state dicts and plain data, in order of the mapping; then
        generators of the mapping and, if `rng`, the global ones of `objects`. What is not in the checkpoint stays."""
        if self._restore is None:
            raise RuntimeError("finish: call targets first, and fill what it returns")
        self._restore.finish()
        self._restore = None
        if rng:
            generators.restore(objects)


class _Walk:
    """The parts of a state mapping at one moment, and their sources once `read`."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.tree: Node = grow(state)
        self.leaves = list(self.tree.leaves())
        declared = self._declared()
        modules = [(leaf.path, leaf.value) for leaf in self.leaves if leaf.kind is Kind.MODULE]
        self.modules = Modules(modules, declared.keys())
        names = {**self._names_of_tensors(), **self.modules.names()}
        flats = {**self.modules.flats(), **declared}
        self.tied = self.modules.tied_names()
        for leaf in self.leaves:
            if leaf.kind is Kind.FLAT:
                self.tied |= leaf.value.tied
        self.optimizers: dict[str, OptimizerState] = {}
        for leaf in self.leaves:
            if leaf.kind is Kind.OPTIMIZER:
                check_named(leaf.path, leaf.value, {*names, *flats})
                if understood(leaf.value):
                    self.optimizers[leaf.path] = OptimizerState(leaf.path, leaf.value, names, flats, self.tied)
        self.sources: list[Source] = []
        self._owners: list[torch.Tensor] = []
        self._pointers: list[int] = []
        self._locals: list[tuple[Any, torch.Tensor]] = []
        self._watches: list[ModulesWatch | Watch] = []
        self._renewed: list[Source] = []

    def _declared(self) -> dict[int, Flat]:
        """Flat tensors that the mapping declares, by identity; they may be parameters of optimizers and modules."""
        shards = [shard for leaf in self.leaves if leaf.kind is Kind.FLAT for shard in leaf.value.shards]
        return {id(flat): Flat(flat, ranges) for flat, ranges in shards}

    def flat_aliases(self) -> dict[str, str]:
        """Second keys of tied tensors in declared flat ones -> their keys."""
        leaves = [leaf for leaf in self.leaves if leaf.kind is Kind.FLAT and leaf.value.values]
        return {
            f"{leaf.path}/{join_key(second)}": f"{leaf.path}/{join_key(first)}"
            for leaf in leaves
            for second, first in leaf.value.tied.items()
        }

    def _names_of_tensors(self) -> dict[int, str]:
        """Tensors given directly may be parameters too."""
        names: dict[int, str] = {}
        for leaf in self.leaves:
            if leaf.kind is Kind.TENSOR:
                names.setdefault(id(leaf.value), leaf.path)
            elif leaf.kind is Kind.DATA:
                for key, tensor in pack(leaf.value, leaf.path, Share.REPLICATED).tensors.items():
                    names.setdefault(id(tensor), key)
        return names

    def all_optimizers(self) -> list[Optimizer]:
        found = {id(leaf.value): leaf.value for leaf in self.leaves if leaf.kind is Kind.OPTIMIZER}
        return list(found.values())

    def read(self) -> list[Packed]:
        """Makes `sources`; returns the values packed beside them."""
        stepped = {id(parameter) for optimizer in self.all_optimizers() for parameter in parameters(optimizer)}
        made = self.modules.sources(stepped)
        self._watches = [self.modules.watch()]
        tensors = [entry.tensor if entry.flat is None else entry.local for entry in self.modules.entries]
        for leaf in self.leaves:
            if leaf.kind is Kind.TENSOR:
                windowed = id(leaf.value) in stepped and leaf.value.requires_grad
                made += sources_of(leaf.path, leaf.value, Share.REPLICATED, windowed=windowed)
                tensors.append(leaf.value)
            elif leaf.kind is Kind.FLAT:
                for key, flat, held in _flat_parts(leaf):
                    windowed = id(flat) in stepped and flat.requires_grad
                    made += flat_sources(key, flat, held, Share.SHARDED, windowed=windowed)
                    tensors.append(flat)
            elif leaf.path in self.optimizers:
                sources, watch = self.optimizers[leaf.path].sources()
                made += sources
                self._watches.append(watch)
                tensors += [value for _, values in watch.entries for value in values]
                tensors += [value for _, values in watch.mixed for value in values.values()]
        self._owners = [local_of(tensor) for tensor in tensors]
        self._pointers = [owner.data_ptr() for owner in self._owners]
        self._locals = [(tensor, local_of(tensor)) for tensor in tensors if is_dtensor(tensor)]
        packed = self._packed()
        self._renewed = [source for value in packed for source in value.sources]
        self.sources = [*made, *self._renewed]
        self._check_unique()
        return packed

    def _check_unique(self) -> None:
        if len({source.key for source in self.sources}) == len(self.sources):
            return
        seen = set()
        for source in self.sources:
            place = (source.key, source.box)
            if place in seen:
                raise ConfigError(f"{source.key}: two tensors would be stored under this name; rename one of them")
            seen.add(place)

    def _packed(self) -> list[Packed]:
        """Everything whose tensors cannot be watched, read now."""
        made = [
            pack(module.get_extra_state(), place, Share.PER_RANK, inline=True)
            for module, place in self.modules.extras()
        ]
        for leaf in self.leaves:
            if leaf.path in self.optimizers:
                made += self.optimizers[leaf.path].packed()
            elif leaf.kind in (Kind.STATEFUL, Kind.OPTIMIZER):
                inline = leaf.kind is Kind.STATEFUL
                made.append(pack(_state_dict(leaf), leaf.path, Share.PER_RANK, inline=inline))
            elif leaf.kind is Kind.DATA:
                made.append(pack(leaf.value, leaf.path, Share.REPLICATED))
        return made

    def unchanged(self) -> bool:
        """Whether the tensors that can be watched are the same objects at the same addresses."""
        return (
            self.tree.unchanged()
            and all(watch.unchanged() for watch in self._watches)
            and [owner.data_ptr() for owner in self._owners] == self._pointers
            and all(tensor._local_tensor is local for tensor, local in self._locals)
        )

    def renew(self) -> list[Packed] | None:
        """Reads the rest afresh and updates its sources in place; None if they are laid out in another way."""
        packed = self._packed()
        found = [source for value in packed for source in value.sources]
        if [source.layout for source in found] != [source.layout for source in self._renewed]:
            return None
        for source, new in zip(self._renewed, found, strict=True):
            source.tensor = new.tensor
        return packed

    def unexpected(self, keys: Iterable[str]) -> list[str]:
        names = {join_key(name) for name in self.tree.value}
        known = {entry.key for entry in self.modules.entries} | self.modules.aliases.keys()
        known |= {leaf.path for leaf in self.leaves if leaf.kind not in (Kind.MODULE, Kind.FLAT)}
        known |= {key for leaf in self.leaves if leaf.kind is Kind.FLAT for key, _, _ in _flat_parts(leaf)}
        known |= self.flat_aliases().keys()
        values = [place for _, place in self.modules.extras()]
        values += [leaf.path for leaf in self.leaves if leaf.kind in (Kind.STATEFUL, Kind.OPTIMIZER, Kind.DATA)]
        below = tuple(f"{path}/" for path in values if path not in self.optimizers)
        optimizers = [(f"{path}/", optimizer) for path, optimizer in self.optimizers.items()]
        known |= set(values)
        return sorted(
            key
            for key in set(map(without_rank, keys))
            if _first(key) in names
            and key not in known
            and not key.startswith(below)
            and not any(key.startswith(prefix) and optimizer.owns(key) for prefix, optimizer in optimizers)
        )


def _flat_parts(leaf: Node) -> Iterator[tuple[str, torch.Tensor, FlatRange]]:
    """(key, flat tensor, range) of all whose elements a FlatShards stores."""
    for flat, ranges in leaf.value.shards if leaf.value.values else ():
        for held in ranges:
            yield f"{leaf.path}/{join_key(held.name)}", flat, held


def _first(key: str) -> str:
    """The first element of a key, escaped as it stands there."""
    if "\\" not in key:
        return key.partition("/")[0]
    end = next((i for i, c in enumerate(key) if c == "/" and (i - len(key[:i].rstrip("\\"))) % 2 == 0), len(key))
    return key[:end]


class _Restore:
    """A restore between its two halves: values of the checkpoint with tensors to fill, not yet in place."""

    def __init__(self, walk: _Walk, tensors: Mapping[str, TensorInfo], objects: Mapping[str, bytes]) -> None:
        self._walk = walk
        self._tensors = tensors
        self._objects = objects
        self._values: dict[str, Any] = {}
        self._renamed: dict[str, str] = {}
        for alias, canonical in {**walk.modules.aliases, **walk.flat_aliases()}.items():
            if canonical not in tensors and alias in tensors:
                self._renamed.setdefault(canonical, alias)
        self.sources: list[Source] = []
        walk.modules.reshard()
        self._add_modules()
        for leaf in walk.leaves:
            if leaf.kind is Kind.TENSOR:
                self.sources += sources_of(leaf.path, leaf.value, Share.REPLICATED)
            elif leaf.kind is Kind.FLAT:
                for key, flat, held in _flat_parts(leaf):
                    self.sources += flat_sources(self._renamed.get(key, key), flat, held, Share.SHARDED)
            elif leaf.path in walk.optimizers:
                self.sources += walk.optimizers[leaf.path].targets(tensors, objects)
            elif leaf.kind in (Kind.STATEFUL, Kind.OPTIMIZER):
                laid_out = needs_current(leaf.path, objects)
                now = pack(_state_dict(leaf), leaf.path, Share.PER_RANK).tensors if laid_out else {}
                self._add_value(leaf.path, now, Share.PER_RANK, reuse=False)
            elif leaf.kind is Kind.DATA:
                now = pack(leaf.value, leaf.path, Share.REPLICATED).tensors
                self._add_value(leaf.path, now, Share.REPLICATED, reuse=True)
            elif leaf.kind is Kind.GENERATOR and leaf.path in objects:
                self._values[leaf.path] = decode(objects[leaf.path])
        self._newcomer = generators.another_world(objects)
        self._differing = frozenset(self._newcomer.differing if self._newcomer is not None else ())

    def _add_modules(self) -> None:
        modules = self._walk.modules
        for source in modules.sources(set()):
            source.key = self._renamed.get(source.key, source.key)
            self.sources.append(source)
        for _, place in modules.extras():
            self._add_value(place, {}, Share.PER_RANK, reuse=False)

    def _add_value(self, path: str, now: Mapping[str, torch.Tensor], share: Share, *, reuse: bool) -> None:
        make = maker(path, self._objects, now, reuse=reuse)
        if path in self._objects:
            found = unpack(path, self._objects, self._tensors, make, share)
            self._values[path] = found.value
            self.sources += found.sources
        elif path in self._tensors:  # it has become a tensor after the start of the stored run
            self._values[path] = make(self._tensors[path])
            self.sources += sources_of(path, self._values[path], share)

    def finish(self) -> None:
        """Puts everything in place, in order of the mapping; generators last, since the others may draw from them."""
        self._walk.tree.replace(self._settled)
        for leaf in self._walk.leaves:
            if leaf.kind is Kind.GENERATOR and leaf.path in self._values:
                generators.set_state(leaf.value, self._values[leaf.path], leaf.path)
                if self._newcomer is not None and leaf.path in self._differing:
                    saved = self._objects[leaf.path]
                    generators.seed(leaf.value, generators.seed_from(self._newcomer, leaf.path, saved))
        self._tell()

    def _tell(self) -> None:
        """Says what each rank had of its own and cannot have again, once in the job."""
        if self._newcomer is None or self._newcomer.rank != 0:
            return
        kinds = (Kind.STATEFUL, Kind.DATA)
        shared = [leaf.path for leaf in self._walk.leaves if leaf.kind in kinds and leaf.path in self._differing]
        if shared:
            log.warning(
                "%s: differed between the ranks that saved, which were not %d as here; every rank has taken the value "
                "of rank 0 (docs/guides/layouts.md)",
                ", ".join(shared),
                self._newcomer.world,
            )

    def _settled(self, leaf: Node) -> Any:
        try:
            if leaf.kind is Kind.MODULE:
                for module, place in self._walk.modules.extras():
                    if place.startswith(f"{leaf.path}/") and place in self._values:
                        module.set_extra_state(self._values.pop(place))
            elif leaf.path in self._walk.optimizers:
                self._walk.optimizers[leaf.path].finish()
            elif leaf.path in self._values and leaf.kind is Kind.DATA:
                return settle(leaf.value, self._values[leaf.path])
            elif leaf.path in self._values and leaf.kind in (Kind.STATEFUL, Kind.OPTIMIZER):
                load = (
                    functools.partial(load_loader, leaf.value) if is_loader(leaf.value) else leaf.value.load_state_dict
                )
                load(self._values[leaf.path])
        except Exception as error:
            error.add_note(f"while restoring {leaf.path}")
            raise
        return leaf.value


def _state_dict(leaf: Node) -> Any:
    """The state dict of an object; ConfigError with its path if it fails."""
    if is_unstarted_loader(leaf.value):
        return unstarted_state(leaf.value)
    try:
        return leaf.value.state_dict()
    except CkptdError:
        raise
    except Exception as error:
        raise ConfigError(f"{leaf.path}: {type(leaf.value).__qualname__}.state_dict() failed: {error}") from error
