"""supervisord: its configuration, how to start it, how to talk to it, and how to find what outlived it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from xmlrpc.client import Fault, ProtocolError  # nosec B411 # our own supervisor's socket

import psutil

from infra.local.files import write_whole
from training.errors import InfrastructureError, UserError

STACK_MARK = "UNBROKEN_STACK_ID"
"""Only supervisord sets this, to a hash of the home folder: so what outlived a killed supervisord can be found."""

START_SECONDS = 120.0
"""At most: one that ends before is noticed at once."""
STOP_SECONDS = 40.0
SHUTDOWN_STATE = 6  # supervisor.xmlrpc.Faults
SIGNS = ('"', "'", "\n", " ;", " #")
"""What supervisord's configuration cannot hold in a value."""
NOT_RUNNING = "the local engine is not running: start it with `unbroken up` (or `make up`)"


def stack_id(home: Path) -> str:
    return hashlib.sha256(str(home).encode()).hexdigest()[:16]


def socket_path(home: Path) -> Path:
    """Short, since a Unix socket's path may have 107 bytes at most; and the same whatever TMPDIR is."""
    return Path("/tmp") / f"unbroken-{os.getuid()}-{stack_id(home)}" / "supervisor.sock"


def _make_socket_folder(home: Path) -> None:
    """Only its owner may enter it. A link, or somebody else's folder, would hand the stack to a stranger."""
    folder = socket_path(home).parent
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InfrastructureError(f"{folder} belongs to another user: remove it")
    folder.chmod(0o700)


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
        "directory": _escaped(str(directory)),
        "environment": variables,
        "redirect_stderr": "true",
        "stdout_logfile": _escaped(str(log)).replace("{node}", "%(process_num)d"),
        "stdout_logfile_maxbytes": "20MB",
        "stdout_logfile_backups": "2",
        "stopasgroup": "true",
        "killasgroup": "true",
        **options,
    }
    return f"[program:{name}]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items())


def _escaped(value: str) -> str:
    if any(sign in value for sign in SIGNS):
        raise UserError(f"{value!r}: the local stack can have no quote, line end, ' ;' or ' #' in a path or address")
    return value.replace("%", "%%")


def write_config(home: Path, programs: list[str]) -> bool:
    """The main configuration, which includes the jobs from their own files. Returns whether it changed."""
    path = home / "supervisord.conf"
    folder = _escaped(str(home))
    if "%" in folder:  # it expands some paths twice
        raise UserError(f"{home}: the local stack's folder can have no '%' in its path: set UNBROKEN_HOME to another")
    head = f"""[supervisord]
logfile = {folder}/logs/supervisord.log
pidfile = {folder}/supervisord.pid
identifier = unbroken-{stack_id(home)}
environment = {STACK_MARK}="{stack_id(home)}"
childlogdir = {folder}/logs
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
    if path.exists() and path.read_text() == text:
        return False
    write_whole(path, text)
    return True


def start(home: Path) -> None:
    """Start supervisord on its configuration, away from this process's session and terminal."""
    _make_socket_folder(home)
    log = (home / "logs" / "supervisord.start.log").open("w")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(home / "supervisord.conf")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=home,
            env=_start_environment(),
        )
    deadline = time.monotonic() + START_SECONDS
    while not is_running(home):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = (home / "logs" / "supervisord.start.log").read_text()[-1000:]
            raise InfrastructureError(f"the supervisor did not start: {tail or 'see ' + str(home / 'logs')}")
        time.sleep(0.05)


def _start_environment() -> dict[str, str]:
    """Ours, in which `python` is the one that this is installed for: flow runs are started by that name."""
    found = {name: value for name, value in os.environ.items() if name != STACK_MARK}
    return {**found, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', os.defpath)}"}


def remote(home: Path) -> Any:
    """supervisord's XML-RPC interface (http://supervisord.org/api.html)."""
    from xmlrpc.client import ServerProxy  # nosec B411 # our own supervisor's socket

    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{socket_path(home)}")
    return cast(Any, ServerProxy("http://localhost", transport=transport)).supervisor


@contextmanager
def calls() -> Iterator[None]:
    """Around calls of `remote`: a supervisord that does not answer is an error that says what to do."""
    try:
        yield
    except (OSError, HTTPException, ProtocolError) as error:
        raise InfrastructureError(f"{NOT_RUNNING} ({error})") from error
    except Fault as fault:
        if fault.faultCode == SHUTDOWN_STATE:
            raise InfrastructureError(f"{NOT_RUNNING} (it is being stopped)") from fault
        raise


def is_running(home: Path) -> bool:
    try:
        return bool(remote(home).getState()["statename"] == "RUNNING")
    except (OSError, HTTPException, ProtocolError, Fault):
        return False


def apply_config(home: Path, services: Collection[str]) -> bool:
    """Bring a running supervisord to its configuration; whether it was another. Jobs are the launcher's."""
    supervisor = remote(home)
    with calls():
        ((added, changed, removed),) = supervisor.reloadConfig()
        for name in {*changed, *removed} & set(services):
            supervisor.stopProcessGroup(name)
            supervisor.removeProcessGroup(name)
        for name in {*added, *changed} & set(services):
            supervisor.addProcessGroup(name)
    return bool({*added, *changed, *removed} & set(services))


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


def stop(home: Path) -> int:
    """Stop supervisord and all that it runs; returns how many processes it had not stopped, and that were killed."""
    supervisor = supervisor_process(home)
    if supervisor is not None:
        with contextlib.suppress(psutil.Error):
            supervisor.terminate()
        _, alive = psutil.wait_procs([supervisor], timeout=STOP_SECONDS)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)
    num_killed = kill_orphans(home)
    shutil.rmtree(socket_path(home).parent, ignore_errors=True)
    return num_killed
