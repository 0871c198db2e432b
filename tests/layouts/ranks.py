"""What each rank of a world does for the tests of this directory, by the name of a layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import ShardingStrategy

import ckptd
from tests.layouts import partitioned, sharded
from tests.layouts.applications import Application, one_process
from tests.layouts.model import expected, logical

STEP = 7

LAYOUTS: dict[str, tuple[int, Any]] = {
    "one": (1, one_process),
    "ddp-2": (2, sharded.ddp),
    "zero1-2": (2, sharded.zero1),
    "fsdp1-2": (2, functools.partial(sharded.fsdp1, True)),
    "fsdp1-flat-2": (2, functools.partial(sharded.fsdp1, False)),
    "fsdp2-2": (2, functools.partial(sharded.fsdp2, 2)),
    "tp-2": (2, sharded.tensor_parallel),
    "pp-2": (2, partitioned.pipeline),
    "ep-2": (2, functools.partial(partitioned.expert_parallel, 1)),
    "zero3-2": (2, partitioned.zero3),
    "distributed-optimizer-2": (2, partitioned.distributed_optimizer),
    "fsdp1-flat-4": (4, functools.partial(sharded.fsdp1, False)),
    "fsdp1-hybrid-4": (4, functools.partial(sharded.fsdp1, True, ShardingStrategy.HYBRID_SHARD)),
    "fsdp2-4": (4, functools.partial(sharded.fsdp2, 4)),
    "hsdp-4": (4, functools.partial(sharded.fsdp2, 2, 2)),
    "tp-4": (4, sharded.tensor_parallel),
    "tp-fsdp2-4": (4, sharded.tensor_parallel_and_fsdp2),
    "pp-4": (4, partitioned.pipeline),
    "ep-dp-4": (4, functools.partial(partitioned.expert_parallel, 2)),
    "zero3-4": (4, partitioned.zero3),
}
"""Name -> world size, and what builds it. Each of these loads what each of these has saved."""

VARIANTS: dict[str, tuple[int, Any]] = {
    "fsdp1-grad-op-2": (2, functools.partial(sharded.fsdp1, True, ShardingStrategy.SHARD_GRAD_OP)),
    "fsdp1-no-shard-2": (2, functools.partial(sharded.fsdp1, True, ShardingStrategy.NO_SHARD)),
    "fsdp1-flat-no-shard-2": (2, functools.partial(sharded.fsdp1, False, ShardingStrategy.NO_SHARD)),
    "pp-renamed-2": (2, functools.partial(partitioned.pipeline, renamed=True)),
    "fsdp1-4": (4, functools.partial(sharded.fsdp1, True)),
    "pp-dp-4": (4, functools.partial(partitioned.pipeline, 2)),
    "ep-4": (4, functools.partial(partitioned.expert_parallel, 1)),
    "zero1-4": (4, sharded.zero1),
    "distributed-optimizer-4": (4, partitioned.distributed_optimizer),
}
"""These load what one process has saved, and one process loads what they have saved."""

EVERY = {**LAYOUTS, **VARIANTS}

_reference: dict[str, tuple[dict[str, torch.Tensor], list[Any]]] = {}


@functools.cache
def built(name: str) -> Application:
    """The application of a layout, after a real step, which makes the optimizer's state."""
    torch.manual_seed(1)
    made: Application = EVERY[name][1]()
    made.step()
    return made


def save_the_first(path: Path) -> list[float]:
    """One process: its state becomes the logical one, without ckptd. Gives the losses of two steps from there."""
    app = built("one")
    with torch.no_grad():
        for name, parameter in app.model.named_parameters():
            parameter.copy_(logical("model", name, parameter.shape))
            for kind, value in app.state["optimizer"].state[parameter].items():
                value.copy_(logical(kind, name, parameter.shape))
        app.model.scale.copy_(logical("model", "scale", (3,)))
    app.state["counters"]["tokens"] = 1234
    ckptd.save(app.state, path, step=STEP)
    return [app.step(), app.step()]


def load_and_save(name: str, source: Path, path: Path) -> list[str]:
    """Loads the state of one process and looks at it through torch; saves it from this layout. Says what is wrong."""
    app = built(name)
    app.scramble()
    assert ckptd.load(app.state, source) == STEP
    problems = []
    found, wanted = app.gathered(), expected()
    tied = {key.replace("embed", "head"): value for key, value in wanted.items() if key.endswith("/embed.weight")}
    for key in sorted(found.keys() | wanted.keys()):
        if key not in wanted and key in tied:
            wanted[key] = tied[key]
        if key not in found or key not in wanted:
            problems.append(f"{key}: {'not gathered' if key not in found else 'not expected'}")
        elif not torch.equal(found[key].float(), wanted[key]):
            problems.append(f"{key}: {found[key]} instead of {wanted[key]}")
    if app.numbers()[0]["lr"] != 0.011 or app.numbers()[-1] != {"tokens": 1234}:
        problems.append(f"numbers: {app.numbers()}")
    _reference[name] = {key: tensor.clone() for key, tensor in app.local().items()}, app.numbers()
    if path != source:
        ckptd.save(app.state, path, step=STEP)
    return problems


def load_from(name: str, source: Path) -> list[str]:
    """Loads a checkpoint of some layout into this one. Says what is wrong."""
    app = built(name)
    tensors, numbers = _reference[name]
    app.scramble()
    ckptd.load(app.state, source)
    found = app.local()
    problems = [f"{key} differs" for key in tensors if key not in found or not torch.equal(found[key], tensors[key])]
    problems += [f"{key} is too much" for key in found.keys() - tensors.keys()]
    if app.numbers() != numbers:
        problems.append(f"{app.numbers()} instead of {numbers}")
    return problems


def load_all(name: str, sources: dict[str, Path], losses: list[float]) -> list[str]:
    """`load_from` every source, and two steps from the last. Says what is wrong, with the source's name in front."""
    problems = []
    for source, path in sources.items():
        try:
            found = load_from(name, path)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        problems += [f"{source} -> {name}: {problem}" for problem in found]
    app = built(name)
    stepped = [app.step(), app.step()]
    if any(abs(one - other) > 1e-4 * abs(other) for one, other in zip(stepped, losses, strict=True)):
        problems.append(f"{name}: losses {stepped} instead of {losses}")
    return problems


def resume(name: str, path: Path) -> bool:
    """Whether three steps after a load of what this layout has saved are those after the save, to the bit."""
    app = built(name)
    ckptd.save(app.state, path, step=STEP)
    losses, after = [app.step() for _ in range(3)], app.gathered()
    app.scramble()
    ckptd.load(app.state, path)
    assert [app.step() for _ in range(3)] == losses
    again = app.gathered()
    return again.keys() == after.keys() and all(torch.equal(again[key], value) for key, value in after.items())
