"""Random number generators as objects: exact, compact, and set back to the same bit.

As many ranks as saved get back what each had. In another world there is nothing to get back: rank r of w gets
generators seeded from SHA-256 of (what rank 0 had, r, w, name of the generator), so that the same load gives the same
streams, no two ranks have one, and none goes on where a stream of the saved run stopped.

Owns the global generators of Python, NumPy (the legacy one), torch and each CUDA device, and the encodings of
generators that users put into the mapping. Reading a generator never advances it. Includes what the generators keep
beside their words: the second number of Python's and NumPy's Gaussian pairs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from ckptd.core.errors import ConfigError, MismatchError
from ckptd.plan.share import ANOTHER_WORLD, Newcomer
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
    newcomer = another_world(objects)
    if newcomer is not None:
        _seed_all(newcomer, objects)
        return
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


def another_world(objects: Mapping[str, bytes]) -> Newcomer | None:
    """Who this rank is, if `objects` are of a checkpoint that another number of ranks saved."""
    data = objects.get(ANOTHER_WORLD)
    return None if data is None else msgspec.msgpack.decode(data, type=Newcomer)


def seed_from(newcomer: Newcomer, name: str, *saved: bytes) -> bytes:
    """32 bytes of seed for the generator `name` of a rank of another world, from what was saved."""
    digest = hashlib.sha256(f"ckptd {newcomer.rank} {newcomer.world} {name}".encode())
    for data in saved:
        digest.update(hashlib.sha256(data).digest())
    return digest.digest()


def _seed_all(newcomer: Newcomer, objects: Mapping[str, bytes]) -> None:
    """Seeds every global generator anew, devices included, from all of rank 0's states."""
    own = sorted(path for path in objects if path.startswith(f"{PREFIX}/") and path != ANOTHER_WORLD)
    if not own:
        return
    saved = [objects[path] for path in own]
    random.seed(int.from_bytes(seed_from(newcomer, "python", *saved), "little"))
    np.random.seed(_words(seed_from(newcomer, "numpy", *saved)))
    torch.set_rng_state(torch.Generator().manual_seed(_integer(seed_from(newcomer, "torch", *saved))).get_state())
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_integer(seed_from(newcomer, f"cuda/{device}", *saved)))


def seed(generator: Any, data: bytes) -> None:
    """Seeds a generator of the mapping from 32 bytes."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(_integer(data))
    elif isinstance(generator, random.Random):
        generator.seed(int.from_bytes(data, "little"))
    elif isinstance(generator, np.random.RandomState):
        generator.seed(_words(data))
    else:
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(int.from_bytes(data, "little")).state


def _words(data: bytes) -> Any:
    return np.frombuffer(data, "<u4").astype(np.uint32)


def _integer(data: bytes) -> int:
    return int.from_bytes(data[:8], "little") >> 1


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
