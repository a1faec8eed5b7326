"""`python -m flows.monitor PORT`: look at runs and servers for ever, and serve what was seen.

GET /metrics for Prometheus; POST /alerts for Alertmanager. It keeps nothing, so it may be killed at any time.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from flows.monitor.alerts import prefect_events
from flows.monitor.runs import Runs, write_targets
from flows.monitor.servers import PrefectServer, look_at_servers
from infra.engines import make_launcher
from infra.local.ports import LOOPBACK
from tasks.stack import open_stack
from training.errors import UnbrokenError, UserError
from training.runs.exposition import CONTENT_TYPE, Page

log = logging.getLogger("flows.monitor")

LOOK_SECONDS = 2.0
MAX_BODY_BYTES = 1 << 20
TARGETS = Path("monitoring") / "nodes.json"
"""In the stack's folder: the agents, for Prometheus's file discovery."""


class Board:
    """The newest page of each part, whoever looks at it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._pages: dict[str, str] = {}

    def put(self, part: str, page: Page) -> None:
        self._pages[part] = page.text()

    def text(self) -> str:
        disk, page = psutil.disk_usage(str(self._home)), Page()
        page.add("unbroken_stack_disk_bytes", disk.total, "Size of the disk under the stack's folder", {})
        page.add("unbroken_stack_disk_free_bytes", disk.free, "What is free there", {})
        return "".join([*self._pages.values(), page.text()])


def keep_looking(part: str, look: Callable[[], None]) -> None:
    while True:
        try:
            look()
        except UnbrokenError as error:
            log.warning("%s could not be looked at: %s", part, error)
        time.sleep(LOOK_SECONDS)


def make_handler(board: Board, take: Callable[[Any], None]) -> type[BaseHTTPRequestHandler]:
    """`take` is given what is posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, board.text(), CONTENT_TYPE)
            else:
                self._answer(404, "only /metrics and /alerts are here\n")

        def do_POST(self) -> None:
            try:
                take(self._posted())
            except UserError as error:
                self._answer(400, f"{error}\n")
            except OSError as error:  # Prefect is away: Alertmanager sends it again
                self._answer(503, f"{error}\n")
            else:
                self._answer(200, "")

        def _posted(self) -> Any:
            num_bytes = int(self.headers.get("Content-Length", "0"))
            if self.path != "/alerts" or not 0 < num_bytes <= MAX_BODY_BYTES:
                raise UserError(f"POST /alerts takes 1 to {MAX_BODY_BYTES} bytes")
            try:
                return json.loads(self.rfile.read(num_bytes))
            except (ValueError, RecursionError) as error:
                raise UserError(f"not JSON: {error}") from error

        def _answer(self, status: int, text: str, content_type: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: Prometheus asks every few seconds."""

    return Handler


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    settings, store = open_stack()
    runs, board = Runs(settings, store, make_launcher(settings)), Board(settings.home)

    def look_at_runs() -> None:
        board.put("runs", runs.look())
        write_targets(settings.home / TARGETS, runs.targets())

    def take(message: Any) -> None:
        PrefectServer(settings.prefect_api_url).post("events", prefect_events(message, runs.flow_runs))

    looks = {"runs": look_at_runs, "servers": lambda: board.put("servers", look_at_servers(settings))}
    watching = [
        threading.Thread(name=part, target=keep_looking, args=(part, look), daemon=True) for part, look in looks.items()
    ]
    server = ThreadingHTTPServer((LOOPBACK, int(sys.argv[1])), make_handler(board, take))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for thread in watching:
        thread.start()
    while all(thread.is_alive() for thread in watching):
        time.sleep(LOOK_SECONDS)
    sys.exit("a thread has died: see above")  # a bug; a new process begins anew


if __name__ == "__main__":
    main()
