"""Decoded objects in words and as JSON."""

from __future__ import annotations

import json
import math
from collections import OrderedDict

import numpy as np
import pytest

from ckptd.format.objects import DeviceValue, DtypeValue, Ref, SizeValue, TensorValue, decode, encode
from ckptd.operations.describe import describe, jsonable

VALUES = [
    (None, "None", None),
    (True, "True", True),
    (7, "7", 7),
    (2**40, str(2**40), 2**40),
    ("text", "'text'", "text"),
    (1.5, "1.5", 1.5),
    (math.nan, "nan", "nan"),
    (-math.inf, "-inf", "-inf"),
    (b"1234", "4 bytes", "4 bytes"),
    ((1, 2), "(1, 2)", [1, 2]),
    ({3, 1, 2}, "{1, 2, 3}", [1, 2, 3]),
    ({1: "x"}, "{1: 'x'}", {"1": "x"}),
    (OrderedDict(lr=0.1), "{'lr': 0.1}", {"lr": 0.1}),
    (1 + 2j, "(1+2j)", "(1+2j)"),
    (np.zeros((2, 3), np.int16), "array int16 [2, 3]", "array int16 [2, 3]"),
    (np.float32(0.5), "float32 0.5", 0.5),
    (TensorValue("bfloat16", (2,), b"1234"), "tensor bfloat16 [2]", "tensor bfloat16 [2]"),
    (DtypeValue("float32"), "torch.float32", "torch.float32"),
    (DeviceValue("cuda:0"), "device cuda:0", "device cuda:0"),
    (SizeValue((4, 5)), "size [4, 5]", "size [4, 5]"),
    (Ref("optimizer/x"), "-> optimizer/x", "-> optimizer/x"),
]


@pytest.mark.parametrize(("value", "words", "document"), VALUES, ids=[words for _, words, _ in VALUES])
def test_every_kind_of_object(value: object, words: str, document: object) -> None:
    decoded = decode(encode(value))
    assert describe(decoded) == words
    assert jsonable(decoded) == document
    json.dumps(jsonable(decoded), allow_nan=False)


def test_words_stay_short_whatever_the_value() -> None:
    deep: object = "x" * 10_000
    for _ in range(30):
        deep = [deep, np.zeros((1000,)), 2**30_000]
    wide = list(range(100_000))
    for value in (deep, wide, 2**30_000, "x" * 10_000, {str(i): wide for i in range(100)}):
        assert len(describe(value)) < 1000
        assert "\n" not in describe(value)


def test_integers_that_python_does_not_spell_in_decimal() -> None:
    assert jsonable([2**30_000])[0].startswith("0x1000")
    json.dumps(jsonable({2**30_000: 2**30_000}))
