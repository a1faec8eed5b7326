"""Prefect's server away for a while: neither the command that looks on nor the flow's last words end with it."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest
from botocore.exceptions import EndpointConnectionError
from httpx import ConnectError, HTTPStatusError, Request, Response
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Crashed

from flows import publish
from flows.cli import follow
from infra.local.ports import free_port
from tasks import policy
from training.config import Preset
from training.errors import InfrastructureError
from training.preset_file import load_preset


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


class StarterBehind503:
    """Prefect answers with an error of its own at first, be it that it took the flow run."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.asked: list[str] = []

    def __call__(self, asked: str) -> FlowRun:
        self.asked.append(asked)
        if self.codes:
            response = Response(self.codes.pop(0), request=Request("POST", "http://prefect/api"))
            raise HTTPStatusError("an answer", request=response.request, response=response)
        return FlowRun(flow_id=uuid.uuid4())


@pytest.mark.usefixtures("no_pauses")
def test_starting_is_tried_again_as_one_flow_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = StarterBehind503(503, 500)
    follow._asked_again(start)
    assert len(start.asked) == 3
    assert len(set(start.asked)) == 1
    assert capsys.readouterr().err.count("is asked again") == 2

    refused = StarterBehind503(422)
    with pytest.raises(HTTPStatusError):
        follow._asked_again(refused)
    assert len(refused.asked) == 1
    monkeypatch.setattr(follow, "AWAY_SECONDS", 0.0)
    with pytest.raises(HTTPStatusError):
        follow._asked_again(StarterBehind503(*[503] * 1000))


def test_an_alias_is_resolved_once_per_flow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own registration moves it, and a resumed flow is still the same."""
    labels: dict[str, str] = {}
    versions = iter("12")
    monkeypatch.setattr(publish, "_flow_run", lambda: FlowRun(flow_id=uuid.uuid4(), labels=dict(labels)))
    monkeypatch.setattr(publish, "_label", labels.__setitem__)
    monkeypatch.setattr(publish, "pinned", lambda settings, preset: with_start(f"digits/{next(versions)}"))
    for _ in range(2):
        found = publish.pinned_once(cast(Any, None), with_start("digits@champion"))
        assert found.train.warm_start == "digits/1"
    assert publish.pinned_once(cast(Any, None), load_preset("digits")) == load_preset("digits")


def with_start(text: str) -> Preset:
    return load_preset("digits", {"train.warm_start": text})


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
