"""Which engine the settings name."""

from __future__ import annotations

from infra.launcher import Launcher
from infra.local.launcher import LocalLauncher
from infra.settings import Settings


def make_launcher(settings: Settings) -> Launcher:
    """So far the local engine is the only one."""
    return LocalLauncher(settings.home)
