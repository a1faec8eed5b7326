"""Every way to fail has a name, and the names are split by who must act."""

from __future__ import annotations

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


class DeterministicError(UnbrokenError):
    """The same input will fail the same way again: whoever wrote the recipe must act. Never retried."""

    exit_code = 4


class FencedError(UnbrokenError):
    """A newer token owns the run: this process must stop and write nothing more."""

    exit_code = 5


class DamagedError(UnbrokenError):
    """Stored bytes do not match their digest. The message names the object."""

    exit_code = 6


class CancelledError(UnbrokenError):
    """A person asked the run to stop."""

    exit_code = 130
