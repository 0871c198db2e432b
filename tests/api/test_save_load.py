"""save, load and open in one process, through a real store."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptd
from ckptd.tiers.store import Store
from ckptd.trainer.restoring import PARTLY_WRITTEN
from tests.api.models import application, content, same, train


def trained(steps: int = 3, **options: Any) -> dict[str, Any]:
    state = application(1, **options)
    train(state, steps)
    return state


def damage(store: Path, key: str) -> None:
    """Flips one bit of the stored tensor `key`."""
    table = ckptd.open(store).manifest.to_pylist()
    row = next(row for row in table if row["key"] == key)
    path = next(store.glob(f"step-*/data/w{row['writer']:05}-{row['file']:05}.ckd"))
    data = bytearray(path.read_bytes())
    data[row["file_offset"] + row["stored"] // 2] ^= 1
    path.write_bytes(data)


def test_a_resumed_run_is_bit_exact(tmp_path: Path) -> None:
    """Saved after three steps, loaded into an application that took none, both go on alike."""
    state = trained()
    ckptd.save(state, tmp_path, step=3)
    resumed = application(2)
    assert not same(content(state), content(resumed))
    assert ckptd.load(resumed, tmp_path) == 3
    assert same(content(state), content(resumed))
    assert train(state, 4, seed=5) == train(resumed, 4, seed=5)
    assert same(content(state), content(resumed))


def test_loading_is_in_place_and_leaves_gradients_alone(tmp_path: Path) -> None:
    ckptd.save(trained(), tmp_path)
    state = trained(1)
    weight = state["model"].first.weight
    pointer, gradient = weight.data_ptr(), torch.ones_like(weight)
    weight.grad = gradient
    ckptd.load(state, tmp_path)
    assert state["model"].first.weight is weight
    assert (weight.data_ptr(), weight.grad) == (pointer, gradient)


def test_tied_weights_are_stored_once_and_found_under_both_names(tmp_path: Path) -> None:
    ckptd.save(trained(tied=True), tmp_path, step=1)
    stored = ckptd.open(tmp_path)
    assert torch.equal(stored.read("model/first.weight"), stored.read("model/head.weight"))
    table = stored.manifest
    places = [
        row
        for row in table.select(["key", "file", "file_offset"]).to_pylist()
        if row.pop("key") in ("model/first.weight", "model/head.weight")
    ]
    assert places[0] == places[1]
    for tied in (True, False):
        state = {"model": application(3, tied=tied)["model"]}
        ckptd.load(state, tmp_path)
        assert torch.equal(state["model"].head.weight, stored.read("model/head.weight"))


def test_plain_values_and_tensors_are_restored_where_they_are(tmp_path: Path) -> None:
    given = {"seen": [1, 2], "ema": torch.arange(4.0), "nested": {"t": torch.ones(2, 3).T, "n": (1, "x")}, "best": 0.5}
    ckptd.save(given, tmp_path, step=9)
    nested = {"t": torch.zeros(2, 3).T, "n": (0, "")}
    state = {"seen": [], "ema": torch.zeros(4), "nested": nested, "best": 0.0}
    ema, view = state["ema"], nested["t"]
    assert ckptd.load(state, tmp_path) == 9
    assert state["nested"] is nested
    assert state["ema"] is ema
    assert nested["t"] is view
    assert same(state, given)


def test_generators_are_restored_only_where_asked(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    ckptd.save({"x": 1}, tmp_path)
    after = draw()
    ckptd.load({"x": 0}, tmp_path)
    assert draw() != after
    ckptd.load({"x": 0}, tmp_path, rng=True)
    assert draw() == after


def test_names_absent_here_are_ignored(tmp_path: Path) -> None:
    state = trained()
    ckptd.save(state, tmp_path)
    model = {"model": application(4)["model"]}
    ckptd.load(model, tmp_path)
    assert torch.equal(model["model"].last.weight, state["model"].last.weight)


def test_all_differences_at_once_and_nothing_written(tmp_path: Path) -> None:
    state = trained()
    state["model"].register_parameter("old", nn.Parameter(torch.zeros(2)))
    ckptd.save(state, tmp_path)
    other = trained(1, width=6)
    other["model"].register_parameter("new", nn.Parameter(torch.zeros(2)))
    other["model"].last.to(torch.bfloat16)
    other["more"] = {"n": 1}
    before = content(other)
    with pytest.raises(ckptd.MismatchError) as caught:
        ckptd.load(other, tmp_path)
    message = str(caught.value)
    for line in (
        "model/new: not in the checkpoint",
        "more: not in the checkpoint",
        "model/old: in the checkpoint only (strict=False ignores it)",
        "model/first.weight: shape [5, 3] in the checkpoint, [6, 3] here",
        "model/last.bias: float32 in the checkpoint, bfloat16 here (cast=True converts it)",
    ):
        assert f"  {line}\n" in message + "\n"
    assert same(before, content(other))


def test_not_strict_loads_what_both_have(tmp_path: Path) -> None:
    state = trained()
    ckptd.save(state, tmp_path)
    model = application(4)["model"]
    model.register_parameter("new", nn.Parameter(torch.full((2,), 7.0)))
    del model.head
    ckptd.load({"model": model, "more": 1}, tmp_path, strict=False)
    assert torch.equal(model.first.weight, state["model"].first.weight)
    assert model.new.tolist() == [7.0, 7.0]


def test_cast_converts_the_model_and_not_the_rest(tmp_path: Path) -> None:
    state = trained()
    ckptd.save(state, tmp_path)
    half = application(4)["model"].to(torch.bfloat16)
    ckptd.load({"model": half}, tmp_path, cast=True)
    assert torch.equal(half.last.weight, state["model"].last.weight.to(torch.bfloat16))


def test_a_step_is_replaced_only_on_demand(tmp_path: Path) -> None:
    for value in (1, 2):
        ckptd.save({"x": value}, tmp_path, step=value)
    with pytest.raises(ckptd.StoreError, match=r"step 2 of epoch .* is committed already.*overwrite=True"):
        ckptd.save({"x": 3}, tmp_path, step=2)
    ckptd.save({"x": 3}, tmp_path, step=2, overwrite=True)
    state = {"x": 0}
    assert ckptd.load(state, tmp_path) == 2
    assert state == {"x": 3}
    assert len(list(tmp_path.glob("step-*"))) == 2
    first = min(tmp_path.glob("step-00000001.*"))
    assert ckptd.load(state, first) == 1
    assert state == {"x": 1}


def test_the_last_save_is_the_newest_whatever_its_step(tmp_path: Path) -> None:
    ckptd.save({"x": "later"}, tmp_path, step=10)
    ckptd.save({"x": "again"}, tmp_path, step=4)
    assert ckptd.open(tmp_path).step == 4


@pytest.mark.parametrize("step", [-1, 1.5, True, "7"])
def test_steps_that_are_none(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ckptd.ConfigError, match="step="):
        ckptd.save({"x": 1}, tmp_path, step=step)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises((ckptd.StoreError, ckptd.FormatError), match="file/store"):
        ckptd.save({"x": 1}, tmp_path / "file" / "store")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises((ckptd.NotFoundError, ckptd.StoreError, ckptd.FormatError)):
            ckptd.load({"x": 1}, path)
        with pytest.raises((ckptd.NotFoundError, ckptd.StoreError, ckptd.FormatError)):
            ckptd.open(path)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckptd.save({"x": 1}, tmp_path, step=1)
    there = sorted(tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckptd.trainer.saving.SourceReader.read", full)
    with pytest.raises(ckptd.StoreError, match="No space left"):
        ckptd.save({"x": torch.ones(3)}, tmp_path, step=2)
    assert sorted(tmp_path.iterdir()) == there
    assert ckptd.open(tmp_path).step == 1


def test_damage_is_never_loaded(tmp_path: Path) -> None:
    ckptd.save(trained(), tmp_path)
    damage(tmp_path, "model/last.weight")
    with pytest.raises(ckptd.CorruptionError, match=r"model/last\.weight"):
        ckptd.open(tmp_path).verify()
    with pytest.raises(ckptd.CorruptionError, match=r"model/last\.weight") as caught:
        ckptd.load(application(2), tmp_path)
    assert PARTLY_WRITTEN in str(caught.value)
    assert ckptd.open(tmp_path).read("model/first.weight").shape == (5, 3)


def test_damage_that_is_found_before_anything_is_written(tmp_path: Path) -> None:
    """Objects are read first; and what is not asked for does not matter."""
    ckptd.save(trained(), tmp_path)
    damage(tmp_path, "objects/rng/torch@0")
    state = application(2)
    before = content(state)
    with pytest.raises(ckptd.CorruptionError) as caught:
        ckptd.load(state, tmp_path, rng=True)
    assert PARTLY_WRITTEN not in str(caught.value)
    assert same(content(state), before)
    ckptd.load(state, tmp_path)


def test_a_checkpoint_is_opened(tmp_path: Path) -> None:
    state = trained()
    state["wide"] = torch.arange(6 * 8 * 10, dtype=torch.int32).reshape(6, 8, 10)
    ckptd.save(state, tmp_path, step=7)
    stored = ckptd.open(tmp_path)
    assert (stored.step, stored.epoch, stored.job) == (7, 1, Store.open(str(tmp_path)).uri)
    assert stored.tensors["model/first.weight"] == (torch.float32, torch.Size([5, 3]))
    assert stored.tensors["wide"].dtype is torch.int32
    assert not any(key.startswith("objects/") for key in stored.tensors)
    assert len(stored.tensors) == len(list(stored.tensors))
    assert "rng/torch" in stored.objects
    assert stored.objects["optimizer/param_groups"][0]["lr"] == state["optimizer"].param_groups[0]["lr"]
    assert stored.manifest.num_rows >= len(stored.tensors)
    assert torch.equal(stored.read("model/first.weight"), state["model"].first.weight)
    stored.verify()
    with pytest.raises(ckptd.NotFoundError, match="no tensor 'model/none'"):
        stored.read("model/none")


@pytest.mark.parametrize(
    "index",
    [
        ...,
        3,
        -1,
        (2, 5, 7),
        slice(1, 4),
        slice(None, None, 3),
        slice(4, 2),
        slice(-2, None),
        (slice(1, 5, 2), ..., slice(3, 9, 4)),
        (..., 2),
        (1, slice(2, 7), -3),
        (),
    ],
    ids=repr,
)
def test_parts_are_read_as_tensors_are_indexed(tmp_path: Path, index: Any) -> None:
    value = torch.arange(6 * 8 * 10, dtype=torch.float64).reshape(6, 8, 10)
    ckptd.save({"wide": value}, tmp_path)
    part = ckptd.open(tmp_path).read("wide", index)
    assert same(part, value[index])


@pytest.mark.parametrize("index", [6, (0, -9), (0, 0, 0, 0), (..., ...), "x", slice(None, None, -1), (slice(2), 1.0)])
def test_indices_that_are_none(tmp_path: Path, index: Any) -> None:
    ckptd.save({"wide": torch.zeros(6, 8, 10)}, tmp_path)
    with pytest.raises(IndexError):
        ckptd.open(tmp_path).read("wide", index)
