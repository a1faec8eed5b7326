"""The running local stack: `up` again changes nothing, it heals, it is closed to others, and its secret stays one."""

from __future__ import annotations

import configparser
import contextlib
import json
import shutil
import socket
import stat
import subprocess
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from infra.local import supervisor
from infra.local.ports import LOOPBACK
from infra.local.services import WORK_POOL
from infra.local.stack import MIN_FREE_BYTES, require_free_disk
from infra.settings import credentials_path, read_state
from tests.conftest import UNBROKEN, Stack
from tests.infra.probes import environment_for, family, kill_9, listeners, post_json, service_pid
from tests.waiting import wait_until
from training.errors import UserError

MONITORING = ("prometheus", "alertmanager") if shutil.which("prometheus") and shutil.which("amtool") else ()
SERVICES = ("s3", "mlflow", "prefect", "worker", "reaper", "keeper", "monitor", *MONITORING)


def test_up_again_starts_nothing(stack: Stack) -> None:
    def pids() -> dict[str, int]:
        return {name: service_pid(stack.home, name) for name in SERVICES}

    def is_quiet() -> bool:
        """Whoever is slow to answer just now is waited for, and that is said."""
        done = stack.command("up", "--json")
        assert done.returncode == 0, done.stderr
        return done.stderr == ""

    before = wait_until(lambda: found if all((found := pids()).values()) else None, what="all services to run")
    wait_until(is_quiet, what="nothing to be done, so that nothing is said")
    assert pids() == before


def test_status_tells_scripts_each_service(stack: Stack) -> None:
    def when_well() -> str:
        done = stack.command("status", "--json")
        return done.stdout if done.returncode == 0 else ""

    services = json.loads(wait_until(when_well, what="all services to answer in time"))
    assert [service["name"] for service in services] == list(SERVICES)
    assert all(service["healthy"] and service["state"] == "running" for service in services)
    assert all(Path(service["log"]).is_file() for service in services)


def test_killed_services_are_restarted(stack: Stack) -> None:
    """The others are killed in tests/flows/test_deaths.py."""
    names = ("s3", "worker")
    killed_at = datetime.now(UTC)
    killed = {name: service_pid(stack.home, name) for name in names}
    for pid in killed.values():
        kill_9(pid)
    for name in names:
        wait_until(
            lambda name=name: _serves_again(stack, name, killed[name], killed_at),  # type: ignore[misc]
            what=f"{name} to serve again from a new process",
        )
    wait_until(lambda: stack.command("status").returncode == 0, what="the whole stack to be well")


def _serves_again(stack: Stack, name: str, killed: int, killed_at: datetime) -> bool:
    """The new process itself answers, and not a child that the killed one left behind."""
    info = supervisor.remote(stack.home).getProcessInfo(name)
    if info["statename"] != "RUNNING" or info["pid"] == killed:
        return False
    if name == "worker":
        return _heartbeat(stack) > killed_at
    port = read_state(stack.home)["ports"][name]
    holders = {pid for pid, _, where in listeners(stack.home) if where == port}
    return bool(holders) and holders <= family(info["pid"])


def _heartbeat(stack: Stack) -> datetime:
    with contextlib.suppress(OSError):
        workers = post_json(f"{stack.settings.prefect_api_url}/work_pools/{WORK_POOL}/workers/filter", {})
        return max(datetime.fromisoformat(worker["last_heartbeat_time"]) for worker in workers)
    return datetime.fromtimestamp(0, UTC)


def test_everything_listens_on_loopback_alone_and_where_it_was_told_to(stack: Stack) -> None:
    ports = read_state(stack.home)["ports"]
    found = list(listeners(stack.home))
    assert {port for _, _, port in found} >= {ports["s3"], ports["mlflow"], ports["prefect"], ports["filer"]}
    assert {address for _, address, _ in found} == {LOOPBACK}
    services = set().union(*(family(service_pid(stack.home, name)) for name in ("s3", "mlflow", "prefect")))
    unknown = {port for pid, _, port in found if pid in services} - set(ports.values())
    assert not unknown, "ports that nobody chose can be another stack's"


def test_no_web_page_may_start_flows(stack: Stack) -> None:
    """By a script of somebody's page in a browser on this machine: the server must allow it to, and does not."""
    url = stack.settings.prefect_api_url
    for origin, expected in (("https://example.org", None), (url.removesuffix("/api"), url.removesuffix("/api"))):
        wants = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(f"{url}/flows/", headers=wants, method="OPTIONS")
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                allowed = reply.headers["Access-Control-Allow-Origin"]
        except urllib.error.HTTPError as error:
            allowed = error.headers["Access-Control-Allow-Origin"]
        assert allowed == expected


def test_secret_is_in_two_private_files_and_nowhere_else(stack: Stack) -> None:
    private = {credentials_path(stack.home), stack.home / "s3-identities.json"}
    secret = _secret(stack).encode()
    files = [path for path in stack.home.rglob("*") if path.is_file()]
    assert {path for path in files if _holds(path, secret)} == private
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    names = {path.relative_to(stack.home).as_posix() for path in files}
    assert names >= {"env", "stack.json", "supervisord.conf", "prefect/prefect.db", "logs/s3.log"}, (
        "they were looked at"
    )


def test_secret_is_in_no_command_line_nor_environment(stack: Stack) -> None:
    """Anybody on the machine may read the one, and every crash report holds the other."""
    secret = _secret(stack)
    seen = []
    for process in supervisor.stack_processes(stack.home):
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append(" ".join([*process.cmdline(), *process.environ().values()]))
    assert len(seen) >= len(SERVICES)
    assert not [text for text in seen if secret in text]


def _secret(stack: Stack) -> str:
    credentials = configparser.ConfigParser()
    credentials.read(credentials_path(stack.home))
    return credentials["default"]["aws_secret_access_key"]


def _holds(path: Path, secret: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError):  # a log that was just rotated
        return secret in path.read_bytes()
    return False


def test_up_refuses_a_configured_port_that_is_taken(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with socket.create_server((LOOPBACK, 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run(
            [UNBROKEN, "up"],
            env=environment_for(home, UNBROKEN_PREFECT_PORT=port),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert f"port {port}, configured for prefect, is in use by" in done.stderr
    assert supervisor.supervisor_process(home) is None
    assert not supervisor.stack_processes(home)


def test_nearly_full_disk_is_said_with_a_way_out(tmp_path: Path) -> None:
    require_free_disk(MIN_FREE_BYTES, tmp_path)
    with pytest.raises(UserError, match=r"only 12 MiB are free under .*UNBROKEN_HOME") as caught:
        require_free_disk(12 * 2**20, tmp_path)
    assert str(tmp_path) in str(caught.value)
