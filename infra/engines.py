"""Which engine the settings name."""

from __future__ import annotations

from infra.launcher import Launcher
from infra.settings import Settings

QUEUE_SECONDS = 5.0
"""Slurm's queue is asked for at most so often by who follows a job: a controller has thousands of users."""


def make_launcher(settings: Settings) -> Launcher:
    if settings.engine == "slurm":
        from infra.slurm.launcher import SlurmLauncher
        from infra.store import store_location
        from training.s3.objectstore import Store

        store = Store(store_location(settings))
        return SlurmLauncher(settings.home, store, settings.slurm, max_age_seconds=QUEUE_SECONDS)
    from infra.local.launcher import LocalLauncher

    return LocalLauncher(settings.home)
