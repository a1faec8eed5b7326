"""Promotion, rollback and history as flows; a promotion may wait for a person first."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.flow_runs import suspend_flow_run

from flows import publish
from flows.hooks import log_user_errors_in_one_line, outlive_the_worker
from tasks import registry
from tasks.gate.judge import judge
from tasks.lifecycle import champions, promotion
from tasks.lifecycle.champion import moment
from tasks.lifecycle.promotion import Outcome
from tasks.lineage import page
from tasks.policy import patiently
from tasks.stack import open_stack

APPROVAL_SECONDS = 7 * 24 * 3600
OPTIONS: dict[str, Any] = {"persist_result": True, "result_serializer": "json"}


@flow(name="promote", **OPTIONS)
def promote(version: str, reason: str = "", approve: bool = False, gate: bool = True) -> dict[str, Any]:
    """Make a registered version champion. It loses if another becomes champion since this flow run began.

    Args:
        version: NAME/VERSION or NAME@ALIAS.
        reason: for the history.
        approve: once the version is proven and the gate lets it through, wait until a person resumes this flow run.
        gate: without it nothing is judged; the history shows that no decision was.
    """
    _begin()
    settings, store = open_stack()
    ask: dict[str, Any] = {"by": _this_flow_run(), "judge": judge if gate else None}

    def find() -> tuple[str, int]:
        name, number = registry.find_version(settings.mlflow_uri, version, what="version")
        return f"{name}/{number}", champions.read(store, name).current.sequence

    pinned, replaces = publish.judged_once(find)
    name, number = pinned.split("/")
    current = patiently(lambda: champions.read(store, name).current)
    if approve and current.version != number:
        patiently(lambda: promotion.check(settings, store, name, number, against=current.version, **ask))
        suspend_flow_run(key="approval", timeout=APPROVAL_SECONDS)
    return _told(patiently(lambda: promotion.promote(settings, store, pinned, reason=reason, replaces=replaces, **ask)))


@flow(name="rollback", **OPTIONS)
def rollback(model: str, to: str | None = None, reason: str = "") -> dict[str, Any]:
    """Make the champion before the current one champion again.

    Args:
        model: a registered model's name.
        to: an earlier champion's version, if not the one before.
        reason: for the history.
    """
    _begin()
    settings, store = open_stack()
    target, replaces = publish.judged_once(lambda: promotion.way_back(store, model, to))
    return _told(
        patiently(
            lambda: promotion.roll_back(
                settings, store, model, to=target, by=_this_flow_run(), reason=reason, replaces=replaces
            )
        )
    )


@flow(name="history", **OPTIONS)
def history(model: str, at: str | None = None) -> list[dict[str, Any]]:
    """A table of who was champion of a model, since when, by whom and why.

    Args:
        model: a registered model's name.
        at: only the one at this time, such as 2026-11-27T08:00.
    """
    _begin()
    champion = patiently(lambda: champions.read(open_stack()[1], model))
    entries = champion.entries if at is None else (champion.at(moment(at)),)
    table: list[Any] = [{**asdict(entry), "when": entry.when} for entry in reversed(entries)]
    patiently(lambda: create_table_artifact(key="champions", table=table, description=f"Champions of {model}"))
    return table


def _begin() -> None:
    outlive_the_worker()
    log_user_errors_in_one_line()


def _this_flow_run() -> str:
    return f"flow run {publish.flow_run_name()}"


def _told(outcome: Outcome) -> dict[str, Any]:
    entry = outcome.entry
    page.renew(*open_stack(), outcome)
    text = f"{outcome.model} version {entry.version} is champion ({entry.action} by {entry.by}, {entry.when})"
    patiently(lambda: create_markdown_artifact(key="champion", markdown=text, description="The champion"))
    return asdict(outcome)
