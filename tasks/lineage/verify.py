"""Hashing anew all that a version came from, until something differs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.settings import Settings
from tasks import registry
from tasks.lifecycle import champions, model_file
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.gather import decision_key, decisions_of
from tasks.mlflow_client import RUN_KEY_TAG, WEIGHTS_TAG
from training.checkpoints.trust import trusted_result
from training.data.manifest import Manifest, load_manifest, shard_key
from training.documents import sha256_hex
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.runs.identity import SourceFile, find_identity
from training.runs.job import Job
from training.runs.proof import find_job, mismatch
from training.runs.record import CheckpointRef, Record, RunRecord
from training.s3.objectstore import Store
from training.sources import find_module

if TYPE_CHECKING:
    from torch import Tensor


class LineageError(DamagedError):
    """Something that a model came from is not what it was. The message names the first."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One thing that was looked at."""

    what: str
    is_whole: bool
    """False: it could not be compared here, and `note` says why. What differs is an error."""
    note: str = ""


def verify(settings: Settings, store: Store, kept: KeptVersion) -> Iterator[Checked]:
    """Each thing, once it was found to be what it was; the model file first, then what it was made of.

    Raises `LineageError` (or another `DamagedError`) naming the first that differs or is missing;
    `InfrastructureError` if the store is away.
    """
    model_file.prove(store, kept)
    yield Checked(what=f"model file {kept.model_sha256}", is_whole=True)
    yield from _in_mlflow(settings, kept)
    yield from _decisions(settings, store, kept)
    record, job = require_run(store, kept)
    yield Checked(what=f"run record {record.key}", is_whole=True)
    yield from exactness(job)
    yield from _checkpoints(store, record)
    yield from verify_identity(store, kept, job)
    yield from _shards(store, job)


def _in_mlflow(settings: Settings, kept: KeptVersion) -> Iterator[Checked]:
    what = f"MLflow's version {kept.version}"
    try:
        registry.find_version(settings.mlflow_uri, f"{kept.model}/{kept.version}", what="VERSION")
        tags = registry.tags_of(settings.mlflow_uri, kept.model, kept.version)
    except InfrastructureError as error:
        yield Checked(what=what, is_whole=False, note=str(error))
        return
    except UserError as error:
        raise LineageError(f"{what} of model {kept.model!r} is missing: it was deleted there") from error
    for tag, due in ((RUN_KEY_TAG, kept.run_key), (WEIGHTS_TAG, kept.weights_sha256)):
        if tags.get(tag) != due:
            raise LineageError(f"{what} has the tag {tag} = {tags.get(tag)!r}, and the store {due!r}")
    yield Checked(what=what, is_whole=True)


def _decisions(settings: Settings, store: Store, kept: KeptVersion) -> Iterator[Checked]:
    maybe_champion = champions.find(store, kept.model)
    entries = maybe_champion.entries if maybe_champion is not None else ()
    history = [entry for entry in entries if (entry.version, entry.run_key) == (kept.version, kept.run_key)]
    for entry in history:
        if entry.model_sha256 not in ("", kept.model_sha256):
            raise LineageError(
                f"change {entry.sequence} of {store.location.uri(champions.champion_key(kept.model))} names another"
                f" model file, {entry.model_sha256}"
            )
    for sha256 in decisions_of(history, {}):
        _proven(store, decision_key(kept.model, sha256), sha256, "a decision of the gate")
        yield Checked(what=f"gate's decision {sha256}", is_whole=True)


def require_run(store: Store, kept: KeptVersion) -> tuple[Record, Job]:
    """Raises `LineageError` if the run is gone, or gave other weights since, `UntrustedError` if its
    result is not signed as it should be."""
    run = RunRecord(store, kept.run_key)
    where = store.location.uri(run.object_key)
    record, job = run.find(), find_job(store, kept.run_key)
    if record is None:
        raise LineageError(f"{where} is missing: the run was removed, and nothing more can be proven of it")
    if job is None:
        folder = store.location.uri(f"runs/{kept.run_key}/jobs/")
        raise LineageError(f"{folder} is empty: what was trained is not known")
    if record.result is None or record.result.weights_sha256 != kept.weights_sha256:
        now = record.result.weights_sha256 if record.result is not None else "none yet"
        setting = job.preset.train.maybe_inexact
        why = f" ({setting} gives others each time)" if setting else ""
        raise LineageError(
            f"{where}: the run was begun anew, and its weights are {now}, not {kept.weights_sha256}{why}"
        )
    trusted_result(run, record)
    return record, job


def _checkpoints(store: Store, record: Record) -> Iterator[Checked]:
    """Every object of each; and of the result's the weights and the state."""
    from training.checkpoints.checkpoint import load_checkpoint

    assert record.result is not None
    prefix = RunRecord(store, record.key).prefix(record)
    if record.result.checkpoint not in record.checkpoints:
        raise LineageError(f"the run record names no more the checkpoint of its result, step {record.result.step}")
    for reference in reversed(record.checkpoints):
        tensors = load_checkpoint(store, prefix, reference)
        if reference == record.result.checkpoint:
            require_result(record, reference, tensors)
        yield Checked(what=f"checkpoint of step {reference.step}", is_whole=True)


def require_result(record: Record, reference: CheckpointRef, tensors: dict[str, Tensor]) -> None:
    """Raises `LineageError` unless these, its checkpoint's, are what a run's result has the digests of."""
    from training.checkpoints.state import tensors_sha256

    assert record.result is not None
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for what, found, due in (
        ("weights", tensors_sha256(weights), record.result.weights_sha256),
        ("state", tensors_sha256(tensors), record.result.state_sha256),
    ):
        if found != due:
            raise LineageError(f"checkpoint {reference.step}: its {what} have sha256 {found}, the result's have {due}")


def exactness(job: Job) -> Iterator[Checked]:
    """Whether what was done could be compared with what would be done now."""
    if setting := job.preset.train.maybe_inexact:
        yield Checked(what="training", is_whole=False, note=f"{setting}: done again, it gives another result")


def verify_identity(store: Store, kept: KeptVersion, job: Job) -> Iterator[Checked]:
    """The job against the run key, and the recipe's source files against those that are here."""
    identity = find_identity(store, kept.run_key)
    if identity is None:
        note = "the run was begun by an earlier release, which kept no source"
        yield Checked(what="source", is_whole=False, note=note)
        return
    if wrong := mismatch(identity, job):
        raise LineageError(f"the job of run {kept.run_key[:12]} has {wrong}")
    if kept.dataset_digest != job.dataset_digest:
        raise LineageError(f"version {kept.version} names dataset {kept.dataset_digest}, its run {job.dataset_digest}")
    yield Checked(what="run key", is_whole=True)
    for name, source in identity.sources.items():
        yield _source(name, source, job)


def _source(name: str, source: SourceFile, job: Job) -> Checked:
    """A source file as it was, against the one that is imported here."""
    spec = find_module(name, job.preset.folder)
    path = Path(spec.origin) if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        note = "no such file on this machine; what was kept of it is whole"
        return Checked(what=f"source {name}", is_whole=False, note=note)
    data = path.read_bytes()
    if sha256_hex(data) != source.sha256:
        raise LineageError(f"{path}{first_difference(source.data, data)}")
    return Checked(what=f"source {name}", is_whole=True)


def first_difference(before: bytes, now: bytes) -> str:
    """`:LINE …`, the first line that is not as it was."""
    was, found = (data.decode("utf-8", "replace").splitlines() for data in (before, now))
    for tag, start, end, there, there_end in difflib.SequenceMatcher(None, was, found, autojunk=False).get_opcodes():
        if tag != "equal":
            old = was[start] if start < end else "nothing"
            new = found[there] if there < there_end else "nothing"
            return f":{there + 1} differs from the source that was trained: it has {new!r}, where {old!r} was"
    return " differs from the source that was trained, in its line ends"


def _shards(store: Store, job: Job) -> Iterator[Checked]:
    name, digest = job.preset.data.name, job.dataset_digest
    manifest = _manifest(store, name, digest)
    yield Checked(what=f"manifest {digest}", is_whole=True)
    for split, shards in manifest.splits.items():
        for number, shard in enumerate(shards, start=1):
            _proven(store, shard_key(name, shard.sha256), shard.sha256, f"a shard of dataset {name!r}")
            yield Checked(what=f"shard {number}/{len(shards)} ({split}) {shard.sha256}", is_whole=True)


def _manifest(store: Store, name: str, digest: str) -> Manifest:
    try:
        return load_manifest(store, name, digest)
    except UserError as error:
        raise LineageError(f"the dataset version that it was trained on is gone: {error}") from error


def _proven(store: Store, key: str, sha256: str, what: str) -> None:
    try:
        store.get_proven(key, sha256=sha256)
    except MissingError as error:
        raise LineageError(f"{store.location.uri(key)} is missing, {what}") from error
