"""Objects of a checkpoint for people and for JSON: values decoded by `format.objects`, in words or as JSON values.

Pure. Nothing here is read back: `--json` shows values, the store holds them.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np

from ckptd.format.objects import DeviceValue, DtypeValue, Ref, SizeValue, TensorValue

_MAX_DECIMAL_BITS = 256
"""Larger integers are shown in hexadecimal: Python refuses to spell very large ones in decimal."""


def describe(value: object) -> str:
    """A value in one line of bounded length."""
    return _SHORT.repr(value)


def jsonable(value: object) -> Any:
    """A value as JSON: tuples and sets as lists, keys as text, NaN and infinities spelled; arrays and tensors only by
    dtype and shape, bytes only by length."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if value.bit_length() <= _MAX_DECIMAL_BITS else hex(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {key if isinstance(key, str) else describe(key): jsonable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [jsonable(inner) for inner in value]
        case set() | frozenset():
            return sorted((jsonable(inner) for inner in value), key=repr)
        case np.generic() if value.dtype.kind in "biuf":
            return jsonable(value.item())
    return describe(value)


class _Short(reprlib.Repr):
    """`repr`, bounded, with words for what has none: tensors, arrays, bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8

    def repr1(self, x: object, level: int) -> str:
        words = _in_words(x)
        if words is not None:
            return words
        return self.repr_dict(x, level) if isinstance(x, dict) else super().repr1(x, level)


def _in_words(value: object) -> str | None:
    match value:
        case TensorValue():
            return f"tensor {value.dtype} {list(value.shape)}"
        case np.ndarray():
            return f"array {value.dtype} {list(value.shape)}"
        case DtypeValue():
            return f"torch.{value.name}"
        case DeviceValue():
            return f"device {value.text}"
        case SizeValue():
            return f"size {list(value.sizes)}"
        case Ref():
            return f"-> {value.key}"
        case bytes():
            return f"{len(value)} bytes"
        case np.generic():
            return f"{value.dtype} {value.item()!r:.100}"
        case bool():
            return None
        case int() if value.bit_length() > _MAX_DECIMAL_BITS:
            return f"{value.bit_length()}-bit integer {hex(value)[:20]}..."
    return None


_SHORT = _Short()
