"""Bringing together what the store has of a run. MLflow and Prefect are not asked: they may be away, and change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from infra.settings import Settings
from tasks import tracking
from tasks.attempts import attempts_table, begun_by_token
from tasks.lifecycle import model_file
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.facts import Code
from tasks.lineage.gather import code_of, data_of
from tasks.report.facts import Group, Left, RunFacts, Saved, State
from tasks.results import Evaluation
from training.documents import parse, unsealed
from training.errors import DamagedError, MissingError
from training.runs.events import Event, EventReader, committed
from training.runs.goodput import account, in_time
from training.runs.job import Job, read_jobs
from training.runs.record import Record, RunRecord
from training.runs.system import Sample, SampleReader
from training.s3.objectstore import Store

NUM_AT_ONCE = 8
"""Chunks of events that are read at a time: a long run has one for each second."""


def gather(settings: Settings, run: RunRecord) -> RunFacts:
    """What there is of a run. What is missing or damaged is told in `unknown`.

    Raises `MissingError` if there is no such run, `DamagedError` if its record is damaged, `InfrastructureError` if the
    store is away.
    """
    unknown: list[str] = []
    record, store = run.read(), run.store
    maybe_job = _job(store, record, unknown)
    events = in_time(_events(run, record, unknown))
    steps = committed(events, record.resume_steps)
    counting = {(event.step, event.time) for event in steps}
    groups = _groups(record, events, maybe_job.preset.launch.processes_per_node if maybe_job else 1)
    maybe_code = code_of(store, maybe_job, unknown) if maybe_job else None
    _tell_gaps(steps, unknown)
    return RunFacts(
        run_key=record.key,
        generation=record.generation,
        name=maybe_job.preset.name if maybe_job else "",
        state=_state(record),
        failure=record.failure.message if record.failure else "",
        goal_steps=maybe_job.preset.train.steps if maybe_job else None,
        steps=tuple(steps),
        redone=tuple(e for e in events if e.kind == "step" and (e.step, e.time) not in counting),
        begun_at=events[0].time if events else None,
        last_at=events[-1].time if events else None,
        groups=tuple(groups),
        departures=tuple(_departures(record, groups)),
        saved=tuple(Saved(step=event.step, at=event.time) for event in events if event.kind == "checkpoint"),
        damaged=tuple(f"step {one.checkpoint.step}: {one.reason}" for one in record.quarantined),
        goodput=account(events, record.resume_steps),
        samples=_samples(run, record, unknown),
        evaluation=_newest_evaluation(store, record),
        result=record.result,
        preset=dict(tracking.flat(maybe_job.preset.to_json())) if maybe_job else {},
        environment=record.environment,
        data=data_of(store, maybe_job, unknown) if maybe_job else None,
        code=maybe_code,
        initial=maybe_job.initial if maybe_job else None,
        continued=record.continued,
        versions=tuple(_versions(store, record, maybe_job, unknown)) if maybe_job else (),
        links=_links(settings, record, maybe_code),
        unknown=tuple(unknown),
    )


def _state(record: Record) -> State:
    return "finished" if record.result else "failed" if record.failure else "open"


def _job(store: Store, record: Record, unknown: list[str]) -> Job | None:
    """The first by its digest: those of one run differ in what does not change the result."""
    try:
        jobs = [job for job in read_jobs(store, record.key) if job.generation == record.generation]
    except DamagedError as error:
        unknown.append(str(error))
        return None
    if not jobs:
        unknown.append("what was asked for: no job of this run is on the store")
        return None
    return jobs[0]


def _events(run: RunRecord, record: Record, unknown: list[str]) -> list[Event]:
    """All that are there: a chunk that is missing or damaged hides no later one."""
    prefix = run.prefix(record)

    def read(position: tuple[int, int]) -> list[Event] | DamagedError:
        try:
            return EventReader(run.store, prefix, position).read_next()
        except DamagedError as error:
            return error

    found: list[Event] = []
    with ThreadPoolExecutor(max_workers=NUM_AT_ONCE) as pool:
        for events in pool.map(read, _chunks(run.store, f"{prefix}events/", unknown)):
            if isinstance(events, DamagedError):
                unknown.append(str(events))
            else:
                found += events
    return found


def _chunks(store: Store, folder: str, unknown: list[str]) -> list[tuple[int, int]]:
    """The (token, number) of each, in order."""
    found = []
    for key, _ in store.list_keys(folder):
        of_token, _, its_number = key.removeprefix(folder).removesuffix(".jsonl").partition("/")
        if of_token.isdecimal() and its_number.isdecimal():
            found.append((int(of_token), int(its_number)))
        else:
            unknown.append(f"{store.location.uri(key)} is no chunk of events")
    found.sort()
    for (token, number), before in zip(found, [(0, 0), *found], strict=False):
        num_missing = number - (before[1] + 1 if before[0] == token else 0)
        if num_missing:
            unknown.append(f"events of token {token}: {num_missing} chunks are missing before chunk {number}")
    return found


def _tell_gaps(steps: Sequence[Event], unknown: list[str]) -> None:
    """Steps that came after steps of which nothing is told."""
    known = 0
    for event in steps:
        if event.step > known + 1:
            unknown.append(f"steps {known + 1} to {event.step - 1}: no event tells of them")
        known = event.step


def _groups(record: Record, events: Sequence[Event], processes_per_node: int) -> list[Group]:
    """Each with what was told between its beginning and the next one's."""
    spans: dict[int, list[Event]] = {}
    token = 0
    for event in events:
        token = event.token if event.kind == "attempt" else token
        spans.setdefault(token, []).append(event)
    rows = attempts_table(record, begun_by_token(events))
    return [_group(row, spans.get(row["token"], []), processes_per_node) for row in rows]


def _group(row: Mapping[str, Any], span: Sequence[Event], processes_per_node: int) -> Group:
    group = Group(token=row["token"], from_step=row["from_step"], why_it_ended=row["why_it_ended"])
    if not span:
        return group
    return replace(
        group,
        ranks=row["ranks"],
        nodes=row["ranks"] // processes_per_node,
        source=row["from"],
        began_at=span[0].time,
        ended_at=span[-1].time,
        last_step=max((event.step for event in span if event.kind == "step"), default=None),
    )


def _departures(record: Record, groups: Sequence[Group]) -> Iterable[Left]:
    for number, left in enumerate(record.departures, start=1):
        before = [group for group in groups if group.token <= left.token and group.ended_at is not None]
        last_steps = [group.last_step for group in before if group.last_step is not None]
        yield Left(
            number=number,
            node=left.node,
            token=left.token,
            step=max([left.step, *last_steps[-1:]]),  # who is gone did not say how far it was
            class_name=left.class_name,
            cause=left.cause,
            at=before[-1].ended_at if before else None,
        )


def _samples(run: RunRecord, record: Record, unknown: list[str]) -> dict[int, tuple[Sample, ...]]:
    found: dict[int, list[Sample]] = {}
    try:
        for node, sample in SampleReader(run.store, run.prefix(record)).read_new():
            found.setdefault(node, []).append(sample)
    except DamagedError as error:
        unknown.append(str(error))
    return {node: tuple(sorted(found[node], key=lambda sample: sample.time)) for node in sorted(found)}


def _newest_evaluation(store: Store, record: Record) -> Evaluation | None:
    """Of several, by other `[evaluate]` tables, the one that was made last, as in MLflow."""
    if record.result is None:
        return None
    entries = [entry for entry in store.list_entries(f"runs/{record.key}/results/") if entry.key.endswith(".json")]
    for entry in sorted(entries, key=lambda entry: (entry.modified, entry.key), reverse=True):
        try:
            return parse(Evaluation, unsealed("result", store.get(entry.key)))
        except (DamagedError, MissingError):  # of another kind; or damaged, and then it is made anew by who needs it
            continue
    return None


def _versions(store: Store, record: Record, job: Job, unknown: list[str]) -> Iterable[KeptVersion]:
    folder = f"models/{job.preset.name}/versions/"
    names = (key.removeprefix(folder).removesuffix(".json") for key, _ in store.list_keys(folder))
    for version in sorted(names, key=lambda name: (len(name), name)):
        try:
            kept = model_file.find(store, job.preset.name, version)
        except DamagedError as error:
            unknown.append(str(error))
            continue
        if record.result is not None and (kept.run_key, kept.weights_sha256) == (
            record.key,
            record.result.weights_sha256,
        ):
            yield kept


def _links(settings: Settings, record: Record, maybe_code: Code | None) -> dict[str, str]:
    """Of what the record and the starts name."""
    found = {}
    if record.tracking_run_id and settings.maybe_mlflow_uri:
        found["MLflow run"] = tracking.direct_url(settings.maybe_mlflow_uri, record.tracking_run_id)
    if settings.maybe_prefect_api_url and maybe_code is not None:
        flow_runs = sorted({start.flow_run for start in maybe_code.starts if start.flow_run})
        for number, flow_run in enumerate(flow_runs, start=1):
            name = "Prefect flow run" if len(flow_runs) == 1 else f"Prefect flow run {number}"
            found[name] = f"{settings.prefect_ui_url}/runs/flow-run/{flow_run}"
    return found
