"""Foreign files for the tests: builders, and ways in and out of ckptd."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ckptd
from ckptd.interop.importing import Imported, import_checkpoint, read_foreign
from ckptd.interop.pieces import Files
from ckptd.plan.layout import Layout, Mesh

WHOLE = Layout(Mesh.parse(""))

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any dtype, no two elements next to each other alike."""
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    return (torch.arange(count) % 97).to(torch.float32).to(dtype).reshape(shape)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and bits."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1) for t in (first, second)]
    return torch.equal(*bits)


def looked_into(path: Path, name: str = "model", **options: Any) -> Imported:
    """What is read before a byte of a tensor is."""
    with Files() as files:
        return read_foreign(str(path), files, name, **options)


def imported(path: Path, store: Path, name: str = "model", layout: Layout = WHOLE, **options: Any) -> Any:
    """An opened checkpoint made of foreign files."""
    with Files() as files:
        found = read_foreign(str(path), files, name, **options)
        import_checkpoint(found, str(store), layout)
    checkpoint = ckptd.open(store)
    checkpoint.verify()
    return checkpoint


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of the format; `header` is bytes, or becomes JSON. `length` lies about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], first: int, last: int) -> Mapping[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
