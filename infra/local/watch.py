"""What can be seen of the running services: their processes, whether they answer, who has their ports."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local import supervisor
from infra.local.ports import is_free, listening_ports
from infra.local.services import Service
from training.errors import InfrastructureError

NAMES = frozenset({"s3", "mlflow", "prefect", "worker", "reaper", "keeper", "monitor", "prometheus", "alertmanager"})
POLL_SECONDS = 0.2
Report = Callable[[str], None]


class PortLostError(InfrastructureError):
    """Somebody else took the service's port between its choice and its use."""

    def __init__(self, service: str, port: int) -> None:
        super().__init__(f"port {port} of {service} was taken by somebody else meanwhile")
        self.port = port


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """What is known of one service."""

    name: str
    state: str
    healthy: bool
    url: str
    log: str
    pid: int | None


def infos(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What the supervisor knows of each service."""
    with supervisor.calls():
        found = supervisor.remote(folder).getAllProcessInfo()
    return {info["name"]: info for info in found if info["name"] == info["group"] in NAMES}


def serves(service: Service, info: Mapping[str, Any] | None) -> bool:
    """Whether the service's own process answers, and not another stack's that has its port."""
    if info is None or info["statename"] != "RUNNING":
        return False
    if service.port is not None and service.port not in _ports_of(info):
        return False
    return service.is_healthy()


def _ports_of(info: Mapping[str, Any]) -> set[int]:
    try:
        return listening_ports(psutil.Process(info["pid"])) if info["pid"] else set()
    except psutil.NoSuchProcess:
        return set()


def served_names(folder: Path, ports: Mapping[str, int]) -> set[str]:
    """The services that listen on their ports, or are about to."""
    found = {name: info for name, info in infos(folder).items() if name in ports}
    return {name for name, info in found.items() if ports[name] in _ports_of(info) or _is_starting(info, ports[name])}


def _is_starting(info: Mapping[str, Any], port: int) -> bool:
    return info["statename"] in ("STARTING", "RUNNING") and is_free(port)


def status_of(folder: Path, services: Collection[Service]) -> list[ServiceStatus]:
    known = infos(folder) if supervisor.is_running(folder) else {}

    def look(service: Service) -> ServiceStatus:
        info = known.get(service.name)
        return ServiceStatus(
            name=service.name,
            state=info["statename"].lower() if info else "stopped",
            healthy=serves(service, info),
            url=service.url,
            log=str(log_path(folder, service.name)),
            pid=info["pid"] or None if info else None,
        )

    with ThreadPoolExecutor(max(1, len(services))) as pool:
        return list(pool.map(look, services))


def wait_until_it_serves(folder: Path, service: Service, report: Report, *, timeout_seconds: float) -> None:
    """Raises `InfrastructureError` naming the service, its log and the log's end if it does not come up."""
    deadline = time.monotonic() + timeout_seconds
    while not serves(service, info := infos(folder).get(service.name)):
        state = str(info["statename"]) if info else "UNKNOWN"
        if service.port is not None and _is_lost(folder, service.port):
            raise PortLostError(service.name, service.port)
        if state == "FATAL" or time.monotonic() > deadline:
            raise InfrastructureError(_does_not_come_up(folder, service.name, state))
        time.sleep(POLL_SECONDS)
    report(f"{service.name} is up at {service.url}")


def _is_lost(folder: Path, port: int) -> bool:
    """The port is in use, but not by this stack. Looked at twice, since a service may just be leaving it."""
    if is_free(port):
        return False
    is_ours = any(port in listening_ports(process) for process in supervisor.stack_processes(folder))
    return not is_ours and not is_free(port)


def log_path(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _does_not_come_up(folder: Path, name: str, state: str) -> str:
    log = log_path(folder, name)
    tail = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
    return f"service {name!r} does not come up ({state}); its log is {log} and ends with:\n  " + "\n  ".join(tail)
