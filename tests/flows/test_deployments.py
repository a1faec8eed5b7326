"""What Prefect knows of the deployments: parameters that are checked, a schedule to switch on, queues by priority."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Scheduled

from infra.local.ports import free_port
from infra.local.provision import are_gone
from infra.local.services import MAX_RUNS_AT_ONCE, WORK_POOL, WORK_QUEUES
from tests.conftest import Stack
from tests.waiting import wait_until


@pytest.fixture
def client(stack: Stack) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        yield client


def test_parameters_have_a_schema_and_wrong_ones_are_refused(client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("pipeline/custom")
    schema = deployment.parameter_openapi_schema
    assert schema is not None
    assert schema["required"] == ["preset"]
    assert {name: bool(known["description"]) for name, known in schema["properties"].items()} == {
        "preset": True,
        "overrides": True,
        "fresh": True,
        "quarantine": True,
    }
    for wrong in ({}, {"preset": "digits", "fresh": "perhaps"}):
        with pytest.raises(PrefectHTTPStatusError):
            client.create_flow_run_from_deployment(deployment.id, parameters=wrong)


def test_schedule_is_there_and_off_until_it_is_switched_on(client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("pipeline/stdlib")
    (schedule,) = client.read_deployment_schedules(deployment.id)
    assert schedule.active is False
    client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    assert client.read_deployment_schedules(deployment.id)[0].active is True
    client.update_deployment_schedule(deployment.id, schedule.id, active=False)


def test_runs_wait_by_the_priority_of_their_queue(client: SyncPrefectClient) -> None:
    pool = client.read_work_pool(WORK_POOL)
    assert pool.concurrency_limit == MAX_RUNS_AT_ONCE
    queues = sorted(client.read_work_queues(work_pool_name=WORK_POOL), key=lambda queue: queue.priority or 0)
    assert tuple(queue.name for queue in queues) == WORK_QUEUES
    deployment = client.read_deployment_by_name("pipeline/digits")
    later = datetime.now(UTC) + timedelta(hours=1)
    runs = [
        client.create_flow_run_from_deployment(
            deployment.id, state=Scheduled(scheduled_time=later), work_queue_name=name
        )
        for name in reversed(WORK_QUEUES)
    ]

    def found() -> list[str | None]:
        """As many as there are places for: another test's run may hold one for a while yet."""
        answers = client.get_scheduled_flow_runs_for_work_pool(WORK_POOL, scheduled_before=later + timedelta(minutes=1))
        return [answer.flow_run.work_queue_name for answer in answers]

    wait_until(lambda: len(found()) == len(runs), what="a place for each of them")
    names = found()
    for run in runs:
        client.delete_flow_run(run.id)
    assert names == list(WORK_QUEUES)


def test_up_brings_back_what_the_server_has_lost(stack: Stack, client: SyncPrefectClient) -> None:
    """As if its database were an older one's: what the stack noted of the time before says nothing then."""
    deployment = client.read_deployment_by_name("pipeline/custom")
    assert not are_gone(stack.settings.prefect_api_url)
    client.delete_deployment(deployment.id)
    assert are_gone(stack.settings.prefect_api_url)
    done = stack.command("up")
    assert done.returncode == 0, done.stderr
    assert client.read_deployment_by_name("pipeline/custom").id != deployment.id


def test_server_that_does_not_answer_is_not_one_that_has_lost_anything() -> None:
    assert not are_gone(f"http://127.0.0.1:{free_port()}/api")
