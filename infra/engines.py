"""Which engine the settings name."""

from __future__ import annotations

from infra.launcher import Launcher
from infra.settings import Settings


def make_launcher(settings: Settings) -> Launcher:
    if settings.engine == "slurm":
        from infra.slurm.launcher import SlurmLauncher
        from infra.store import store_location
        from training.s3.objectstore import Store

        return SlurmLauncher(settings.home, Store(store_location(settings)), settings.slurm)
    from infra.local.launcher import LocalLauncher

    return LocalLauncher(settings.home)
