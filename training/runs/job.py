"""What an agent and its workers are told: the job, as a JSON document without secrets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from training.config import Preset
from training.documents import canonical_json, parse, read_document, sha256_hex
from training.runs.record import InitialWeights, RunRecord
from training.s3.objectstore import Store, StoreLocation, shared_store


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run to be done by `preset.launch.nodes` agents."""

    key: str
    generation: int
    preset: Preset
    dataset_digest: str
    location: StoreLocation
    initial: InitialWeights | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> Job:
        return parse(Job, document)

    def open_run(self) -> RunRecord:
        return RunRecord(shared_store(self.location), self.key)


def store_job(store: Store, job: Job) -> str:
    """Put the job where agents on any machine find it; returns its digest.

    Its name decides its bytes, so two starters of one run (with other numbers of nodes, say) cannot change what the
    other's agents are told.
    """
    data = canonical_json(job.to_json())
    digest = sha256_hex(data)
    store.put_immutable(_job_key(job.key, digest), data)
    return digest


def read_job(store: Store, run_key: str, digest: str) -> Job:
    """Raises `DamagedError` if it is not as it was stored."""
    key = _job_key(run_key, digest)
    return Job.from_json(read_document(store.get_proven(key, sha256=digest), what=store.location.uri(key)))


def read_jobs(store: Store, run_key: str) -> list[Job]:
    """Every job that was submitted for a run."""
    keys = [key for key, _ in store.list_keys(f"runs/{run_key}/jobs/")]
    return [read_job(store, run_key, key.rpartition("/")[2].removesuffix(".json")) for key in sorted(keys)]


def _job_key(run_key: str, digest: str) -> str:
    return f"runs/{run_key}/jobs/{digest}.json"


def agent_command(run_key: str, job_digest: str) -> tuple[str, ...]:
    """How an engine starts the agent of node `{node}`."""
    return (sys.executable, "-m", "training.cluster.agent", "{node}", run_key, job_digest)


def location_from(environment: Mapping[str, str]) -> StoreLocation | None:
    """The inverse of `agent_environment`; None if there is nothing of it."""
    if "UNBROKEN_S3_BUCKET" not in environment:
        return None
    return StoreLocation(
        endpoint=environment.get("UNBROKEN_S3_ENDPOINT") or None,
        bucket=environment["UNBROKEN_S3_BUCKET"],
        prefix=environment.get("UNBROKEN_S3_PREFIX", ""),
        region=environment.get("UNBROKEN_S3_REGION", "us-east-1"),
    )


def agent_environment(location: StoreLocation) -> dict[str, str]:
    """Where an agent finds its job. Credentials are not in it."""
    return {
        "UNBROKEN_S3_ENDPOINT": location.endpoint or "",
        "UNBROKEN_S3_BUCKET": location.bucket,
        "UNBROKEN_S3_PREFIX": location.prefix,
        "UNBROKEN_S3_REGION": location.region,
    }
