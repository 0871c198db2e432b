"""torchdata's StatefulDataLoader, whose `state_dict` is not free of effects.

Without an iterator it makes one: that draws random numbers, starts workers, and changes what training draws later.
Such a loader is stored as unstarted, with the generator of its sampler. On the other side, an iterator that is made
after the generators were set back would advance them by its seed; so a restore makes it before, and `iter` gives it.
"""

from __future__ import annotations

from typing import Any

import torch

UNSTARTED = "unstarted"


def is_loader(value: Any) -> bool:
    """Whether it is a StatefulDataLoader, without importing torchdata."""
    return any(kind.__name__ == "StatefulDataLoader" for kind in type(value).__mro__) and hasattr(
        value, "next_iter_state"
    )


def is_unstarted_loader(value: Any) -> bool:
    """Whether it is a StatefulDataLoader that has no iterator."""
    return is_loader(value) and value._iterator is None


def unstarted_state(loader: Any) -> dict[str, Any]:
    """The state of such a loader: what it was given to start from, else that it has not started."""
    pending: dict[str, Any] | None = loader.next_iter_state
    if pending is not None:
        return pending
    generator = getattr(loader.sampler, "generator", None)
    return {UNSTARTED: generator.get_state() if isinstance(generator, torch.Generator) else None}


def load_loader(loader: Any, state: dict[str, Any]) -> None:
    """Gives a StatefulDataLoader its state, and makes the iterator of one that had started."""
    if set(state) == {UNSTARTED}:
        loader.load_state_dict({})
        if state[UNSTARTED] is not None:
            loader.sampler.generator.set_state(state[UNSTARTED])
        return
    loader.load_state_dict(state)
    if is_unstarted_loader(loader):
        loader.state_dict()
