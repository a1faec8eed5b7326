"""How a site wants its jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Site:
    """[slurm] of unbroken.toml. What is empty is left to Slurm."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    commands: str = ""
    """The folder of Slurm's commands, if they are not on PATH."""
    priorities: Mapping[str, str] = field(default_factory=dict)
    """What each `launch.priority` is here: `partition=NAME` or `qos=NAME`."""
