"""`python -m infra.local.mlflow_server DATABASE COMMAND…`: become COMMAND, once what a killed predecessor left is gone.

That is children that hold its port, and a database whose making it did not finish: MLflow would fail on them for ever.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path

from infra.local.supervisor import STACK_MARK, kill_group

CONTENT = {
    "experiments": "SELECT 1 FROM experiments LIMIT 1",
    "registered_models": "SELECT 1 FROM registered_models LIMIT 1",
}


def main() -> None:
    kill_group(os.environ[STACK_MARK], os.environ["SUPERVISOR_GROUP_NAME"])
    remove_unfinished(Path(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


def remove_unfinished(database: Path) -> None:
    """Remove an SQLite database of MLflow's that never served: its making can only be begun anew.

    MLflow makes its first experiment after all tables, before it serves. So where there is none, and no model, there is
    nothing.
    """
    if database.exists() and not _holds_something(database):
        for path in (database, *(database.with_name(database.name + end) for end in ("-journal", "-wal", "-shm"))):
            path.unlink(missing_ok=True)


def _holds_something(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        return any(connection.execute(ask).fetchone() is not None for table, ask in CONTENT.items() if table in tables)


if __name__ == "__main__":
    main()
