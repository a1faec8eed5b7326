"""The local stack as a whole: up, down, status. Everything it keeps is under one folder, its home."""

from __future__ import annotations

import fcntl
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault

from infra.local import provision, supervisor
from infra.local.ports import choose_ports
from infra.local.services import Service, local_services
from infra.settings import (
    DEFAULT_BUCKET,
    PROJECT_ROOT,
    Settings,
    activate,
    credentials_path,
    environment,
    home,
    load_settings,
    read_settings_file,
    read_state,
    write_state,
)
from training.errors import InfrastructureError, UserError

START_SECONDS = 180.0
MIN_FREE_BYTES = 2**30
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """What is known of one service."""

    name: str
    state: str
    healthy: bool
    url: str
    log: str


def up(report: Report) -> Settings:
    """Have every service running and healthy; what runs already is left alone.

    Raises `UserError` (a configured port is taken, the disk is full) and `InfrastructureError` naming the service that
    does not come up, its log's end and where the log is.
    """
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    require_free_disk(shutil.disk_usage(folder).free, folder)
    with (folder / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second `up` would take the first's services for orphans
        return _up(folder, report)


def _up(folder: Path, report: Report) -> Settings:
    if not supervisor.is_running(folder):
        _begin(folder, report)
    settings = load_settings()
    activate(settings)
    services = {service.name: service for service in _services(settings)}
    if all(status.healthy for status in status_of(folder, list(services.values()))):
        provision.provision(settings, report)
        return settings
    _start_stopped(folder)
    _wait(folder, _picked(services, "s3"), report)
    provision.create_bucket(settings)
    _wait(folder, _picked(services, "prefect"), report)
    with ThreadPoolExecutor(1) as pool:
        provisioned = pool.submit(provision.provision, settings, report)
        _wait(folder, _picked(services, "mlflow"), report)
        provisioned.result()
    _start(folder, "worker")
    _wait(folder, _picked(services, "worker"), report)
    return settings


def _begin(folder: Path, report: Report) -> None:
    """Choose ports, write what others need to find the stack, and start the supervisor."""
    killed = supervisor.kill_orphans(folder)
    if killed:
        report(f"killed {killed} processes that had outlived their supervisor")
    file = read_settings_file()
    ports = choose_ports(read_state(folder).get("ports", {}), file.get("ports", {}))
    state = {
        "ports": ports,
        "s3": {"endpoint": f"http://127.0.0.1:{ports['s3']}", "bucket": DEFAULT_BUCKET},
        "mlflow": {"uri": f"http://127.0.0.1:{ports['mlflow']}"},
        "prefect": {"api_url": f"http://127.0.0.1:{ports['prefect']}/api"},
    }
    write_state(folder, state)
    settings = load_settings()
    activate(settings)
    _write_shell_environment(settings)
    _write_dvc_remote(settings)
    supervisor.write_config(folder, [_section(folder, service) for service in _services(settings)])
    report("starting the supervisor")
    supervisor.start(folder)


def _services(settings: Settings) -> list[Service]:
    import os

    file = read_settings_file()
    external = {
        part
        for part, variable in (("s3", "S3_ENDPOINT"), ("mlflow", "MLFLOW_URI"), ("prefect", "PREFECT_API_URL"))
        if file.get(part) or os.environ.get(f"UNBROKEN_{variable}")
    }
    return local_services(settings, read_state(settings.home)["ports"], frozenset(external))


def _section(folder: Path, service: Service) -> str:
    later = service.name == "worker"  # it would only fail until Prefect's server is there
    return supervisor.program_section(
        service.name,
        service.command,
        log=folder / "logs" / f"{service.name}.log",
        environment=service.environment,
        directory=folder,
        options={
            "autorestart": "true",
            "autostart": str(not later).lower(),
            "startretries": "10",
            "stopwaitsecs": "10",
        },
    )


def _picked(services: Mapping[str, Service], name: str) -> list[Service]:
    return [services[name]] if name in services else []


def _start_stopped(folder: Path) -> None:
    """Start services that gave up."""
    for info in supervisor.remote(folder).getAllProcessInfo():
        if info["statename"] in ("FATAL", "EXITED", "STOPPED") and info["group"] == info["name"] != "worker":
            _start(folder, info["name"])


def _start(folder: Path, name: str) -> None:
    try:
        supervisor.remote(folder).startProcess(name, False)
    except Fault as fault:
        if "ALREADY_STARTED" not in str(fault):
            raise InfrastructureError(f"service {name!r} cannot be started: {fault}") from fault


def _wait(folder: Path, services: list[Service], report: Report) -> None:
    deadline = time.monotonic() + START_SECONDS
    for service in services:
        while not service.is_healthy():
            state = _state(folder, service.name)
            if state == "FATAL" or time.monotonic() > deadline:
                raise InfrastructureError(_does_not_come_up(folder, service.name, state))
            time.sleep(0.2)
        report(f"{service.name} is up at {service.url}")


def _state(folder: Path, name: str) -> str:
    return str(supervisor.remote(folder).getProcessInfo(name)["statename"])


def _does_not_come_up(folder: Path, name: str, state: str) -> str:
    log = folder / "logs" / f"{name}.log"
    tail = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
    return f"service {name!r} does not come up ({state}); its log is {log} and ends with:\n  " + "\n  ".join(tail)


def down() -> bool:
    """Stop everything and leave no process; the data stays. False if nothing ran."""
    folder = home()
    ran = supervisor.supervisor_process(folder) is not None or bool(supervisor.stack_processes(folder))
    supervisor.stop(folder)
    state = read_state(folder)
    if state:  # the ports are kept for next time; addresses where nobody listens are not
        write_state(folder, {"ports": state["ports"]})
    return ran


def status() -> list[ServiceStatus]:
    """Every local service. Raises `InfrastructureError` if the stack was never up."""
    settings = load_settings()
    return status_of(settings.home, _services(settings)) if read_state(settings.home) else []


def status_of(folder: Path, services: list[Service]) -> list[ServiceStatus]:
    running = supervisor.is_running(folder)
    with ThreadPoolExecutor(len(services)) as pool:
        healths = list(pool.map(lambda service: running and service.is_healthy(), services))
    return [
        ServiceStatus(
            name=service.name,
            state=_state(folder, service.name).lower() if running else "stopped",
            healthy=healthy,
            url=service.url,
            log=str(folder / "logs" / f"{service.name}.log"),
        )
        for service, healthy in zip(services, healths, strict=True)
    ]


def status_json() -> list[dict[str, Any]]:
    return [asdict(service) for service in status()]


def require_free_disk(free_bytes: int, folder: Path) -> None:
    """Raises `UserError` if the disk under the stack's folder is nearly full."""
    if free_bytes < MIN_FREE_BYTES:
        raise UserError(
            f"only {free_bytes / 2**20:.0f} MiB are free under {folder}, and the stack needs at least"
            f" {MIN_FREE_BYTES / 2**20:.0f}: free some, or set UNBROKEN_HOME to a folder on another disk"
        )


def _write_shell_environment(settings: Settings) -> None:
    """For `source .unbroken/env`. It names the credentials' file, and holds no secret itself."""
    lines = [f"export {name}='{value}'" for name, value in sorted(environment(settings).items())]
    lines.append(f"export PATH='{sysconfig.get_path('scripts')}':\"$PATH\"")
    (settings.home / "env").write_text("\n".join(lines) + "\n")


def _write_dvc_remote(settings: Settings) -> None:
    """Tell DVC where the store is, in the file that git does not see."""
    folder = PROJECT_ROOT / ".dvc"
    if (folder / "config").exists() and settings.home.parent == PROJECT_ROOT:
        (folder / "config.local").write_text(dvc_remote(settings))


def dvc_remote(settings: Settings) -> str:
    """The remote `stack` of .dvc/config, as far as it differs from machine to machine."""
    lines = ["['remote \"stack\"']", f"    url = s3://{settings.s3_bucket}/{settings.s3_prefix}dvc"]
    if settings.s3_endpoint:
        lines.append(f"    endpointurl = {settings.s3_endpoint}")
    if settings.s3_is_local:
        lines.append(f"    credentialpath = {credentials_path(settings.home)}")
    return "\n".join(lines) + "\n"
