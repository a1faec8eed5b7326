"""Slurm's own commands, with typed errors: who must act if one fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.errors import InfrastructureError, UserError

ANSWER_SECONDS = 60.0
AWAY = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Connection timed out",
    "Zero Bytes were transmitted",
    "Transport endpoint is not connected",
    "slurm_persist_conn_open",
    "Unable to establish controller machine",
)
"""What a command says whose controller does not answer. That is over sooner or later; all else is a refusal."""


class Refusal(UserError):
    """Slurm will not do what it was asked to: its own words."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """`folder` holds them (None: they are found on PATH)."""

    folder: Path | None = None

    @staticmethod
    def at(folder: str) -> Commands:
        """As settings name it: empty if they are on PATH."""
        return Commands(folder=Path(folder) if folder else None)

    def run(self, command: str, *arguments: str, environment: Mapping[str, str] | None = None, given: str = "") -> str:
        """What the command prints; `given` is its standard input.

        Raises `InfrastructureError` if the controller is away, `Refusal` if it refuses, `UserError` if there is no
        such command here.
        """
        path = str(self.folder / command) if self.folder else command
        try:
            done = subprocess.run(
                [path, *arguments],
                input=given,
                env={**os.environ, **(environment or {})},
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"there is no command {path}: run this where Slurm's commands are, or name their folder as"
                " [slurm] commands in unbroken.toml"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise InfrastructureError(f"Slurm did not answer {command} within {ANSWER_SECONDS:.0f} s") from error
        if done.returncode == 0:
            return done.stdout
        words = (done.stderr or done.stdout).strip()
        if any(word in words for word in AWAY):
            raise InfrastructureError(f"Slurm's controller does not answer {command}: {words}")
        raise Refusal(words)
