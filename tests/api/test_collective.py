"""Exchanges between two real ranks, and the rule that all fail alike."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ckptd.core.errors import ConfigError, CorruptionError, StoreError
from ckptd.trainer import collective
from tests.api.world import World, succeeded


def exchange() -> tuple[list[list[bytes]], list[bytes], bool]:
    group = collective.world()
    mine = bytes([group.rank + 1]) * (3 if group.rank else 70_000)
    gathered = [group.all_gather(data) for data in (mine, b"", b"x" * group.rank)]
    sent = [group.broadcast(data if group.rank == 0 else None) for data in (b"hello", b"")]
    group.barrier()
    return gathered, sent, collective.world() is group


def fail_on(rank: int, error: Exception) -> list[bytes]:
    group = collective.world()

    def work() -> bytes:
        if group.rank == rank:
            raise error
        return b"done"

    return group.together(work)


def test_bytes_of_any_length(two_ranks: World) -> None:
    for gathered, sent, kept in succeeded(two_ranks.run(exchange)):
        assert gathered == [[b"\1" * 70_000, b"\2" * 3], [b"", b""], [b"", b"x"]]
        assert sent == [b"hello", b""]
        assert kept, "one group per process and world"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failure_is_everybodys(two_ranks: World, rank: int) -> None:
    for error in (CorruptionError("chunk 7 changed"), OSError(28, "No space left on device")):
        answers = two_ranks.run(fail_on, rank, error)
        kind = CorruptionError if isinstance(error, CorruptionError) else StoreError
        assert [type(answer) for answer in answers] == [kind, kind]
        assert all(str(error) in str(answer) for answer in answers)
        assert f"rank {rank}: " in str(answers[1 - rank])
    assert succeeded(two_ranks.run(fail_on, 2, OSError())) == [[b"done"] * 2] * 2, "the group still works"


def test_an_error_that_is_not_ours_keeps_its_type_where_it_happened(two_ranks: World) -> None:
    answers = two_ranks.run(fail_on, 0, ZeroDivisionError("by zero"))
    assert [type(answer) for answer in answers] == [ZeroDivisionError, ConfigError]
    assert "rank 0: ZeroDivisionError: by zero" in str(answers[1])


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group = collective.world()
    assert (group.rank, group.size) == (0, 1)
    assert group.all_gather(b"x") == [b"x"]
    assert group.broadcast(b"x") == b"x"
    assert group.together(lambda: b"y") == [b"y"]
    with pytest.raises(StoreError, match="No space"):
        group.together(lambda: _raise(OSError(28, "No space left on device")))
    with pytest.raises(KeyError):
        group.together(lambda: _raise(KeyError("x")))


def _raise(error: Exception) -> bytes:
    raise error


def test_other_ranks_without_a_process_group_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="init_process_group"):
        collective.world()
