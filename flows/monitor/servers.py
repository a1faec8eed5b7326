"""Whether S3, MLflow and Prefect answer, who waits in Prefect's queues, and which alerts fire."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

from flows.monitor.firing import ask_alertmanager
from flows.monitor.view import Servers, Waiting
from infra.fetching import fetch
from infra.passwords import prefect_headers
from infra.settings import Settings
from training.documents import read_json
from training.errors import DamagedError

ANSWER_SECONDS = 3.0
STATES = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED")
ALL_TIME = {
    "history_start": "2000-01-01T00:00:00Z",
    "history_end": "2100-01-01T00:00:00Z",
    "history_interval_seconds": 100 * 366 * 86400,
}
COUNT_SECONDS = 30.0
"""Prefect takes tens of milliseconds for an answer: too much for each look."""
MAX_WAITING = 200
"""Scheduled flow runs that are looked at, those that wait longest first."""


class PrefectServer:
    """Its HTTP interface: importing Prefect would take 170 MiB."""

    def __init__(self, api_url: str) -> None:
        self._api_url = api_url

    def post(self, path: str, body: Any) -> Any:
        """Raises `OSError` if the server is away or refuses, `DamagedError` if its answer is none of Prefect's."""
        headers = {"Content-Type": "application/json", **prefect_headers()}
        request = urllib.request.Request(f"{self._api_url}/{path}", json.dumps(body).encode(), headers)
        data = fetch(request, timeout=ANSWER_SECONDS)
        return read_json(data, what="Prefect's answer") if data else None

    def counts(self) -> Mapping[str, int]:
        """Flow runs by their state's type: a history of a single interval, as one request for each takes Prefect six
        times as long."""
        found = dict.fromkeys(map(str.lower, STATES), 0)
        for interval in self.post("flow_runs/history", ALL_TIME):
            for state in interval["states"]:
                found[str(state["state_type"]).lower()] += int(state["count_runs"])
        return found

    def waiting(self, now: datetime) -> tuple[Waiting, ...]:
        """Those that should have been running already, the longest first."""
        found = self.post(
            "flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
                "sort": "EXPECTED_START_TIME_ASC",
                "limit": MAX_WAITING,
            },
        )
        waiting = [self._waiting(run, now) for run in found]
        late = [run for run in waiting if run.seconds > 0]
        return tuple(sorted(late, key=lambda run: run.seconds, reverse=True))

    def _waiting(self, run: Any, now: datetime) -> Waiting:
        due = run["next_scheduled_start_time"] or run["expected_start_time"]
        return Waiting(
            name=str(run["name"]),
            queue=str(run["work_queue_name"] or "none"),
            state=str(run["state_name"]),
            seconds=(now - datetime.fromisoformat(due)).total_seconds(),
            link=f"{self._api_url.removesuffix('/api')}/runs/flow-run/{run['id']}",
        )


def answers(url: str) -> bool:
    """Whether a server is there: one that refuses strangers is."""
    try:
        fetch(url, timeout=ANSWER_SECONDS)
        return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException):
        return False


def health_urls(settings: Settings) -> dict[str, str]:
    found = {"s3": settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com"}
    if settings.maybe_mlflow_uri:
        found["mlflow"] = f"{settings.maybe_mlflow_uri}/health"
    if settings.maybe_prefect_api_url:
        found["prefect"] = f"{settings.maybe_prefect_api_url}/health"
    return found


def ask_prefect(prefect: PrefectServer) -> tuple[Mapping[str, int], tuple[Waiting, ...]]:
    """Flow runs by state, and those that wait. Raises `OSError` if Prefect is away, `DamagedError` if its answers are
    none of Prefect's."""
    try:
        return prefect.counts(), prefect.waiting(datetime.now(UTC))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"Prefect does not answer as it should: {error!r}") from error


class ServersLook:
    """Looks at all of them, again and again."""

    def __init__(self, settings: Settings, *, maybe_alertmanager: str | None) -> None:
        """`maybe_alertmanager` is its URL, where there is one."""
        self._settings = settings
        self._maybe_alertmanager = maybe_alertmanager
        self._counted_at = -math.inf
        self._flow_runs: Mapping[str, int] = {}
        self._waiting: tuple[Waiting, ...] = ()

    def look(self) -> Servers:
        up = {name: answers(url) for name, url in health_urls(self._settings).items()}
        if not up.get("prefect", False):
            self._counted_at, self._flow_runs, self._waiting = -math.inf, {}, ()
        elif time.monotonic() >= self._counted_at + COUNT_SECONDS:
            with suppress(OSError, DamagedError):  # it went away since
                self._flow_runs, self._waiting = ask_prefect(PrefectServer(self._settings.prefect_api_url))
                self._counted_at = time.monotonic()
        alerts = ask_alertmanager(self._maybe_alertmanager) if self._maybe_alertmanager else None
        return Servers(at=time.time(), up=up, flow_runs=self._flow_runs, waiting=self._waiting, alerts=alerts)
