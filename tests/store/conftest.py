"""Stores of every kind, for the contracts that all of them keep."""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow.fs
import pytest

from ckptd.tiers.store import Store
from ckptd.tiers.store.backend import BackEnd
from ckptd.tiers.store.files import FileBackEnd
from ckptd.tiers.store.filesystems import ObjectSystem
from ckptd.tiers.store.object_store import ObjectBackEnd
from tests.simulated_disk import SimulatedDisk

KINDS = ["posix", "simulated", "objects in a directory", "flat", "fsspec", "s3"]


@pytest.fixture(params=KINDS)
def every_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "simulated":
        return Store(FileBackEnd(SimulatedDisk()), "simulated")
    if request.param == "flat":
        system = ObjectSystem(pyarrow.fs.LocalFileSystem(), str(tmp_path), flat=True)
        return Store(ObjectBackEnd(system, "flat"), "flat")
    if request.param == "s3":
        uri = request.getfixturevalue("s3").uri()
    elif request.param == "fsspec":
        uri = f"memory://{uuid.uuid4().hex}/store"
    else:
        uri = f"{'file' if request.param == 'posix' else 'file+object'}://{tmp_path}/store"
    return Store.open(uri, create=True)


@pytest.fixture
def back_end(every_store: Store) -> BackEnd:
    """Its back end."""
    return every_store.back_end
