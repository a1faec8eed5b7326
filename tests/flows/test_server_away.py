"""Prefect's server away for a while: neither the command that looks on nor the flow's last words end with it."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest
from botocore.exceptions import EndpointConnectionError
from httpx import ConnectError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Crashed

from flows.cli import follow
from infra.local.ports import free_port
from tasks import policy
from training.config import load_preset
from training.errors import InfrastructureError


class KeptOnAStoreThatIsAway:
    """A state whose result can be read after `num_refused` tries."""

    name, message = "Completed", "done"

    def __init__(self, num_refused: int) -> None:
        self.num_left = num_refused

    def result(self, *, raise_on_failure: bool) -> str:
        if self.num_left:
            self.num_left -= 1
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
        return "found"


class AwayAtFirst:
    """Refuses connections as often as it is told to; then the flow run is completed."""

    def __init__(self, num_refused: int) -> None:
        self.num_left = num_refused
        self._away = SyncPrefectClient(f"http://127.0.0.1:{free_port()}/api")

    def read_flow_run(self, run_id: uuid.UUID) -> FlowRun:
        if self.num_left:
            self.num_left -= 1
            return self._away.read_flow_run(run_id)
        return FlowRun(id=run_id, flow_id=run_id, state=Completed())


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(policy, "PAUSE_SECONDS", 0.0)


def watcher(client: Any) -> follow._Watcher:
    return follow._Watcher(client, None, load_preset("digits"), quiet=True)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_pauses")
def test_command_looks_on_until_the_server_is_back() -> None:
    client = AwayAtFirst(3)
    assert watcher(client).until_over(uuid.uuid4()).state.is_completed()
    assert client.num_left == 0


@pytest.mark.usefixtures("no_pauses")
def test_command_gives_up_if_the_server_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "AWAY_SECONDS", 0.0)
    with pytest.raises(ConnectError):
        watcher(AwayAtFirst(1000)).until_over(uuid.uuid4())


def test_each_crash_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it that the resumed run between two of them was not seen; and a time without a server does not count."""
    clock = [0.0]
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    looking = watcher(None)
    first, second = (FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), state=Crashed()) for _ in range(2))
    assert looking._may_be_resumed(first)
    clock[0] = follow.RESUME_SECONDS + 1
    assert looking._may_be_resumed(second)
    with looking._patience():
        raise ConnectError("away")
    clock[0] += follow.RESUME_SECONDS
    assert looking._may_be_resumed(second)
    clock[0] += follow.RESUME_SECONDS
    assert not looking._may_be_resumed(second)


@pytest.mark.usefixtures("no_pauses")
def test_result_is_read_once_the_store_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    away_for_a_while, away_for_long = KeptOnAStoreThatIsAway(3), KeptOnAStoreThatIsAway(1000)
    assert follow.outcome_of(cast(Any, away_for_a_while)) == "found"
    monkeypatch.setattr(follow, "RESULT_SECONDS", 0.0)
    with pytest.raises(InfrastructureError, match=r"ended Completed \(done\), and .* cannot be read: Could not"):
        follow.outcome_of(cast(Any, away_for_long))


@pytest.mark.usefixtures("no_pauses")
def test_artifacts_are_made_once_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    client, run_id = AwayAtFirst(3), uuid.uuid4()
    assert policy.patiently(lambda: client.read_flow_run(run_id)).id == run_id
    monkeypatch.setattr(policy, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConnectError):
        policy.patiently(lambda: AwayAtFirst(1000).read_flow_run(run_id))
