"""`python -m flows.monitor PORT LOOK_SECONDS`: look at runs and servers for ever, and serve what was seen.

GET / for people, /metrics for Prometheus; POST /alerts for Alertmanager. It keeps nothing, so it may be killed at any
time.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from flows.monitor.alerts import prefect_events
from flows.monitor.app import make_app
from flows.monitor.board import Board
from flows.monitor.runs import Runs, write_targets
from flows.monitor.servers import PrefectServer, ServersLook
from infra.engines import make_launcher
from infra.local.ports import LOOPBACK
from infra.local.services import alertmanager_url
from tasks.stack import open_stack
from training.errors import UnbrokenError

log = logging.getLogger("flows.monitor")

MAX_LOOK_SECONDS = 10.0
"""What is older counts as late on the pages."""
TARGETS = Path("monitoring") / "nodes.json"
"""In the stack's folder: the agents, for Prometheus's file discovery."""


def keep_looking(part: str, look: Callable[[], None], *, every_seconds: float) -> None:
    """As often as Prometheus asks. A look at a run reads its record and what it told since."""
    while True:
        try:
            look()
        except UnbrokenError as error:
            log.warning("%s could not be looked at: %s", part, error)
        time.sleep(every_seconds)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    port, look_seconds = int(sys.argv[1]), min(float(sys.argv[2]), MAX_LOOK_SECONDS)
    settings, store = open_stack()
    runs = Runs(settings, store, make_launcher(settings))
    board = Board(settings, store.location, runs)
    servers = ServersLook(settings, maybe_alertmanager=alertmanager_url(settings))

    def look_at_runs() -> None:
        runs.look()
        write_targets(settings.home / TARGETS, runs.targets())

    def look_at_all_servers() -> None:
        board.servers = servers.look()

    def take(message: Any) -> None:
        PrefectServer(settings.prefect_api_url).post("events", prefect_events(message, runs.flow_runs))

    server = uvicorn.Server(
        uvicorn.Config(
            make_app(board, take),
            host=LOOPBACK,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
    )
    parts = {
        "runs": lambda: keep_looking("runs", look_at_runs, every_seconds=look_seconds),
        "servers": lambda: keep_looking("servers", look_at_all_servers, every_seconds=look_seconds),
        "http": server.run,
    }
    threads = [threading.Thread(name=name, target=part, daemon=True) for name, part in parts.items()]
    for thread in threads:
        thread.start()
    while all(thread.is_alive() for thread in threads):
        time.sleep(look_seconds)
    sys.exit("a thread has died: see above")  # a bug, or the port is taken; a new process begins anew


if __name__ == "__main__":
    main()
