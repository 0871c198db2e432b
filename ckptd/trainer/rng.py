"""Random number generators as objects: exact, compact, and set back to the same bit.

Owns the global generators of Python, NumPy (the legacy one), torch and each CUDA device, and the encodings of
generators that users put into the mapping. Reading a generator never advances it. Includes what the generators keep
beside their words: the second number of Python's and NumPy's Gaussian pairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckptd.core.errors import ConfigError, MismatchError
from ckptd.trainer.state_values import decode, encode

PREFIX = "rng"
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
"""Types of generators that may stand in the mapping of the state."""


def objects() -> dict[str, bytes]:
    """The states of all global generators of this process, encoded, by path."""
    made: dict[str, Any] = {
        "python": _of_python(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": _of_torch(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            made[f"cuda/{device}"] = _of_torch(torch.cuda.get_rng_state(device))
    return {f"{PREFIX}/{name}": encode(value, f"{PREFIX}/{name}") for name, value in made.items()}


def restore(objects: Mapping[str, bytes]) -> None:
    """Sets back every global generator that `objects` has a state of; those of devices not here are passed over."""
    states = {
        path.removeprefix(f"{PREFIX}/"): decode(data) for path, data in objects.items() if path.startswith(f"{PREFIX}/")
    }
    if "python" in states:
        random.setstate(_to_python(states["python"]))
    if "numpy" in states:
        np.random.set_state(states["numpy"])
    if "torch" in states:
        torch.set_rng_state(_to_torch(states["torch"]))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in range(devices):
        if f"cuda/{device}" in states:
            torch.cuda.set_rng_state(_to_torch(states[f"cuda/{device}"]), device)


def state_of(generator: Any) -> dict[str, Any]:
    """The state of a generator of the mapping, as plain data with its kind."""
    if isinstance(generator, torch.Generator):
        return {"kind": f"torch {generator.device.type}", "state": _of_torch(generator.get_state())}
    if isinstance(generator, random.Random):
        return {"kind": "python", "state": _of_python(generator.getstate())}
    if isinstance(generator, np.random.RandomState):
        return {"kind": "numpy legacy", "state": generator.get_state(legacy=False)}
    return {"kind": "numpy", "state": generator.bit_generator.state}


def set_state(generator: Any, state: Any, path: str) -> None:
    """Sets back a generator of the mapping; MismatchError, naming `path`, if the state is of another kind."""
    found = state.get("kind") if isinstance(state, dict) else None
    expected = state_of(generator)["kind"]
    if found != expected:
        raise MismatchError(f"{path}: expected the state of a {expected} generator, found {found}")
    value = state["state"]
    if isinstance(generator, torch.Generator):
        generator.set_state(_to_torch(value))
    elif isinstance(generator, random.Random):
        generator.setstate(_to_python(value))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(value)
    else:
        generator.bit_generator.state = value


def _of_python(state: tuple[Any, ...]) -> dict[str, Any]:
    """Python's Mersenne Twister: 624 words and a position, as bytes; and the cached Gaussian number."""
    version, words, gauss = state
    if version != 3:
        raise ConfigError(f"rng/python: expected state version 3, found {version}; this Python is not known")
    return {"version": version, "words": np.asarray(words, "<u4").tobytes(), "gauss": gauss}


def _to_python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return state["version"], tuple(np.frombuffer(state["words"], "<u4").tolist()), state["gauss"]


def _of_torch(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _to_torch(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
