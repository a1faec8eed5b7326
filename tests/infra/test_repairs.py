"""What goes wrong around a stack: a port lost to another one, two that write at once, a socket folder of a stranger."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.local import supervisor
from infra.local.files import locked, write_whole
from infra.local.ports import LOOPBACK, free_port, listening_ports
from infra.local.services import Service
from infra.local.watch import PortLostError, infos, served_names, serves, wait_until_it_serves
from infra.settings import read_state
from tests.conftest import Stack
from training.errors import InfrastructureError, UserError


def _claims(port: int) -> Service:
    """MLflow, as if it had been told to listen on `port`; whoever listens there answers."""
    return Service(name="mlflow", command=(), is_healthy=lambda: True, url="", port=port)


def test_port_that_somebody_else_took_is_noticed_although_it_answers(stack: Stack) -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        port = int(server.getsockname()[1])
        assert not serves(_claims(port), infos(stack.home)["mlflow"])
        with pytest.raises(PortLostError, match=str(port)):
            wait_until_it_serves(stack.home, _claims(port), lambda line: None, timeout_seconds=5)


def test_services_keep_the_ports_on_which_they_listen(stack: Stack) -> None:
    ports = read_state(stack.home)["ports"]
    assert serves(_claims(ports["mlflow"]), infos(stack.home)["mlflow"])
    served = served_names(stack.home, ports)
    assert served >= {"s3", "mlflow", "prefect", "monitor"}
    with socket.create_server((LOOPBACK, 0)) as server:
        lost = {**ports, "mlflow": int(server.getsockname()[1])}
        assert served_names(stack.home, lost) == served - {"mlflow"}


def test_shell_environment_is_what_a_shell_reads(stack: Stack) -> None:
    command = f"source {shlex.quote(str(stack.home / 'env'))} && echo $UNBROKEN_HOME $AWS_ACCESS_KEY_ID- && which weed"
    done = subprocess.run(
        ["bash", "-uc", command.replace("$AWS", "${AWS").replace("KEY_ID-", "KEY_ID-none}")],
        env={"PATH": os.environ["PATH"], "AWS_ACCESS_KEY_ID": "of another store"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[0] == f"{stack.home} none"


def test_locked_part_is_entered_one_after_another(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")

    def add(_: int) -> None:
        for _ in range(25):
            with locked(tmp_path / "folder" / "lock"):
                count.write_text(str(int(count.read_text()) + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert count.read_text() == "200"


def _take(path: Path) -> None:
    with locked(path):
        os.kill(os.getpid(), 9)


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_take, args=(tmp_path / "lock",))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -9
    with locked(tmp_path / "lock"):
        pass


def test_private_file_is_private_from_the_start(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "secret", mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_listening_ports_are_seen_of_this_process() -> None:
    import psutil

    with socket.create_server((LOOPBACK, 0)) as server:
        assert server.getsockname()[1] in listening_ports(psutil.Process())
    assert free_port() not in listening_ports(psutil.Process())
    gone = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(gone.pid)
    gone.kill()
    gone.wait()
    assert listening_ports(process) == set()


def test_socket_path_is_short_and_does_not_follow_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ("long" * 50)
    before = supervisor.socket_path(home)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert supervisor.socket_path(home) == before
    assert len(str(before)) < 100
    assert not before.parent.exists(), "looking makes no folder"


def test_socket_folder_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(supervisor, "socket_path", lambda home: tmp_path / "link" / "supervisor.sock")
    (tmp_path / "logs").mkdir()
    with pytest.raises(InfrastructureError, match="link"):
        supervisor.start(tmp_path)


@pytest.mark.parametrize("sign", ['"', "'", "\n", " ;", " #", "%"])
def test_home_that_the_supervisor_cannot_name_is_refused(tmp_path: Path, sign: str) -> None:
    with pytest.raises(UserError, match="can have no"):
        supervisor.write_config(tmp_path / f"a{sign}b", [])
    assert list(tmp_path.iterdir()) == []
