"""Flat tensors that the mapping declares: what lies where, and what cannot be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptd
from ckptd.core.errors import ConfigError, MismatchError
from ckptd.trainer.state import AppState, Share
from ckptd.trainer.state_flat import FlatRange, FlatShards, flat_ranges, flat_sources
from tests.trainer_state.memory import Memory, same_bits

SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)}
TOTAL = 12 + 3 + 6 + 2


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def plain(steps: int = 2) -> dict[str, Any]:
    """A model with state, by parameter."""
    torch.manual_seed(0)
    model = net()
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}
    for _ in range(steps):
        state["optimizer"].zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        state["optimizer"].step()
    return state


def flat(start: int, stop: int, size: int | None = None) -> tuple[dict[str, Any], nn.Parameter]:
    """One rank's part [start, stop) of the same model, in a flat parameter with some padding."""
    parameter = nn.Parameter(torch.full((size or stop - start,), 9.0))
    shards = FlatShards([(parameter, flat_ranges(SHAPES.items(), start, stop))])
    return {"model": shards, "optimizer": torch.optim.AdamW([parameter], lr=9.0)}, parameter


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.data(), shapes)
def test_boxes_of_a_range_are_the_elements_of_it(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """Whatever the order in memory; put into the boxes, the flat elements are those of the range, and no others."""
    size = torch.Size(shape).numel()
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    offset = data.draw(st.integers(0, 3))
    tensor = torch.arange(size).reshape([shape[d] for d in order])
    holder = torch.cat([torch.full((offset,), -1), tensor.flatten()[start:stop], torch.full((2,), -1)])
    inverse = [order.index(d) for d in range(len(shape))]
    logical = tensor.permute(inverse)
    sources = flat_sources("w", holder, FlatRange("w", shape, start, stop, offset, order), Share.SHARDED)
    seen = torch.zeros(shape, dtype=torch.int64)
    for source in sources:
        part = tuple(slice(o, o + n) for o, n in zip(source.box.offsets, source.box.sizes, strict=True))
        assert torch.equal(source.tensor, logical[part])
        seen[part] += 1
        if source.tensor.numel():
            assert source.tensor.untyped_storage().data_ptr() == holder.untyped_storage().data_ptr(), "in place"
    assert torch.equal(seen, ((logical >= start) & (logical < stop)).long())
    assert len(sources) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("cuts", [(0, TOTAL), (0, 7, TOTAL), (0, 1, 13, 14, TOTAL), (0, 12, 15, 21, TOTAL)])
def test_parts_are_a_whole_model_and_back(cuts: tuple[int, ...]) -> None:
    """A model -> flat parts of several ranks -> a model, optimizer state too; nothing of the flat layout remains."""
    source = plain()
    stored = Memory.of(AppState(source))
    boxes, infos, objects = {}, {}, {}
    for start, stop in itertools.pairwise(cuts):
        state, parameter = flat(start, stop, stop - start + 3)
        app = AppState(state)
        assert app.missing(stored.infos, stored.objects) == []
        assert app.unexpected([*stored.infos, *stored.objects]) == []
        stored.restore(app)
        assert state["optimizer"].param_groups[0]["lr"] == 0.1
        assert state["optimizer"].state[parameter]["exp_avg"].shape == parameter.shape
        assert parameter[-3:].tolist() == [9.0] * 3, "padding is nobody's"
        again = Memory.of(app)
        boxes |= again.boxes
        infos |= again.infos
        objects = again.objects
    assert infos == stored.infos
    assert objects.keys() == stored.objects.keys()
    target = plain(0)
    Memory(boxes, infos, objects).restore(AppState(target))
    found = Memory.of(AppState(target))
    assert found.boxes.keys() == stored.boxes.keys()
    assert all(same_bits(found.boxes[place], tensor) for place, tensor in stored.boxes.items())


def test_changes_are_seen() -> None:
    state, parameter = flat(0, TOTAL)
    app = AppState(state)
    sources = {source.key: source for source in app.sources()}
    assert app.unchanged()
    assert sources["model/1.weight"].windowed
    assert sources["model/1.weight"].share is Share.SHARDED
    parameter.data = parameter.data.clone()
    assert not app.unchanged()
    parameter.grad = torch.ones_like(parameter)
    app.sources()
    state["optimizer"].step()
    assert not app.unchanged()
    assert "optimizer/state/1.weight/exp_avg" in {source.key for source in app.sources()}
    assert app.unchanged()


def test_shards_of_a_modules_memory() -> None:
    """`values=False`: the module stores the elements, the declaration lays out the optimizer's state."""
    model = net()
    buffer = torch.zeros(TOTAL)
    for (name, shape), held in zip(SHAPES.items(), flat_ranges(SHAPES.items(), 0, TOTAL), strict=True):
        model.get_parameter(name).data = buffer[held.offset : held.offset + held.stop].view(shape)
    shard = nn.Parameter(buffer[:13])
    state = {
        "model": model,
        "optimizer": torch.optim.AdamW([shard], lr=0.1),
        "shards": FlatShards([(shard, flat_ranges(SHAPES.items(), 0, 13))], values=False),
    }
    shard.grad = torch.ones_like(shard)
    state["optimizer"].step()
    keys = [source.key for source in AppState(state).sources()]
    assert [key for key in keys if not key.startswith("optimizer")] == [f"model/{name}" for name in SHAPES]
    stored = Memory.of(AppState(plain()))
    stored.restore(AppState(state))
    assert same_bits(
        state["optimizer"].state[shard]["exp_avg"][:12].view(3, 4), stored.full("optimizer/state/0.weight/exp_avg")
    )


def test_a_declared_parameter_of_a_module_is_stored_as_declared() -> None:
    holder = nn.Module()
    holder.everything = nn.Parameter(torch.arange(3.0))
    state = {"model": holder, "flat": FlatShards([(holder.everything, [FlatRange("w", (2,), 0, 2, 1)])])}
    (source,) = AppState(state).sources()
    assert source.key == "flat/w"
    assert source.tensor.tolist() == [1.0, 2.0]


def test_tied_names() -> None:
    """A second name is one for optimizer state too, for whoever knows the tensor by that name alone."""
    parameter = nn.Parameter(torch.ones(4))
    shards = FlatShards([(parameter, [FlatRange("embed", (2, 2), 0, 4, 0)])], tied={"head": "embed"})
    state = {"model": shards, "optimizer": torch.optim.SGD([parameter], momentum=0.9)}
    parameter.grad = torch.ones(4)
    state["optimizer"].step()
    app = AppState(state)
    app.sources()
    assert app.aliases() == {
        "model/head": "model/embed",
        "optimizer/state/head/momentum_buffer": "optimizer/state/embed/momentum_buffer",
    }
    other = nn.ParameterDict({"head": nn.Parameter(torch.zeros(2, 2))})
    target = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), momentum=0.5)}
    memory = Memory.of(app)
    for alias, key in app.aliases().items():
        memory.infos[alias] = type(memory.infos[key])(alias, *memory.infos[key][1:])
        memory.boxes |= {(alias, box): tensor for (name, box), tensor in memory.boxes.items() if name == key}
    memory.restore(AppState(target))
    assert other["head"].tolist() == parameter.view(2, 2).tolist()
    assert target["optimizer"].state[other["head"]]["momentum_buffer"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    back, known = flat(0, TOTAL)[0], nn.Parameter(torch.zeros(4))
    back["model"] = FlatShards([(known, [FlatRange("embed", (2, 2), 0, 4, 0)])], tied={"head": "embed"})
    back["optimizer"] = torch.optim.SGD([known], momentum=0.5)
    only_head = Memory.of(AppState(target))
    again = AppState(back)
    assert again.missing(only_head.infos, only_head.objects) == []
    assert again.unexpected(only_head.infos) == []
    only_head.restore(again)
    assert known.tolist() == parameter.tolist()
    assert back["optimizer"].state[known]["momentum_buffer"].tolist() == [1.0] * 4, "found under its second name"


def test_state_of_some_of_its_tensors_is_refused() -> None:
    """A model one of whose parameters never had a gradient has no state for it; one flat tensor cannot say that."""
    source = plain(0)
    for parameter in list(source["model"].parameters())[1:]:
        parameter.grad = torch.ones_like(parameter)
    source["optimizer"].step()
    stored = Memory.of(AppState(source))
    state, _ = flat(0, TOTAL)
    with pytest.raises(MismatchError, match=r"0\.weight/exp_avg: nothing in the checkpoint, \[3, 4\] here, .*0\.bias"):
        AppState(state).targets(stored.infos, stored.objects)
    without, parameter = flat(13, TOTAL)
    stored.restore(AppState(without))
    assert without["optimizer"].state[parameter]["step"] == 1


def test_two_steps_of_one_flat_tensor_are_refused() -> None:
    source = plain()
    source["optimizer"].state[source["model"][1].bias]["step"].fill_(5.0)
    stored = Memory.of(AppState(source))
    state, _ = flat(0, TOTAL)
    with pytest.raises(
        MismatchError, match=r"0\.weight/step: one flat parameter .* \[2\.0, 5\.0\].*use_orig_params=True"
    ):
        stored.restore(AppState(state))


def test_state_of_another_shape_is_refused() -> None:
    state, parameter = flat(0, TOTAL)
    state["optimizer"].state[parameter]["rows"] = torch.zeros(3)
    with pytest.raises(
        ConfigError, match=r"optimizer: 'rows' of the flat parameter of 0\.weight, .*\(3,\), which is neither"
    ):
        AppState(state).sources()
    state["optimizer"].state[parameter] = {"history": [torch.zeros(3)]}
    with pytest.raises(ConfigError, match="tensors inside other values"):
        AppState(state).sources()


def test_numbers_beside_tensors() -> None:
    """What is no tensor is stored under each name, and must be the same under all to be loaded."""
    state, parameter = flat(0, TOTAL)
    state["optimizer"].state[parameter]["count"] = 4
    stored = Memory.of(AppState(state))
    assert {f"optimizer/state/{name}" for name in SHAPES} <= stored.objects.keys()
    fresh, other = flat(0, TOTAL)
    stored.restore(AppState(fresh))
    assert fresh["optimizer"].state[other]["count"] == 4
    state["optimizer"].state[parameter]["count"] = 5
    stored.objects["optimizer/state/1.bias"] = Memory.of(AppState(state)).objects["optimizer/state/1.bias"]
    with pytest.raises(MismatchError, match=r"optimizer/state/0\.weight: one flat parameter"):
        stored.restore(AppState(fresh))


def test_ranges_of_a_run() -> None:
    """Padding has no name; tensors outside the run are named with nothing of them."""
    layout = [("a", (2, 2)), (None, (4,)), ("b", (3,)), ("c", ()), ("d", (0, 3))]
    assert ckptd.flat_ranges(layout, 3, 10) == [
        FlatRange("a", (2, 2), 3, 4, 0),
        FlatRange("b", (3,), 0, 2, 5),
        FlatRange("c", (), 0, 0, 0),
        FlatRange("d", (0, 3), 0, 0, 0),
    ]


WRONG: dict[str, tuple[Any, list[FlatRange], str]] = {
    "two dimensions": (
        torch.zeros(2, 2),
        [],
        r"tensor 0: expected a plain tensor of one dimension, found shape \(2, 2\)",
    ),
    "no tensor": ([1.0], [], "found <class 'list'>"),
    "no name": (torch.zeros(2), [FlatRange("", (2,), 0, 2, 0)], "name ''"),
    "outside its tensor": (torch.zeros(9), [FlatRange("w", (2, 2), 1, 5, 0)], r"range \[1, 5\) of w, which has 4"),
    "backwards": (torch.zeros(9), [FlatRange("w", (4,), 3, 2, 0)], r"range \[3, 2\)"),
    "beyond the flat one": (torch.zeros(3), [FlatRange("w", (4,), 0, 4, 0)], "w ends at element 4 of 3"),
    "before it": (torch.zeros(3), [FlatRange("w", (2,), 0, 2, -1)], "w ends at element 1 of 3"),
    "on each other": (
        torch.zeros(4),
        [FlatRange("v", (2,), 0, 2, 0), FlatRange("w", (2,), 0, 2, 1)],
        "v and w lie on the same elements",
    ),
    "twice": (
        torch.zeros(4),
        [FlatRange("w", (3,), 0, 2, 0), FlatRange("w", (3,), 1, 3, 2)],
        "element 1 of w is in two ranges",
    ),
    "two shapes": (
        torch.zeros(4),
        [FlatRange("w", (4,), 0, 2, 0), FlatRange("w", (2, 2), 2, 4, 2)],
        "w has shape",
    ),
    "order": (torch.zeros(4), [FlatRange("w", (2, 2), 0, 4, 0, (0, 0))], r"order \(0, 0\) of w"),
}


@pytest.mark.parametrize("case", WRONG)
def test_declarations_that_cannot_be(case: str) -> None:
    tensor, ranges, says = WRONG[case]
    with pytest.raises(ConfigError, match=says):
        FlatShards([(tensor, ranges)])


def test_ties_that_cannot_be() -> None:
    shards = [(torch.zeros(4), [FlatRange("v", (2,), 0, 2, 0), FlatRange("w", (2,), 0, 2, 2)])]
    for tied in ({"v": "w"}, {"x": "y"}):
        with pytest.raises(ConfigError, match="tied"):
            FlatShards(shards, tied=tied)
