"""The services of the local stack, as a table: what each one runs, and how to see that it is well."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import sysconfig
import tomllib
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.fetching import fetch
from infra.local.ports import LOOPBACK
from infra.monitoring.render import seconds_of, windows_of, write_configs
from infra.passwords import prefect_headers
from infra.settings import (
    PROJECT_ROOT,
    Settings,
    credentials_path,
    environment,
    monitoring_settings,
    read_state,
    settings_path,
)
from training.errors import InfrastructureError

WORK_POOL = "local"
WORK_QUEUES = ("urgent", "default", "background")
"""Of the pool, by priority: a later one's runs start when no earlier one's wait."""
MAX_RUNS_AT_ONCE = 4
"""A limit of the pool, not of a deployment: those hold leases, and end a healthy run that could not renew its own."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service. `is_healthy` may be asked at any time."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    is_healthy: Callable[[], bool]
    url: str
    port: int | None = None


def local_services(settings: Settings, ports: Mapping[str, int], external: frozenset[str]) -> list[Service]:
    """Every service that no existing server replaces (`external` names those parts)."""
    services = [
        s3_service(settings.home, ports),
        mlflow_service(settings, ports["mlflow"]),
        prefect_service(settings, ports["prefect"]),
        worker_service(settings),
        reaper_service(settings),
        keeper_service(settings),
        monitor_service(settings, ports["monitor"]),
        *monitoring_services(settings, ports),
    ]
    return [service for service in services if service.name not in external]


def s3_service(home: Path, ports: Mapping[str, int]) -> Service:
    """SeaweedFS in one process. Its inner ports have no passwords, so all are bound to loopback."""
    flags = {
        "dir": str(home / "s3"),
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.telemetry": "false",
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "admin.port": ports["admin"],
        "admin.port.grpc": ports["admin_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": str(_s3_identities(home)),
        "s3.autoCreateBucket": "false",
        "webdav": "false",
        "admin.ui": "false",
    }
    (home / "s3").mkdir(parents=True, exist_ok=True)
    url = f"http://{LOOPBACK}:{ports['s3']}"
    return Service(
        name="s3",
        command=(_script("weed"), f"-logdir={home / 'logs'}", "mini", *(f"-{k}={v}" for k, v in flags.items())),
        is_healthy=lambda: answers(f"{url}/healthz"),
        url=url,
        port=ports["s3"],
    )


def _s3_identities(home: Path) -> Path:
    """Generated once: the only user of the local store, in SeaweedFS's form and in AWS's. Nobody else may read them."""
    import json

    path = home / "s3-identities.json"
    if path.exists() and credentials_path(home).exists():
        return path
    access, secret = secrets.token_hex(10), secrets.token_urlsafe(30)
    identity = {
        "name": "unbroken",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_private(path, json.dumps({"identities": [identity]}))
    lines = f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
    _write_private(credentials_path(home), lines)
    return path


def _write_private(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def mlflow_service(settings: Settings, port: int) -> Service:
    """MLflow on SQLite, artifacts proxied to S3; the other flags are in mlflow/server.toml."""
    policy = tomllib.loads((PROJECT_ROOT / "mlflow" / "server.toml").read_text())
    url = f"http://{LOOPBACK}:{port}"
    store = f"s3://{settings.s3_bucket}/{settings.s3_prefix}mlflow"
    database = settings.home / "mlflow.sqlite"
    return Service(
        name="mlflow",
        command=(
            *(sys.executable, "-m", "infra.local.mlflow_server", str(database)),
            *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{database}"),
            *("--artifacts-destination", store),
            *(("--app-name", "unbroken") if "mlflow" in settings.passwords else ()),
            *policy["flags"],
        ),
        environment={
            **policy["environment"],
            **environment(settings),
            **({"MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint} if settings.s3_endpoint else {}),
        },
        is_healthy=lambda: answers(f"{url}/health"),
        url=url,
        port=port,
    )


PREFECT_PACES = {
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT30S",
}
"""What an idle server looks after every five seconds, and nobody here waits for: it took a tenth of a core."""


def prefect_service(settings: Settings, port: int) -> Service:
    """Prefect's server on SQLite: for one machine; docs/architecture.md names Postgres beyond."""
    url = f"http://{LOOPBACK}:{port}"
    return Service(
        name="prefect",
        command=(_script("prefect"), "server", "start", "--host", LOOPBACK, "--port", str(port)),
        environment={
            **environment(settings),
            **PREFECT_PACES,
            "PREFECT_UI_API_URL": f"{url}/api",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url,  # else any page in a browser here may start flows
        },
        is_healthy=lambda: answers(f"{url}/api/health"),
        url=url,
        port=port,
    )


def worker_service(settings: Settings) -> Service:
    """Prefect's process worker, which starts flow runs as processes of its own."""

    def has_worker() -> bool:
        url = f"{settings.prefect_api_url}/work_pools/{WORK_POOL}"
        return answers(urllib.request.Request(url, headers=prefect_headers()), containing=b'"READY"')

    return Service(
        name="worker",
        command=(_script("prefect"), "worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", "local"),
        environment=environment(settings),
        is_healthy=has_worker,
        url=settings.prefect_ui_url + "/work-pools",
    )


def reaper_service(settings: Settings) -> Service:
    """Sets Prefect, MLflow and the engine right after a death (flows/reaper). Well while it runs: it serves nobody."""
    return Service(
        name="reaper",
        command=(sys.executable, "-P", "-m", "flows.reaper"),
        environment={**environment(settings), "PREFECT_CLIENT_MAX_RETRIES": "0"},  # it looks again anyway
        is_healthy=lambda: True,
        url=settings.prefect_ui_url,
    )


def keeper_service(settings: Settings) -> Service:
    """Has the stack up again if its supervisor is killed. Well while it runs: it serves nobody."""
    maybe_file = settings_path()
    return Service(
        name="keeper",
        command=(sys.executable, "-P", "-m", "infra.local.keeper"),
        environment={
            "UNBROKEN_HOME": str(settings.home),
            **(
                {"UNBROKEN_SETTINGS": str(maybe_file.resolve())} if maybe_file else {}
            ),  # whoever called `up` found it there
        },
        is_healthy=lambda: True,
        url="",
    )


def monitor_service(settings: Settings, port: int) -> Service:
    """What Prometheus reads of runs and servers (flows/monitor), as often as it does."""
    url = f"http://{LOOPBACK}:{port}"
    look_seconds = seconds_of(windows_of(monitoring_settings())["look"])
    return Service(
        name="monitor",
        command=(sys.executable, "-P", "-m", "flows.monitor", str(port), str(look_seconds)),
        environment=environment(settings),
        is_healthy=lambda: answers(f"{url}/metrics"),
        url=url,
        port=port,
    )


def monitoring_services(settings: Settings, ports: Mapping[str, int]) -> list[Service]:
    """Prometheus and Alertmanager, where both are installed."""
    programs = monitoring_programs()
    if not programs:
        return []
    folder = settings.home / "monitoring"
    digests = write_configs(folder, ports, monitoring_settings())
    commands = {
        "prometheus": (
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            "--storage.tsdb.retention.size=1GB",
        ),
        "alertmanager": (
            f"--config.file={folder / 'alertmanager.yaml'}",
            f"--storage.path={folder / 'alertmanager'}",
            "--cluster.listen-address=",
        ),
    }
    return [
        _monitoring_service(name, program, flags, digests[name], ports[name])
        for program, (name, flags) in zip(programs, commands.items(), strict=True)
    ]


def monitoring_programs() -> tuple[str, ...]:
    """Prometheus and Alertmanager; none, unless both are installed."""
    found = shutil.which("prometheus"), shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    return tuple(program for program in found if program) if all(found) else ()


def alertmanager_url(settings: Settings) -> str | None:
    """Of the stack's own, if it has one."""
    maybe_port = read_state(settings.home).get("ports", {}).get("alertmanager")
    return f"http://{LOOPBACK}:{maybe_port}" if maybe_port and monitoring_programs() else None


def _monitoring_service(name: str, program: str, flags: tuple[str, ...], digest: str, port: int) -> Service:
    url = f"http://{LOOPBACK}:{port}"
    return Service(
        name=name,
        command=(program, *flags, f"--web.listen-address={LOOPBACK}:{port}"),
        environment={"UNBROKEN_CONFIG": digest},  # another one is another section, with which it is started again
        is_healthy=lambda: answers(f"{url}/-/healthy"),
        url=url,
        port=port,
    )


def _script(name: str) -> str:
    """A command of this environment, which need not be on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise InfrastructureError(f"the command {name!r} is not installed: install the project again (`make install`)")
    return found


def answers(url: str | urllib.request.Request, *, containing: bytes = b"") -> bool:
    try:
        return containing in fetch(url, timeout=3)
    except OSError:
        return False
