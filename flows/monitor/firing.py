"""The alerts that fire now, as Alertmanager has them: what is silenced or follows from another is left out."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from flows.monitor.view import AlertView

ANSWER_SECONDS = 3.0
MAX_BYTES = 4 << 20
MAX_ALERTS = 100
QUERY = "api/v2/alerts?active=true&silenced=false&inhibited=false"


def ask_alertmanager(url: str) -> tuple[AlertView, ...] | None:
    """The worst first; None if nobody answers there as Alertmanager does."""
    try:
        with urllib.request.urlopen(f"{url}/{QUERY}", timeout=ANSWER_SECONDS) as reply:
            alerts = [_alert(document) for document in json.loads(reply.read(MAX_BYTES))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
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
