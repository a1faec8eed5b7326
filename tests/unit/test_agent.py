"""The agent's shell: what it makes of a record that is over; and the job that it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.tiny import tiny_preset
from training.cluster.agent import Agent
from training.cluster.zygote import Zygote
from training.errors import DamagedError
from training.runs.job import Job, read_job, store_job
from training.runs.record import Failure, Record, start_fresh
from training.s3.objectstore import Store

RECORD = Record(key="k", token=3)


@pytest.fixture
def job(store: Store) -> Job:
    return Job(key="k", generation=0, preset=tiny_preset(), dataset_digest="d", location=store.location)


def agent(job: Job) -> Agent:
    return Agent(job=job, node=1, address="127.0.0.1", zygote=Zygote(job.preset))


@pytest.mark.parametrize(
    ("kind", "code"), [("UserError", 2), ("DeterministicError", 4), ("InfrastructureError", 4), ("DamagedError", 4)]
)
def test_run_that_failed_for_good_is_not_started_again_by_the_engine(job: Job, kind: str, code: int) -> None:
    """Not even one that failed for want of a server: the engine would begin it again for ever."""
    assert agent(job).exit_code(replace(RECORD, failure=Failure(kind=kind, message="m"))) == code


def test_agent_of_an_older_generation_is_done(job: Job) -> None:
    assert agent(job).exit_code(start_fresh(RECORD)) == 0


def test_jobs_of_two_starters_stand_side_by_side(store: Store, job: Job) -> None:
    other = replace(job, preset=replace(job.preset, launch=replace(job.preset.launch, nodes=3)))
    digests = [store_job(store, job), store_job(store, other), store_job(store, job)]
    assert digests[0] == digests[2] != digests[1]
    assert read_job(store, "k", digests[0]) == job
    assert read_job(store, "k", digests[1]) == other


def test_damaged_job_is_named(store: Store, job: Job) -> None:
    digest = store_job(store, job)
    store.put(f"runs/k/jobs/{digest}.json", b"{}")
    with pytest.raises(DamagedError, match=digest):
        read_job(store, "k", digest)
