"""What one may ask of a running job: snapshot, flush, wait, level, statistics; and what the daemon does unasked."""

from __future__ import annotations

import datetime
import itertools

import pytest
import torch

import ckptd
from ckptd.core.types import Level
from ckptd.daemon.client import Control
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, until, weights_after


def test_snapshot_on_request(home: Home) -> None:
    """At any moment between a boundary and the next update; with its step, and the weights of that step."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6, flush_every=None) as checkpointer:
        assert checkpointer.snapshot() is None
        for step in checkpointer.steps(4):
            if step == 3:
                assert checkpointer.level(2) is None
                assert checkpointer.snapshot() == 2
                assert checkpointer.level(2) is Level.SEALED
                assert checkpointer.snapshot() == 2
            training.forward()
            if step == 4:
                assert checkpointer.snapshot() == 3
            training.update()
            assert checkpointer.snapshot() is None
        assert checkpointer.statistics()["snapshots_sealed"] == 2
    assert home.checkpoints() == [4]


def test_what_is_sealed_is_what_stood_at_the_boundary(home: Home) -> None:
    """Also where the request comes when the gradients of the next step are already there."""

    def stop() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6) as checkpointer:
            for step in checkpointer.steps(9):
                training.forward()
                if step == 6:
                    assert checkpointer.snapshot() == 5
                training.update()
                if step == 8:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 5
        restored = training.weights
    assert restored == weights_after(5)


def test_flush_on_request(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6, flush_every=None) as checkpointer:
        checkpointer.restore()
        with pytest.raises(ckptd.ConfigError, match="no step is captured"):
            checkpointer.flush()
        for step in checkpointer.steps(3):
            if step == 3:
                assert checkpointer.flush() == 2
                assert home.checkpoints() == [2]
                assert checkpointer.level(2) is Level.DURABLE
                assert checkpointer.flush() == 2
            training.step()
            if step == 3:
                assert checkpointer.flush() == 2
    assert home.checkpoints() == [2, 3]


def test_flush_after_break_is_of_the_step_that_was_left(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for step in checkpointer.steps():
            training.step()
            if step == 3:
                break
        assert checkpointer.flush() == 3
        assert home.checkpoints() == [3]
    assert training.weights == weights_after(3)


def test_wait_until_safe(home: Home) -> None:
    """Waiting captures and flushes what is not; levels are what they are named."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6, flush_every=None) as checkpointer:
        for step in checkpointer.steps(6):
            if step == 3:
                assert checkpointer.wait("captured") >= "captured"
                assert checkpointer.wait("sealed") == "sealed"
                assert checkpointer.wait(Level.SEALED, step=1) == "sealed"
            if step == 5:
                assert checkpointer.wait(timeout_s=60) == "durable"
                assert checkpointer.wait("sealed", step=2) == "durable"
                assert home.checkpoints() == [4]
            training.step()
    assert home.checkpoints() == [4, 6]


def test_wait_for_what_cannot_be(home: Home) -> None:
    """At once, without a deadline."""
    impossible = [
        (("protected",), "several nodes"),
        (("durable",), "needs a store"),
        (("sealed", 7), "step 7 is not completed"),
        (("sealed", 0), "step 0 is not completed"),
        (("safe",), "'safe': expected one of captured, sealed, protected, durable"),
    ]
    training = Training()
    with ckptd.Checkpointer(training.state, job="in memory") as checkpointer:
        for _ in checkpointer.steps(2):
            training.step()
        for arguments, message in impossible:
            with pytest.raises(ckptd.ConfigError, match=message):
                checkpointer.wait(*arguments)


def test_wait_in_a_body_that_has_updated(home: Home) -> None:
    """The state is between two steps: what is not captured cannot be any more."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6) as checkpointer:
        for step in checkpointer.steps(3):
            if step == 2:
                checkpointer.snapshot()
            training.step()
            if step == 2:
                assert checkpointer.wait("sealed", step=1) == "sealed"
            if step == 3:
                with pytest.raises(ckptd.ConfigError, match="step 2 was not captured"):
                    checkpointer.wait("sealed", step=2)


def test_wait_no_longer_than_asked(home: Home) -> None:
    """The daemon is frozen: the deadline holds, and the error is a TimeoutError too."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        for _ in checkpointer.steps(2):
            training.step()
        checkpointer.wait("sealed")
        daemon = home.daemon()
        daemon.suspend()
        try:
            with pytest.raises(ckptd.DeadlineError, match="Flush"):
                checkpointer.wait("durable", timeout_s=0.2)
            training.step()
            checkpointer.step()
            with pytest.raises(TimeoutError):
                checkpointer.wait("sealed", timeout_s=0.2)
        finally:
            daemon.resume()
        assert checkpointer.wait("durable", timeout_s=60) == "durable"
    assert home.checkpoints()[-1] == 3


def test_statistics_tell_what_the_loop_paid_and_got(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6) as checkpointer:
        for step in checkpointer.steps(5):
            if step == 5:
                checkpointer.snapshot()
            training.step()
    found = checkpointer.statistics()
    restored = found["restored"]
    assert restored["source"] == "none"
    assert 0 < restored["begin_s"] + restored["memory_s"] <= restored["took_s"]
    assert found["steps"] == 5
    assert found["snapshots_captured"] == found["snapshots_sealed"] == 2
    assert found["snapshots_skipped"] == 0
    assert found["skip_reasons"] == {}
    assert found["bytes_captured"] >= 2 * 2 * (15 * 4)
    assert found["daemon_connections_lost"] == 0
    assert 0 < found["stall_s_last"] < found["stall_s_total"]
    assert found["step_s"] > 0


def until_durable(checkpointer: ckptd.Checkpointer, step: int) -> None:
    """Without asking for it."""
    until(lambda: checkpointer.level(step) is Level.DURABLE)


def test_periodic_flush_by_steps(home: Home) -> None:
    """Unasked, as soon as a step in the next interval is sealed; the newest `keep` stay."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), flush_every=3, keep=2) as checkpointer:
        for step in checkpointer.steps(11):
            if step > 1:
                checkpointer.snapshot()
            for due in (3, 6, 9):
                if step == due + 1:
                    until_durable(checkpointer, due)
                    assert home.checkpoints()[-1] == due
            training.step()
    assert home.checkpoints() == [9, 11]


def test_periodic_flush_by_time(home: Home) -> None:
    training = Training()
    every = datetime.timedelta(seconds=0.05)
    with ckptd.Checkpointer(training.state, home.store(), flush_every=every, keep=None) as checkpointer:
        for step in checkpointer.steps(6):
            if step in (2, 4):
                checkpointer.snapshot()
                until_durable(checkpointer, step - 1)
            training.step()
    assert home.checkpoints()[:2] == [1, 3]
    assert home.checkpoints()[-1] == 6


def test_no_periodic_flush(home: Home) -> None:
    """Only the clean end writes."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), flush_every=None) as checkpointer:
        for step in checkpointer.steps(8):
            if step > 1:
                checkpointer.snapshot()
            training.step()
        control = Control.connect()
        assert control.status()["counters"]["sealed"] >= 7
        assert control.status()["newest"]["durable"] is None
        control.close()
    assert home.checkpoints() == [8]


@pytest.mark.parametrize("capture", ["eager", "lazy"])
def test_accumulated_gradients_wait_for_their_update(home: Home, capture: str) -> None:
    """Nothing is captured at a boundary without an update, and the grant is used at the next one with one. Whatever a
    restart then finds is a state right after an update. (At the end, the last step is captured as it is.)"""
    training = Training()
    options = {"snapshot_every": 1, "flush_every": 1, "keep": None, "capture": capture}
    with ckptd.Checkpointer(training.state, home.store(), **options) as checkpointer:
        for step in checkpointer.steps():
            training.forward()
            if step % 4 == 0:
                training.update()
            if checkpointer.statistics()["snapshots_sealed"] >= 3 and step % 4 == 2:
                break
    assert home.checkpoints()
    assert {step % 4 for step in home.checkpoints()[:-1]} == {0}


def test_before_update_counts_as_an_update(home: Home) -> None:
    """Writes without a torch optimizer: the user says so, and the boundary after them is captured."""
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=1) as checkpointer:
        for step in checkpointer.steps():
            last = step
            checkpointer.before_update()
            with torch.no_grad():
                training.model.weight.add_(1.0)
            if checkpointer.statistics()["snapshots_sealed"] >= 2:
                break
    assert home.checkpoints()[-1] == last
    again = Training()
    with ckptd.Checkpointer(again.state, home.store()) as checkpointer:
        assert checkpointer.restore() == last
    assert again.weights == training.weights


def test_keep_all(home: Home) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), keep=None, flush_every=None) as checkpointer:
        for _ in checkpointer.steps(5):
            training.step()
        steps = itertools.count(6)
        for step in itertools.islice(steps, 4):
            training.step()
            checkpointer.step(step)
            checkpointer.flush()
    assert home.checkpoints() == [6, 7, 8, 9]
