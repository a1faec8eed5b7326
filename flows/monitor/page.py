"""What Prometheus reads of runs, servers and the stack: the views, as metrics (docs/monitoring.md lists them)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from flows.monitor.view import OVER, RunView, Servers
from training.runs.exposition import Page

NOT_FINITE = re.compile(r"the loss is (nan|-?inf)|the gradient norm (nan|inf)")


def runs_page(views: Iterable[RunView]) -> Page:
    page = Page()
    for view in views:
        add_run(page, view)
    return page


def add_run(page: Page, view: RunView) -> None:
    labels = {"run": view.short_key}

    def add(name: str, value: float | None, help: str, **more: str) -> None:
        if value is not None:
            page.add(f"unbroken_run_{name}", value, help, {**labels, **more})

    link = next(iter(view.links.values()), "")
    add("info", 1, "The model that the run trains, and where to read more", model=view.model, link=link)
    add("active", view.state not in OVER, "1 while an engine works on the run and it is not over")
    add("token", view.token, "The fencing token: how often its set of nodes changed")
    add("attempts_total", view.num_attempts, "Groups that began to train")
    add("goal_steps", view.goal_steps, "Steps that the run is to make")
    add("wanted_nodes", view.wanted_nodes, "Nodes that the run asked for")
    add("group_nodes", view.group_nodes, "Nodes of its newest group")
    add("checkpoint_every_steps", view.checkpoint_every_steps, "Steps between two checkpoints")
    add("departures_total", view.num_departures, "How often a node left it by a failure, or was lost")
    add("failures_total", view.num_failures, "Groups that ended by a failure, of however many of their nodes")
    if last := view.last_departure:
        add("last_departure", 1, "The last such node, and why", **{**last, "cause": last["cause"][:200]})
    if view.state == "failed":
        cause = "loss not finite" if NOT_FINITE.search(view.why) else view.why.partition(":")[0]
        add("failed", 1, "The run stopped for good", cause=cause)
    if view.step_at is not None:
        add("step", view.step, "The newest finished step that was told of")
        add("step_timestamp_seconds", view.step_at, "When it was finished")
    if view.began_at is not None:
        help = "When its newest checkpoint was proven; before the first, when the run began"
        add("checkpoint_timestamp_seconds", view.checkpoint_at, help)
        add("checkpoint_step", view.checkpoint_step, "The step of that checkpoint")
        add("deadline_timestamp_seconds", view.deadline_at, "When the run is to be done")
    for use, seconds in view.seconds.items():
        add("seconds", seconds, "Where the run's time went; all uses add up to its wall time", use=use)


def servers_page(servers: Servers) -> Page:
    page = Page()
    for name, is_up in servers.up.items():
        page.add("unbroken_service_up", is_up, "1 if the server answers", {"service": name})
    for state, number in servers.flow_runs.items():
        page.add("unbroken_flow_runs", number, "Flow runs that Prefect knows, by state", {"state": state})
    for queue, seconds in servers.longest_waits.items():
        help = "How long the flow run that waits longest should have been running"
        page.add("unbroken_flow_run_wait_seconds", seconds, help, {"queue": queue})
    return page
