"""Tensors and objects of torch as the bytes that the format stores, and back.

Objects are encoded by `format.objects`. DCP hands objects to its load planner as a file that the planner unpickles:
`pickled` makes it, in memory, from a value that was decoded already; nothing that was read from a store is unpickled.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptd.core.box import Box
from ckptd.core.errors import ConfigError
from ckptd.core.types import DTYPES
from ckptd.format import objects as encoding

_ORDINARY = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def dtype_name(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype; None for one that it does not know."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name; raises ConfigError where this torch does not have it."""
    found = getattr(torch, name, None) if name in DTYPES else None
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {name!r}: torch {torch.__version__} does not have it; use a newer torch")
    return found


def usable(tensor: Any, name: str) -> torch.Tensor:
    """`tensor` without autograd and lazy views, if its bytes can be stored; raises ConfigError naming `name`."""
    problem = None
    if not isinstance(tensor, torch.Tensor):
        problem = f"the planner gives a {type(tensor).__qualname__} for it; expected a tensor"
    elif type(tensor) not in _ORDINARY and is_traceable_wrapper_subclass(tensor):
        problem = f"{type(tensor).__qualname__} wraps other tensors and cannot be stored; give it as its parts"
    elif dtype_name(tensor.dtype) is None:
        problem = f"dtype {tensor.dtype} cannot be stored; known: {', '.join(DTYPES)}"
    elif tensor.layout is not torch.strided:
        problem = f"layout {tensor.layout} cannot be stored; use a dense tensor"
    elif tensor.device.type == "meta":
        problem = "it is on the meta device and has no values; materialise it first"
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
        if type(value) not in _ORDINARY:
            raise TypeError("a distributed or wrapped tensor inside an object; let the planner flatten the state dict")
        try:
            tensor = usable(value, "tensor")
        except ConfigError as error:
            raise TypeError(str(error)) from None
        return encoding.TensorValue(str(dtype_name(tensor.dtype)), tuple(tensor.shape), bytes_of(tensor).tobytes())
    if isinstance(value, torch.dtype):
        return encoding.DtypeValue(str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return encoding.DeviceValue(str(value))
    if isinstance(value, torch.Size):
        return encoding.SizeValue(tuple(value))
    raise TypeError(f"{type(value)} cannot be stored")


def decode(data: bytes) -> Any:
    """The inverse of `encode`; references to tensors of the checkpoint stay `Ref`. Raises FormatError."""
    return encoding.decode(data, restore=_restore)


def _restore(value: object) -> object:
    if isinstance(value, encoding.DtypeValue):
        return torch_dtype(value.name)
    if isinstance(value, encoding.DeviceValue):
        return torch.device(value.text)
    if isinstance(value, encoding.SizeValue):
        return torch.Size(value.sizes)
    if isinstance(value, encoding.TensorValue):
        dtype = torch_dtype(value.dtype)
        if not value.data:
            return torch.empty(value.shape, dtype=dtype)
        return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
    return value


def pickled(value: Any) -> io.BytesIO:
    """A file from which DCP's load planner reads `value`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
