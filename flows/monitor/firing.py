"""The alerts that fire now, as Alertmanager has them: what is silenced or follows from another is left out."""

from __future__ import annotations

from typing import Any

from flows.monitor.view import AlertView
from infra.fetching import fetch
from training.documents import read_json
from training.errors import DamagedError

ANSWER_SECONDS = 3.0
MAX_BYTES = 4 << 20
MAX_ALERTS = 100
QUERY = "api/v2/alerts?active=true&silenced=false&inhibited=false"


def ask_alertmanager(url: str) -> tuple[AlertView, ...] | None:
    """The worst first; None if nobody answers there as Alertmanager does."""
    try:
        return alerts_in(fetch(f"{url}/{QUERY}", timeout=ANSWER_SECONDS, max_bytes=MAX_BYTES))
    except (OSError, DamagedError):
        return None


def alerts_in(answer: bytes) -> tuple[AlertView, ...]:
    """The worst first. Raises `DamagedError` for what Alertmanager does not say."""
    try:
        alerts = [_alert(document) for document in read_json(answer, what="Alertmanager's list of alerts")]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"Alertmanager's list of alerts is none: {error!r}") from error
    return tuple(sorted(alerts, key=lambda alert: (alert.severity != "critical", alert.since))[:MAX_ALERTS])


def _alert(document: Any) -> AlertView:
    labels, annotations = document["labels"], document["annotations"]
    return AlertView(
        name=str(labels["alertname"]),
        severity=str(labels.get("severity", "")),
        run=str(labels.get("run", "")),
        summary=str(annotations.get("summary", "")),
        cause=str(annotations.get("cause", "")),
        link=str(annotations.get("link", "")),
        since=str(document["startsAt"]),
    )
