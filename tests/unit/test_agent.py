"""The agent's decisions: what it says of its workers, when it is done, and what it may still write."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.unit.tiny import tiny_preset
from training.agent import Agent
from training.documents import canonical_json
from training.errors import DamagedError
from training.job import Job, read_job, store_job
from training.objectstore import Store
from training.record import Departure, Failure, Record, RunRecord, start_fresh, without_failure
from training.worker import WorkerOrder, WorkerReport

RECORD = Record(key="k", token=3)


@pytest.fixture
def job(store: Store) -> Job:
    return Job(key="k", generation=0, preset=tiny_preset(), dataset_digest="d", location=store.location)


def agent(job: Job) -> Agent:
    return Agent(job=job, node=1, address="127.0.0.1")


def order(job: Job, folder: Path, local_rank: int, report: WorkerReport | None) -> WorkerOrder:
    path = folder / f"report-{local_rank}.json"
    if report is not None:
        path.write_bytes(canonical_json(asdict(report)))
    return WorkerOrder(
        job=job.to_json(),
        token=3,
        rank=local_rank,
        local_rank=local_rank,
        world_size=3,
        store_address="127.0.0.1",
        store_port=1,
        maybe_listen_fd=None,
        report_path=str(path),
        agent_pid=1,
    )


PEER_LOST = WorkerReport(class_name="PeerLost", message="gloo: connection closed", step=4)
BUG = WorkerReport(class_name="Exception", message="list index out of range", step=4)
NOT_FINITE = WorkerReport(class_name="DeterministicError", message="the loss is nan", step=4)


@pytest.mark.parametrize(
    ("reports", "codes", "cause"),
    [
        ([PEER_LOST, NOT_FINITE], [1, 4], "the loss is nan"),
        ([PEER_LOST, BUG, PEER_LOST], [1, 1, 1], "list index out of range"),
        ([BUG, NOT_FINITE], [1, 4], "the loss is nan"),
        ([PEER_LOST, None], [1, -9], "worker killed by signal 9"),
        ([None, None], [None, 7], "worker exited with 7"),
        ([PEER_LOST, None], [1, None], "gloo: connection closed"),
    ],
)
def test_departure_names_the_worker_that_failed_by_itself(
    job: Job, tmp_path: Path, reports: list[WorkerReport | None], codes: list[int | None], cause: str
) -> None:
    orders = [order(job, tmp_path, rank, report) for rank, report in enumerate(reports)]
    departure = agent(job).departure(RECORD, orders, codes)
    assert (departure.cause, departure.token, departure.node) == (cause, 3, 1)


@pytest.mark.parametrize(
    ("kind", "code"), [("UserError", 2), ("DeterministicError", 4), ("InfrastructureError", 4), ("DamagedError", 4)]
)
def test_run_that_failed_for_good_is_not_started_again_by_the_engine(job: Job, kind: str, code: int) -> None:
    """Not even one that failed for want of a server: the engine would begin it again for ever."""
    assert agent(job).exit_code(replace(RECORD, failure=Failure(kind=kind, message="m"))) == code


def test_agent_of_an_older_generation_is_done_and_writes_nothing(store: Store, job: Job) -> None:
    run = RunRecord(store, "k")
    run.create_if_missing()
    newer = run.update(start_fresh)
    assert agent(job).exit_code(newer) == 0
    last = Departure(token=1, node=1, cause="the loss is nan", step=4, class_name="DeterministicError")
    agent(job).maybe_give_up(run, last)
    assert run.read() == newer


def test_agent_notes_a_failure_for_good(store: Store, job: Job) -> None:
    run = RunRecord(store, "k")
    run.create_if_missing()
    last = Departure(token=1, node=1, cause="the loss is nan", step=4, class_name="DeterministicError")
    agent(job).maybe_give_up(run, last)
    assert run.read().failure == Failure(kind="DeterministicError", message="the loss is nan")


def test_restarts_that_led_to_a_failure_do_not_count_after_it_was_struck(store: Store, job: Job) -> None:
    """Or a run that was given up could never be started again."""
    run = RunRecord(store, "k")
    run.create_if_missing()
    killed = [Departure(token=n, node=1, cause="killed", step=0, class_name="Killed") for n in range(1, 99)]
    num_given_up = job.preset.launch.max_restarts + 1
    for departure in killed[:num_given_up]:
        run.update(lambda record, token=departure.token: replace(record, token=token))  # type: ignore[misc]
        agent(job).maybe_give_up(run, departure)
    failure = run.read().failure
    assert failure is not None
    assert failure.kind == "InfrastructureError"
    run.update(without_failure)
    agent(job).maybe_give_up(run, killed[num_given_up])
    assert run.read().failure is None


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
