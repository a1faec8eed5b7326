"""Alertmanager's messages as Prefect events, which may trigger an automation (cancel, run again, tell somebody)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from training.errors import UserError

MAX_ALERTS = 100


def prefect_events(message: Any, flow_runs_of: Callable[[str], Sequence[str]]) -> list[dict[str, Any]]:
    """One event for each alert of a webhook message: `unbroken.alert.firing` or `unbroken.alert.resolved`, of resource
    `unbroken.run.RUN`; its flow runs are related, so that an action such as cancel-flow-run finds them.

    Raises `UserError` if the message is not as Alertmanager sends it.
    """
    try:
        return [_event(alert, flow_runs_of) for alert in message["alerts"][:MAX_ALERTS]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not a webhook message of Alertmanager: {error!r}") from error


def _event(alert: dict[str, Any], flow_runs_of: Callable[[str], Sequence[str]]) -> dict[str, Any]:
    labels, is_firing = alert["labels"], alert["status"] == "firing"
    about = labels.get("run")
    resource = f"unbroken.run.{about}" if about else f"unbroken.service.{labels.get('service', 'stack')}"
    related = [
        {"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}
        for flow_run in (flow_runs_of(about) if about else ())
    ]
    return {
        "id": str(uuid.uuid4()),
        "occurred": alert["startsAt" if is_firing else "endsAt"],
        "event": f"unbroken.alert.{'firing' if is_firing else 'resolved'}",
        "resource": {"prefect.resource.id": resource, "unbroken.alert": labels["alertname"]},
        "related": related,
        "payload": {"labels": labels, "annotations": alert["annotations"]},
    }
