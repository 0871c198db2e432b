"""Reading chunks out of tensors, however they lie in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ckptd
from ckptd.core.box import Box
from ckptd.core.catalog import Catalog
from ckptd.core.native import crc32c
from ckptd.plan.save import plan_save
from ckptd.trainer import saving
from ckptd.trainer.saving import SourceReader, pieces_of
from ckptd.trainer.state_tensors import Share, Source


def sources() -> tuple[dict[str, torch.Tensor], list[Source]]:
    """Packed, transposed, spaced, scalar, empty and expanded tensors; and one that is held as two boxes."""
    values = {
        "packed": torch.randn(7, 5),
        "turned": torch.randn(5, 7).T,
        "spaced": torch.arange(60, dtype=torch.int16).reshape(6, 10)[::2, 1:9:3],
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 4),
        "halves": torch.randn(6, 2),
    }
    names = {torch.float32: "float32", torch.int16: "int16", torch.bfloat16: "bfloat16"}
    made = [
        Source(key, names[v.dtype], tuple(v.shape), Box.whole(v.shape), Share.REPLICATED, v)
        for key, v in values.items()
        if key != "halves"
    ]
    for start in (0, 3):
        half = values["halves"][start : start + 3]
        made.append(Source("halves", "float32", (6, 2), Box((start, 0), (3, 2)), Share.SHARDED, half))
    return values, made


def packed(value: torch.Tensor, box: Box) -> bytes:
    part = value[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].clone(memory_format=torch.contiguous_format)
    return part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b""


def test_chunks_and_checksums_of_any_memory() -> None:
    values, made = sources()
    (catalog,) = plan_save([pieces_of(made)])
    reader = SourceReader(made)
    checksums = reader.checksums(catalog)
    assert len(catalog.rows("halves")) == 2
    for row in catalog:
        expected = packed(values[catalog.tensors[catalog.tensor[row]].key], catalog.box(row))
        assert read(reader, catalog, row) == expected
        assert checksums[row] == crc32c(expected)


def test_a_part_of_a_source() -> None:
    values, made = sources()
    reader = SourceReader(made)
    box = Box((2, 1), (3, 4))
    for key in ("packed", "turned"):
        into = bytearray(3 * 4 * 4)
        reader.read(key, box, memoryview(into))
        assert bytes(into) == packed(values[key], box)


def test_copies_of_device_tensors_are_packed() -> None:
    """The way of tensors on devices, taken by tensors on the CPU."""
    values, made = sources()
    for source in made:
        expected = packed(values[source.key], source.box)
        assert bytes(saving._on_cpu(source, source.box)) == expected


def read(reader: SourceReader, catalog: Catalog, row: int) -> bytes:
    into = bytearray(int(catalog.raw[row]))
    reader.read(catalog.tensors[catalog.tensor[row]].key, catalog.box(row), memoryview(into))
    return bytes(into)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_tensors_there_and_back(tmp_path: Path) -> None:
    state = {"w": torch.randn(300, 40, device="cuda").T, "n": torch.tensor(3, device="cuda")}
    expected = {key: value.clone() for key, value in state.items()}
    ckptd.save(state, tmp_path)
    for value in state.values():
        value.zero_()
    ckptd.load(state, tmp_path)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert np.array_equal(ckptd.open(tmp_path).read("w").numpy(), expected["w"].cpu().numpy())
