"""The loop: what counts as a step, where it goes on after a restart, and what may be restored."""

from __future__ import annotations

import pytest
import torch

import ckptd
from ckptd.daemon.client import Control, jobs
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, until, weights_after


def run(home: Home, stop: int, **options: object) -> tuple[list[int], Training]:
    """A clean run to `stop`; the steps that it did."""
    training = Training()
    done = []
    with ckptd.Checkpointer(training.state, home.store(), **options) as checkpointer:
        for step in checkpointer.steps(stop):
            training.step()
            done.append(step)
    return done, training


def interrupted(home: Home, steps: int, **options: object) -> None:
    """A run that fails in the body of the step after `steps`, whose snapshot is in memory."""

    def fail() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, **{"store": home.store(), **options}) as checkpointer:
            for step in checkpointer.steps(steps + 1):
                if step == steps + 1:
                    assert checkpointer.snapshot() == steps
                    raise RuntimeError("lost power")
                training.step()

    with pytest.raises(RuntimeError, match="lost power"):
        fail()


def test_steps_count_from_one_and_go_on_after_the_last(home: Home) -> None:
    """Nothing is done twice, nothing left out, and where the stop is reached there is nothing to do."""
    assert run(home, 3)[0] == [1, 2, 3]
    home.assert_nothing_left()
    done, training = run(home, 5)
    assert done == [4, 5]
    assert training.weights == weights_after(5)
    done, training = run(home, 5)
    assert done == []
    assert training.weights == weights_after(5)
    assert home.checkpoints() == [3, 5]


def test_steps_without_a_stop(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for step in checkpointer.steps():
            training.step()
            if step == 4:
                break
    assert home.checkpoints() == [4]


@pytest.mark.parametrize(("updated", "last"), [(True, 3), (False, 2)])
@pytest.mark.parametrize("way", ["break", "return"])
def test_leaving_the_body_early_counts_if_an_optimizer_stepped(home: Home, updated: bool, last: int, way: str) -> None:
    training = Training()

    def loop() -> None:
        with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
            for step in checkpointer.steps(10):
                training.forward()
                if step == 3 and not updated and way == "break":
                    break
                if step == 3 and not updated:
                    return
                training.update()
                if step == 3 and way == "break":
                    break
                if step == 3:
                    return

    loop()
    assert home.checkpoints() == [last]
    assert run(home, last)[1].weights == weights_after(last)


def test_a_second_loop_counts_the_body_that_the_first_left(home: Home) -> None:
    """Training in two phases: the first ends by `break` in step 2, after an update; the second begins with step 3."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for step in checkpointer.steps(10):
            training.step()
            if step == 2:
                break
        second = []
        for step in checkpointer.steps(4):
            training.step()
            second.append(step)
    assert second == [3, 4]
    assert training.weights == weights_after(4)
    assert run(home, 4)[1].weights == weights_after(4)


def test_a_loop_that_counts_itself(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 0
        for _ in range(2):
            training.step()
            last = checkpointer.step()
        assert last == 2
        training.step()
        assert checkpointer.step(3) == 3
        with pytest.raises(ckptd.ConfigError, match="step 3 ends after step 3"):
            checkpointer.step(3)
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 3
        assert training.weights == weights_after(3)
        training.step()
        assert checkpointer.step() == 4
    assert home.checkpoints() == [3, 4]


def test_a_loop_that_counts_twice(home: Home) -> None:
    """`steps` ends each step itself; a `step` in its body would count the same one again."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        loop = checkpointer.steps(5)
        next(loop)
        training.step()
        checkpointer.step()
        with pytest.raises(ckptd.ConfigError, match="step 1 ends after step 1"):
            next(loop)


def test_a_loop_that_forgot_to_restore_does_not_mislabel_what_it_restores(home: Home) -> None:
    """`step` restores where nobody has. The body before it is lost: the state is that of the checkpoint, and so is its
    number. To count one more would store the weights of step 3 as those of step 4."""
    run(home, 3)
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        training.step()
        assert checkpointer.step() == 3
        assert training.weights == weights_after(3)
        training.step()
        assert checkpointer.step() == 4
    assert training.weights == weights_after(4)
    assert run(home, 4)[1].weights == weights_after(4)


def test_restore_a_given_step_and_forget_what_came_after(home: Home) -> None:
    """History branches at the step that was restored: the newest checkpoint of the dead branch is not taken again."""
    for stop in (2, 4, 6):
        run(home, stop)
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), keep=None) as checkpointer:
        assert checkpointer.restore(step=4) == 4
        assert training.weights == weights_after(4)
        torch.manual_seed(1)
        training.step()
        checkpointer.step()
    branched = training.weights
    done, training = run(home, 5, keep=None)
    assert done == []
    assert training.weights == branched


def test_restore_before_a_step(home: Home) -> None:
    """As one goes back before a spike of the loss."""
    for stop in (2, 4):
        run(home, stop)
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore(before=4) == 2
        assert training.weights == weights_after(2)
        assert checkpointer.statistics()["restored"]["source"] == "store"
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore(before=2) == 0
    assert training.weights == weights_after(0)


def test_restore_a_step_that_is_not_there(home: Home) -> None:
    """It must not begin anew in silence."""
    run(home, 2)
    training = Training()
    with (
        pytest.raises(ckptd.NotFoundError, match="step 7"),
        ckptd.Checkpointer(training.state, home.store()) as checkpointer,
    ):
        checkpointer.restore(step=7)
    home.stop()
    assert home.checkpoints() == [2]
    assert run(home, 2)[1].weights == weights_after(2)


def test_restore_is_done_once_and_inside(home: Home) -> None:
    training = Training()
    checkpointer = ckptd.Checkpointer(training.state, home.store())
    with pytest.raises(ckptd.ConfigError, match="context manager"):
        checkpointer.restore()
    with pytest.raises(ckptd.ConfigError, match="context manager"):
        checkpointer.flush()
    with checkpointer:
        checkpointer.restore()
        with pytest.raises(ckptd.ConfigError, match="restored already"):
            checkpointer.restore()


@pytest.mark.parametrize("where", ["memory", "store"])
def test_resume_never_begins_anew(home: Home, where: str) -> None:
    if where == "store":
        run(home, 2)
    else:
        interrupted(home, 2)
    done, training = run(home, 1, resume="never")
    assert done == [1]
    assert training.weights == weights_after(1)
    done, training = run(home, 1)
    assert (done, training.weights) == ([], weights_after(1))


def test_resume_must_find_something(home: Home) -> None:
    with pytest.raises(ckptd.NotFoundError, match="must"):
        run(home, 2, resume="must")
    home.stop()
    assert home.checkpoints() == []
    assert run(home, 2)[0] == [1, 2]
    assert run(home, 3, resume="must")[0] == [3]


def test_resume_from_a_step(home: Home) -> None:
    for stop in (2, 4):
        run(home, stop)
    with pytest.raises(ckptd.NotFoundError, match="step 3"):
        run(home, 5, resume=3)
    home.stop()
    done, training = run(home, 3, resume=2)
    assert done == [3]
    assert training.weights == weights_after(3)


def test_options_from_the_environment(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_RESUME", "must")
    with pytest.raises(ckptd.NotFoundError):
        run(home, 1)
    home.stop()
    assert run(home, 1, resume="auto")[0] == [1]


def test_memory_alone_is_enough_for_a_restart(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """No store: a failed run goes on from memory, a clean end leaves nothing at all."""
    interrupted(home, 3, store=None, job="in memory")
    training = Training()
    with ckptd.Checkpointer(training.state, job="in memory") as checkpointer:
        assert list(checkpointer.steps(3)) == []
        assert training.weights == weights_after(3)
        assert checkpointer.statistics()["restored"]["source"] == "memory"
        assert "restored step 3 from memory" in capfd.readouterr().err
        assert [job.name for job in jobs()] == ["in memory"]
    home.assert_nothing_left()
    assert list(home.folder.iterdir()) == []


def test_without_a_store_a_job_is_its_command_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script with the same arguments is the same job; with others it is another one."""
    monkeypatch.setattr("sys.argv", ["train.py", "--size", "small"])
    interrupted(home, 2, store=None)
    monkeypatch.setattr("sys.argv", ["train.py", "--size", "large"])
    training = Training()
    with ckptd.Checkpointer(training.state) as checkpointer:
        assert checkpointer.restore() == 0
        assert len(jobs()) == 2
    until(lambda: len(jobs()) == 1)
    monkeypatch.setattr("sys.argv", ["train.py", "--size", "small"])
    training = Training()
    with ckptd.Checkpointer(training.state) as checkpointer:
        assert checkpointer.restore() == 2
    assert training.weights == weights_after(2)


def test_a_store_is_one_job_however_it_is_spelled(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(home, 2)
    monkeypatch.chdir(home.folder)
    training = Training()
    with ckptd.Checkpointer(training.state, "./x/../store/") as checkpointer:
        assert checkpointer.restore() == 2
        assert checkpointer.statistics()["restored"]["source"] == "memory"


def test_two_jobs_beside_each_other(home: Home) -> None:
    """Two loops in one process, each with its own daemon; an optimizer step of either closes both windows."""
    first, second = Training(), Training()
    with (
        ckptd.Checkpointer(first.state, job="first") as left,
        ckptd.Checkpointer(second.state, home.store(), job="second") as right,
    ):
        for _ in zip(left.steps(3), right.steps(5), strict=False):
            first.step()
            second.step()
        assert sorted(job.name for job in jobs()) == ["first", "second"]
        control = Control.connect("second")
        assert control.status()["store"] == home.store()
        control.close()
    assert home.checkpoints() == [3]


def test_another_training_after_the_loop_does_not_spoil_the_end(home: Home) -> None:
    """A probe is trained inside the context, after the last step: what was captured before it becomes durable."""
    training, probe = Training(), Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for _ in checkpointer.steps(3):
            training.step()
        assert checkpointer.snapshot() == 3
        probe.step()
        assert checkpointer.snapshot() is None
    assert home.checkpoints() == [3]
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert list(checkpointer.steps(3)) == []
        probe.step()
    assert home.checkpoints() == [3]


def test_objects_without_an_optimizer_count_every_step(home: Home) -> None:
    """A state without an optimizer (an evaluation, a simulation): each body counts."""
    state = {"progress": {"seen": 0}, "table": torch.zeros(3)}
    with ckptd.Checkpointer(state, home.store()) as checkpointer:
        for step in checkpointer.steps(10):
            state["progress"]["seen"] += 5
            state["table"] += 1
            if step == 4:
                break
    again = {"progress": {"seen": 0}, "table": torch.zeros(3)}
    with ckptd.Checkpointer(again, home.store()) as checkpointer:
        assert checkpointer.restore() == 4
    assert again["progress"] == {"seen": 20}
    assert again["table"].tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("value", "dtype", "finite"),
    [
        (float("nan"), torch.float32, False),
        (float("-inf"), torch.bfloat16, False),
        (complex(0, float("inf")), torch.complex64, False),
        (float("nan"), torch.float8_e4m3fn, False),
        (3e38, torch.float32, True),
        (6e4, torch.float16, True),
    ],
)
def test_what_is_not_finite_is_said(
    home: Home, capsys: pytest.CaptureFixture[str], value: complex, dtype: torch.dtype, finite: bool
) -> None:
    """It is restored as it is, but not in silence. Large values whose sum overflows are no cause."""
    numbers = torch.full((100,), value).to(dtype)
    ckptd.save(Training(numbers=numbers).state, home.store(), step=1)
    training = Training(numbers=torch.zeros(100).to(dtype))
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 1
        assert checkpointer.statistics()["restored"]["not_finite"] == ([] if finite else ["numbers"])
    assert ("NaN or Inf in 1 tensors: numbers" in capsys.readouterr().err) != finite
