"""A catalog as bytes inside a slot or between ranks: columns as little-endian arrays in one msgpack map.

Written and read on one machine within one protocol version; not part of the checkpoint format. Decoding checks what
`Catalog.build` checks and raises FormatError.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ckptd.core.catalog import COLUMNS, Catalog
from ckptd.core.errors import FormatError


class _Table(msgspec.Struct):
    tensors: list[tuple[str, str, list[int]]]
    tensor: bytes
    offsets: bytes
    sizes: bytes
    columns: dict[str, bytes]


def encode_table(catalog: Catalog) -> bytes:
    """The catalog's rows, in order."""
    return msgspec.msgpack.encode(
        _Table(
            [(t.key, t.dtype, list(t.shape)) for t in catalog.tensors],
            catalog.tensor.tobytes(),
            catalog.offsets.tobytes(),
            catalog.sizes.tobytes(),
            {name: getattr(catalog, name).tobytes() for name in COLUMNS},
        )
    )


def decode_table(data: bytes) -> Catalog:
    """The inverse of `encode_table`; raises FormatError."""
    try:
        table = msgspec.msgpack.decode(data, type=_Table)
        width = max((len(shape) for _, _, shape in table.tensors), default=0)
        tensor = np.frombuffer(table.tensor, np.int32)
        columns: dict[str, Any] = {name: np.frombuffer(table.columns[name], kind) for name, kind in COLUMNS.items()}
        offsets = np.frombuffer(table.offsets, np.int64).reshape(len(tensor), width)
        sizes = np.frombuffer(table.sizes, np.int64).reshape(len(tensor), width)
    except (msgspec.MsgspecError, ValueError, KeyError) as error:
        raise FormatError(f"table of {len(data)} bytes: {error}") from None
    if any(len(column) != len(tensor) for column in columns.values()):
        raise FormatError("table: columns of different lengths")
    return Catalog.build(table.tensors, tensor, offsets, sizes, **columns)
