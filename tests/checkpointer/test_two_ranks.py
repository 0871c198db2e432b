"""What two ranks of a job hear and do together: the same errors, the same snapshots, each its own part of the state."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckptd
from ckptd.core.types import Level
from ckptd.daemon.client import Control
from tests.checkpointer.child import Child, await_parent, report
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, until


def pair(home: Home, function: Callable[..., Any], *arguments: Any, **different: Sequence[str]) -> list[Child]:
    """The two ranks of a job, each running `function(*arguments)`; `different` are variables of their environments."""
    rendezvous = home.folder / f"rendezvous-{time.monotonic_ns()}"
    children = []
    for rank in (0, 1):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        own = {name: values[rank] for name, values in different.items()}
        environment = {**home.environment, **place, **own}
        children.append(Child(environment, home.folder / f"log-{rank}", _rank, str(rendezvous), function, arguments))
    return children


def _rank(rendezvous: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def values(children: Sequence[Child]) -> list[Any]:
    """What both returned; neither was killed."""
    ended = [child.end() for child in children]
    assert [end.status for end in ended] == [0, 0], [end.stderr for end in ended]
    return [end.value for end in ended]


def rank() -> int:
    return dist.get_rank()


def refusal(state: dict[str, Any], store: str, **options: Any) -> tuple[str, str]:
    """The error that a training is refused with."""
    try:
        with ckptd.Checkpointer(state, store, **options) as checkpointer:
            for step in checkpointer.steps(3):
                if step > 1:
                    checkpointer.snapshot()
    except ckptd.CkptdError as error:
        return type(error).__name__, str(error)
    return "", ""


def is_untouched(home: Home) -> bool:
    return not home.processes() and not home.runtime.exists() and not Path(home.store()).exists()


def test_several_nodes(home: Home) -> None:
    """Nodes that would be served by one daemon, and nodes of one name, are refused on every rank."""
    found = values(pair(home, on_nodes, home.store(), CKPTD_NODE=["alpha", "beta"]))
    assert found[0] == found[1]
    assert found[0][0] == "ConfigError"
    assert "'alpha' and 'beta' have one runtime directory" in found[0][1]
    assert is_untouched(home)
    found = values(pair(home, on_nodes, home.store(), LOCAL_WORLD_SIZE=["1", "1"], LOCAL_RANK=["0", "0"]))
    assert found[0] == found[1]
    assert "several nodes are called" in found[0][1]
    assert is_untouched(home)


def on_nodes(store: str) -> tuple[str, str]:
    return refusal(Training().state, store)


def test_what_is_wrong_on_one_rank_is_said_on_both(home: Home) -> None:
    """A state that cannot be stored, on rank 1 alone."""
    found = values(pair(home, with_a_bad_part, home.store()))
    assert [name for name, _ in found] == ["ConfigError", "ConfigError"]
    assert all("notes/handle" in message for _, message in found)
    assert "rank 1" in found[0][1]
    assert is_untouched(home)


def with_a_bad_part(store: str) -> tuple[str, str]:
    class Notes:
        def state_dict(self) -> dict[str, Any]:
            return {"handle": object() if rank() == 1 else 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    return refusal(Training(notes=Notes()).state, store)


def test_a_difference_on_one_rank_is_said_on_both(home: Home) -> None:
    assert values(pair(home, one_step, home.store())) == [1, 1]
    found = values(pair(home, with_a_difference, home.store()))
    assert found[0] == found[1]
    assert found[0][0] == "MismatchError"
    assert "average: shape [3] in the checkpoint, [4] here" in found[0][1]
    home.stop()
    assert home.checkpoints() == [1]


def one_step(store: str) -> int:
    training = Training(average=torch.zeros(3))
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        for _ in checkpointer.steps(1):
            training.step()
        return checkpointer.flush()


def with_a_difference(store: str) -> tuple[str, str]:
    return refusal(Training(average=torch.zeros(3 + rank())).state, store)


def test_replicas_that_have_other_shapes(home: Home) -> None:
    """The ranks built different models: named on both, at the first step."""
    found = values(pair(home, with_other_shapes, home.store()))
    assert [name for name, _ in found] == ["ConfigError", "ConfigError"]
    assert all("average" in message for _, message in found)
    home.stop()
    assert home.checkpoints() == []


def with_other_shapes(store: str) -> tuple[str, str]:
    training = Training(average=torch.zeros(3 + rank()))
    try:
        with ckptd.Checkpointer(training.state, store) as checkpointer:
            for step in checkpointer.steps(3):
                if step > 1:
                    checkpointer.snapshot()
                training.step()
    except ckptd.CkptdError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_snapshots_are_taken_together(home: Home) -> None:
    """Every rank asks, every rank gets the same answer, and each finds its own buffers and data again."""
    found = values(pair(home, together, home.store()))
    assert found[0]["answers"] == found[1]["answers"] == [None, 2, 4, "durable", "sealed", 6]
    assert home.checkpoints() == [4, 5, 6, 8]
    again = values(pair(home, restored, home.store()))
    assert [value["step"] for value in again] == [8, 8]
    for before, after in zip(found, again, strict=True):
        assert after["buffer"] == before["buffer"]
        assert after["text"] == before["text"]
        assert after["random"] == before["random"]
        assert after["average"] == found[0]["average"]
    assert again[0]["buffer"] != again[1]["buffer"]
    assert again[0]["random"] != again[1]["random"]
    assert again[0]["text"] != again[1]["text"]


def parts() -> Training:
    training = Training(average=torch.zeros(3), notes={"text": ""})
    training.model.register_buffer("own", torch.zeros(2))
    return training


def picture(training: Training) -> dict[str, Any]:
    return {
        "buffer": training.model.own.tolist(),
        "average": training.state["average"].tolist(),
        "text": training.state["notes"]["text"],
        "random": torch.rand(2).tolist(),
    }


def together(store: str) -> dict[str, Any]:
    training, answers = parts(), []
    torch.manual_seed(rank())
    with ckptd.Checkpointer(training.state, store, snapshot_every=10**6, flush_every=None, keep=None) as checkpointer:
        for step in checkpointer.steps(8):
            if step in (1, 3):
                answers.append(checkpointer.snapshot())
            if step == 5:
                answers += [checkpointer.flush(), str(checkpointer.wait())]
            if step == 6:
                answers.append(str(checkpointer.wait("sealed")))
                assert checkpointer.wait(timeout_s=60) is Level.DURABLE
            if step == 7:
                answers.append(checkpointer.flush())
            training.step()
            training.model.own += 1 + rank()
            training.state["average"] += 1
            training.state["notes"]["text"] += f"rank {rank()}, "
    return {"answers": answers, **picture(training)}


def restored(store: str) -> dict[str, Any]:
    training = parts()
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        return {"step": checkpointer.restore(), **picture(training)}


def test_a_flush_that_fails_fails_on_both_and_works_on_both(home: Home) -> None:
    """What failed before does not make a rank fail when the store is there again."""
    assert values(pair(home, flush_broken_and_mended, home.store())) == [["StoreError", 2, 3]] * 2
    assert home.checkpoints() == [2, 3]


def flush_broken_and_mended(store: str) -> list[Any]:
    training, answers = Training(), []
    path = Path(store)
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps(3):
            if step == 3:
                dist.barrier()
                if rank() == 0:
                    path.rename(path.with_name("moved away"))
                    path.write_text("not a directory")
                dist.barrier()
                try:
                    checkpointer.flush()
                except ckptd.StoreError as error:
                    answers.append(type(error).__name__)
                dist.barrier()
                if rank() == 0:
                    path.unlink()
                    path.with_name("moved away").rename(path)
                dist.barrier()
                answers.append(checkpointer.flush())
            training.step()
        answers.append(checkpointer.flush())
    return answers


def test_sigterm_to_all_ranks(home: Home) -> None:
    """As torchrun and Slurm do it: all get it, the newest sealed snapshot is durable, all die of it."""
    ranks = pair(home, until_terminated, home.store())
    assert [child.receive() for child in ranks] == ["sealed", "sealed"]
    for child in ranks:
        os.kill(child.pid, signal.SIGTERM)
    assert [child.end().status for child in ranks] == [-signal.SIGTERM] * 2
    assert home.checkpoints()[-1] >= 2
    home.stop()


def until_terminated(store: str) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps():
            if step == 3:
                checkpointer.snapshot()
                report("sealed")
            training.step()
            time.sleep(0.002)


def test_a_rank_that_fails_leaves_what_was_sealed(home: Home) -> None:
    """One raises, the other is terminated as torchrun would: the daemon flushes, and both go on from memory."""
    ranks = pair(home, fail_on_rank_1, home.store())
    assert [child.receive() for child in ranks] == ["sealed", "sealed"]
    ranks[1].send("fail")
    assert ranks[1].end().value == "failed"
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert ranks[0].end().status == -signal.SIGTERM
    until(lambda: home.checkpoints() == [2])
    found = values(pair(home, source_of_restart, home.store()))
    assert found == [(2, "memory")] * 2


def fail_on_rank_1(store: str) -> str:
    training = Training()
    try:
        with ckptd.Checkpointer(training.state, store, snapshot_every=10**6, flush_every=None) as checkpointer:
            for step in checkpointer.steps():
                if step == 3:
                    checkpointer.snapshot()
                    report("sealed")
                    if rank() == 1:
                        await_parent()
                        raise RuntimeError("out of memory")
                training.step()
                time.sleep(0.002)
    except RuntimeError:
        return "failed"
    return ""


def source_of_restart(store: str) -> tuple[int, str]:
    training = Training()
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        step = checkpointer.restore()
    return step, checkpointer.statistics()["restored"]["source"]


def test_a_layout_that_changes_on_one_rank(home: Home) -> None:
    """Rank 1's data outgrows its slot: both get new slots, and the next snapshot is whole."""
    assert values(pair(home, grow_on_rank_1, home.store())) == [4, 4]
    assert home.checkpoints() == [4]
    assert values(pair(home, lengths, home.store())) == [3, 1_000_003]


def grow_on_rank_1(store: str) -> int | None:
    training = Training(notes={"text": "abc"})
    step: int | None = None
    with ckptd.Checkpointer(training.state, store, snapshot_every=10**6) as checkpointer:
        for number in checkpointer.steps(4):
            if number == 3:
                checkpointer.snapshot()
                training.state["notes"]["text"] += "d" * 1_000_000 * rank()
            training.step()
        step = checkpointer.snapshot()
    return step


def lengths(store: str) -> int:
    training = Training(notes={"text": ""})
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        checkpointer.restore()
    return len(training.state["notes"]["text"])


def test_what_is_taken_for_a_replica_and_is_none(home: Home) -> None:
    """Weights that drift apart are seen at the first snapshot; from then on each rank's are kept, whatever the layout,
    and come back."""
    found = values(pair(home, drifts_apart, home.store()))
    trained = [weights for weights, _ in found]
    assert trained[0] != trained[1]
    assert [times for _, times in found] == [1, 1]
    assert values(pair(home, comes_back, home.store())) == trained
    stored = ckptd.open(home.store())
    stored.verify()
    assert stored.read("model/weight").tolist() == trained[0]


def drifts_apart(store: str) -> Any:
    training = Training(steady=torch.ones(3))
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        for step in checkpointer.steps(6):
            if step > 2:
                checkpointer.snapshot()
            if step == 4:
                training.state["late"] = torch.zeros(3)
            training.step()
            with torch.no_grad():
                training.model.weight += rank()
        control = Control.connect()
        times = control.status()["counters"]["replicas_differ"]
        control.close()
    return training.weights, times


def comes_back(store: str) -> Any:
    training = Training(steady=torch.zeros(3), late=torch.ones(3))
    with ckptd.Checkpointer(training.state, store) as checkpointer:
        assert checkpointer.restore() == 6
        return training.weights


def test_another_number_of_ranks_goes_on_from_memory(home: Home) -> None:
    """One process takes what two ranks left in memory, and two take what one left."""
    first = [child.end() for child in pair(home, goes_on, home.store(), 3)]
    second = Child(home.environment, home.folder / "log", goes_on, home.store(), 5).end()
    third = [child.end() for child in pair(home, goes_on, home.store(), 7)]
    assert [end.value for end in first] == [(0, seeded(0))] * 2
    assert second.value == (3, seeded(3)), second.stderr
    assert "from memory" in second.stderr
    assert [end.value for end in third] == [(5, seeded(5))] * 2
    assert "from memory" in third[0].stderr
    home.stop()


def goes_on(store: str, at: int) -> Any:
    """What was restored. Captures step `at`, then ends with an error, so that the daemon stays."""
    training, found = Training(), None
    try:
        with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
            found = checkpointer.restore(), training.weights
            for step in checkpointer.steps(at + 1):
                if step == at + 1:
                    checkpointer.snapshot()
                    raise ArithmeticError
                torch.manual_seed(step)
                training.step()
    except ArithmeticError:
        pass
    return found


def seeded(steps: int) -> list[list[float]]:
    """The weights after so many steps of a training whose inputs depend on the step alone."""
    training = Training()
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        training.step()
    return training.weights
