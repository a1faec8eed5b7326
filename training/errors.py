"""Every way to fail has a name, and the names are split by who must act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class UnbrokenError(Exception):
    """Root of all errors that this project raises on purpose; its message is written for a reader."""

    exit_code: ClassVar[int] = 1


class UserError(UnbrokenError):
    """The input is wrong: whoever wrote the preset, the recipe or the command must act. Never retried."""

    exit_code = 2


class InfrastructureError(UnbrokenError):
    """A server, disk or network is away or full: whoever runs the machines must act. Worth a retry."""

    exit_code = 3


class MissingError(InfrastructureError):
    """No object has this key."""


class DeterministicError(UnbrokenError):
    """The same input will fail the same way again: whoever wrote the recipe must act. Never retried."""

    exit_code = 4

    def __init__(self, message: str = "", *, records: Sequence[str] = ()) -> None:
        """`records`: ids of those that each make it fail, and without which it would not."""
        super().__init__(message)
        self.records = tuple(records)


class FencedError(UnbrokenError):
    """A newer token owns the run: this process must stop and write nothing more."""

    exit_code = 5


class DamagedError(UnbrokenError):
    """Stored bytes do not match their digest. The message names the object."""

    exit_code = 6


class UntrustedError(DamagedError):
    """A stored document is not signed by a key of this process, and is not believed. The message names it and says
    what to do. It may be whole: nothing is deleted, quarantined or made again for it."""


class OutOfMemoryError(UnbrokenError):
    """Memory ran out again and again: whoever sized the run must act."""

    exit_code = 7


class RedDrillError(UnbrokenError):
    """A drill found a promise broken, or could not show that it was kept."""

    exit_code = 8


class OvertakenError(UnbrokenError):
    """Somebody else changed first what this was judged against. Nothing was done; the message says who."""

    exit_code = 9


class RefusedError(UnbrokenError):
    """The gate refused a model. The message has its reasons."""

    exit_code = 10


class CancelledError(UnbrokenError):
    """A person asked the run to stop."""

    exit_code = 130


def error_of(kind: str, message: str, records: Sequence[str] = ()) -> UnbrokenError:
    """The error that a record names by its class; the root of all for a name that is none of them."""
    if kind == DeterministicError.__name__:
        return DeterministicError(message, records=records)
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, UnbrokenError):
        return found(message)
    return UnbrokenError(f"{kind}: {message}")
