"""What an agent and its workers are told: the job, as a JSON document without secrets."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from training.config import Preset
from training.documents import parse
from training.objectstore import Store, StoreLocation
from training.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run to be done by `preset.launch.nodes` agents."""

    key: str
    generation: int
    preset: Preset
    dataset_digest: str
    location: StoreLocation

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> Job:
        return parse(Job, document)

    def open_run(self) -> RunRecord:
        return RunRecord(Store(self.location), self.key)


def job_key(run_key: str) -> str:
    """Where the job's description lies on the object store, for agents on any machine."""
    return f"runs/{run_key}/job.json"


def agent_command(run_key: str) -> tuple[str, ...]:
    """How an engine starts the agent of node `{node}`."""
    return (sys.executable, "-m", "training.agent", "{node}", run_key)


def agent_environment(location: StoreLocation) -> dict[str, str]:
    """Where an agent finds its job. Credentials are not in it."""
    return {
        "UNBROKEN_S3_ENDPOINT": location.endpoint or "",
        "UNBROKEN_S3_BUCKET": location.bucket,
        "UNBROKEN_S3_PREFIX": location.prefix,
        "UNBROKEN_S3_REGION": location.region,
    }
