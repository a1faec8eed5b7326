"""Whether S3, MLflow and Prefect answer, and who waits in Prefect's queues."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from infra.settings import Settings
from training.runs.exposition import Page

ANSWER_SECONDS = 3.0
STATES = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED")
MAX_WAITING = 200
"""Scheduled flow runs that are looked at, those that wait longest first."""


class PrefectServer:
    """Its HTTP interface: importing Prefect would take 170 MiB."""

    def __init__(self, api_url: str) -> None:
        self._api_url = api_url

    def post(self, path: str, body: Any) -> Any:
        """Raises `OSError` if the server is away or refuses, `ValueError` if its answer is none of Prefect's."""
        headers = {"Content-Type": "application/json"}
        if user := os.environ.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        request = urllib.request.Request(f"{self._api_url}/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
            data = reply.read()
        return json.loads(data) if data else None

    def counts(self) -> Mapping[str, int]:
        """Flow runs by their state's type."""
        return {
            state: self.post("flow_runs/count", {"flow_runs": {"state": {"type": {"any_": [state]}}}})
            for state in STATES
        }

    def waits(self, now: datetime) -> Mapping[str, float]:
        """By work queue: how many seconds the flow run that waits longest should have run already."""
        waiting = self.post(
            "flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
                "sort": "EXPECTED_START_TIME_ASC",
                "limit": MAX_WAITING,
            },
        )
        longest: dict[str, float] = {}
        for run in waiting:
            due = run["next_scheduled_start_time"] or run["expected_start_time"]
            queue = run["work_queue_name"] or "none"
            seconds = (now - datetime.fromisoformat(due)).total_seconds()
            longest[queue] = max(longest.get(queue, 0.0), seconds)
        return longest


def answers(url: str) -> bool:
    """Whether a server is there: one that refuses strangers is."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def health_urls(settings: Settings) -> dict[str, str]:
    found = {"s3": settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com"}
    if settings.maybe_mlflow_uri:
        found["mlflow"] = f"{settings.maybe_mlflow_uri}/health"
    if settings.maybe_prefect_api_url:
        found["prefect"] = f"{settings.maybe_prefect_api_url}/health"
    return found


def look_at_servers(settings: Settings) -> Page:
    page = Page()
    for name, url in health_urls(settings).items():
        page.add("unbroken_service_up", answers(url), "1 if the server answers", {"service": name})
    if settings.maybe_prefect_api_url:
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is away: that is told above
            _add_flow_runs(page, PrefectServer(settings.maybe_prefect_api_url))
    return page


def _add_flow_runs(page: Page, prefect: PrefectServer) -> None:
    for state, number in prefect.counts().items():
        page.add("unbroken_flow_runs", number, "Flow runs that Prefect knows, by state", {"state": state.lower()})
    for queue, seconds in prefect.waits(datetime.now(UTC)).items():
        help = "How long the flow run that waits longest should have been running"
        page.add("unbroken_flow_run_wait_seconds", seconds, help, {"queue": queue})
