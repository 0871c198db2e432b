"""The ways out of a run that do not end it: exceptions, Ctrl-C, SIGTERM, a store that fails; and who is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ckptd
from ckptd.core.types import Level
from ckptd.daemon.client import Control, jobs
from tests.checkpointer.child import Child, Ended, await_parent, report
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, until, weights_after


def status() -> dict[str, Any]:
    """What the only daemon here says."""
    control = Control.connect()
    try:
        return control.status()
    finally:
        control.close()


@pytest.mark.parametrize("error", [RuntimeError("lost power"), KeyboardInterrupt()])
def test_an_error_is_raised_again_and_the_daemon_stays(home: Home, error: BaseException) -> None:
    """It flushes the newest sealed snapshot by itself, and keeps the memory until somebody stops it."""

    def fail() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, home.store(), flush_every=None) as checkpointer:
            for step in checkpointer.steps(9):
                if step == 4:
                    checkpointer.snapshot()
                training.step()
                if step == 4:
                    raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    until(lambda: home.checkpoints() == [3])
    (job,) = jobs()
    assert job.name == home.store()
    assert status()["newest"]["sealed"] == 3
    assert status()["memory_bytes"] > 0
    home.stop()
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 3
        assert training.weights == weights_after(3)


def test_an_error_in_the_same_process_is_no_end(home: Home) -> None:
    """A notebook: the cell fails, and is run again. The second run goes on from memory."""
    for attempt in (1, 2):
        training = Training()
        try:
            with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
                for step in checkpointer.steps(4):
                    if step == 3 and attempt == 1:
                        checkpointer.snapshot()
                        raise RuntimeError("a bug in the cell")
                    training.step()
        except RuntimeError:
            continue
        assert checkpointer.statistics()["restored"]["source"] == "memory"
        assert checkpointer.statistics()["restored"]["step"] == 2
    assert training.weights == weights_after(4)
    assert home.checkpoints()[-1] == 4


def test_hooks_and_handlers_go_with_the_context(home: Home) -> None:
    """Afterwards an optimizer steps, and a SIGTERM comes, as if ckptd had never been there."""
    previous, wakeup = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    training = Training()
    checkpointer = ckptd.Checkpointer(training.state, job="job")
    with checkpointer:
        for _ in checkpointer.steps(2):
            training.step()
        assert signal.getsignal(signal.SIGTERM) is not previous
    assert signal.getsignal(signal.SIGTERM) is previous
    assert signal.set_wakeup_fd(wakeup) == -1
    assert not [t.name for t in threading.enumerate() if t.name.startswith("ckptd")]
    training.step()
    assert checkpointer.statistics()["steps"] == 2
    descriptors = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)}
    assert not [name for name in descriptors if "ckptd" in name]


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_nothing_is_left_open_by_many_runs(home: Home) -> None:
    """Descriptors, threads and mapped memory of a process that trains again and again stay as they were."""

    def once() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, job="job") as checkpointer:
            for step in checkpointer.steps(3):
                if step == 2:
                    checkpointer.snapshot()
                training.step()

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:ckptd")
        return len(os.listdir("/proc/self/fd")), threading.active_count(), maps

    once()
    before = held()
    for _ in range(3):
        once()
    assert held() == before


def test_a_clean_end_that_cannot_flush(home: Home) -> None:
    """StoreError; the daemon and the memory stay, `ckptd flush --to` rescues them, and the next run goes on."""
    store = Path(home.store())

    def end() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
            for step in checkpointer.steps(5):
                training.step()
                if step == 5:
                    break_store(store)

    with pytest.raises(ckptd.StoreError, match="store"):
        end()
    assert home.checkpoints() == []
    assert status()["newest"] == {"captured": 5, "sealed": 5, "protected": None, "durable": None}
    control = Control.connect(home.store())
    assert control.flush(to=home.store("rescued")) == 5
    control.close()
    assert home.checkpoints("rescued") == [5]
    again = Training()
    assert ckptd.load(again.state, home.store("rescued")) == 5
    assert again.weights == weights_after(5)
    store.unlink()
    again = Training()
    with ckptd.Checkpointer(again.state, store) as checkpointer:
        assert list(checkpointer.steps(5)) == []
        assert checkpointer.statistics()["restored"]["source"] == "memory"
    assert home.checkpoints() == [5]
    assert again.weights == weights_after(5)


def break_store(store: Path) -> None:
    """Puts a file where the store was."""
    store.rename(store.with_name("moved away"))
    store.write_text("not a directory")


def test_a_flush_that_failed_is_tried_again_on_request(home: Home) -> None:
    training = Training()
    store = Path(home.store())
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps(4):
            if step == 2:
                break_store(store)
                with pytest.raises(ckptd.StoreError):
                    checkpointer.flush()
                assert checkpointer.level(1) is Level.SEALED
                store.unlink()
                store.with_name("moved away").rename(store)
                assert checkpointer.flush() == 1
            training.step()
    assert home.checkpoints() == [1, 4]


def test_a_periodic_flush_that_fails_does_not_stop_training(home: Home) -> None:
    """It is counted and shown, memory goes on, and the next one works."""
    training = Training()
    store = Path(home.store())
    with ckptd.Checkpointer(training.state, store, flush_every=2) as checkpointer:
        for step in checkpointer.steps(6):
            if step == 2:
                break_store(store)
            if step == 4:
                until(lambda: status()["counters"].get("flush_errors", 0) >= 1)
                assert status()["last_error"]
                store.unlink()
                store.with_name("moved away").rename(store)
            if step > 1:
                checkpointer.snapshot()
            training.step()
    assert home.checkpoints()[-1] == 6
    assert training.weights == weights_after(6)


def test_an_answer_that_comes_too_late_is_of_no_account(home: Home) -> None:
    """A request ran into its deadline, and failed later. The next one works, and is not told of that failure."""
    training = Training()
    store = Path(home.store())
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps(3):
            if step == 3:
                checkpointer.snapshot()
                daemon = home.daemon()
                daemon.suspend()
                with pytest.raises(ckptd.DeadlineError):
                    checkpointer.wait("durable", timeout_s=0.1)
                break_store(store)
                daemon.resume()
                until(lambda: status()["counters"].get("flush_errors", 0) == 1)
                store.unlink()
                store.with_name("moved away").rename(store)
                assert checkpointer.flush() == 2
            training.step()
    assert home.checkpoints() == [2, 3]


def test_a_part_of_the_state_that_fails_once(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """Its snapshot is skipped and counted; training, and the snapshots after it, go on."""

    class Moody:
        calls, mood = 0, "good"

        def state_dict(self) -> dict[str, int]:
            if self.mood == "bad":
                raise RuntimeError("not now")
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    moody = Moody()
    training = Training(moody=moody)
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=1) as checkpointer:
        for step in checkpointer.steps():
            if step == 3:
                checkpointer.snapshot()
                moody.mood = "bad"
            training.step()
            moody.calls = step
            if checkpointer.statistics()["skip_reasons"].get("failed"):
                break
        moody.mood = "good"
        last = checkpointer.flush()
    assert "not now" in caplog.text
    again = Training(moody=Moody())
    with ckptd.Checkpointer(again.state, home.store()) as checkpointer:
        assert checkpointer.restore() == last
    assert again.state["moody"].calls == last


def test_a_training_in_a_thread(home: Home) -> None:
    """Signal handlers are for the main thread alone; all else works in any."""
    previous = signal.getsignal(signal.SIGTERM)
    done: list[int] = []

    def work() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
            done.extend(training.step() or step for step in checkpointer.steps(3))
            assert signal.getsignal(signal.SIGTERM) is previous

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1, 2, 3]
    assert home.checkpoints() == [3]


def test_ctrl_c_while_the_end_is_waiting(home: Home) -> None:
    """The last flush hangs on a frozen daemon: Ctrl-C ends the process, the memory stays."""
    child = Child(home.environment, home.folder / "log", end_slowly, home.store())
    assert child.receive() == "sealed"
    daemon = home.daemon()
    daemon.suspend()
    try:
        child.send("go")
        assert child.receive() == "ending"
        os.kill(child.pid, signal.SIGINT)
        ended = child.end()
        assert (ended.status, ended.value) == (0, "interrupted")
    finally:
        daemon.resume()
    until(lambda: home.checkpoints() == [2])
    home.stop()


def end_slowly(store: str) -> str:
    training = Training()
    try:
        with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
            for step in checkpointer.steps(3):
                if step == 3:
                    checkpointer.snapshot()
                    report("sealed")
                    await_parent()
                training.step()
            report("ending")
    except KeyboardInterrupt:
        return "interrupted"
    return "ended"


# --- SIGTERM


def sigterm(child: Child) -> Ended:
    """The end of a training that gets SIGTERM once something is sealed."""
    assert child.receive() == "sealed"
    os.kill(child.pid, signal.SIGTERM)
    return child.end()


def terminated(home: Home, **options: object) -> tuple[int, str]:
    """A training that gets SIGTERM with snapshots in memory and none in the store; its end."""
    child = Child(home.environment, home.folder / "log", train_on, home.store(), options)
    ended = sigterm(child)
    return ended.status, ended.stderr


def train_on(store: str, options: dict[str, object]) -> int:
    training = Training()
    handler = options.pop("handler", None)
    caught: list[int] = []
    if handler == "stop":
        signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    if handler == "exit":
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
    if handler == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ckptd.Checkpointer(training.state, store, flush_every=None, **options) as checkpointer:
        for step in checkpointer.steps():
            if step == 4:
                checkpointer.snapshot()
                report("sealed")
            training.step()
            time.sleep(0.002)
            if caught or (handler == "ignore" and checkpointer.level(3) is Level.DURABLE):
                break
    return step


def test_sigterm_kills_when_the_newest_sealed_snapshot_is_durable(home: Home) -> None:
    exit_status, stderr = terminated(home)
    assert exit_status == -signal.SIGTERM, stderr
    assert home.checkpoints()
    assert home.checkpoints()[-1] >= 3
    home.stop()


@pytest.mark.parametrize("handler", ["default", "exit"])
def test_sigterm_wherever_the_main_thread_is(home: Home, handler: str) -> None:
    """Inside a lock that the drain needs, above all: Python runs its handler there."""
    child = Child(home.environment, home.folder / "log", terminate_in_a_lock, home.store(), handler)
    ended = child.end()
    assert ended.status == (7 if handler == "exit" else -signal.SIGTERM), ended.stderr
    assert home.checkpoints()
    home.stop()


def terminate_in_a_lock(store: str, handler: str) -> None:
    if handler == "exit":
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
    training = Training()
    with ckptd.Checkpointer(training.state, store, flush_every=None, grace_s=1000) as checkpointer:
        for step in checkpointer.steps():
            if step == 4:
                checkpointer.snapshot()
                with checkpointer._running._lock:
                    signal.raise_signal(signal.SIGTERM)
            training.step()
            time.sleep(0.002)


def test_sigterm_in_a_collective_that_hangs(home: Home) -> None:
    """The main thread is in C and never comes back: Python's handlers do not run, ours does."""
    child = Child(home.environment, home.folder / "log", hang, home.store())
    ended = sigterm(child)
    assert ended.status == -signal.SIGTERM, ended.stderr
    assert home.checkpoints() == [2]
    home.stop()


def hang(store: str) -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps():
            if step == 3:
                checkpointer.snapshot()
                report("sealed")
                import ctypes

                libc = ctypes.CDLL(None)
                while True:
                    libc.pause()
            training.step()


def test_sigterm_leaves_the_last_word_to_the_previous_handler(home: Home) -> None:
    """One that only takes note: the loop ends by itself, cleanly, with its last step durable."""
    child = Child(home.environment, home.folder / "log", train_on, home.store(), {"handler": "stop"})
    ended = sigterm(child)
    assert ended.status == 0, ended.stderr
    assert home.checkpoints()[-1] == ended.value
    assert len(home.checkpoints()) >= 2


def test_sigterm_with_a_handler_that_exits(home: Home) -> None:
    exit_status, stderr = terminated(home, handler="exit")
    assert exit_status == 7, stderr
    assert home.checkpoints()
    home.stop()


def test_sigterm_that_was_ignored_stays_ignored(home: Home) -> None:
    """What is sealed becomes durable all the same: somebody wants the machine."""
    child = Child(home.environment, home.folder / "log", train_on, home.store(), {"handler": "ignore"})
    ended = sigterm(child)
    assert ended.status == 0, ended.stderr


def test_sigterm_without_a_store_kills_at_once(home: Home) -> None:
    child = Child(home.environment, home.folder / "log", train_in_memory)
    assert child.receive() == "sealed"
    os.kill(child.pid, signal.SIGTERM)
    assert child.end().status == -signal.SIGTERM
    assert jobs()
    home.stop()


def train_in_memory() -> None:
    training = Training()
    with ckptd.Checkpointer(training.state, job="in memory", grace_s=1000) as checkpointer:
        for step in checkpointer.steps():
            if step == 4:
                checkpointer.snapshot()
                report("sealed")
            training.step()
            time.sleep(0.002)


def test_sigterm_waits_no_longer_than_the_grace_time(home: Home) -> None:
    """The daemon is frozen: nothing becomes durable, and the process still ends."""
    child = Child(home.environment, home.folder / "log", train_on, home.store(), {"grace_s": 0.3})
    assert child.receive() == "sealed"
    daemon = home.daemon()
    daemon.suspend()
    try:
        os.kill(child.pid, signal.SIGTERM)
        assert child.end().status == -signal.SIGTERM
        assert home.checkpoints() == []
    finally:
        daemon.resume()
    until(lambda: home.checkpoints() != [])
    home.stop()


def test_sigterm_of_a_forked_child_is_its_own(home: Home) -> None:
    """A helper process that was forked in the loop is terminated: the training hears nothing of it."""
    child = Child(home.environment, home.folder / "log", fork_and_terminate, home.store())
    ended = child.end()
    assert ended.status == 0, ended.stderr
    assert ended.value == {-signal.SIGTERM}
    assert home.checkpoints() == [3]


def fork_and_terminate(store: str) -> set[int | None]:
    training = Training()
    with ckptd.Checkpointer(training.state, store, flush_every=None) as checkpointer:
        for step in checkpointer.steps(3):
            training.step()
            if step == 2:
                codes = {terminate_a_helper() for _ in range(20)}
                subprocess.run(["true"], check=True)
    return codes


def terminate_a_helper() -> int | None:
    helper = multiprocessing.get_context("fork").Process(target=signal.pause)
    helper.start()
    helper.terminate()
    helper.join()
    return helper.exitcode


def test_a_process_that_ends_without_leaving_the_context(home: Home) -> None:
    """sys.exit in a thread, os._exit, a crash of the interpreter: to the daemon it is a death like any other."""
    child = Child(home.environment, home.folder / "log", vanish, home.store())
    assert child.receive() == "sealed"
    child.send("go")
    assert child.end().status == 3
    until(lambda: status()["newest"]["durable"] == 2)
    home.stop()
    assert home.checkpoints() == [2]


def vanish(store: str) -> None:
    training = Training()
    checkpointer = ckptd.Checkpointer(training.state, store, flush_every=None)
    checkpointer.__enter__()
    for step in checkpointer.steps():
        if step == 3:
            checkpointer.snapshot()
            report("sealed")
            await_parent()
            os._exit(3)
        training.step()
