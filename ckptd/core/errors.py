"""Every error ckptd raises. Each message names the thing, what was expected, what was found, and what to do.

One root, `CkptdError`, for `except`; it is never raised itself.
"""

from __future__ import annotations


class CkptdError(Exception):
    """Root of all errors raised by ckptd."""

    def __init__(self, *args: object) -> None:
        if type(self) is CkptdError:
            raise TypeError("CkptdError is a root for `except`; raise one of its subclasses")
        super().__init__(*args)


class FormatError(CkptdError):
    """Bytes that are not what the format document says: foreign, truncated, hostile."""


class CorruptionError(FormatError):
    """Bytes that were ours once and have changed: a checksum does not match."""


class VersionError(CkptdError):
    """A format or protocol version this build does not know."""


class NotFoundError(CkptdError):
    """A checkpoint, step, key or job that does not exist."""


class UnrecoverableError(CkptdError):
    """State was announced safe and no tier can give it back whole."""


class MismatchError(CkptdError):
    """A checkpoint does not fit the state it is loaded into; every difference is listed."""


class ConfigError(CkptdError):
    """Options, environment or state that cannot work; found before anything is written."""


class DaemonError(CkptdError):
    """The daemon cannot be reached, refused, or failed."""


class StoreError(CkptdError):
    """A store cannot be read or written."""


class DeadlineError(CkptdError, TimeoutError):
    """Something did not happen within its deadline."""
