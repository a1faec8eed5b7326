"""What the monitor makes of records, events, servers and messages. The store and the engine are stand-ins."""

from __future__ import annotations

import json
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from flows.monitor.agents import ask_agents, node_view
from flows.monitor.alerts import prefect_events
from flows.monitor.app import MAX_BODY_BYTES, make_app
from flows.monitor.board import Board
from flows.monitor.firing import alerts_in, ask_alertmanager
from flows.monitor.page import add_run
from flows.monitor.runs import write_targets
from flows.monitor.servers import PrefectServer, answers, ask_prefect
from flows.monitor.view import RunView, Servers
from infra.fetching import fetch
from tests.unit.status_views import VIEW
from training.cluster.links import Place
from training.errors import DamagedError, UserError
from training.runs.exposition import Page

MESSAGE = {
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "Stalled", "run": "0123456789ab"},
            "annotations": {"summary": "it stands"},
            "startsAt": "2026-01-01T00:00:00Z",
            "endsAt": "0001-01-01T00:00:00Z",
        }
    ]
}


def page_of(view: RunView) -> dict[str, dict[str, str]]:
    page = Page()
    add_run(page, view)
    found = {}
    for family in text_string_to_metric_families(page.text()):
        for sample in family.samples:
            found[sample.name] = {**sample.labels, "value": str(sample.value)}
    return found


def test_a_run_is_told_of() -> None:
    found = page_of(replace(VIEW, deadline_at=None))
    assert found["unbroken_run_active"]["value"] == "1.0"
    assert found["unbroken_run_step"]["value"] == "209.0"
    assert found["unbroken_run_checkpoint_timestamp_seconds"]["value"] == str(VIEW.checkpoint_at)
    assert found["unbroken_run_attempts_total"]["value"] == "2.0"
    assert found["unbroken_run_info"]["link"] == VIEW.links["Prefect"]
    assert found["unbroken_run_last_departure"]["node"] == "1"
    assert found["unbroken_run_failures_total"]["value"] == "1.0"
    assert "unbroken_run_failed" not in found
    assert "unbroken_run_deadline_timestamp_seconds" not in found, "none is set"


@pytest.mark.parametrize(
    ("why", "cause"),
    [
        ("DeterministicError: step 3, virtual worker 1: the loss is nan; samples a, b", "loss not finite"),
        ("DeterministicError: step 3: the loss is 1.5, the gradient norm inf", "loss not finite"),
        ("DeterministicError: step 3: ValueError", "DeterministicError"),
    ],
)
def test_a_failed_run_says_why(why: str, cause: str) -> None:
    found = page_of(replace(VIEW, state="failed", why=why))
    assert found["unbroken_run_failed"]["cause"] == cause
    assert found["unbroken_run_active"]["value"] == "0.0"


def test_targets_are_written_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "monitoring" / "nodes.json"
    write_targets(path, [])
    before = path.stat()
    write_targets(path, [])
    assert path.stat().st_ino == before.st_ino
    write_targets(path, [{"targets": ["a:1"], "labels": {"job": "unbroken_node"}}])
    assert json.loads(path.read_text())[0]["targets"] == ["a:1"]


def test_an_alert_becomes_an_event_of_its_run_and_flow_run() -> None:
    (event,) = prefect_events(MESSAGE, lambda run: ["flow-1"] if run == "0123456789ab" else [])
    assert event["event"] == "unbroken.alert.firing"
    assert event["resource"]["prefect.resource.id"] == "unbroken.run.0123456789ab"
    assert event["related"][0] == {
        "prefect.resource.id": "prefect.flow-run.flow-1",
        "prefect.resource.role": "flow-run",
    }
    assert event["occurred"] == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("message", [None, [], {}, {"alerts": 3}, {"alerts": [3]}, {"alerts": [{"status": "firing"}]}])
def test_what_is_no_message_is_refused(message: Any) -> None:
    with pytest.raises(UserError, match="Alertmanager"):
        prefect_events(message, lambda run: [])


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With servers that are threads of this process: none is away for being slow."""
    for module in ("agents", "firing", "servers"):
        monkeypatch.setattr(f"flows.monitor.{module}.ANSWER_SECONDS", 120.0)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_monitor_serves_and_takes_messages(tmp_path: Path) -> None:
    taken: list[Any] = []
    is_away = False

    def take(message: Any) -> None:
        if is_away:
            raise urllib.error.URLError("away")
        prefect_events(message, lambda run: [])
        taken.append(message)

    settings = SimpleNamespace(home=tmp_path)
    board = Board(cast(Any, settings), cast(Any, None), cast(Any, SimpleNamespace(views={VIEW.key: VIEW})))
    client = TestClient(make_app(board, take), base_url="http://127.0.0.1")

    def post(body: bytes, path: str = "/alerts", **headers: str) -> int:
        return int(client.post(path, content=body, headers=headers).status_code)

    assert "unbroken_stack_disk_free_bytes" in client.get("/metrics").text
    assert "unbroken_run_step" in client.get("/metrics").text
    message = json.dumps(MESSAGE).encode()
    assert post(message) == 200
    assert taken == [MESSAGE]
    for body in (b"", b"{", b"[" * 100_000, b"{}", b" " * (MAX_BODY_BYTES + 1)):
        assert post(body) == 400, body[:9]
    assert post(b"{}", **{"content-length": str(MAX_BODY_BYTES + 1)}) == 400, "before it comes"
    assert post(b"{}", **{"content-length": "9" * 5000}) == 400
    for length in ("", "x", "-5"):
        assert post(message, **{"content-length": length}) == 200, "by its body, which is counted"
        taken.pop()
    assert post(message, origin="https://evil.example") == 400, "a web page's"
    assert post(message, host="evil.example") == 400, "a name that a web page has pointed here"
    assert post(message, path="/else") == 404
    assert taken == [MESSAGE]
    is_away = True
    assert post(message) == 503, "Alertmanager sends it again"


class Prefect(BaseHTTPRequestHandler):
    """As its server answers."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        due = (datetime(2026, 1, 1, tzinfo=UTC) - timedelta(seconds=30)).isoformat()
        waiting = {
            "next_scheduled_start_time": due,
            "expected_start_time": due,
            "work_queue_name": "urgent",
            "id": "i",
            "name": "brave-otter",
            "state_name": "Late",
        }
        running = [
            {"state_type": "RUNNING", "state_name": name, "count_runs": number}
            for name, number in (("Running", 2), ("Retrying", 1))
        ]
        is_history = self.path.endswith("/history")
        assert is_history or body["flow_runs"]["state"]["type"]["any_"]
        answer: Any = [{"states": running}] if is_history else [waiting]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/garbage":
            self.wfile.write(b"what?\n")
            return
        self.send_response(403 if self.path == "/closed" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_queues_and_health_are_looked_at() -> None:
    with serving(Prefect) as url:
        prefect = PrefectServer(f"{url}/api")
        counts = prefect.counts()
        assert (counts["running"], counts["failed"], len(counts)) == (3, 0, 9)
        waiting = prefect.waiting(datetime(2026, 1, 1, tzinfo=UTC))
        assert [(run.queue, run.seconds, run.link) for run in waiting] == [("urgent", 30.0, f"{url}/runs/flow-run/i")]
        assert Servers(at=0.0, waiting=waiting).longest_waits == {"urgent": 30.0}
        assert prefect.waiting(datetime(2025, 1, 1, tzinfo=UTC)) == (), "its time has not come"
        assert answers(f"{url}/closed"), "who refuses strangers is there"
        assert not answers(f"{url}/broken")
        assert not answers(f"{url}/garbage"), "what speaks no HTTP is another server, or none"
    assert not answers(url)


class Dying(BaseHTTPRequestHandler):
    """As one that is killed while it answers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Alertmanager(BaseHTTPRequestHandler):
    """As it answers; or as another program does that has its port."""

    def do_GET(self) -> None:
        alerts = [
            {"labels": {"alertname": name, "severity": severity}, "annotations": {"summary": "s"}, "startsAt": "2026"}
            for name, severity in (("Straggler", "warning"), ("Stalled", "critical"))
        ]
        data = json.dumps(alerts if self.path.startswith("/api/v2/alerts?") else {"alerts": alerts}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_the_alerts_that_fire_are_asked_for_the_worst_first() -> None:
    with serving(Alertmanager) as url:
        found = ask_alertmanager(url)
        assert found is not None
        assert [alert.name for alert in found] == ["Stalled", "Straggler"]
        assert ask_alertmanager(f"{url}/other") is None
    assert ask_alertmanager(url) is None, "nobody is there"


class NoHttp(BaseRequestHandler):
    """What is no server of HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"220 mail\r\n")


def test_what_does_not_speak_http_does_not_answer() -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), NoHttp) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        host, port = server.server_address
        url = f"http://{host!s}:{port}"
        with pytest.raises(OSError, match="does not speak HTTP"):
            fetch(url, timeout=120)
        assert not answers(url)
        assert ask_alertmanager(url) is None
        (node,) = ask_agents([Place(node=0, incarnation="i", address=str(host), port=1, metrics_port=port)])
        assert not node.is_answering
        server.shutdown()


@pytest.mark.parametrize(
    "text",
    [
        "a b c d",
        'unbroken_rank_step{rank="a"} 1',
        "unbroken_rank_step 1",
        'unbroken_rank_step{rank="1"} NaN',
        'unbroken_rank_step{rank="1"} Inf',
        "unbroken_node_peers NaN",
    ],
)
def test_what_is_no_page_of_an_agents_metrics_is_named(text: str) -> None:
    place = Place(node=3, incarnation="i", address="a", port=1)
    with pytest.raises(DamagedError, match="what node 3 tells is no page of metrics"):
        node_view(place, text)


@pytest.mark.parametrize("answer", [b"", b"3", b"{", b"[3]", b"[{}]", b'[{"labels": 3, "annotations": 3}]', b"[" * 999])
def test_what_is_no_list_of_alerts_is_damage(answer: bytes) -> None:
    with pytest.raises(DamagedError, match="Alertmanager's list of alerts"):
        alerts_in(answer)


@pytest.mark.parametrize(
    "waiting",
    [
        3,
        [3],
        [{}],
        [{"next_scheduled_start_time": 3, "expected_start_time": None, "work_queue_name": "a"}],
        [{"next_scheduled_start_time": "2026-01-01T00:00:00", "name": "a", "work_queue_name": 3, "state_name": "a"}],
        [{"next_scheduled_start_time": "x", "expected_start_time": None, "work_queue_name": "a"}],
    ],
)
def test_an_answer_that_is_none_of_prefects_is_named(waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prefect = PrefectServer("http://127.0.0.1:9")
    monkeypatch.setattr(prefect, "post", lambda path, body: 1 if path.endswith("count") else waiting)
    with pytest.raises(DamagedError, match="Prefect does not answer as it should"):
        ask_prefect(prefect)
