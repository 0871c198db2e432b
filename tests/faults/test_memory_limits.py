"""Too little memory is an error with numbers when a layout is planned, never a kill: the limit that the user gave, the
machine's, and that of a memory cgroup, which would kill instead of refusing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.core.errors import ConfigError
from ckptd.tiers import memory
from tests.faults.lab import Lab, until

MIB = 1024 * 1024
CGROUP = Path("/sys/fs/cgroup")


def limits(text: str) -> bool:
    """Whether an error names what is needed and what there is."""
    return "ConfigError" in text and "snapshot memory" in text and "available" in text


def test_given_limit(storeless: Lab, expected: Callable[..., str]) -> None:
    """`memory=` is kept: too little is refused before a byte is allocated; with just enough, all slots fit into it."""
    run = storeless.start("--ballast", str(4 * MIB), memory=8 * MIB, linger_s=2.0)
    assert run.ends() == [1]
    assert limits(run.said()), run.said()
    storeless.daemons_end()

    run = storeless.start("--ballast", str(4 * MIB), memory=9 * MIB)
    status = storeless.reaches(lambda s: s["newest"]["sealed"] is not None, "a sealed snapshot")
    assert 8 * MIB < status["memory_bytes"] <= 9 * MIB
    assert run.finishes()["hash"] == expected()
    storeless.daemons_end()


def test_fewer_slots_where_memory_is_short(lab: Lab, expected: Callable[..., str]) -> None:
    """With a store three slots are wanted; two must do where the limit allows no more, and that is shown."""
    run = lab.start("--ballast", str(4 * MIB), memory=10 * MIB)
    status = lab.reaches(lambda s: s["newest"]["sealed"] is not None, "a sealed snapshot")
    assert len(status["slots"]) == 2
    assert "2 slots a rank instead of 3" in status["last_error"]
    assert run.finishes()["hash"] == expected()
    lab.ends_clean()


def test_allocation_checks_before_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that others take meanwhile is noticed between two steps of one allocation."""
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4 * MIB)
    rooms = iter([3 * MIB, MIB // 2])
    monkeypatch.setattr(memory, "STEP_BYTES", MIB)
    monkeypatch.setattr(memory, "headroom", lambda: memory.Headroom(next(rooms), "a limit"))
    with pytest.raises(ConfigError, match=r"3145728 more bytes needed, 524288 available \(a limit\)"):
        memory.allocate(descriptor, 4 * MIB)
    assert os.fstat(descriptor).st_blocks * 512 <= MIB
    os.close(descriptor)


def _memory_cgroup() -> Path | None:
    """This process's memory cgroup, where groups can be made in it or at the root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = CGROUP / "memory" if "memory" in controllers.split(",") else CGROUP
        if "memory" in controllers.split(",") or (root / "memory.max").parent.joinpath("cgroup.controllers").exists():
            return root / path.lstrip("/")
    return None


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of 700 MiB for the job's processes."""
    parent = _memory_cgroup()
    if os.geteuid() != 0 or parent is None:
        pytest.skip("needs root and a memory controller")
    group = parent / f"ckptd-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = next(group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
        limit.write_text(str(700 * MIB))
    except (OSError, StopIteration):
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip("memory cgroups cannot be made here")
    yield group
    until(lambda: _removed(group), "the end of the group")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@pytest.mark.root
def test_cgroup_limit(small_group: Path, storeless: Lab, expected: Callable[..., str]) -> None:
    """The group would kill the trainer while it allocates; instead it ends with a ConfigError that names the limit.
    With a smaller state the same job runs in the same group."""
    storeless.group = small_group
    run = storeless.start("--ballast", str(200 * MIB), linger_s=2.0)
    assert run.ends() == [1], run.said()
    assert limits(run.said()), run.said()
    storeless.daemons_end()
    assert storeless.start().finishes()["hash"] == expected()
    storeless.daemons_end()
    storeless.close()
