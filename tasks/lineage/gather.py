"""Bringing together what the store and MLflow know of a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.settings import Settings
from tasks import registry, tracking
from tasks.attempts import attempts_table, begun_by_token
from tasks.gate.decide import Decision
from tasks.lifecycle import champions
from tasks.lifecycle.champion import Champion, Entry
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.facts import Code, Data, Gate, Lineage, Training
from tasks.provenance import starts_of
from training.data.manifest import load_manifest
from training.documents import parse, read_document
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.runs.events import Event, EventReader, chunk_key
from training.runs.identity import find_identity
from training.runs.job import Job, read_jobs
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What is told of a decision of the gate."""

    champion: str | None
    decision: Decision


def lineage_of(settings: Settings, store: Store, kept: KeptVersion) -> Lineage:
    """All that is known of a version. What is gone, damaged or does not answer is told in `unknown`.

    Raises `InfrastructureError` if the store is away.
    """
    unknown: list[str] = []
    maybe_champion = champions.find(store, kept.model)
    history = _history(maybe_champion, kept)
    tags, links = _of_mlflow(settings, kept, unknown)
    maybe_training = None
    record, jobs = _run(store, kept, unknown)
    if record is not None and jobs:
        maybe_training = _training(store, record, jobs[0], unknown)
        links |= _link_of_run(settings, record, unknown)
    return Lineage(
        kept=kept,
        training=maybe_training,
        data=data_of(store, jobs[0], unknown) if jobs else None,
        code=code_of(store, jobs[0], unknown) if jobs else None,
        gate=_gate(store, kept.model, history, tags, unknown),
        history=history,
        is_champion=bool(history) and maybe_champion is not None and maybe_champion.current == history[-1],
        tags=tags,
        links=links,
        unknown=tuple(unknown),
    )


def _history(maybe_champion: Champion | None, kept: KeptVersion) -> tuple[Entry, ...]:
    entries = maybe_champion.entries if maybe_champion is not None else ()
    return tuple(entry for entry in entries if (entry.version, entry.run_key) == (kept.version, kept.run_key))


def _of_mlflow(settings: Settings, kept: KeptVersion, unknown: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The version's tags, and its page."""
    try:
        registry.require_run_key(settings.mlflow_uri, kept.model, kept.version, kept.run_key)
        tags = registry.tags_of(settings.mlflow_uri, kept.model, kept.version)
    except (InfrastructureError, UserError) as error:
        unknown.append(str(error))
        return {}, {}
    return tags, {"registry": registry.version_url(settings.mlflow_uri, kept.model, kept.version)}


def _link_of_run(settings: Settings, record: Record, unknown: list[str]) -> dict[str, str]:
    if record.tracking_run_id is None:
        return {}
    try:
        return {"mlflow": tracking.url_of(settings.mlflow_uri, record.tracking_run_id)}
    except InfrastructureError as error:
        unknown.append(f"MLflow run {record.tracking_run_id}: {error}")
        return {}


def _run(store: Store, kept: KeptVersion, unknown: list[str]) -> tuple[Record | None, list[Job]]:
    """The record of the run that gave these weights, and its jobs."""
    try:
        record, jobs = RunRecord(store, kept.run_key).find(), read_jobs(store, kept.run_key)
    except DamagedError as error:
        unknown.append(str(error))
        return None, []
    if record is None or record.result is None or record.result.weights_sha256 != kept.weights_sha256 or not jobs:
        unknown.append(f"the run {kept.run_key[:12]} was removed, or trained anew to other weights")
        return None, jobs
    return record, jobs


def _training(store: Store, record: Record, job: Job, unknown: list[str]) -> Training:
    assert record.result is not None
    return Training(
        run_key=record.key,
        generation=record.generation,
        steps=record.result.step,
        state_sha256=record.result.state_sha256,
        environment=record.environment,
        attempts=tuple(attempts_table(record, begun_by_token(_beginnings(store, record, unknown)))),
        departures=record.departures,
        checkpoints=record.checkpoints,
        quarantined=record.quarantined,
        inexact=job.preset.train.maybe_inexact,
        initial=job.initial,
        continued=record.continued,
        preset=job.preset.to_json(),
    )


def _beginnings(store: Store, record: Record, unknown: list[str]) -> list[Event]:
    """The first events of each token: how its group began is among those of its first second."""
    found: list[Event] = []
    prefix = RunRecord(store, record.key).prefix(record)
    for token, step in enumerate(record.resume_steps, start=1):
        if step is not None and store.exists(chunk_key(prefix, token, 0)):
            try:
                found += EventReader(store, prefix, (token, 0)).read_next()
            except DamagedError as error:
                unknown.append(str(error))
    return found


def data_of(store: Store, job: Job, unknown: list[str]) -> Data:
    """What a run reads. What is damaged is told in `unknown`."""
    preset = job.preset
    try:
        shards = {str(split): infos for split, infos in _splits(store, job).items()}
    except (UserError, DamagedError) as error:
        unknown.append(str(error))
        shards = {}
    return Data(
        name=preset.data.name,
        digest=job.dataset_digest,
        shards=shards,
        order_seed=preset.seed,
        batch_size=preset.train.batch_size,
        virtual_workers=preset.train.virtual_workers,
        shuffle_window_shards=preset.train.shuffle_window_shards,
    )


def _splits(store: Store, job: Job) -> Mapping[Any, Any]:
    return load_manifest(store, job.preset.data.name, job.dataset_digest).splits


def code_of(store: Store, job: Job, unknown: list[str]) -> Code:
    """What a run is computed by, and who started it. What is damaged is told in `unknown`."""
    maybe_identity = None
    try:
        maybe_identity = find_identity(store, job.key)
        starts = tuple(starts_of(store, job.key))
    except DamagedError as error:
        unknown.append(str(error))
        starts = ()
    known = maybe_identity.determining if maybe_identity is not None else {}
    sources = maybe_identity.sources if maybe_identity is not None else {}
    return Code(
        recipe=job.preset.recipe,
        recipe_source=known.get("recipe_source"),
        numerics_version=known.get("numerics_version"),
        sources={name: source.sha256 for name, source in sources.items()},
        starts=starts,
    )


def decisions_of(history: Sequence[Entry], tags: Mapping[str, str]) -> list[str]:
    """Digests of what the gate decided of a version, the newest first."""
    by_tag = tags.get(f"{registry.GATE_TAG}.decision")
    found = [by_tag] if by_tag else []
    return found + [e.decision_sha256 for e in reversed(history) if e.decision_sha256 and e.decision_sha256 != by_tag]


def decision_key(model: str, sha256: str) -> str:
    return f"models/{model}/decisions/{sha256}.json"


def _gate(
    store: Store, model: str, history: Sequence[Entry], tags: Mapping[str, str], unknown: list[str]
) -> Gate | None:
    for sha256 in decisions_of(history, tags)[:1]:
        try:
            data = store.get_proven(decision_key(model, sha256), sha256=sha256)
            judged = parse(_Judged, read_document(data, what="it"))
        except (MissingError, DamagedError) as error:
            unknown.append(f"the gate's decision: {error}")
            return None
        return Gate(
            decision_sha256=sha256,
            passed=judged.decision.passed,
            champion=judged.champion,
            reasons=tuple(reason.text for reason in judged.decision.reasons),
        )
    return None
