"""Views of runs: what is made of records and events, and how pages and terminals show it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from flows.monitor import terminal, words
from flows.monitor.agents import ask_agents, node_view
from flows.monitor.app import make_app
from flows.monitor.board import Board
from flows.monitor.rendering import error_html, overview_html, run_html
from flows.monitor.seen import MAX_POINTS, Seen
from flows.monitor.view import Overview, RunView, to_json, view_of
from infra.launcher import JobState, JobStatus
from tasks.follow import Follower, _after
from tests.unit.status_views import HOSTILE, HOSTILE_OVERVIEW, HOSTILE_VIEW, NOW, OVERVIEW, VIEW
from tests.unit.tiny import tiny_preset
from training.cluster.links import Place
from training.documents import parse
from training.errors import DamagedError, MissingError
from training.runs.events import Event
from training.runs.exposition import Page
from training.runs.record import CheckpointRef, Departure, Failure, Record, Result

KEY = "0123456789abcdef"
PLACE = Place(node=1, incarnation="i", address="127.0.0.1", port=1, metrics_port=9)
AT_WORK = JobStatus(state=JobState.RUNNING, nodes={"node0": "RUNNING"})


def event(kind: str, at: float, step: int, token: int = 1, **values: Any) -> Event:
    return Event(kind=kind, time=at, token=token, step=step, values=values)


def step(number: int, *, at: float, token: int = 1, loss: Any = 0.5) -> Event:
    return event("step", at, number, token, loss=loss, samples_per_second=100.0, seconds=1.0)


def attempt(token: int, *, at: float, from_step: int = 0, source: str = "start") -> Event:
    return event("attempt", at, from_step, token, world_size=2, resumed_from=from_step, source=source)


def checkpoint(at_step: int) -> CheckpointRef:
    return CheckpointRef(step=at_step, token=1, sha256="c")


def seen(events: Sequence[Event], record: Record) -> Seen:
    """As if they were just read."""
    follower = Follower(cast(Any, type("Run", (), {"run_key": KEY})), generation=0, num_steps=10)
    for one in events:
        follower.progress = _after(follower.progress, one)
    found = Seen(follower)
    found.take(events, record)
    return found


def view(
    record: Record, events: Sequence[Event], *, now: float = 10.0, maybe_job: JobStatus | None = AT_WORK
) -> RunView:
    return view_of(
        record=record,
        preset=PRESET,
        seen=seen(events, record),
        maybe_job=maybe_job,
        is_at_work=maybe_job is not None,
        links={},
        now=now,
    )


PRESET = replace(tiny_preset(), launch=replace(tiny_preset().launch, nodes=2))
CALM = (attempt(1, at=0.0), *(step(number, at=float(number)) for number in range(1, 6)))
BEGUN = Record(key=KEY, token=1, num_nodes=2, resume_steps=(0,))


def test_a_run_that_trains() -> None:
    found = view(BEGUN, CALM, now=5.5)
    assert (found.state, found.why, found.step) == ("training", "", 5)
    assert found.steps_per_second == 1.0
    assert found.expected_end_at == 5.5 + found.goal_steps - 5
    assert found.seconds["productive"] == 5.0
    assert [point.step for point in found.curve] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("record", "events", "maybe_job", "state", "why"),
    [
        (replace(BEGUN, resume_steps=()), (), AT_WORK, "starting", "its nodes look for one another"),
        (BEGUN, CALM[:1], AT_WORK, "starting", "first step"),
        (BEGUN, CALM, JobStatus(state=JobState.RUNNING, nodes={"0": "PENDING (Resources)"}), "waiting", "Resources"),
        (BEGUN, CALM, None, "stopped", "no engine works on it"),
        (replace(BEGUN, failure=Failure(kind="UserError", message="no")), CALM, None, "failed", "UserError: no"),
        (replace(BEGUN, num_nodes=1), CALM, AT_WORK, "training", "on 1 of 2 nodes"),
    ],
)
def test_states(record: Record, events: Sequence[Event], maybe_job: JobStatus | None, state: str, why: str) -> None:
    found = view(record, events, now=5.5, maybe_job=maybe_job)
    assert found.state == state
    assert why in found.why


def test_a_run_in_which_nothing_moves_has_stalled() -> None:
    found = view(BEGUN, CALM, now=6.0 + PRESET.launch.hang_seconds)
    assert (found.state, found.why) == ("stalled", "no finished step for 31 s")


def test_a_departure_is_told_until_the_next_step() -> None:
    gone = Departure(token=1, node=1, cause="Killed: by signal 9", step=5, class_name="Killed")
    record, maybe_seen = replace(BEGUN, departures=(gone,)), seen(CALM, BEGUN)
    maybe_seen._follower.progress = replace(maybe_seen.progress, trouble=gone.cause)
    found = view_of(
        record=record, preset=PRESET, seen=maybe_seen, maybe_job=AT_WORK, is_at_work=True, links={}, now=6.0
    )
    assert (found.state, found.why) == ("recovering", "Killed: by signal 9")
    assert found.last_departure == {"node": "1", "class": "Killed", "cause": "Killed: by signal 9"}
    assert found.attempts[0].why_it_ended == "node 1: Killed: by signal 9"


def test_a_finished_run_is_at_its_last_step_though_its_last_events_were_not_read() -> None:
    result = Result(step=300, weights_sha256="w", state_sha256="s", checkpoint=checkpoint(300))
    found = view(replace(BEGUN, result=result), CALM, maybe_job=None)
    assert (found.state, found.step, found.checkpoint_step) == ("finished", 300, 300)
    assert found.expected_end_at is None


def test_steps_that_are_done_again_leave_the_curve() -> None:
    record = replace(BEGUN, token=2, resume_steps=(0, 2))
    found = view(record, [*CALM, attempt(2, at=8.0, from_step=2, source="checkpoint"), step(3, at=9.0, token=2)])
    assert [(point.step, point.time) for point in found.curve] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert (found.seconds["redone"], found.step) == (3.0, 3)


def test_a_long_run_takes_as_much_memory_as_a_short_one() -> None:
    found, record = seen([], BEGUN), BEGUN
    for number in range(1, 20_001):
        if number % 100 == 0:
            record = replace(record, checkpoints=(checkpoint(number - 50),))
        found.take([step(number, at=float(number), loss="nan")], record)
    assert len(found.curve.points) <= MAX_POINTS
    assert found.curve.points[-1].step > 19_800
    assert len(found._account._open) <= 200
    assert not found.is_outdated_by(replace(record, token=2, resume_steps=(0, 19_950)))
    assert found.is_outdated_by(replace(record, token=2, resume_steps=(0, 19_949))), "it went back behind the settled"
    assert found.is_outdated_by(replace(record, generation=1))


def test_views_are_the_same_after_json() -> None:
    for shown, kind in ((VIEW, RunView), (OVERVIEW, Overview)):
        text = json.dumps(to_json(shown), allow_nan=False)
        assert parse(cast(Any, kind), json.loads(text)) == shown
    assert to_json(replace(VIEW, loss=float("nan")))["loss"] == "nan"


def test_what_json_tells_of_a_run_is_stable() -> None:
    """Scripts read it: a name that goes is told in the CHANGELOG."""
    assert set(to_json(VIEW)) == {
        *("key", "model", "at", "state", "why", "step", "goal_steps", "step_at", "steps_per_second"),
        *("samples_per_second", "loss", "expected_end_at", "deadline_at", "began_at", "ended_at", "token"),
        *("num_ranks", "group_nodes", "wanted_nodes", "engine", "checkpoint_step", "checkpoint_at"),
        *(
            "checkpoint_every_steps",
            "num_attempts",
            "num_departures",
            "num_failures",
            "last_departure",
            "attempts",
            "seconds",
        ),
        *("notes", "curve", "links", "nodes", "num_unasked_nodes", "alerts"),
    }


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("shown", [VIEW, HOSTILE_VIEW], ids=["usual", "hostile"])
def test_no_line_is_longer_than_the_terminal(shown: RunView, width: int) -> None:
    lines = terminal.run_lines(shown, NOW, width)
    lines += terminal.overview_lines(replace(HOSTILE_OVERVIEW, runs=(shown,)), NOW, width)
    assert [line.text for line in lines if len(line.text) > width] == []
    assert all(line.text.isprintable() for line in lines), "nothing that a terminal obeys"


def test_a_terminal_answers_what_one_asks() -> None:
    text = "\n".join(line.text for line in terminal.run_lines(VIEW, NOW, 100))
    for words_of_it in (
        *("digits  0123456789ab", "RECOVERING", "209/300  70%", "in 1 min 15 s", "will be missed", "3,691 samples/s"),
        *("step 200", "7 s ago", "1 of 2 nodes", "node 1 at 10.0.0.2: does not answer", "NodeLost", "goes on"),
        *("12.0 ms", "productive 79%", "1 RUNNING, 1 BACKOFF"),
    ):
        assert words_of_it in text
    text = "\n".join(line.text for line in terminal.overview_lines(OVERVIEW, NOW, 100))
    assert "brave-otter in urgent, Late, for 1 min 35 s" in text
    none = replace(OVERVIEW, runs=(), servers=replace(OVERVIEW.servers, alerts=None))
    text = "\n".join(line.text for line in terminal.overview_lines(none, NOW, 100))
    assert "no run is at work" in text
    assert "no Alertmanager answers" in text


def test_pages_escape_all_that_comes_from_elsewhere() -> None:
    for page in (run_html(HOSTILE_VIEW), overview_html(HOSTILE_OVERVIEW), error_html(HOSTILE)):
        assert "&lt;script&gt;" in page
        assert "<script" not in page
        assert not re.search(r"""href=["']?javascript""", page)
        assert 'style="' not in page, "the policy allows none"
    assert run_html(VIEW).count("<a href=") == 1, "S3 has no page"


def test_a_run_that_is_over_is_not_loaded_anew() -> None:
    assert 'http-equiv="refresh"' in run_html(VIEW)
    assert 'http-equiv="refresh"' not in run_html(replace(VIEW, state="finished", ended_at=NOW))


def test_what_was_seen_long_ago_says_so() -> None:
    now = time.time()
    assert "This is what was seen 1 min ago" in terminal.run_lines(VIEW, NOW + 60, 100)[0].text
    assert terminal.run_lines(VIEW, NOW, 100)[0].text.startswith("digits")
    assert "This is what was seen" in run_html(replace(VIEW, nodes=(), at=now - words.LATE_SECONDS - 1))
    assert "This is what was seen" not in run_html(replace(VIEW, at=time.time() + words.LATE_SECONDS))


class OneRun:
    """Stands in for those that are watched."""

    views = {VIEW.key: VIEW}  # noqa: RUF012

    def find(self, key: str) -> RunView:
        if key != VIEW.key:
            raise MissingError(f"no run {key}")
        return VIEW


def test_the_app_serves_pages_and_json(tmp_path: Any) -> None:
    settings = type("Settings", (), {"home": tmp_path, "maybe_prefect_api_url": None, "maybe_mlflow_uri": None})
    location = type("Location", (), {"uri": lambda self: "s3://b/"})()
    board = Board(cast(Any, settings), location, OneRun())
    client = TestClient(make_app(board, lambda message: None), base_url="http://127.0.0.1")
    page = client.get(f"/runs/{VIEW.key}")
    assert page.status_code == 200
    assert "script" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert parse(RunView, client.get(f"/runs/{VIEW.key}.json").json()) == replace(VIEW, alerts=VIEW.alerts)
    board.servers = OVERVIEW.servers
    assert parse(Overview, client.get("/overview.json").json()).runs[0].key == VIEW.key
    assert f'href="/runs/{VIEW.key}"' in client.get("/").text
    assert client.get("/style.css").headers["content-type"].startswith("text/css")
    for path, status in (("/runs/x", 404), ("/runs/x.json", 404), ("/runs/..%2fx", 404), ("/pages/base.html", 404)):
        assert client.get(path).status_code == status, path
    assert client.get("/runs/<b>").text.count("<b>") == 0
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/").status_code == 405, "it is for reading"


def test_what_an_agent_tells() -> None:
    page = Page()
    page.add("unbroken_node_training", 1, "", {"run": "r", "node": "1"})
    page.add("unbroken_node_sees_store", 0, "", {"run": "r", "node": "1"})
    page.add("unbroken_node_memory_bytes", 100, "", {"run": "r", "node": "1"})
    page.add("unbroken_node_memory_available_bytes", 25, "", {"run": "r", "node": "1"})
    for path, free in (("/a", 7), ("/b", 5)):
        page.add("unbroken_node_disk_free_bytes", free, "", {"run": "r", "node": "1", "path": path})
    for name, value in (("step", 8), ("steps_total", 4), ("pace_seconds_total", 2), ("collective_seconds_total", 1)):
        page.add(f"unbroken_rank_{name}", value, "", {"run": "r", "node": "1", "rank": "3"})
    found = node_view(PLACE, page.text())
    assert (found.is_answering, found.is_training, found.sees_store) == (True, True, False)
    assert (found.memory_used_share, found.disk_free_bytes) == (0.75, 5)
    (rank,) = found.ranks
    assert (rank.rank, rank.step, rank.busy_seconds, rank.collective_seconds) == (3, 8, 0.5, 0.25)
    assert rank.loss is None


def test_an_agent_that_is_gone_is_shown() -> None:
    (found,) = ask_agents([PLACE])
    assert (found.node, found.is_answering) == (1, False)
    with pytest.raises(DamagedError, match="no page of metrics"):
        node_view(PLACE, "<html>something else has its port</html>")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min"), (75, "1 min 15 s"), (3600, "1 h"), (7260, "2 h 1 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(3691.2, "3,691"), (14.44, "14.4"), (2.5, "2.50"), (0.00123456, "0.00123"), (0, "0"), (float("nan"), "nan")],
)
def test_figures(number: float, said: str) -> None:
    assert words.figure(number) == said
