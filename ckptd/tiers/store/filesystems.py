"""Which pyarrow file system serves a URI, and what must be known of it.

Credentials come from the environment, in the way of each system; options that are not secret from the URI. No bucket is
made unless the URI says so.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from ckptd.core.errors import ConfigError
from ckptd.tiers.store.location import OBJECT_SUFFIX, Location

GCS_RETRY_S = 60.0
"""How long the Google client repeats a request that fails; its own default is 15 minutes."""

_NATIVE = ("abfs", "abfss", "hdfs", "viewfs")


class ObjectSystem(NamedTuple):
    """A file system and the path of the store in it.

    buckets: the first part of a path must exist. directories: they must be made before files in them. flat: a listing
    names only directories that were made, so one of everything must be asked for to see the others. threads: several
    threads may read one open file at a time.
    """

    system: pafs.FileSystem
    root: str
    buckets: bool = False
    directories: bool = True
    flat: bool = False
    threads: bool = True


def find(location: Location) -> ObjectSystem:
    """The file system of a location. Raises ConfigError for a scheme or option that is not known."""
    if location.scheme == "file" + OBJECT_SUFFIX:
        return ObjectSystem(pafs.LocalFileSystem(), "/" + "/".join(location.segments))
    if location.scheme in ("s3", "gs"):
        if not location.authority:
            raise ConfigError(f"store {location.uri}: names no bucket; expected {location.scheme}://bucket/path")
        google = location.scheme == "gs"
        root = "/".join((location.authority.rpartition("@")[2], *location.segments))
        system = _gcs(location) if google else _s3(location)
        return ObjectSystem(system, root, buckets=True, directories=False, flat=google)
    if location.scheme in _NATIVE:
        system, root = pafs.FileSystem.from_uri(location.uri)
        return ObjectSystem(system, root, directories=not location.scheme.startswith("abfs"))
    return _fsspec(location)


def _s3(location: Location) -> pafs.FileSystem:
    options = _typed(
        location,
        {
            "region": str,
            "scheme": str,
            "endpoint_override": str,
            "tls_ca_file_path": str,
            "force_virtual_addressing": _boolean,
            "anonymous": _boolean,
            "allow_bucket_creation": _boolean,
        },
    )
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    known = "endpoint_override" in options or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if "region" not in options and not known:
        options["region"] = pafs.resolve_s3_region(location.authority)
    # Delayed: a small object is one request, not three.
    return pafs.S3FileSystem(allow_delayed_open=True, **options)


def _gcs(location: Location) -> pafs.FileSystem:
    kinds = {"scheme": str, "endpoint_override": str, "project_id": str, "retry_limit_seconds": float}
    options = _typed(location, kinds | {"anonymous": _boolean})
    if location.authority.startswith("anonymous@"):
        options["anonymous"] = True
    limit = datetime.timedelta(seconds=options.pop("retry_limit_seconds", GCS_RETRY_S))
    return pafs.GcsFileSystem(retry_time_limit=limit, **options)


def _fsspec(location: Location) -> ObjectSystem:
    try:
        import fsspec
    except ImportError:
        raise _unknown(location, "fsspec is not installed") from None
    if location.scheme not in fsspec.available_protocols():
        raise _unknown(location, "neither pyarrow nor fsspec knows this scheme")
    try:
        # A cached listing would hide what other nodes write.
        system, root = fsspec.core.url_to_fs(
            location.text, use_listings_cache=False, skip_instance_cache=True, **dict(location.options)
        )
    except ImportError as error:
        raise _unknown(location, str(error)) from None
    return ObjectSystem(pafs.PyFileSystem(pafs.FSSpecHandler(system)), root, threads=False)


def _typed(location: Location, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The options as values. ConfigError for one that is not in `kinds` or does not fit."""
    values = {}
    for name, text in location.options:
        if name not in kinds:
            raise ConfigError(f"store {location.uri}: unknown option {name!r}; known: {', '.join(sorted(kinds))}")
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise ConfigError(f"store {location.uri}: option {name}={text!r} is not a value of its kind") from None
    return values


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _unknown(location: Location, reason: str) -> ConfigError:
    return ConfigError(
        f"store {location.uri}: scheme {location.scheme!r} cannot be used: {reason}. Expected a path, file://, s3://, "
        "gs://, or another scheme of pyarrow or fsspec"
    )
