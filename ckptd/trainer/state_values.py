"""Values that are not a module or an optimizer: state dicts, plain data, hyperparameters.

A value is packed into a skeleton, in which each tensor is a `Ref` to its key, and the sources of those tensors; the
skeleton is encoded as an object. Restoring decodes it with tensors of the right dtype, shape and device at the
references; the caller fills them before it uses the value. Nothing is executed on decoding.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError, MismatchError
from ckptd.core.types import join_key
from ckptd.format import objects as encoding
from ckptd.tensors.values import convert, torch_dtype
from ckptd.tensors.values import restore as restore_value
from ckptd.trainer.state_tensors import Share, Source, check, is_dtensor, sources_of

MAX_DEPTH = 64
"""How deep values may nest; the format's limit."""

DEVICES = "_devices"
"""Last element of the path of an object that says which tensors of a value were not plain ones on the CPU: key ->
device type, or `dtensor`."""
DTENSOR = "dtensor"

INLINE_BYTES = 16 * 1024
INLINE_TOTAL_BYTES = 1024 * 1024
"""CPU tensors of at most this size may stand inside the object, up to a total: in state dicts their shapes change from
step to step and from rank to rank (positions, buffers of samples), which objects may and keys may not."""

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_LEAVES = frozenset({set, frozenset, bytearray, np.ndarray, torch.dtype, torch.device, torch.Size})

Make = Callable[[TensorInfo], torch.Tensor]
"""Gives the tensor to fill for a tensor of the checkpoint."""


@dataclasses.dataclass(slots=True)
class Packed:
    """A value with its tensors taken out: `tensors` are those tensors by key, `sources` what is stored of them."""

    path: str
    skeleton: Any
    tensors: dict[str, torch.Tensor]
    sources: list[Source]

    def objects(self) -> dict[str, bytes]:
        """The value's objects by path; ConfigError names the path of what cannot be stored."""
        made = {self.path: encode(self.skeleton, self.path)}
        devices = {
            key: DTENSOR if is_dtensor(tensor) else tensor.device.type
            for key, tensor in self.tensors.items()
            if is_dtensor(tensor) or tensor.device.type != "cpu"
        }
        if devices:
            path = f"{self.path}/{DEVICES}"
            made[path] = encode(devices, path)
        return made


def pack(value: Any, path: str, share: Share, *, windowed: bool = False, inline: bool = False) -> Packed:
    """Takes the tensors out of `value`: the one at p inside it gets the key `path`/p. `inline` leaves small ones in.

    Raises ConfigError for two that would get one key, for nesting that is too deep, and for unusable tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _take(value, path, tensors, [INLINE_TOTAL_BYTES if inline else 0], 0)
    sources = [source for key, t in tensors.items() for source in sources_of(key, t, share, windowed=windowed)]
    return Packed(path, skeleton, tensors, sources)


def _take(value: Any, path: str, tensors: dict[str, torch.Tensor], room: list[int], depth: int) -> Any:
    """The skeleton of `value`; adds its tensors to `tensors`. `room` is what may still be left inside, in bytes."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, torch.Tensor):
        if (
            not is_dtensor(value)
            and value.device.type == "cpu"
            and room[0]
            and _bytes(value) <= min(room[0], INLINE_BYTES)
        ):
            room[0] -= _bytes(value)
            return _inline(value, path)
        if path in tensors:
            raise ConfigError(f"{path}: two tensors would be stored under this name; rename one of the entries")
        tensors[path] = value
        return encoding.Ref(path)
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {MAX_DEPTH}; flatten it")
    if isinstance(value, dict):
        taken = {k: _take(v, f"{path}/{join_key(k)}", tensors, room, depth + 1) for k, v in value.items()}
        return type(value)(taken) if isinstance(value, (collections.OrderedDict, collections.Counter)) else taken
    if isinstance(value, list) or (isinstance(value, tuple) and not isinstance(value, torch.Size)):
        plain: Callable[[Any], Any] = list if isinstance(value, list) else tuple
        if _ATOMS.issuperset(map(type, value)):
            return plain(value)
        return plain(_take(v, f"{path}/{i}", tensors, room, depth + 1) for i, v in enumerate(value))
    if type(value) not in _LEAVES and not isinstance(value, np.generic):
        raise ConfigError(
            f"{path}: {type(value)} cannot be stored; use numbers, text, dicts, lists, tuples, sets, arrays or "
            "tensors, or give its object state_dict and load_state_dict that do"
        )
    return value


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _inline(tensor: torch.Tensor, path: str) -> encoding.TensorValue:
    dtype = check(path, tensor)
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return encoding.TensorValue(dtype, tuple(tensor.shape), data)


def encode(value: Any, path: str) -> bytes:
    """The bytes of an object; ConfigError names the path of what cannot be stored."""
    try:
        return encoding.encode(value, convert=_convert)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _convert(value: object) -> object:
    return bytes(value) if isinstance(value, bytearray) else convert(value)


@dataclasses.dataclass(slots=True)
class Unpacked:
    """A value of the checkpoint whose tensors are still to be filled, through `sources`."""

    value: Any
    sources: list[Source]


def unpack(
    path: str, objects: Mapping[str, bytes], tensors: Mapping[str, TensorInfo], make: Make, share: Share
) -> Unpacked:
    """Decodes the object at `path`; `make` gives the tensor for each of its references.

    Raises MismatchError for a reference to a tensor that the checkpoint does not have.
    """
    made: dict[str, torch.Tensor] = {}

    def restore(value: object) -> object:
        if isinstance(value, encoding.Ref):
            if value.key not in tensors:
                raise MismatchError(f"{path}: refers to tensor {value.key!r}, which the checkpoint does not have")
            if value.key not in made:
                made[value.key] = make(tensors[value.key])
            return made[value.key]
        return restore_value(value)

    value = encoding.decode(objects[path], restore=restore)
    return Unpacked(value, [source for key, tensor in made.items() for source in sources_of(key, tensor, share)])


def decode(data: bytes) -> Any:
    """The value of an object that refers to no tensors."""
    return encoding.decode(data, restore=restore_value)


def maker(path: str, objects: Mapping[str, bytes], current: Mapping[str, torch.Tensor], *, reuse: bool) -> Make:
    """Makes tensors on the kind of device they were stored from, where this process has it, else on the CPU.

    `current` are the tensors the value has now. With `reuse` those are filled in place, so a difference in shape is
    an error of loading; without, they only say how a DTensor is laid out.
    """
    stored = objects.get(f"{path}/{DEVICES}")
    devices = decode(stored) if stored is not None else {}

    def make(info: TensorInfo) -> torch.Tensor:
        now = current.get(info.key)
        if now is not None and reuse:
            return now
        dtype = torch_dtype(info.dtype)
        if is_dtensor(now) and now is not None and tuple(now.shape) == info.shape:
            return torch.empty_like(now, dtype=dtype)
        device = devices.get(info.key, "cpu")
        return torch.empty(info.shape, dtype=dtype, device=device if _usable(device) else "cpu")

    return make


def needs_current(path: str, objects: Mapping[str, bytes]) -> bool:
    """Whether restoring the value at `path` asks how its present tensors are laid out."""
    stored = objects.get(f"{path}/{DEVICES}")
    return stored is not None and DTENSOR in decode(stored).values()


def _usable(device: str) -> bool:
    if device == "cpu":
        return True
    backend = getattr(torch, device, None)
    return backend is not None and bool(backend.is_available())


def settle(current: Any, loaded: Any) -> Any:
    """`loaded` in the place of `current`: mutable containers keep their identity and type, the rest is replaced."""
    if current is loaded:
        return current
    if isinstance(current, dict) and isinstance(loaded, dict):
        merged = {key: settle(current.get(key), value) for key, value in loaded.items()}
        current.clear()
        for key, value in merged.items():
            current[key] = value
        return current
    if isinstance(current, list) and isinstance(loaded, list):
        current[:] = _settle_each(current, loaded)
        return current
    if isinstance(current, tuple) and isinstance(loaded, tuple) and not isinstance(current, torch.Size):
        values = _settle_each(current, loaded)
        same_fields = hasattr(current, "_fields") and len(current) == len(values)
        return type(current)(*values) if same_fields else tuple(values)
    if isinstance(current, set) and isinstance(loaded, set):
        current.clear()
        current.update(loaded)
        return current
    if isinstance(current, bytearray) and isinstance(loaded, bytes):
        current[:] = loaded
        return current
    if isinstance(current, np.ndarray) and isinstance(loaded, np.ndarray) and current.flags.writeable:
        if (current.shape, current.dtype) != (loaded.shape, loaded.dtype):
            return loaded
        np.copyto(current, loaded)
        return current
    return loaded


def _settle_each(current: Any, loaded: Any) -> list[Any]:
    missing = len(loaded) - len(current)
    padded = [*current, *([None] * missing)] if missing > 0 else current
    return [settle(now, value) for now, value in zip(padded, loaded, strict=False)]
