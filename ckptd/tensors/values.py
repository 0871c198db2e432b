"""torch's dtypes, devices, sizes and small tensors as the format's neutral values, and back.

Owns the names of dtypes and what keeps a tensor's bytes from being stored. Does not know keys, shards or state.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptd.core.errors import ConfigError
from ckptd.core.types import DTYPES
from ckptd.format import objects as encoding

DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in DTYPES if hasattr(torch, name)}
_ORDINARY = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def dtype_name(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype; None for one that it does not know."""
    return DTYPE_NAMES.get(dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name; raises ConfigError where this torch does not have it."""
    found = getattr(torch, name, None) if name in DTYPES else None
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {name!r}: torch {torch.__version__} does not have it; use a newer torch")
    return found


def is_ordinary(tensor: object) -> bool:
    """Whether it is a tensor of torch's own classes, which hold their elements themselves."""
    return type(tensor) in _ORDINARY


def why_not(tensor: torch.Tensor) -> str | None:
    """What keeps the bytes of a tensor from being stored; None where nothing does."""
    if not is_ordinary(tensor) and is_traceable_wrapper_subclass(tensor):
        return f"{type(tensor).__qualname__} wraps other tensors and cannot be stored; give it as its parts"
    if dtype_name(tensor.dtype) is None:
        return f"dtype {tensor.dtype} cannot be stored; known: {', '.join(DTYPES)}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout} cannot be stored; use a dense tensor"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no values; materialise it first (to_empty, then initialise)"
    return None


def convert(value: object) -> object:
    """A value of torch's as a neutral one; raises TypeError for what is none."""
    if isinstance(value, torch.dtype):
        return encoding.DtypeValue(str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return encoding.DeviceValue(str(value))
    if isinstance(value, torch.Size):
        return encoding.SizeValue(tuple(value))
    raise TypeError(f"{type(value)} cannot be stored")


def restore(value: object) -> object:
    """The inverse of `convert`, for small tensors inside objects too. Raises ConfigError for an unknown dtype."""
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
