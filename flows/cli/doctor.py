"""The doctor's checks: each says what it found, and what to do where that is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from infra.fetching import fetch
from infra.settings import Settings, activate, home, load_settings
from training.errors import InfrastructureError, UnbrokenError

MIN_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    is_good: bool
    found: str


def run_checks() -> list[Check]:
    """Every check, in order; one that cannot be made is wrong, with the reason."""
    checks = [
        check("python", _python),
        check("system", _system),
        check("memory", _memory),
        check("disk", _disk),
        check("torch", _torch),
    ]
    try:
        settings = load_settings()
    except UnbrokenError as error:
        return [*checks, Check(name="stack", is_good=False, found=str(error))]
    activate(settings)
    return [
        *checks,
        check("S3 storage", lambda: _storage(settings)),
        check("MLflow", lambda: _answers(f"{settings.mlflow_uri}/health")),
        check("Prefect", lambda: _answers(f"{settings.prefect_api_url}/health")),
        check("Prefect worker", lambda: _worker(settings)),
        check("engine", lambda: _engine(settings)),
    ]


def check(name: str, look: Callable[[], str]) -> Check:
    """What a look finds; or that it cannot be made, with the reason."""
    try:
        return Check(name=name, is_good=True, found=look())
    except (UnbrokenError, OSError, ValueError) as error:
        return Check(name=name, is_good=False, found=str(error))


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise InfrastructureError(f"{platform.python_version()}: use 3.11, 3.12 or 3.13")
    return platform.python_version()


def _system() -> str:
    if platform.system() != "Linux":
        raise InfrastructureError(f"{platform.system()}: only Linux is tested (agents need prctl)")
    return f"Linux {platform.machine()}, {os.cpu_count()} cores"


def _memory() -> str:
    total = psutil.virtual_memory().total
    if total < MIN_MEMORY_BYTES:
        raise InfrastructureError(f"{total / 2**30:.1f} GiB: the stack and two ranks need 4")
    return f"{total / 2**30:.1f} GiB"


def _disk() -> str:
    from infra.local.stack import require_free_disk

    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    require_free_disk(free, folder)
    return f"{free / 2**30:.1f} GiB free under {folder}"


def _torch() -> str:
    from training.environment import fingerprint

    return ", ".join(f"{name} {value}" for name, value in fingerprint().items())


def _storage(settings: Settings) -> str:
    """Also proves the conditional writes that every protocol here rests on."""
    from infra.store import store_location
    from training.s3.objectstore import Store

    store = Store(store_location(settings))
    store.probe()
    return f"{store.location.uri()} at {settings.s3_endpoint or 'AWS'}: create-only and If-Match writes honoured"


def _answers(url: str) -> str:
    fetch(url, timeout=5)
    return url


def _worker(settings: Settings) -> str:
    from infra.local.services import worker_service

    if not worker_service(settings).is_healthy():
        raise InfrastructureError("no worker serves the work pool 'local': see `unbroken status`")
    return "serves the work pool 'local'"


def _engine(settings: Settings) -> str:
    from infra.engines import make_launcher

    launcher = make_launcher(settings)
    launcher.find("none")
    return f"answers; {len(launcher.jobs())} jobs"
