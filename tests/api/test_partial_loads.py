"""Loading a part: some keys, what both have, one slice of one tensor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.tiers.store.reader import StoredCheckpoint
from tests.api.models import application, content, same, train


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A checkpoint of a small application after three steps, and of some values."""
    state = application(1)
    train(state, 3)
    ckptd.save({**state, "values": {"n": 1, "t": torch.arange(3.0)}}, tmp_path, step=3)
    return tmp_path


def loaded(store: Path, keys: Any, **options: Any) -> tuple[dict[str, Any], set[str]]:
    """What is in a trained application after a load of `keys`, and which of it changed."""
    state = application(2)
    train(state, 2, seed=4)
    before = content(state)
    assert ckptd.load(state, store, keys=keys, **options) == 3
    after = content(state)
    return state, {key for key in after if not same(before[key], after[key])}


def test_only_the_model(store: Path) -> None:
    """The optimizer that is trained already keeps all it has."""
    for keys in ("model", ["model/*"], "model/**"):
        state, changed = loaded(store, keys)
        assert {key.split("/")[0] for key in changed} == {"model"}
        assert torch.equal(state["model"].first.weight, ckptd.open(store).read("model/first.weight"))


def test_some_keys_of_the_model(store: Path) -> None:
    _, changed = loaded(store, ["model/first.*", "model/gate.bias"])
    assert changed == {"model/first.weight", "model/first.bias", "model/gate.bias"}


def test_one_moment_of_the_optimizer(store: Path) -> None:
    state, changed = loaded(store, "optimizer/state/*/exp_avg")
    assert {key.rsplit("/", 1)[-1] for key in changed} == {"exp_avg"}
    first = state["optimizer"].state[state["model"].first.weight]
    assert set(first) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(first["exp_avg"], ckptd.open(store).read("optimizer/state/first.weight/exp_avg"))
    train(state, 1)


def test_state_of_an_optimizer_that_has_none_yet(store: Path) -> None:
    state = application(2)
    ckptd.load(state, store, keys=["optimizer"])
    first = state["optimizer"].state[state["model"].first.weight]
    assert torch.equal(first["exp_avg_sq"], ckptd.open(store).read("optimizer/state/first.weight/exp_avg_sq"))
    state = application(2)
    ckptd.load(state, store, keys=["model", "scheduler"])
    assert not state["optimizer"].state
    assert state["scheduler"].last_epoch == 3


def test_plain_values_by_key(store: Path) -> None:
    state = {"values": {"n": 7, "t": torch.zeros(3)}, "model": application(2)["model"]}
    before = content({**application(2), **state})
    ckptd.load(state, store, keys="values")
    assert state["values"]["n"] == 1
    assert state["values"]["t"].tolist() == [0, 1, 2]
    assert same(content({**application(2), **state}), before)


def test_what_is_not_asked_for_may_be_absent_or_different(store: Path) -> None:
    state = {"model": nn.ModuleDict({"first": nn.Linear(3, 5), "new": nn.Linear(2, 2)}), "more": 1}
    state["model"]["gate"] = nn.Linear(9, 9)
    found = ckptd.load(state, store, keys="model/first.*")
    assert (found.missing, found.unexpected) == ((), ())
    assert torch.equal(state["model"]["first"].weight, ckptd.open(store).read("model/first.weight"))


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ("modell", ckptd.MismatchError, "match no key of the checkpoint"),
        ([], ckptd.MismatchError, "match no key"),
        (["model", ""], ckptd.ConfigError, "expected patterns"),
        ([3], ckptd.ConfigError, "expected patterns"),
    ],
)
def test_keys_that_cannot_be_meant(store: Path, keys: Any, error: type[Exception], says: str) -> None:
    state = application(2)
    before = content(state)
    with pytest.raises(error, match=says):
        ckptd.load(state, store, keys=keys)
    assert same(content(state), before)


def test_keys_are_strict_about_what_they_match(store: Path) -> None:
    state = application(2)
    state["model"].register_parameter("new", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ckptd.MismatchError, match="model/new: not in the checkpoint"):
        ckptd.load(state, store, keys="model")
    ckptd.load(state, store, keys="optimizer")


def test_a_load_that_is_not_strict_says_what_it_left_out(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = application(4)["model"]
    model.register_parameter("new", nn.Parameter(torch.full((2,), 7.0)))
    del model.head
    with caplog.at_level(logging.WARNING, "ckptd"):
        found = ckptd.load({"model": model, "more": 1}, store, strict=False)
    assert found == 3
    assert found.missing == ("model/new", "more")
    assert found.unexpected == ("model/head.weight",)
    assert "2 keys are not in it, left as they were: model/new, more" in caplog.text
    assert "1 keys are in it only, ignored: model/head.weight" in caplog.text
    assert ckptd.load({"model": application(4)["model"]}, store).missing == ()


def test_generators_are_a_matter_of_rng_alone(store: Path) -> None:
    state = application(2)
    torch.manual_seed(5)
    ckptd.load(state, store, keys="model")
    here = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(()), here)
    ckptd.load(state, store, keys="model", rng=True)
    first = torch.rand(())
    ckptd.load(state, store, keys="model", rng=True)
    assert torch.equal(torch.rand(()), first)


def test_a_slice_reads_the_chunks_that_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of five chunks, of which a process asks for a few rows."""
    value = torch.arange(5 * 2**22, dtype=torch.int32).reshape(5 * 2**12, 2**10)
    ckptd.save({"w": value, "other": torch.ones(4)}, tmp_path)
    rows: list[int] = []
    original = StoredCheckpoint.read_run

    def counted(self: StoredCheckpoint, run: list[int], into: list[memoryview]) -> None:
        rows.extend(run)
        original(self, run, into)

    monkeypatch.setattr(StoredCheckpoint, "read_run", counted)
    stored = ckptd.open(tmp_path)
    assert stored.manifest.num_rows >= 6
    for index, chunks in ((slice(10, 20), 1), (slice(2**12 - 1, 2**12 + 1), 2), ((3, slice(5, 7)), 1), (..., 5)):
        rows.clear()
        assert torch.equal(stored.read("w", index), value[index])
        assert len(rows) == len(set(rows)) == chunks
