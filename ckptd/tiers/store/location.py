"""Where a store is: a path, or the URI of a place that keeps objects, in one canonical spelling.

The spelling names jobs and appears in logs and messages, so it holds no secret: a URI with credentials in it is
refused, and they are taken from the environment instead. Opens nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse

from ckptd.core.errors import ConfigError

OBJECT_SUFFIX = "+object"
"""`file+object:///path`: a directory that is written like an object store."""

_ALIASES = {"gcs": "gs"}
_SECRET = re.compile(r"key|secret|token|passw|credential|signature|\bsas", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Location:
    """A canonical place. `scheme` is "" for a path of the file system; `segments` are the names on the way, decoded;
    `options` are the URI's query, sorted."""

    scheme: str
    authority: str
    segments: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The place without the options, for messages."""
        path = "/".join(self.segments)
        if not self.scheme:
            return "/" + path
        return f"{self.scheme}://{self.authority}" + ("/" + urllib.parse.quote(path) if path else "")

    @property
    def uri(self) -> str:
        """The canonical spelling; `parse` gives it back unchanged."""
        query = urllib.parse.urlencode(self.options, safe=":/", quote_via=urllib.parse.quote)
        return self.text + ("?" + query if query else "")

    @property
    def name(self) -> str:
        """The last segment; "" for a root or a bucket."""
        return self.segments[-1] if self.segments else ""

    @property
    def parent(self) -> Location:
        """The place that holds this one."""
        return dataclasses.replace(self, segments=self.segments[:-1])


def parse(place: str | os.PathLike[str]) -> Location:
    """The location that a path or URI names. ConfigError for what is neither, or holds a secret."""
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _local("", text, text)
    if scheme in ("file", "file" + OBJECT_SUFFIX):
        host, slash, tail = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"store {text!r}: names the host {host!r}; expected {scheme}:///path")
        return _local("" if scheme == "file" else scheme, text, urllib.parse.unquote(slash + tail))
    return _remote(text)


def _local(scheme: str, text: str, path: str) -> Location:
    if not path or "\0" in path:
        raise ConfigError(f"store {text!r}: expected a path or a URI such as file:///path or s3://bucket/path")
    absolute = os.path.realpath(os.path.expanduser(path))
    return Location(scheme, "", tuple(filter(None, absolute.split("/"))))


def _remote(text: str) -> Location:
    shown = text.partition("://")[0] + "://..."
    try:
        split = urllib.parse.urlsplit(text)
        query = urllib.parse.parse_qsl(split.query, keep_blank_values=True, strict_parsing=bool(split.query))
    except ValueError as error:
        raise ConfigError(f"store {shown}: is not a URI: {error}") from None
    user, at, _ = split.netloc.rpartition("@")
    secrets = [name for name, _ in query if _SECRET.search(name)]
    if ":" in user or (at and split.scheme == "s3"):
        secrets.append("user:password@")
    if secrets:
        raise ConfigError(
            f"store {shown}: the URI holds credentials ({', '.join(secrets)}), which would end up in names of jobs "
            "and logs. Put them into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS ...) or a credentials file"
        )
    path = split.path.removeprefix("/").removesuffix("/")
    segments = tuple(urllib.parse.unquote(segment) for segment in path.split("/")) if path else ()
    if any(s in ("", ".", "..") or "/" in s or "\0" in s for s in segments) or split.fragment:
        raise ConfigError(f"store {text!r}: expected a plain path, without empty parts, `.`, `..` and `#`")
    if len(dict(query)) != len(query):
        raise ConfigError(f"store {text!r}: an option is given twice")
    return Location(_ALIASES.get(split.scheme, split.scheme), split.netloc, segments, tuple(sorted(query)))
