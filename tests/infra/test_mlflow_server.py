"""An MLflow server that was killed while it made its database comes up again; one that has served keeps it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.mlflow_server import remove_unfinished
from infra.local.ports import LOOPBACK, free_port
from infra.local.services import answers
from infra.local.supervisor import STACK_MARK
from tests.waiting import wait_until


@contextlib.contextmanager
def server(database: Path, *before: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*before, *mlflow, "--backend-store-uri", f"sqlite:///{database}"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", STACK_MARK: str(database)}
        | {"SUPERVISOR_GROUP_NAME": "mlflow", "PYTHONPATH": str(Path.cwd())},
        cwd=database.parent,
        start_new_session=True,
    )
    try:
        yield process, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=120)


def ask(database: Path, question: str) -> list[tuple[str]]:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(question).fetchall()
    return []


def killed_amid_the_making(folder: Path) -> tuple[Path, list[tuple[str]]] | None:
    """A database that its server did not finish, and how far it came; None if it was done before the kill."""
    database = folder / os.urandom(4).hex() / "mlflow.sqlite"
    database.parent.mkdir()
    with server(database) as (process, _):
        wait_until(lambda: ask(database, "SELECT * FROM alembic_version"), what="the first tables")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=120)
    unfinished = ask(database, "SELECT * FROM alembic_version")
    assert unfinished, "killed amid the making"
    return None if ask(database, "SELECT * FROM experiments") else (database, unfinished)


def test_mlflow_killed_while_it_makes_its_database_comes_up_again(tmp_path: Path) -> None:
    database, unfinished = wait_until(lambda: killed_amid_the_making(tmp_path), what="one that was not quicker")

    with server(database, sys.executable, "-m", "infra.local.mlflow_server", str(database)) as (_, port):
        wait_until(lambda: answers(f"http://{LOOPBACK}:{port}/health"), what="MLflow to serve")
    assert ask(database, "SELECT * FROM alembic_version") != unfinished
    served = database.read_bytes()
    remove_unfinished(database)
    assert database.read_bytes() == served


@pytest.mark.parametrize(("table", "is_kept"), [("experiments", True), ("registered_models", True), ("runs", False)])
def test_database_in_which_somebody_made_something_is_kept(tmp_path: Path, table: str, is_kept: bool) -> None:
    """Experiments can be deleted for good, all of them, and models stay."""
    database = tmp_path / "mlflow.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for name in ("experiments", "registered_models", "runs"):
            connection.execute(f"CREATE TABLE {name} (id INTEGER)")
        connection.execute(f"INSERT INTO {table} VALUES (1)")
    remove_unfinished(database)
    assert database.exists() == is_kept
