"""Tensors and objects of torch as the bytes that the format stores, and back.

Objects are encoded by `format.objects`. DCP hands objects to its load planner as a file that the planner unpickles:
`pickled` makes it, in memory, from a value that was decoded already; nothing that was read from a store is unpickled.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from ckptd.core.box import Box
from ckptd.core.errors import ConfigError
from ckptd.format import objects as encoding
from ckptd.tensors.values import convert, dtype_name, is_ordinary, restore, why_not


def usable(tensor: Any, name: str) -> torch.Tensor:
    """`tensor` without autograd and lazy views, if its bytes can be stored; raises ConfigError naming `name`."""
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"{name}: the planner gives a {type(tensor).__qualname__} for it; expected a tensor")
    problem = why_not(tensor)
    if problem is not None:
        raise ConfigError(f"{name}: {problem}")
    plain: torch.Tensor = tensor.detach().resolve_conj().resolve_neg()
    return plain


def part_of(tensor: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    """The view of `tensor`, which holds the box `outer`, that is the box `inner`."""
    spans = zip(inner.offsets, inner.sizes, outer.offsets, strict=True)
    return tensor[tuple(slice(start - first, start - first + size) for start, size, first in spans)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major: its own memory if that is contiguous and on the CPU, else a copy."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encode(value: Any, name: str) -> bytes:
    """The bytes of an object; raises ConfigError that names the entry and the place inside it."""
    try:
        return encoding.encode(value, convert=_convert)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}. ckptd stores data, not pickled objects") from None


def encode_saved(file: Any, name: str) -> bytes:
    """The bytes of an object that a planner gives only as a file made by torch.save; it may hold plain data alone."""
    if not isinstance(file, io.BytesIO):
        raise ConfigError(f"{name}: the planner gives a {type(file).__qualname__} for it; expected a BytesIO")
    file.seek(0)
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{name}: not plain data, nor tensors: {error}") from None
    return encode(value, name)


def _convert(value: object) -> object:
    if isinstance(value, torch.Tensor):
        if not is_ordinary(value):
            raise TypeError("a distributed or wrapped tensor inside an object; let the planner flatten the state dict")
        try:
            tensor = usable(value, "tensor")
        except ConfigError as error:
            raise TypeError(str(error)) from None
        return encoding.TensorValue(str(dtype_name(tensor.dtype)), tuple(tensor.shape), bytes_of(tensor).tobytes())
    return convert(value)


def decode(data: bytes) -> Any:
    """The inverse of `encode`; references to tensors of the checkpoint stay `Ref`. Raises FormatError."""
    return encoding.decode(data, restore=restore)


def pickled(value: Any) -> io.BytesIO:
    """A file from which DCP's load planner reads `value`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
