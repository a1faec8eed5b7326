"""The report of a run: all that the store has of it, the same bytes each time, and nothing foreign that would act."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings
from tasks.report import attach as module
from tasks.report.attach import attach_if_possible
from tasks.report.compare import MAX_RUNS, compared, require_comparable
from tasks.report.facts import RunFacts
from tasks.report.figures import MAX_POINTS, curve, figures_of
from tasks.report.gather import gather
from tasks.report.page import duration, number, page_of, page_of_several
from tests.unit.reported import BEGUN, FORMULA, HOSTILE, STEPS, disturbed_run
from training.errors import InfrastructureError, MissingError, UserError
from training.runs.events import chunk_key
from training.runs.record import Failure, RunRecord
from training.s3.objectstore import Store

ALL_FIGURES = {
    *("loss", "validation", "rate", "norm", "throughput", "timeline"),
    *("system", "slices", "reliability", "confusion"),
}
RENDER = """
import hashlib, pickle, sys
from tasks.report.page import page_of, page_of_several
facts = pickle.load(open(sys.argv[1], "rb"))
for page in (page_of(facts), page_of_several([facts, facts])):
    print(hashlib.sha256(page.encode()).hexdigest())
"""


@pytest.fixture
def settings() -> Settings:
    """Of servers that nobody asks."""
    return Settings(
        home=Path("nowhere"),
        s3_endpoint=None,
        s3_bucket="b",
        s3_prefix="",
        s3_region="r",
        maybe_mlflow_uri="http://mlflow.test",
        maybe_prefect_api_url="http://p.test/api",
        s3_is_local=False,
    )


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_that_the_store_has_is_told(settings: Settings, store: Store) -> None:
    facts = gather(settings, disturbed_run(store))
    assert (facts.state, facts.name, facts.goal_steps) == ("finished", "tiny", STEPS)
    assert [event.step for event in facts.steps] == list(range(1, STEPS + 1))
    assert [event.step for event in facts.redone] == [11, 12, 13, 14]
    assert [(group.nodes, group.source, group.last_step) for group in facts.groups] == [
        (2, "start", 8),
        (1, "memory", 14),
        (2, "checkpoint", 20),
    ]
    assert [(left.node, left.step, left.at) for left in facts.departures] == [(1, 8, BEGUN + 9), (0, 14, BEGUN + 16.5)]
    assert [one.step for one in facts.saved] == [5, 10, STEPS]
    assert facts.wall_seconds == 31.5
    assert facts.goodput.wall_seconds == pytest.approx(facts.wall_seconds, rel=0.01)
    assert sum(facts.goodput.seconds.values()) == pytest.approx(facts.wall_seconds, rel=0.01)
    assert facts.evaluation is not None
    assert {node: len(samples) for node, samples in facts.samples.items()} == {0: 3, 1: 3}
    assert facts.data is not None
    assert facts.code is not None
    assert "tests.unit.tiny" in facts.code.sources
    assert facts.preset["train.steps"] == STEPS
    assert facts.links == {"MLflow run": f"http://mlflow.test/#/runs/{'f' * 32}?workflowType=machine_learning"}
    assert facts.unknown == ()


def test_the_page_has_every_figure_and_nothing_that_acts(settings: Settings, store: Store) -> None:
    run = disturbed_run(store)
    facts = gather(settings, run)
    html = page_of(facts)
    page = Page(html)
    assert figures_of(facts).keys() == ALL_FIGURES
    for name in ALL_FIGURES:
        assert f'id="{name}-figure_1"' in html
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(ALL_FIGURES)
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    _require_harmless(page)
    for said in (
        HOSTILE,
        FORMULA,
        "worker killed by signal 9",
        "node 0 is gone",
        "wall time",
        facts.run_key,
    ):
        assert said in page.text
    assert run.read().secret not in html


def test_runs_side_by_side(settings: Settings, store: Store) -> None:
    runs = [gather(settings, disturbed_run(store, seed=seed, rates=(rate,))) for seed, rate in ((1, 0.1), (2, 0.2))]
    rows = {row.name: row.cells for row in compared(runs)}
    assert rows == {"preset: seed": ("1", "2"), "preset: hyperparameters.learning_rate": ("0.1", "0.2")}
    html = page_of_several(runs)
    page = Page(html)
    _require_harmless(page)
    for name in ("loss", "rate", "norm", "throughput", "validation0", "validation1"):
        (figure,) = re.findall(rf'<svg [^>]*"{name}-title">.*?</svg>', html, re.DOTALL)
        assert "var(--run0)" in figure
        assert "var(--run1)" in figure
    for run in runs:
        assert run.run_key[:12] in page.text
    require_comparable(["k"] * MAX_RUNS)
    with pytest.raises(UserError, match="tells 8 apart at most"):
        require_comparable(["k"] * (MAX_RUNS + 1))


def _require_harmless(page: Page) -> None:
    """No script, nothing that is fetched, and no address but of links that a person may follow."""
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "img", "image", "object", "link", "base"}
    for tag, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        for name, value in values.items():
            outside = "://" in (value or "") or name == "src"
            assert not outside or (tag, name) == ("a", "href"), (tag, name, value)
    policies = [values["content"] for tag, values in page.tags if "http-equiv" in values]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    style = " ".join(values.get("style") or "" for _, values in page.tags)
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", style + page.text)


def test_the_same_bytes_whatever_the_process(settings: Settings, store: Store, tmp_path: Path) -> None:
    facts = gather(settings, disturbed_run(store))
    assert facts == gather(settings, RunRecord(store, facts.run_key))
    expected = [_sha256(page_of(facts)), _sha256(page_of_several([facts, facts]))]
    (tmp_path / "facts").write_bytes(pickle.dumps(facts))
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.grid: False\n")
    odd = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    command = [sys.executable, "-c", RENDER, str(tmp_path / "facts")]
    processes = [
        subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
        for variables in (odd, {"PYTHONHASHSEED": "2"})
    ]
    assert [process.communicate(timeout=240)[0].split() for process in processes] == [expected, expected]


def _sha256(page: str) -> str:
    return hashlib.sha256(page.encode()).hexdigest()


def test_a_run_that_is_not_finished_and_one_that_failed(settings: Settings, store: Store) -> None:
    run = RunRecord(store, "new")
    run.create_if_missing()
    facts = gather(settings, run)
    assert (facts.state, facts.steps, facts.wall_seconds) == ("open", (), 0.0)
    assert any("no job of this run" in line for line in facts.unknown)
    assert "not finished" in Page(page_of(facts)).text
    assert "not finished" in Page(page_of_several([facts, facts])).text
    run = disturbed_run(store)
    run.update(lambda record: replace(record, result=None, failure=Failure(kind="UserError", message=HOSTILE)))
    failed = gather(settings, run)
    page = Page(page_of(failed))
    _require_harmless(page)
    assert (failed.state, failed.evaluation) == ("failed", None)
    assert HOSTILE in page.text
    with pytest.raises(MissingError):
        gather(settings, RunRecord(store, "nobody"))


def test_what_is_missing_or_damaged_is_told_and_the_rest_is_shown(settings: Settings, store: Store) -> None:
    run = disturbed_run(store)
    prefix = run.prefix(run.read())
    store.delete(chunk_key(prefix, 3, 0))
    store.put(chunk_key(prefix, 2, 1), b"[")
    store.put(f"{prefix}events/odd", b"")
    store.put(f"{prefix}system/0-i/000001.jsonl", b"[")
    (job,) = (key for key, _ in store.list_keys(f"runs/{run.run_key}/jobs/"))
    store.put(job, b"[")
    facts = gather(settings, run)
    told = "\n".join(facts.unknown)
    for said in (
        "events of token 3: 1 chunks are missing before chunk 1",
        store.location.uri(chunk_key(prefix, 2, 1)),
        "odd is no chunk of events",
        "steps 10 to 15: no event tells of them",
        "000001.jsonl is damaged",
        job,
    ):
        assert said in told
    page = Page(page_of(facts))
    assert "What could not be found out" in page.text
    assert facts.goodput.wall_seconds == pytest.approx(facts.wall_seconds, rel=0.01)


def test_a_curve_has_as_many_points_as_can_be_told_apart() -> None:
    values = [(float(step), float(step % 10)) for step in range(10 * MAX_POINTS)]
    found = curve([*values, (5000.0, float("nan")), (5001.0, float("inf"))])
    assert len(found.steps) == MAX_POINTS
    assert set(found.values) == {4.5}
    assert (set(found.low), set(found.high)) == ({0.0}, {9.0})
    assert not curve(values[:50]).is_thinned
    assert len(curve([]).steps) == 0


def test_numbers_as_a_person_reads_them() -> None:
    assert [number(value) for value in (0.99426934, 12345.678, 3.0, float("nan"))] == ["0.9943", "12,346", "3", "nan"]
    assert [duration(value) for value in (5.04, 213.4, 7325.0)] == ["5.0 s", "3 min 33 s", "2 h 2 min"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.policy.PATIENCE_SECONDS", 0.0)


def test_mlflow_that_is_away_fails_no_run(
    settings: Settings, store: Store, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = disturbed_run(store)
    away = replace(settings, maybe_mlflow_uri="http://127.0.0.1:9")
    with pytest.raises(InfrastructureError, match="MLflow"):
        module.attach(away, store, run.run_key)
    assert attach_if_possible(away, store, run.run_key) is None
    assert f"run {run.run_key[:12]} has no report" in caplog.text
    run.update(lambda record: replace(record, tracking_run_id=None))
    assert attach_if_possible(away, store, run.run_key) is None
    assert "has no MLflow run yet" in caplog.text


class TakesNoFile(BaseHTTPRequestHandler):
    """An MLflow server that has the run, and refuses what is to be put there."""

    def do_GET(self) -> None:
        info = {"run_id": "f" * 32, "run_uuid": "f" * 32, "experiment_id": "0", "artifact_uri": "mlflow-artifacts:/0/f"}
        self._reply(200, json.dumps({"run": {"info": info, "data": {}}}).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(413, b"too large")

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_mlflow_that_takes_no_file_is_named(settings: Settings, store: Store) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), TakesNoFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = replace(settings, maybe_mlflow_uri=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(InfrastructureError, match=r"MLflow does not take report\.html: .*413"):
            module.attach(there, store, disturbed_run(store).run_key)
        server.shutdown()


def test_a_bug_in_the_page_fails_no_run_and_is_told_in_full(
    settings: Settings,
    store: Store,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(facts: RunFacts) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "page_of", broken)
    with caplog.at_level(logging.WARNING):
        assert attach_if_possible(settings, store, disturbed_run(store).run_key) is None
    assert "ZeroDivisionError" in caplog.text
