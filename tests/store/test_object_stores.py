"""URIs of stores, what is refused in them, and what only stores of objects do."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs
import pytest

from ckptd.core.errors import ConfigError, NotFoundError, StoreError
from ckptd.operations.inspect import summarize_store
from ckptd.operations.verify import verify
from ckptd.tiers.store import Store, filesystems, is_checkpoint, object_store, open_checkpoint
from ckptd.tiers.store.location import parse
from ckptd.tiers.store.names import checkpoint
from tests.s3_server import BUCKET, S3Server
from tests.store.flaky_system import FlakyStream, flaky_back_end
from tests.store.samples import equal, identity, read, tensors, write


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/a%20b/%C3%BC", "s3://bucket/a%20b/%C3%BC"),
        ("s3://bucket/ü?scheme=http&region=x", "s3://bucket/%C3%BC?region=x&scheme=http"),
        (
            "s3://bucket/run?scheme=http&endpoint_override=http%3A%2F%2Fhost%3A9000",
            "s3://bucket/run?endpoint_override=http://host:9000&scheme=http",
        ),
        ("gcs://anonymous@bucket/run", "gs://anonymous@bucket/run"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("file:///a/../b/", "/b"),
        ("file+object:///a/../b%20c/", "file+object:///b%20c"),
        ("/", "/"),
    ],
)
def test_uris_have_one_spelling(given: str, canonical: str) -> None:
    assert parse(given).uri == canonical
    assert parse(canonical) == parse(given)
    assert "?" not in parse(given).text


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter2@bucket/run",
        "s3://hunter2@bucket/run",
        "sftp://user:hunter2@host/run",
        "s3://bucket/run?access_key=me&secret_key=hunter2",
        "s3://bucket/run?region=x&session_token=hunter2",
        "gs://bucket/run?access_token=hunter2",
        "abfs://container@account/run?account_key=hunter2",
        "abfs://container@account/run?sas_token=hunter2",
    ],
)
def test_secrets_in_uris_are_refused_and_not_repeated(uri: str) -> None:
    """The URI names the job, in logs, status and on disk."""
    with pytest.raises(ConfigError, match="credentials") as refused:
        Store.open(uri)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3:///run", "names no bucket"),
        ("s3://bucket//run", "without empty parts"),
        ("s3://bucket/a/../b", "without empty parts"),
        ("s3://bucket/a%2Fb", "without empty parts"),
        ("s3://bucket/run#1", "plain path"),
        ("s3://bucket/run?region", "not a URI"),
        ("s3://bucket/run?region=x&region=y", "given twice"),
        ("s3://bucket/run?regoin=x", "unknown option 'regoin'; known: .*region"),
        ("s3://bucket/run?anonymous=maybe", "anonymous='maybe'"),
        ("gs://bucket/run?retry_limit_seconds=soon", "retry_limit_seconds='soon'"),
        ("file+object://host/run", "names the host"),
        ("file+object://", "expected a path"),
        ("nonsense://host/run", "scheme 'nonsense' cannot be used"),
    ],
)
def test_uris_that_cannot_work(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Store.open(uri)


def test_options_reach_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(pyarrow.fs, "S3FileSystem", given.update)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pyarrow.fs, "S3FileSystem", lambda **options: given.update(options))
    monkeypatch.setattr(pyarrow.fs, "resolve_s3_region", lambda bucket: f"where {bucket} is")
    filesystems.find(parse("s3://bucket/run?anonymous=true"))
    assert given == {"allow_delayed_open": True, "anonymous": True, "region": "where bucket is"}
    given.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:1")
    filesystems.find(parse("s3://bucket/run"))
    assert given == {"allow_delayed_open": True, "endpoint_override": "http://host:1"}
    filesystems.find(parse("s3://bucket/run?endpoint_override=other:2"))
    assert given["endpoint_override"] == "other:2"


def test_google_buckets() -> None:
    """No server: what is checked is that the system is made as asked, and that it gives up in the time it is given."""
    uri = "gs://anonymous@bucket/run?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    found = filesystems.find(parse(uri))
    assert (found.root, type(found.system)) == ("bucket/run", pyarrow.fs.GcsFileSystem)
    with pytest.raises(StoreError, match=r"gs://anonymous@bucket/run: open: "):
        Store.open(uri)


def test_an_endpoint_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.endpoint}")
    store = Store.open(f"s3://{BUCKET}/from-environment", create=True)
    assert store.uri == f"s3://{BUCKET}/from-environment"
    store.probe()


def test_a_place_is_made_only_when_asked_for_and_buckets_never(s3: S3Server) -> None:
    uri = s3.uri()
    with pytest.raises(NotFoundError, match="nothing is there; expected a store"):
        Store.open(uri)
    with pytest.raises(NotFoundError, match="nothing is there"):
        open_checkpoint(uri)
    assert not is_checkpoint(uri)
    assert Store.open(uri, create=True).checkpoints() == []
    assert Store.open(uri).checkpoints() == []
    with pytest.raises(NotFoundError, match="no committed checkpoint"):
        open_checkpoint(uri)
    with pytest.raises(NotFoundError, match="no bucket 'elsewhere'"):
        Store.open(uri.replace(BUCKET, "elsewhere"), create=True)
    Store.open(uri.replace(BUCKET, "made-for-me") + "&allow_bucket_creation=true", create=True).probe()
    with s3.system.open_output_stream(f"{BUCKET}/object") as stream:
        stream.write(b"x")
    with pytest.raises(NotFoundError, match="is an object"):
        Store.open(s3.uri("object"), create=True)


def test_checkpoints_and_stores_are_opened_by_uri(s3: S3Server) -> None:
    uri = s3.uri()
    store = Store.open(uri, create=True)
    write(store, identity(1), tensors(1))
    write(store, identity(2), tensors(2))
    assert Store.open(store.uri).uri == store.uri
    place, _, query = uri.partition("?")
    assert open_checkpoint(uri).id == identity(2)
    for name in (checkpoint(identity(1)), "my favourite"):
        if name == "my favourite":
            _copy(s3, place, checkpoint(identity(1)), name)
        one = f"{place}/{name.replace(' ', '%20')}?{query}"
        assert is_checkpoint(one)
        with open_checkpoint(one) as stored:
            assert (stored.id, stored.name, stored.location) == (identity(1), name, f"{place}/{name}")
            assert equal(read(stored), tensors(1))
        report = verify(one)
        assert (report.ok, [v.name for v in report.verdicts]) == (True, [name])
    assert [v.name for v in verify(uri, every=True).verdicts] == [checkpoint(identity(s)) for s in (2, 1)]
    summary = summarize_store(Store.open(uri))
    assert [c.id for c in summary.checkpoints] == [identity(2), identity(1)]
    assert all(c.created_s > 1.7e9 for c in summary.checkpoints)


def _copy(s3: S3Server, place: str, source: str, target: str) -> None:
    root = place.removeprefix("s3://")
    for info in s3.system.get_file_info(pyarrow.fs.FileSelector(f"{root}/{source}", recursive=True)):
        if info.type is pyarrow.fs.FileType.File:
            s3.system.copy_file(info.path, info.path.replace(source, target))


def test_bytes_in_flight_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow queues what the network has not taken yet, without limit, until the stream is flushed."""
    monkeypatch.setattr(object_store, "IN_FLIGHT_BYTES", 1000)
    drained = []
    monkeypatch.setattr(FlakyStream, "flush", lambda self: drained.append(len(self._content)))
    file = flaky_back_end(str(tmp_path))[0].create(("file",))
    for size in (400, 400, 400, 100, 2000, 10):
        file.write(bytes(size))
    file.sync()
    assert drained == [1200, 3300]


def test_a_directory_of_objects_is_for_the_owner_and_has_no_pipes(tmp_path: Path) -> None:
    store = Store.open(f"file+object://{tmp_path}/parent/store", create=True)
    assert (tmp_path / "parent" / "store").stat().st_mode & 0o777 == 0o700
    write(store, identity(1), tensors())
    commit = tmp_path / "parent" / "store" / checkpoint(identity(1)) / "COMMIT"
    commit.unlink()
    os.mkfifo(commit)
    assert "expected a regular file" in store.broken()[0][1]
