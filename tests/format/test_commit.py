"""COMMIT and epoch records: what is written is read, and every kind of wrong has its own error."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.errors import CorruptionError, FormatError, VersionError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format.commit import Commit, ObjectsFile, Part, decode_commit, decode_record, encode_commit, encode_record

DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
EPOCHS = st.builds(Epoch, st.integers(0, 10**18 - 1), st.text("0123456789abcdef", min_size=16, max_size=16))
STEPS = st.integers(0, 10**18 - 1)
SIZES = st.integers(0, 2**50)
PARTS = st.lists(
    st.builds(Part, st.integers(0, 10**6 - 1), st.integers(0, 2**20), SIZES, DIGEST, st.lists(SIZES, max_size=4)),
    max_size=4,
    unique_by=lambda part: part.writer,
).map(lambda parts: sorted(parts, key=lambda part: part.writer))
COMMITS = st.builds(Commit, st.text(max_size=40), STEPS, EPOCHS, PARTS, st.builds(ObjectsFile, SIZES, DIGEST))


@given(COMMITS)
@settings(max_examples=100, deadline=None)
def test_commit_round_trip(commit: Commit) -> None:
    data = encode_commit(commit)
    assert decode_commit(data) == commit
    members = json.loads(data)
    assert (members["format"], members["version"], members["step"]) == ("ckptd checkpoint", 1, commit.step)
    assert data.endswith(b'"}\n')
    assert data.count(b"\n") == 1


@given(EPOCHS, st.none() | st.builds(SnapshotId, EPOCHS, STEPS))
@settings(max_examples=50, deadline=None)
def test_record_round_trip(epoch: Epoch, point: SnapshotId | None) -> None:
    record = EpochRecord(epoch, point)
    assert decode_record(encode_record(record)) == record


COMMIT = Commit("job", 5, Epoch(1, "0" * 16), [Part(0, 3, 10, "a" * 64, [1, 2])], ObjectsFile(1, "b" * 64))


def resealed(**changes: object) -> bytes:
    members = {**json.loads(encode_commit(COMMIT)), **changes}
    del members["sha256"]
    body = json.dumps(members, separators=(",", ":")).encode()[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def test_resealing_is_what_encoding_does() -> None:
    assert decode_commit(resealed()) == COMMIT


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, 1.0, [1]])
def test_other_versions_are_named(version: object) -> None:
    with pytest.raises(VersionError, match="this build reads version 1"):
        decode_commit(resealed(version=version))


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "x" * 5000},
        {"job": 1},
        {"step": -1},
        {"step": 10**18},
        {"step": 1.5},
        {"step": True},
        {"epoch": [1, "0" * 15]},
        {"epoch": [-1, "0" * 16]},
        {"epoch": "1-" + "0" * 16},
        {"parts": None},
        {"parts": [{"writer": 0}]},
        {"parts": [{"writer": 0, "rows": 2**28, "size": 1, "sha256": "a" * 64, "data": []}]},
        {"parts": [{"writer": 10**6, "rows": 1, "size": 1, "sha256": "a" * 64, "data": []}]},
        {"parts": [{"writer": i, "rows": 2**26, "size": 1, "sha256": "a" * 64, "data": []} for i in range(3)]},
        {"parts": [{"writer": 1 - i, "rows": 0, "size": 1, "sha256": "a" * 64, "data": []} for i in range(2)]},
        {"parts": [{"writer": 0, "rows": 0, "size": 1, "sha256": "A" * 64, "data": []}]},
        {"parts": [{"writer": 0, "rows": 0, "size": 1, "sha256": "a" * 64, "data": [2**51]}]},
        {"objects": {"size": 1}},
        {"objects": {"size": 1, "sha256": "short"}},
        {"extra": 1},
        {"format": "ckptd epoch"},
    ],
)
def test_members_out_of_range(changes: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        decode_commit(resealed(**changes))


def test_a_flipped_bit_is_corruption_and_an_edit_too() -> None:
    data = encode_commit(COMMIT)
    with pytest.raises(CorruptionError, match="SHA-256"):
        decode_commit(data.replace(b'"step":5', b'"step":6'))
    with pytest.raises(CorruptionError):
        decode_commit(data.rstrip(b"\n"))
    with pytest.raises(FormatError):
        decode_record(data)
