"""Jobs whose store is not a directory: S3, with a real server, found by URI and environment alone."""

from __future__ import annotations

import pytest
import torch

import ckptd
from ckptd.daemon.client import Control, jobs
from ckptd.tiers.store import Store
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training, weights_after
from tests.s3_server import CREDENTIALS, S3Server


def test_a_job_with_a_store_of_objects(home: Home, s3: S3Server) -> None:
    """The daemon writes there, prunes there, and a restart goes on from there; the job's name holds no secret."""
    uri = s3.uri()
    training = Training()
    with ckptd.Checkpointer(training.state, uri, flush_every=2, keep=1) as checkpointer:
        for step in checkpointer.steps(5):
            if step == 3:
                assert checkpointer.flush() == 2
                (job,) = jobs()
                assert job.name == Store.open(uri).uri
                status = str(Control.connect(uri).status())
                assert job.name in status
                assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in status + home.logs()
            training.step()
    home.assert_nothing_left()
    assert [name.step for name in Store.open(uri).checkpoints()] == [5]
    assert Store.open(uri).broken() == []
    training = Training()
    with ckptd.Checkpointer(training.state, uri) as checkpointer:
        done = []
        for step in checkpointer.steps(7):
            training.step()
            done.append(step)
        assert checkpointer.statistics()["restored"]["source"] == "store"
    assert done == [6, 7]
    assert training.weights == weights_after(7)


def test_a_store_that_is_gone_at_the_end(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job says so, memory keeps the state, and it can be rescued to another place."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3Server()

    def train() -> None:
        training = Training()
        with ckptd.Checkpointer(training.state, server.uri("run")) as checkpointer:
            for step in checkpointer.steps(3):
                training.step()
                if step == 3:
                    server.stop()

    try:
        with pytest.raises(ckptd.StoreError, match=r"s3://.*connect"):
            train()
    finally:
        server.stop()
    (job,) = jobs()
    control = Control.connect(job.name)
    assert control.flush(home.store()) == 3
    control.close()
    assert home.checkpoints() == [3]
    home.stop()
    rescued = Training()
    ckptd.load(rescued.state, home.store())
    assert rescued.weights == weights_after(3)


def test_saving_loading_and_looking_by_uri(s3: S3Server) -> None:
    uri = s3.uri()
    training = Training()
    training.step()
    ckptd.save(training.state, uri, step=1)
    with pytest.raises(ckptd.StoreError, match="committed already"):
        ckptd.save(training.state, uri, step=1)
    training.step()
    ckptd.save(training.state, uri, step=1, overwrite=True)
    other = Training()
    assert ckptd.load(other.state, uri) == 1
    assert other.weights == training.weights
    opened = ckptd.open(uri)
    assert torch.equal(opened.read("model/weight"), training.model.weight)
    opened.verify()
