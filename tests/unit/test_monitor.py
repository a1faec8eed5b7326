"""What the monitor makes of records, events, servers and messages. The store and the engine are stand-ins."""

from __future__ import annotations

import json
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from flows.monitor.alerts import prefect_events
from flows.monitor.app import MAX_BODY_BYTES, Board, make_app
from flows.monitor.reading import rows
from flows.monitor.runs import Watched, add_run, write_targets
from flows.monitor.servers import PrefectServer, answers
from tests.unit.tiny import tiny_preset
from training.errors import UserError
from training.runs.events import Event
from training.runs.exposition import Page
from training.runs.job import Job
from training.runs.record import Departure, Failure, Record
from training.s3.objectstore import StoreLocation

KEY = "0123456789abcdef"
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


def watched(**changes: Any) -> Watched:
    job = Job(
        key=KEY, generation=0, preset=tiny_preset(), dataset_digest="d",
        location=StoreLocation(endpoint=None, bucket="b"),
    )  # fmt: skip
    record = Record(key=KEY, token=2, num_nodes=1, resume_steps=(0, 4), **changes)
    run = Watched(record=record, job=job, owners=(), is_at_work=True, reader=cast(Any, None))
    run.events = [Event(kind="step", time=100.0 + step, token=1, step=step) for step in (1, 2)]
    run.events.append(Event(kind="checkpoint", time=102.5, token=1, step=2))
    run.goodput_seconds = {"productive": 3.0, "redone": 1.0}
    return run


def page_of(run: Watched) -> dict[str, dict[str, str]]:
    page = Page()
    add_run(page, run, "http://link")
    found = {}
    for family in text_string_to_metric_families(page.text()):
        for sample in family.samples:
            found[sample.name] = {**sample.labels, "value": str(sample.value)}
    return found


def test_a_run_is_told_of() -> None:
    found = page_of(watched())
    assert found["unbroken_run_active"]["value"] == "1.0"
    assert found["unbroken_run_step"]["value"] == "2.0"
    assert found["unbroken_run_checkpoint_timestamp_seconds"]["value"] == "102.5"
    assert found["unbroken_run_attempts_total"]["value"] == "2.0"
    assert found["unbroken_run_info"]["link"] == "http://link"
    assert "unbroken_run_failed" not in found
    assert "unbroken_run_deadline_timestamp_seconds" not in found, "none is set"


def test_before_the_first_checkpoint_its_age_is_the_runs() -> None:
    run = watched()
    run.events = run.events[:2]
    assert page_of(run)["unbroken_run_checkpoint_timestamp_seconds"]["value"] == "101.0"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("step 3, virtual worker 1: the loss is nan; samples a, b", "loss not finite"),
        ("step 3: the loss is 1.5, the gradient norm inf", "loss not finite"),
        ("step 3: ValueError", "DeterministicError"),
    ],
)
def test_a_failed_run_says_why(message: str, cause: str) -> None:
    gone = Departure(token=1, node=3, cause=message, step=2, class_name="DeterministicError")
    found = page_of(watched(failure=Failure(kind="DeterministicError", message=message), departures=(gone,)))
    assert found["unbroken_run_failed"]["cause"] == cause
    assert found["unbroken_run_active"]["value"] == "0.0"
    assert found["unbroken_run_last_departure"]["node"] == "3"


def test_a_terminal_shows_each_run() -> None:
    page = Page()
    add_run(page, watched(), "")
    (row,) = rows(page.text(), now=110.0)
    assert row[:4] == ["0123456789ab", "tiny", "at work", f"2/{tiny_preset().train.steps}"]
    assert row[-3:] == ["8 s ago", "8 s ago", "75%"]
    assert rows("") == []


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

    board = Board(tmp_path)
    client = TestClient(make_app(board, take), base_url="http://127.0.0.1")

    def post(body: bytes, path: str = "/alerts", **headers: str) -> int:
        return int(client.post(path, content=body, headers=headers).status_code)

    assert "unbroken_stack_disk_free_bytes" in client.get("/metrics").text
    page = Page()
    add_run(page, watched(), "")
    board.put("runs", page)
    assert len(rows(client.get("/metrics").text)) == 1
    message = json.dumps(MESSAGE).encode()
    assert post(message) == 200
    assert taken == [MESSAGE]
    for body in (b"", b"{", b"[" * 100_000, b"{}", b" " * (MAX_BODY_BYTES + 1)):
        assert post(body) == 400, body[:9]
    assert post(b"{}", **{"content-length": str(MAX_BODY_BYTES + 1)}) == 400, "before it comes"
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
        waiting = {"next_scheduled_start_time": due, "expected_start_time": due, "work_queue_name": "urgent"}
        answer: Any = 2 if self.path.endswith("/count") else [waiting]
        assert body["flow_runs"]["state"]["type"]["any_"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_response(403 if self.path == "/closed" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_queues_and_health_are_looked_at() -> None:
    with serving(Prefect) as url:
        prefect = PrefectServer(f"{url}/api")
        assert prefect.counts()["RUNNING"] == 2
        assert prefect.waits(datetime(2026, 1, 1, tzinfo=UTC)) == {"urgent": 30.0}
        assert answers(f"{url}/closed"), "who refuses strangers is there"
        assert not answers(f"{url}/broken")
    assert not answers(url)
