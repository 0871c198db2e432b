"""What cannot work is refused before anything is written, in words that name it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.core.config import Options
from tests.checkpointer.child import run
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, weights_after


def nothing_written(home: Home) -> bool:
    """No store, no runtime directory, no process."""
    return not home.processes() and not home.runtime.exists() and not Path(home.store()).exists()


class Opaque:
    """Something whose state dict holds what cannot be stored."""

    def state_dict(self) -> dict[str, Any]:
        return {"fine": 1, "inner": [{"handle": object()}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"notes": {"a": [1, {"b": object()}]}}, r"notes/a/1/b.*object"),
        ({"notes": {"a": lambda: 1}}, r"notes/a.*function"),
        ({"progress": Opaque()}, r"progress/inner/0/handle.*object"),
        ({"rng": 1}, r"'rng' is reserved"),
        ({"objects": {}}, r"'objects' is reserved"),
        ({3: 1}, r"name 3"),
        ({"empty": torch.empty(2, device="meta")}, r"empty.*meta device"),
        ({"sparse": torch.eye(2).to_sparse()}, r"sparse.*layout"),
    ],
)
def test_state_that_cannot_be_stored(home: Home, more: dict[Any, Any], message: str) -> None:
    training = Training()
    with (
        pytest.raises(ckptd.ConfigError, match=message),
        ckptd.Checkpointer({**training.state, **more}, home.store()) as checkpointer,
    ):
        checkpointer.restore()
    assert nothing_written(home)


def test_a_parameter_in_an_optimizer_but_in_no_module(home: Home) -> None:
    training = Training()
    del training.state["model"]
    with pytest.raises(ckptd.ConfigError, match=r"optimizer: parameter 0 of group 0, shape \(3, 4\), is in no module"):
        ckptd.Checkpointer(training.state, home.store())
    assert nothing_written(home)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshot_evry": 3}, "snapshot_evry"),
        ({"snapshot_every": 0}, "snapshot_every=0"),
        ({"keep": 0}, "keep=0"),
        ({"resume": "maybe"}, "resume='maybe'"),
        ({"redundancy": "2+1"}, "found 1 node"),
        ({"capture": "sometimes"}, "capture='sometimes'"),
        ({"max_stall_s": -1}, "max_stall_s=-1"),
        ({"job": ""}, "job=''"),
    ],
)
def test_options_that_cannot_be(home: Home, options: dict[str, Any], message: str) -> None:
    training = Training()
    with (
        pytest.raises(ckptd.ConfigError, match=message),
        ckptd.Checkpointer(training.state, home.store(), **options) as checkpointer,
    ):
        checkpointer.restore()
    assert nothing_written(home)


def test_every_option_is_an_argument(home: Home) -> None:
    """And nothing is started by making a Checkpointer alone."""
    training = Training()
    defaults = {name: getattr(Options(), name) for name in Options.__dataclass_fields__}
    ckptd.Checkpointer(training.state, home.store(), **defaults)
    assert not home.processes()
    assert not home.runtime.exists()


# --- a store that cannot be written


def refused(home: Home, store: str) -> str:
    """The message of the StoreError that a run with this store ends with, before its first step."""
    training = Training()
    with (
        pytest.raises(ckptd.StoreError) as raised,
        ckptd.Checkpointer(training.state, store) as checkpointer,
    ):
        next(checkpointer.steps())
    return str(raised.value)


def test_a_store_below_a_file(home: Home) -> None:
    (home.folder / "file").write_text("not a directory")
    message = refused(home, str(home.folder / "file" / "store"))
    assert str(home.folder / "file") in message
    assert not home.processes()
    assert (home.folder / "file").read_text() == "not a directory"


def test_a_store_that_is_a_file(home: Home) -> None:
    Path(home.store()).write_text("not a directory")
    assert home.store() in refused(home, home.store())
    assert not home.processes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.root
def test_a_store_that_is_read_only(home: Home, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = refused(home, str(small_disk / "store"))
    assert "Read-only file system" in message
    assert not home.processes()


@pytest.mark.root
def test_a_store_that_has_become_read_only(home: Home, small_disk: Path) -> None:
    """Reading would work, writing does not: it is noticed at the start, not at the first flush."""
    (small_disk / "store").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = refused(home, str(small_disk / "store"))
    assert "Read-only file system" in message
    assert not home.processes()


@pytest.mark.root
def test_a_full_disk(home: Home, small_disk: Path) -> None:
    """Not even an epoch record fits: an error at the start, and the next start works once there is room."""
    (small_disk / "store").mkdir()
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    assert "No space left" in refused(home, str(small_disk / "store"))
    assert not home.processes()
    (small_disk / "filler").unlink()
    training = Training()
    with ckptd.Checkpointer(training.state, small_disk / "store") as checkpointer:
        for _ in checkpointer.steps(2):
            training.step()
    assert [path.name[:13] for path in (small_disk / "store").glob("step-*")] == ["step-00000002"]


# --- memory


def test_too_little_memory(home: Home) -> None:
    """Needed, available, and whose limit: at the first step, since optimizers make their state in it."""
    training = Training(table=torch.zeros(300_000))

    def start() -> None:
        with ckptd.Checkpointer(training.state, home.store(), memory=2_000_000) as checkpointer:
            for step in checkpointer.steps():
                if step > 1:
                    checkpointer.snapshot()
                training.step()

    with pytest.raises(ckptd.ConfigError) as raised:
        start()
    message = str(raised.value)
    assert "snapshot memory" in message
    needed, available = [
        int(word) for word in message.replace(",", " ").split() if word.isdigit() and int(word) > 10**6
    ]
    assert needed > 2 * 4 * 300_000
    assert available <= 2_000_000
    assert "memory=2000000" in message
    home.stop()
    assert home.checkpoints() == []
    with ckptd.Checkpointer(training.state, home.store(), memory=20_000_000) as checkpointer:
        for _ in checkpointer.steps(2):
            training.step()
    assert home.checkpoints() == [2]


def test_memory_for_two_slots_but_not_for_three(home: Home) -> None:
    """Fewer slots: a flush holds snapshots up, which is said, and nothing else is different."""
    training = Training(table=torch.zeros(300_000))
    with ckptd.Checkpointer(training.state, home.store(), memory=3_400_000) as checkpointer:
        for step in checkpointer.steps(4):
            if step > 1:
                checkpointer.snapshot()
            training.step()
    assert home.checkpoints() == [4]


# --- what is restored


def trained(home: Home, *stops: int, **more: Any) -> Training:
    """Runs that leave a checkpoint of each of these steps."""
    for stop in stops:
        training = Training(**more)
        with ckptd.Checkpointer(training.state, home.store(), keep=None) as checkpointer:
            for _ in checkpointer.steps(stop):
                training.step()
    return training


def folder_of(home: Home, step: int) -> Path:
    return next(Path(home.store()).glob(f"step-{step:08}.*"))


def snapshot_of(home: Home) -> dict[str, bytes]:
    """Every file of the store but epoch records."""
    files = [path for path in Path(home.store()).glob("step-*/**/*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def test_a_checkpoint_that_differs_from_the_state(home: Home) -> None:
    """All differences at once, and no tensor touched. The daemon keeps what it has for the corrected program."""
    trained(home, 2, average=torch.zeros(3))
    before = snapshot_of(home)
    training = Training(counter=0)
    training.model.register_parameter("weight", nn.Parameter(torch.ones(3, 5)))
    training.model.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=torch.float64)))
    training.model.bias.data = training.model.bias.data.to(torch.float16)
    training.state["optimizer"] = torch.optim.SGD(training.model.parameters(), lr=0.5, momentum=0.9)
    bias = training.model.bias.tolist()
    with (
        pytest.raises(ckptd.MismatchError) as raised,
        ckptd.Checkpointer(training.state, home.store()) as checkpointer,
    ):
        checkpointer.restore()
    message = str(raised.value)
    for difference in (r"model/weight", "model/bias", "model/scale", "counter"):
        assert difference in message
    for found in ("[3, 5]", "[3, 4]", "float16", "step 2"):
        assert found in message
    assert training.model.weight.tolist() == [[1.0] * 5] * 3
    assert training.model.bias.tolist() == bias
    home.stop()
    assert snapshot_of(home) == before


def test_a_state_that_dropped_a_part(home: Home) -> None:
    """Top-level names that are not in the state are ignored; what is new in it must be somewhere."""
    trained(home, 2, average=torch.zeros(3))
    training = Training()
    with ckptd.Checkpointer(training.state, home.store()) as checkpointer:
        assert checkpointer.restore() == 2
    training = Training(extra=torch.zeros(1))
    with (
        pytest.raises(ckptd.MismatchError, match="extra: not in the checkpoint"),
        ckptd.Checkpointer(training.state, home.store()) as checkpointer,
    ):
        checkpointer.restore()
    home.stop()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_a_newer_version(path: Path) -> None:
    members = json.loads(path.read_bytes())
    path.write_text(json.dumps({**members, "version": 99, "format_version": 99, "format": 99}))


def foreign(path: Path) -> None:
    path.write_text("PK\x03\x04 this is something else")


DAMAGE = [
    ("data/w00000-00000.ckd", flip),
    ("data/w00000-00000.ckd", truncate),
    ("manifest.parquet/w00000.parquet", flip),
    ("objects.msgpack", flip),
    ("objects.msgpack", Path.unlink),
    ("COMMIT", truncate),
    ("COMMIT", empty),
    ("COMMIT", foreign),
    ("COMMIT", of_a_newer_version),
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with checkpoints of steps 2 and 4."""
    home = Home(tmp_path_factory.mktemp("original"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.environment.items():
            patch.setenv(name, value)
        trained(home, 2, 4)
        home.assert_nothing_left()
    return Path(home.store())


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_checkpoint(
    home: Home, two_checkpoints: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    """The next older one is taken, and the damaged one is named."""
    shutil.copytree(two_checkpoints, home.store())
    damage(folder_of(home, 4) / name)
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), keep=None) as checkpointer:
        assert checkpointer.restore() == 2
        assert training.weights == weights_after(2)
    assert "step 4" in caplog.text or "step-00000004" in caplog.text


@pytest.mark.parametrize(("name", "damage"), [DAMAGE[0], DAMAGE[2], DAMAGE[-1]])
def test_the_only_checkpoint_is_damaged(home: Home, two_checkpoints: Path, name: str, damage: Any) -> None:
    """An error, each time anew, until somebody says to begin anew: a program that is restarted automatically must not
    begin from nothing after two weeks of training."""
    shutil.copytree(two_checkpoints, home.store())
    shutil.rmtree(folder_of(home, 2))
    damage(folder_of(home, 4) / name)
    for _ in range(2):
        training = Training()
        initial = training.weights
        with (
            pytest.raises(ckptd.UnrecoverableError, match=r"resume='never'") as raised,
            ckptd.Checkpointer(training.state, home.store()) as checkpointer,
        ):
            checkpointer.restore()
        assert "step 4" in str(raised.value) or "step-00000004" in str(raised.value)
        assert training.weights == initial or name.startswith("data")
        if home.processes():
            home.stop()
    training = Training()
    with ckptd.Checkpointer(training.state, home.store(), resume="never") as checkpointer:
        for _ in checkpointer.steps(1):
            training.step()
    assert 1 in home.checkpoints()


# --- the surroundings


def test_ranks_without_a_process_group(home: Home) -> None:
    environment = {**home.environment, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    ended = run(environment, home.folder / "log", error_of, home.store())
    assert ended.value == (
        "ConfigError",
        "WORLD_SIZE=2 but torch.distributed is not initialised: call torch.distributed.init_process_group() first, or "
        "unset WORLD_SIZE if this process is on its own",
    )
    assert nothing_written(home)


def test_contradicting_ranks(home: Home) -> None:
    ended = run({**home.environment, "RANK": "3", "WORLD_SIZE": "2"}, home.folder / "log", error_of, home.store())
    assert ended.value[0] == "ConfigError"
    assert "RANK=3 of WORLD_SIZE=2" in ended.value[1]
    assert nothing_written(home)


def error_of(store: str) -> tuple[str, str]:
    """What a training is refused with."""
    training = Training()
    try:
        with ckptd.Checkpointer(training.state, store) as checkpointer:
            next(checkpointer.steps())
    except ckptd.CkptdError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_runtime_directory_that_others_can_enter(home: Home, mode: int) -> None:
    home.runtime.mkdir()
    home.runtime.chmod(mode)
    training = Training()
    with (
        pytest.raises(ckptd.ConfigError, match=r"runtime directory.*0700.*CKPTD_RUNTIME_DIR"),
        ckptd.Checkpointer(training.state, home.store()) as checkpointer,
    ):
        checkpointer.restore()
    assert not home.processes()
    home.runtime.rmdir()
