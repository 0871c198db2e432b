"""A checkpoint in the memory of one rank: what stands in for capture and loading in the tests of the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from ckptd.core.box import Box
from ckptd.core.catalog import TensorInfo
from ckptd.tensors.values import torch_dtype
from ckptd.trainer.state import AppState


@dataclasses.dataclass
class Memory:
    """Copies of one rank's sources, and its objects."""

    boxes: dict[tuple[str, Box], torch.Tensor]
    infos: dict[str, TensorInfo]
    objects: dict[str, bytes]

    @classmethod
    def of(cls, app: AppState) -> Memory:
        sources = app.sources()
        return cls(
            {(s.key, s.box): s.tensor.clone() for s in sources},
            {s.key: TensorInfo(s.key, s.dtype, s.shape) for s in sources},
            app.objects(),
        )

    def full(self, key: str) -> torch.Tensor:
        """A logical tensor from the boxes held here."""
        info = self.infos[key]
        whole = torch.zeros(info.shape, dtype=torch_dtype(info.dtype))
        for (name, box), tensor in self.boxes.items():
            if name == key:
                whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] = tensor
        return whole

    def restore(self, app: AppState, *, rng: bool = True) -> None:
        """Fills the targets and finishes; a target is a box of the logical tensor, whatever box was stored."""
        for target in app.targets(self.infos, self.objects):
            assert (target.dtype, target.shape) == self.infos[target.key][1:], target.key
            part = tuple(slice(o, o + n) for o, n in zip(target.box.offsets, target.box.sizes, strict=True))
            with torch.no_grad():
                target.tensor.copy_(self.full(target.key)[part])
        app.finish(self.objects, rng=rng)


def same_state(left: AppState, right: AppState) -> None:
    """Asserts that two states are equal to the bit: keys, dtypes, values, objects."""
    ours, theirs = Memory.of(left), Memory.of(right)
    assert ours.infos == theirs.infos
    assert ours.objects.keys() == theirs.objects.keys()
    for path, data in ours.objects.items():
        assert data == theirs.objects[path], path
    for place, tensor in ours.boxes.items():
        assert same_bits(tensor, theirs.boxes[place]), place


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality that tells NaNs and signed zeros apart."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*flat)


Build = Callable[[], MutableMapping[str, Any]]
Step = Callable[[MutableMapping[str, Any]], None]


def resumes_exactly(build: Build, step: Step, before: int = 3, after: int = 3) -> tuple[AppState, Memory]:
    """Trains, stores, trains on; restores into fresh objects built from another seed, trains those on: equal bits.

    Gives the restored state and what was stored.
    """
    torch.manual_seed(1)
    state = build()
    app = AppState(state)
    for _ in range(before):
        step(state)
    memory = Memory.of(app)
    for _ in range(after):
        step(state)
    torch.manual_seed(2)
    fresh = build()
    restored = AppState(fresh)
    assert restored.missing(memory.infos, memory.objects) == []
    assert restored.unexpected([*memory.infos, *memory.objects]) == []
    memory.restore(restored)
    assert Memory.of(restored).objects == memory.objects
    for _ in range(after):
        step(fresh)
    del app
    generators = AppState(state), restored
    same_tensors(*generators)
    return restored, memory


def same_tensors(left: AppState, right: AppState) -> None:
    """As `same_state`, for all but the global generators, which only one of two runs can own."""
    ours, theirs = Memory.of(left), Memory.of(right)
    assert ours.infos == theirs.infos
    for place, tensor in ours.boxes.items():
        assert same_bits(tensor, theirs.boxes[place]), place
    ours_objects = {p: v for p, v in ours.objects.items() if not p.startswith("rng/")}
    assert ours_objects == {p: v for p, v in theirs.objects.items() if not p.startswith("rng/")}
