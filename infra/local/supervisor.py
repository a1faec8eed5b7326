"""supervisord: its configuration, how to start it, how to talk to it, and how to find what outlived it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import psutil

from training.errors import InfrastructureError

STACK_MARK = "UNBROKEN_STACK_ID"
"""Only supervisord sets this, to a hash of the home folder: so what outlived a killed supervisord can be found."""

START_SECONDS = 15.0


def stack_id(home: Path) -> str:
    return hashlib.sha256(str(home).encode()).hexdigest()[:16]


def socket_path(home: Path) -> Path:
    """Short, since a Unix socket's path may have 107 bytes at most; in a folder that only its owner may enter."""
    folder = Path(tempfile.gettempdir()) / f"unbroken-{os.getuid()}-{stack_id(home)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InfrastructureError(f"{folder} belongs to another user: remove it")
    return folder / "supervisor.sock"


def program_section(
    name: str,
    command: tuple[str, ...],
    *,
    log: Path,
    environment: Mapping[str, str],
    directory: Path,
    options: Mapping[str, str],
) -> str:
    """One [program:…] section. `%` is supervisord's own sign and is doubled; `{node}` becomes the process number."""
    variables = ",".join(f'{key}="{_escaped(value)}"' for key, value in environment.items())
    lines = {
        "command": " ".join(f'"{_escaped(part)}"'.replace("{node}", "%(process_num)d") for part in command),
        "directory": str(directory),
        "environment": variables,
        "redirect_stderr": "true",
        "stdout_logfile": str(log).replace("{node}", "%(process_num)d"),
        "stdout_logfile_maxbytes": "20MB",
        "stdout_logfile_backups": "2",
        "stopasgroup": "true",
        "killasgroup": "true",
        **options,
    }
    return f"[program:{name}]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items())


def _escaped(value: str) -> str:
    return value.replace("%", "%%").replace('"', '\\"')


def write_config(home: Path, programs: list[str]) -> Path:
    """The main configuration; jobs of the local engine are included from their own files."""
    path = home / "supervisord.conf"
    head = f"""[supervisord]
logfile = {home}/logs/supervisord.log
pidfile = {home}/supervisord.pid
identifier = unbroken-{stack_id(home)}
environment = {STACK_MARK}="{stack_id(home)}"
childlogdir = {home}/logs
minfds = 1024

[unix_http_server]
file = {socket_path(home)}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[include]
files = jobs/*.conf

"""
    text = head + "\n".join(programs)
    (home / "jobs").mkdir(parents=True, exist_ok=True)
    (home / "logs").mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def start(home: Path) -> None:
    """Start supervisord on its configuration, away from this process's session and terminal."""
    log = (home / "logs" / "supervisord.start.log").open("w")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(home / "supervisord.conf")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=home,
        )
    deadline = time.monotonic() + START_SECONDS
    while not is_running(home):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = (home / "logs" / "supervisord.start.log").read_text()[-1000:]
            raise InfrastructureError(f"the supervisor did not start: {tail or 'see ' + str(home / 'logs')}")
        time.sleep(0.05)


def remote(home: Path) -> Any:
    """supervisord's XML-RPC interface (http://supervisord.org/api.html)."""
    from xmlrpc.client import ServerProxy

    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{socket_path(home)}")
    return cast(Any, ServerProxy("http://localhost", transport=transport)).supervisor


def is_running(home: Path) -> bool:
    try:
        return bool(remote(home).getState()["statename"] == "RUNNING")
    except (OSError, ConnectionError):
        return False


def stack_processes(home: Path) -> list[psutil.Process]:
    """Every process that this stack's supervisord started, or that those started, dead parent or not."""
    return _marked_processes(stack_id(home))


def _marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(STACK_MARK) == mark:
                found.append(process)
    return found


def kill_group(mark: str, group: str) -> None:
    """Kill what a group's processes left behind: children that ignored SIGTERM, or that left the process group.

    `mark` is the stack's (`stack_id`).
    """
    while left := [p for p in _marked_processes(mark) if _group_of(p) == group]:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def _group_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("SUPERVISOR_GROUP_NAME")
    return None


def supervisor_process(home: Path) -> psutil.Process | None:
    """supervisord itself, which does not carry its own mark."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((home / "supervisord.pid").read_text()))
        if str(home / "supervisord.conf") in process.cmdline():
            return process
    return None


def kill_orphans(home: Path) -> int:
    """Kill what outlived a killed supervisord; returns how many processes that were."""
    processes = stack_processes(home)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    return len(processes)


def stop(home: Path) -> None:
    """Stop supervisord and all that it runs, and leave no process."""
    supervisor = supervisor_process(home)
    if is_running(home):
        remote(home).shutdown()
    if supervisor is not None:
        _, alive = psutil.wait_procs([supervisor], timeout=40)
        for process in alive:
            process.kill()
    kill_orphans(home)
    shutil.rmtree(socket_path(home).parent, ignore_errors=True)
