"""What a flow run shows while it runs and when it is done: labels for the command line, artifacts for a person."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from infra.settings import Settings, load_settings
from infra.store import store_location
from tasks.initial import pinned
from tasks.policy import patiently
from tasks.prediction.wanted import Wanted
from tasks.results import Dataset, Evaluation, Registration
from tasks.train import links
from training.config import Preset
from training.documents import parse, read_document
from training.errors import DamagedError, UserError
from training.runs.record import RunRecord
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

RUN_KEY_LABEL = "unbroken.run_key"
MACHINE_LABEL = "unbroken.machine"
WARM_START_LABEL = "unbroken.warm_start"
JUDGED_LABEL = "unbroken.judged"
PREDICTED_LABEL = "unbroken.predicted"
RESULTS_ARTIFACT = "results"
LINKS_ARTIFACT = "links"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def flow_run_id() -> str:
    """The id of the flow run that this process executes."""
    from prefect.runtime import flow_run

    return str(flow_run.get_id())


def run_key(key: str) -> None:
    """Label the flow run, so that others can follow the training before it ends."""
    _label(RUN_KEY_LABEL, key)


def pinned_once(settings: Settings, preset: Preset) -> Preset:
    """The preset with its `warm_start` as a version: the one that it stood for when this flow run first began. Its
    alias may have moved since, by this very flow run."""
    if preset.train.warm_start is None:
        return preset
    known = (_flow_run().labels or {}).get(WARM_START_LABEL)
    if known is None:
        known = patiently(lambda: pinned(settings, preset)).train.warm_start
        _label(WARM_START_LABEL, str(known))
    return replace(preset, train=replace(preset.train, warm_start=str(known)))


def judged_once(find: Callable[[], tuple[str, int]]) -> tuple[str, int]:
    """The version that this flow run is to make champion, and the change that it replaces: what `find` gave when the
    flow run first began. While it waits for a person, or to be tried again, another may become champion."""

    def found() -> str:
        version, replaces = find()
        return f"{version} {replaces}"

    return judged_of(_found_once(JUDGED_LABEL, found))


def judged_of(label: str) -> tuple[str, int]:
    """Raises `UserError` if somebody changed what the flow run is labelled with; so does `wanted_of`."""
    found = re.fullmatch(r"(\S+) (\d{1,18})", label, re.ASCII)
    if found is None:
        raise UserError(
            f"the flow run's label {JUDGED_LABEL} = {label[:100]!r} names no version: start another flow run"
        )
    return found[1], int(found[2])


def wanted_once(find: Callable[[], Wanted]) -> Wanted:
    """What this flow run is to predict: what its names meant when it first began, whoever is champion by now."""
    return wanted_of(_found_once(PREDICTED_LABEL, lambda: json.dumps(asdict(find()))))


def wanted_of(label: str) -> Wanted:
    try:
        return parse(Wanted, read_document(label, what="it"))
    except DamagedError as error:
        raise UserError(
            f"the flow run's label {PREDICTED_LABEL} = {label[:100]!r} names no data to be predicted ({error}): start"
            " another flow run"
        ) from error


def _found_once(label: str, find: Callable[[], str]) -> str:
    known = (_flow_run().labels or {}).get(label)
    if known is None:
        known = patiently(find)
        _label(label, known)
    return str(known)


def flow_run_name() -> str:
    """What Prefect calls the flow run that this process executes."""
    from prefect.runtime import flow_run

    return str(flow_run.get_name())


def machine() -> None:
    """Label the flow run with where its process is: the reaper there need not wait for heartbeats to miss it."""
    _label(MACHINE_LABEL, machine_label(_flow_run().run_count))


def machine_label(run_count: int) -> str:
    """The boot of this kernel and its namespace of processes: here, a process is seen if it lives. And at which try:
    the next may be elsewhere."""
    return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')} {run_count}"


def _flow_run() -> FlowRun:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return patiently(lambda: client.read_flow_run(UUID(flow_run_id())))


def _label(name: str, value: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        patiently(lambda: client.update_flow_run_labels(UUID(flow_run_id()), {name: value}))


def results(
    dataset: Dataset, evaluation: Evaluation, version: Registration, *, maybe_report: str | None
) -> dict[str, str]:
    """Make artifacts, a table of the results and the links to where everything is; returns the links."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    percent = f"{evaluation.confidence:.0%}"
    table: list[Any] = [
        {"metric": name, "value": round(e.value, 5), f"{percent} low": round(e.low, 5), "high": round(e.high, 5)}
        for name, e in evaluation.metrics.items()
    ]
    about = f"{version.name} version {version.version} on {evaluation.num_samples} held-out samples"
    patiently(lambda: create_table_artifact(key=RESULTS_ARTIFACT, table=table, description=about))
    settings = load_settings()
    run = RunRecord(Store(store_location(settings)), version.run_key)
    found = patiently(lambda: links(settings, run))
    found["registry"] = version.url
    if maybe_report is not None:
        found["report"] = maybe_report
    found["prefect"] = f"{settings.prefect_ui_url}/runs/flow-run/{flow_run_id()}"
    lines = [f"- {name}: {url}" for name, url in found.items()]
    lines += [f"- run key: `{version.run_key}`", f"- dataset: `{dataset.name}` `{dataset.digest}`"]
    where = "Where everything is"
    patiently(lambda: create_markdown_artifact(key=LINKS_ARTIFACT, markdown="\n".join(lines), description=where))
    patiently(run.read)  # the store is there: Prefect will try only once to keep the flow's result on it
    return found
