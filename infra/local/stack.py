"""The local stack as a whole: up, down, status. Everything it keeps is under one folder, its home."""

from __future__ import annotations

import shlex
import shutil
import sysconfig
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault  # nosec B411 # our own supervisor's socket

from infra.local import provision, supervisor
from infra.local.files import locked, write_whole
from infra.local.ports import LOOPBACK, USUAL, choose_ports
from infra.local.services import Service, local_services
from infra.local.watch import (
    NAMES,
    PortLostError,
    Report,
    ServiceStatus,
    infos,
    log_path,
    served_names,
    status_of,
    wait_until_it_serves,
)
from infra.passwords import PARTS, make_passwords, shell_lines
from infra.settings import (
    DEFAULT_BUCKET,
    FOREIGN_KEYS,
    PROJECT_ROOT,
    Settings,
    activate,
    credentials_path,
    environment,
    external_parts,
    home,
    load_settings,
    read_settings_file,
    read_state,
    wants_authentication,
    write_state,
)
from training.errors import InfrastructureError, UserError

START_SECONDS = 180.0
MIN_FREE_BYTES = 2**30
MAX_LOST_PORTS = len(USUAL)
WANTED = "is_wanted"
"""Noted from `up` to `down`."""
LATER = ("worker", "reaper", "monitor", "prometheus", "alertmanager")
"""They would only fail until the servers are there, or tell of those that are not there yet."""


def up(report: Report) -> Settings:
    """Have every service running and healthy; what runs already is left alone.

    Raises `UserError` (a configured port is taken, the disk is full) and `InfrastructureError` naming the service that
    does not come up, its log's end and where the log is.
    """
    folder = home()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder / "up.lock"):
        return _up_on_free_ports(folder, report)


def revive(report: Report) -> None:
    """`up` after the supervisor was killed; not if the stack was brought down since. Raises as `up`."""
    folder = home()
    with locked(folder / "up.lock"):
        if read_state(folder).get(WANTED):
            _up_on_free_ports(folder, report)


def _up_on_free_ports(folder: Path, report: Report) -> Settings:
    require_free_disk(shutil.disk_usage(folder).free, folder)
    lost: set[int] = set()
    while True:
        try:
            return _up(folder, report, lost=lost)
        except PortLostError as error:  # another stack starts on this machine just now: choose again
            if len(lost) >= MAX_LOST_PORTS:
                raise
            lost.add(error.port)


def _up(folder: Path, report: Report, *, lost: Collection[int]) -> Settings:
    was_running = supervisor.is_running(folder)
    if not was_running:
        _clear(folder, report)
    _write_addresses(folder, was_running=was_running, lost=lost)
    settings = load_settings()
    activate(settings)
    services = {service.name: service for service in _services(settings)}
    _begin(settings, services, report, was_running=was_running)
    if not all(status.healthy for status in status_of(folder, services.values())):
        _bring_up(settings, services, report)
    provision.provision(settings, report)
    return settings


def _clear(folder: Path, report: Report) -> None:
    """Away with what outlived its supervisor: it would hold the ports and the databases."""
    num_killed = supervisor.stop(folder)
    if num_killed:
        report(f"killed {num_killed} processes that had outlived their supervisor")


def _write_addresses(folder: Path, *, was_running: bool, lost: Collection[int]) -> None:
    """Write down the ports, and where others find the services that run here."""
    file = read_settings_file()
    last = read_state(folder).get("ports", {})
    served = served_names(folder, last) if was_running else set()
    ports = choose_ports(last, file.get("ports", {}), served=served, lost=lost)
    addresses = {
        "s3": {"endpoint": f"http://{LOOPBACK}:{ports['s3']}", "bucket": DEFAULT_BUCKET},
        "mlflow": {"uri": f"http://{LOOPBACK}:{ports['mlflow']}"},
        "prefect": {"api_url": f"http://{LOOPBACK}:{ports['prefect']}/api"},
    }
    local = {part: address for part, address in addresses.items() if part not in external_parts(file)}
    passwords = [part for part in PARTS if part in local] if wants_authentication() else []
    if was_running and read_state(folder).get("passwords", []) != passwords:
        raise UserError("[stack] authentication was changed: `unbroken down`, then `unbroken up` again")
    make_passwords(folder, passwords)
    write_state(folder, {"ports": ports, WANTED: True, "passwords": passwords, **local})


def _begin(settings: Settings, services: Mapping[str, Service], report: Report, *, was_running: bool) -> None:
    """Start the supervisor, or bring the running one to settings that have changed."""
    folder = settings.home
    supervisor.write_config(folder, [_section(folder, service) for service in services.values()])
    _write_shell_environment(settings)
    _write_dvc_remote(settings)
    if was_running:  # always: an `up` that was interrupted may have written what it did not apply
        if supervisor.apply_config(folder, NAMES):
            report("the settings have changed: restarted what they concern")
    else:
        report("starting the supervisor")
        supervisor.start(folder)


def _bring_up(settings: Settings, services: Mapping[str, Service], report: Report) -> None:
    folder = settings.home
    _start_stopped(folder)
    _wait(settings, services, "s3", report)
    provision.create_bucket(settings)
    _wait(settings, services, "prefect", report)
    with ThreadPoolExecutor(1) as pool:
        provisioned = pool.submit(provision.provision, settings, report)
        _wait(settings, services, "mlflow", report)
        provisioned.result()
    for name in LATER:
        if name in services:
            _start(folder, name)
    for name in LATER:  # of whose ports another stack that starts just now may have taken one, too
        _wait(settings, services, name, report)


def _services(settings: Settings) -> list[Service]:
    external = external_parts(read_settings_file())
    return local_services(settings, read_state(settings.home)["ports"], external)


def _section(folder: Path, service: Service) -> str:
    later = service.name in LATER
    return supervisor.program_section(
        service.name,
        service.command,
        log=log_path(folder, service.name),
        environment=service.environment,
        directory=folder,
        options={
            "autorestart": "true",
            "autostart": str(not later).lower(),
            "startretries": "10",
            "stopwaitsecs": "10",
        },
    )


def _wait(settings: Settings, services: Mapping[str, Service], name: str, report: Report) -> None:
    """For a service that runs here; an existing server is not waited for."""
    if name in services:
        wait_until_it_serves(settings.home, services[name], report, timeout_seconds=START_SECONDS)


def _start_stopped(folder: Path) -> None:
    """Start services that gave up."""
    for name, info in infos(folder).items():
        if info["statename"] in ("FATAL", "EXITED", "STOPPED") and name not in LATER:
            _start(folder, name)


def _start(folder: Path, name: str) -> None:
    try:
        with supervisor.calls():
            supervisor.remote(folder).startProcess(name, False)
    except Fault as fault:
        if "ALREADY_STARTED" not in str(fault):
            raise InfrastructureError(f"service {name!r} cannot be started: {fault}") from fault


def down() -> bool:
    """Stop everything and leave no process; the data stays. False if nothing ran."""
    folder = home()
    if not folder.is_dir():
        return False
    with locked(folder / "up.lock"):
        ran = supervisor.supervisor_process(folder) is not None or bool(supervisor.stack_processes(folder))
        supervisor.stop(folder)
        ports = read_state(folder).get("ports")
        if ports:  # kept for next time; addresses where nobody listens are not
            write_state(folder, {"ports": ports})
        return ran


def status() -> list[ServiceStatus]:
    """Every local service. Raises `InfrastructureError` if the stack was never up."""
    settings = load_settings()
    activate(settings)
    return status_of(settings.home, _services(settings)) if read_state(settings.home) else []


def status_json() -> list[dict[str, Any]]:
    return [asdict(service) for service in status()]


def monitor_url() -> str:
    """Where the monitor shows what it sees. Raises `InfrastructureError` if the stack does not run."""
    port = read_state(home()).get("ports", {}).get("monitor")
    if port is None or not read_state(home()).get(WANTED):
        raise InfrastructureError("the local stack is not running: start it with `unbroken up` (or `make up`)")
    return f"http://{LOOPBACK}:{port}"


def require_free_disk(free_bytes: int, folder: Path) -> None:
    """Raises `UserError` if the disk under the stack's folder is nearly full."""
    if free_bytes < MIN_FREE_BYTES:
        raise UserError(
            f"only {free_bytes / 2**20:.0f} MiB are free under {folder}, and the stack needs at least"
            f" {MIN_FREE_BYTES / 2**20:.0f}: free some, or set UNBROKEN_HOME to a folder on another disk"
        )


def _write_shell_environment(settings: Settings) -> None:
    """For `source .unbroken/env`. It names the credentials' file, and holds no secret itself."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment(settings).items())]
    if settings.s3_is_local:  # as `activate` does
        lines.append(f"unset {' '.join(FOREIGN_KEYS)}")
    lines += shell_lines(settings.home, settings.passwords)
    lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"')
    write_whole(settings.home / "env", "\n".join(lines) + "\n")


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
