"""How tests look at a local stack from outside: its processes, its sockets, its servers' answers."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.local import supervisor


def service_pid(home: Path, name: str) -> int:
    """The supervised process of a service or of a job's node (`KEY:node0`); 0 if there is none just now."""
    return int(supervisor.remote(home).getProcessInfo(name)["pid"])


def kill_9(pid: int) -> None:
    """`kill -9`, and wait until it has happened."""
    victim = psutil.Process(pid)
    victim.kill()
    _, alive = psutil.wait_procs([victim], timeout=120)
    assert not alive


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def family(pid: int) -> set[int]:
    """A process and all that descends from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return set()


def listeners(home: Path) -> Iterator[tuple[int, str, int]]:
    """(process, address, port) of every socket on which a process of the stack takes calls."""
    for process in supervisor.stack_processes(home):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.laddr and connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    yield process.pid, connection.laddr.ip, connection.laddr.port


def post_json(url: str, document: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, data=json.dumps(document).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def environment_for(home: Path, **variables: str) -> dict[str, str]:
    """This process's environment, but for what names another stack; then `variables`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UNBROKEN_", "AWS_", "PREFECT_", "MLFLOW_"))
    }
    return {**inherited, "UNBROKEN_HOME": str(home), **variables}
