"""Champions beside the real registry: promoted, rolled back, raced for, killed amid it, and moved by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from flows.reaper.champions import Champions
from infra.local.ports import free_port
from tasks.lifecycle import alias, champions, model_file, projection, promotion
from tasks.lifecycle.promotion import promote, roll_back
from tasks.mlflow_client import RUN_KEY_TAG, STORE_TAG, WEIGHTS_TAG, connect
from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.unit.champions import change, keep
from tests.waiting import wait_until
from training.errors import DamagedError, InfrastructureError, OvertakenError, RefusedError, UserError
from training.s3.objectstore import Store


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reasons: tuple[str, ...]
    sha256: str = "decision"


class Model:
    """A registered model whose versions 1, 2 and 3 are kept on a store; 1 is champion."""

    def __init__(self, stack: Stack, store: Store) -> None:
        self.settings = stack.settings
        self.uri = stack.settings.mlflow_uri
        self.store = store
        self.name = f"model-{uuid.uuid4().hex}"
        self.client = connect(self.uri)
        self.client.create_registered_model(self.name)
        for version in "123":
            tags = {RUN_KEY_TAG: f"run {version}", WEIGHTS_TAG: "w"}
            self.client.create_model_version(self.name, source="s3://bucket/model", tags=tags)
        kept = {version: keep(store, self.name, version) for version in "123"}
        first = change("1", "first", model_sha256=kept["1"].model_sha256)
        projection.show_first(self.uri, store, self.name, champions.begin(store, self.name, first).current)

    def promote(self, version: str, **values: Any) -> promotion.Outcome:
        return promote(self.settings, self.store, f"{self.name}/{version}", **({"by": "test"} | values))

    def roll_back(self, **values: Any) -> promotion.Outcome:
        return roll_back(self.settings, self.store, self.name, by="test", **values)

    def look(self) -> None:
        Champions(self.uri, self.store).set_right()

    def damage(self, version: str) -> None:
        kept = model_file.find(self.store, self.name, version)
        self.store.put(model_file.file_key(self.name, kept.model_sha256), b"other bytes")

    @property
    def history(self) -> list[tuple[str, str]]:
        return [(entry.action, entry.version) for entry in champions.read(self.store, self.name).entries]

    @property
    def alias(self) -> str | None:
        version = self.client.get_registered_model(self.name).aliases.get("champion")
        return str(version) if version is not None else None


@pytest.fixture
def model(stack: Stack, store: Store) -> Model:
    """On a store of its own, which the stack's reaper does not look at."""
    return Model(stack, store)


def test_promotions_and_rollbacks_are_a_history_and_the_alias_follows(model: Model) -> None:
    assert model.alias == "1"
    assert model.promote("2", reason="better").is_new
    assert not model.promote("2").is_new
    assert not promote(model.settings, model.store, f"{model.name}@2", by="test").is_new, "another way to name it"
    model.promote("3")
    assert model.alias == "3"
    model.roll_back()
    model.roll_back(reason="worse in March")
    assert model.alias == "1"
    model.roll_back(to="3")
    assert model.history == [
        ("first", "1"),
        ("promote", "2"),
        ("promote", "3"),
        ("rollback", "2"),
        ("rollback", "1"),
        ("rollback", "3"),
    ]
    newest = champions.read(model.store, model.name).current
    assert newest.model_sha256 == model_file.find(model.store, model.name, "3").model_sha256
    assert model.alias == "3"
    assert not model.roll_back(to="3").is_new


def test_damaged_versions_are_refused_and_the_champion_stays(model: Model) -> None:
    model.promote("2")
    model.damage("1")
    model.damage("3")
    for attempt in (lambda: model.promote("3"), model.roll_back, lambda: model.roll_back(to="1")):
        with pytest.raises(DamagedError, match=f"models/{model.name}/files/"):
            attempt()
    assert (model.history, model.alias) == ([("first", "1"), ("promote", "2")], "2")


def test_gate_refuses_with_its_reasons_and_its_decision_is_kept(model: Model) -> None:
    with pytest.raises(RefusedError, match="accuracy is lower; slice 3 is worse"):
        model.promote("2", judge=lambda *_, **__: Verdict(False, ("accuracy is lower", "slice 3 is worse")))
    assert model.alias == "1"
    asked: list[Any] = []

    def judge(*question: Any, **against: Any) -> Verdict:
        asked.append((question, against))
        return Verdict(True, ("accuracy is higher",))

    model.promote("2", judge=judge)
    assert asked == [((model.settings, model.store, model.name, "2"), {"champion": "1"})]
    newest = champions.read(model.store, model.name).current
    assert (newest.version, newest.decision_sha256) == ("2", "decision")


def test_what_cannot_be_champion_is_named(model: Model) -> None:
    with pytest.raises(UserError, match="the registry has no such model version"):
        model.promote("9")
    model.client.create_model_version(model.name, source="s3://b/m", tags={RUN_KEY_TAG: "run 4", WEIGHTS_TAG: "w"})
    with pytest.raises(UserError, match="version 4 has no model file on the store"):
        model.promote("4")
    keep(model.store, model.name, "4", run_key="before the registry was emptied")
    with pytest.raises(UserError, match="version 4 is of another run in MLflow than on the store"):
        model.promote("4")
    model.client.set_registered_model_tag(model.name, STORE_TAG, "s3://elsewhere/")
    with pytest.raises(UserError, match="is kept at s3://elsewhere/"):
        model.promote("2")
    assert model.history == [("first", "1")]


def test_promotion_that_was_judged_against_another_champion_is_told_who_won(model: Model) -> None:
    judged = champions.read(model.store, model.name).current.sequence
    model.promote("2", by="the other")
    with pytest.raises(OvertakenError, match=r"version 2 has become champion meanwhile \(promote by the other"):
        model.promote("3", replaces=judged)
    assert model.alias == "2"


def test_mlflow_that_goes_away_undoes_no_promotion(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise InfrastructureError("MLflow is away")

    with monkeypatch.context() as patch:
        patch.setattr(alias, "point", fail)
        outcome = model.promote("2")
    assert (outcome.entry.version, outcome.is_shown, model.alias) == ("2", False, "1")
    model.look()
    assert model.alias == "2"


def race(model: Model, num_rounds: int) -> list[dict[str, Any]]:
    """Two promotions at once, both judged against the same champion, again and again."""
    rows = []
    for number in range(1, num_rounds + 1):
        before = champions.read(model.store, model.name).current
        racers = sorted({"1", "2", "3"} - {before.version})
        together = threading.Barrier(2)

        def judge(*_: Any, together: threading.Barrier = together, **__: Any) -> Verdict:
            together.wait(60)
            return Verdict(True, ())

        def attempt(version: str, judge: Any = judge) -> str:
            try:
                model.promote(version, by=f"racer {version}", judge=judge)
            except OvertakenError as error:
                return str(error)
            return "won"

        with ThreadPoolExecutor(2) as pool:
            told = dict(zip(racers, pool.map(attempt, racers), strict=True))
        after = champions.read(model.store, model.name).current
        winners = [version for version, word in told.items() if word == "won"]
        assert winners == [after.version]
        assert after.sequence == before.sequence + 1
        (loser,) = set(racers) - set(winners)
        assert f"version {after.version} has become champion meanwhile (promote by racer {after.version}" in told[loser]
        rows.append({"round": number, "replaced": before.version, "won": after.version, "told": loser})
    champion = champions.read(model.store, model.name)
    assert [entry.sequence for entry in champion.entries] == list(range(1, num_rounds + 2))
    assert [entry.version for entry in champion.entries[1:]] == [row["won"] for row in rows]
    assert sorted(entry.time for entry in champion.entries) == [entry.time for entry in champion.entries]
    assert model.alias == champion.current.version
    return rows


def test_of_two_racing_promotions_one_wins_and_the_other_is_told(model: Model) -> None:
    race(model, 3)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_hundred_races_have_a_hundred_winners(model: Model) -> None:
    write_evidence("racing-promotions", rows=race(model, 100))


KILLED = """
import json, os, signal, sys
from tasks.lifecycle import alias
from tasks.lifecycle.promotion import promote
from training.s3.objectstore import Store, StoreLocation

location, version, moment = json.loads(sys.argv[1])
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
setattr(alias, moment, die)
from tasks.stack import open_stack
promote(open_stack()[0], Store(StoreLocation(**location)), version, by="killed")
"""


def kill_at(stack: Stack, model: Model, version: str, moment: str) -> None:
    """A promotion whose process is killed when it is about to do `moment`."""
    told = json.dumps([asdict(model.store.location), f"{model.name}/{version}", moment])
    done = subprocess.run([sys.executable, "-c", KILLED, told], env=stack.environment(), timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL


def test_alias_is_moved_later_if_the_promotion_was_killed_before_it(stack: Stack, model: Model) -> None:
    kill_at(stack, model, "2", "point")
    assert (model.history[-1], model.alias) == (("promote", "2"), "1")
    model.look()
    assert (model.history[-1], model.alias) == (("promote", "2"), "2")
    kill_at(stack, model, "3", "point")
    assert not model.promote("3").is_new, "the same command again finishes it"
    assert model.alias == "3"


def test_alias_of_an_older_promotion_that_was_killed_is_no_persons(stack: Stack, model: Model) -> None:
    """It moved the alias after a newer promotion had, and died before it could see that."""
    kill_at(stack, model, "2", "note_shown")
    assert model.alias == "2"
    model.promote("3")
    model.client.set_registered_model_alias(model.name, "champion", "2")  # the killed one's request, late
    model.look()
    assert (model.history[-1], model.alias) == (("promote", "3"), "3")
    model.client.set_registered_model_alias(model.name, "champion", "2")
    model.look()
    assert (model.history[-1], model.alias) == (("adopt", "2"), "2"), "from then on it is a person's"


def test_look_amid_two_promotions_adopts_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one points last, and the newer one notes after that: only the mark tells whose alias it is."""
    point, pointed = alias.point, []

    def point_late(uri: str, name: str, version: str, change: int, **values: Any) -> None:
        pointed.append(version)
        if pointed == ["2"]:
            model.promote("3")
            point(uri, name, version, change, **values)
            alias.note_shown(uri, name, change + 1, owner=values["owner"])
            assert model.alias == "2"
            model.look()
        point(uri, name, version, change, **values)

    monkeypatch.setattr(alias, "point", point_late)
    model.promote("2")
    assert pointed == ["2", "3", "3", "3"]
    assert (model.history, model.alias) == ([("first", "1"), ("promote", "2"), ("promote", "3")], "3")
    marked = [model.client.get_model_version(model.name, version).tags for version in "23"]
    assert [tag for tags in marked for tag in tags if tag.startswith(alias.POINTING_TAG)] == []


def test_alias_moved_by_hand_is_adopted_once(model: Model) -> None:
    for _ in range(2):
        model.client.set_registered_model_alias(model.name, "champion", "3")
        for _ in range(2):
            model.look()
    newest = champions.read(model.store, model.name).current
    assert (newest.action, newest.version, newest.by) == ("adopt", "3", "MLflow UI")
    assert (model.history, model.alias) == ([("first", "1"), ("adopt", "3")], "3")
    model.roll_back()
    assert model.alias == "1"


def test_alias_moved_by_hand_is_put_back_if_the_policy_says_so(model: Model) -> None:
    for version in ("3", None):
        if version is None:
            model.client.delete_registered_model_alias(model.name, "champion")
        else:
            model.client.set_registered_model_alias(model.name, "champion", version)
        told = projection.set_right(model.uri, model.store, model.name, "revert")
        assert "put back to version 1" in told
        assert model.alias == "1"
    assert model.history == [("first", "1")]


def test_damaged_version_is_not_adopted_and_says_why(model: Model) -> None:
    model.damage("3")
    model.client.set_registered_model_alias(model.name, "champion", "3")
    model.look()
    assert (model.history, model.alias) == ([("first", "1")], "1")
    tags = model.client.get_model_version(model.name, "3").tags
    assert "is damaged" in tags[alias.NOT_ADOPTED_TAG]


def test_champion_of_an_older_release_is_not_changed_for_lack_of_a_file(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """A person had moved the alias, as was right then."""
    older = {"format": 1, "model": model.name, "version_of_registry": "1", "run_key": "run 1"}
    key = champions.champion_key(model.name)
    model.store.delete(key)
    model.store.create_versioned(key, older)
    model.client.delete_registered_model_tag(model.name, alias.SHOWN_TAG)
    model.client.set_registered_model_alias(model.name, "champion", "2")
    model.store.delete(model_file.version_key(model.name, "2"))
    watched = Champions(model.uri, model.store)
    for _ in range(2):
        watched.set_right()
    assert model.alias == "2"
    assert sum("version 2 has no model file" in record.getMessage() for record in caplog.records) == 1
    keep(model.store, model.name, "2")
    watched.set_right()
    assert model.history == [("first", "1"), ("adopt", "2")]


def test_champion_of_another_store_is_left_alone(model: Model) -> None:
    elsewhere = Store(replace(model.store.location, prefix=f"{model.store.location.prefix}elsewhere/"))
    champions.begin(elsewhere, model.name, change("2", "first"))
    assert projection.set_right(model.uri, elsewhere, model.name, "adopt") == ""
    assert model.alias == "1"


def test_damaged_document_and_an_mlflow_that_is_away_stop_no_others(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    model.store.put(champions.champion_key("a-damaged-one"), b"{}")
    model.client.set_registered_model_alias(model.name, "champion", "3")
    model.look()
    assert model.alias == "3"
    Champions(f"http://127.0.0.1:{free_port()}", model.store).set_right()
    told = [record.getMessage() for record in caplog.records if record.name == "flows.reaper.champions"]
    assert sum("a-damaged-one" in line and "champion.json" in line for line in told) >= 1
    assert sum(model.name in line and "MLflow does not answer" in line for line in told) == 1


# ---- with the stack's own store, worker and reaper -------------------------------------------------------------------


@pytest.fixture
def known(stack: Stack) -> Model:
    return Model(stack, stack.store)


def test_commands_and_the_stacks_own_reaper(stack: Stack, known: Model) -> None:
    done = stack.command("models", "promote", f"{known.name}/2", "--reason", "better", "--no-gate")
    assert done.returncode == 0, done.stderr
    assert f"{known.name} version 2 is champion (change 2)" in done.stdout
    known.client.set_registered_model_alias(known.name, "champion", "3")
    wait_until(lambda: known.history[-1] == ("adopt", "3"), what="the reaper to adopt the alias")
    wait_until(lambda: not judged_moved(known), what="the reaper to note it")
    known.damage("1")
    refused = stack.command("models", "rollback", known.name, "--to", "1")
    assert refused.returncode == DamagedError.exit_code, refused.stderr
    assert stack.command("models", "rollback", known.name).returncode == 0
    shown = stack.command("models", "history", known.name, "--json")
    told = [(entry["action"], entry["version"], entry["reason"]) for entry in json.loads(shown.stdout)]
    assert [each[:2] for each in told] == [("first", "1"), ("promote", "2"), ("adopt", "3"), ("rollback", "2")]
    assert told[1][2] == "better"
    assert stack.command("models", "history", known.name, "--at", "yesterday").returncode == UserError.exit_code
    assert known.alias == "2"


def judged_moved(model: Model) -> bool:
    seen = alias.look_at(model.uri, model.name)
    assert seen is not None
    current = champions.read(model.store, model.name).current
    return projection.judge_alias(seen, current) is not projection.AliasVerdict.LEAVE


@pytest.fixture
def client(stack: Stack) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        yield client


def start(client: SyncPrefectClient, name: str, **parameters: Any) -> FlowRun:
    deployment = client.read_deployment_by_name(f"{name}/models")
    return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


def wait_for(client: SyncPrefectClient, run: FlowRun, *names: str) -> str:
    """Until the flow run is in one of these states; says what it tells then."""

    def look() -> str | None:
        state = client.read_flow_run(run.id).state
        return f"{state.name}: {state.message}" if state is not None and state.name in names else None

    return wait_until(look, what=f"a flow run to be {names}")


@pytest.mark.slow
def test_promotion_waits_for_approval_and_loses_if_the_champion_changed(
    known: Model, client: SyncPrefectClient
) -> None:
    runs = [start(client, "promote", version=f"{known.name}/{version}", approve=True, gate=False) for version in "23"]
    for run in runs:
        wait_for(client, run, "Suspended", "Failed")
    assert known.history == [("first", "1")]
    told = []
    for run in runs:
        client.resume_flow_run(run.id)
        told.append(wait_for(client, run, "Completed", "Failed", "Crashed"))
    assert told[0].startswith("Completed")
    assert told[1].startswith("Failed")
    assert "version 2 has become champion meanwhile" in told[1]
    assert (known.history, known.alias) == ([("first", "1"), ("promote", "2")], "2")


@pytest.mark.slow
def test_rollback_and_history_are_deployments_too(known: Model, client: SyncPrefectClient) -> None:
    known.promote("2")
    runs = [start(client, "rollback", model=known.name, reason="worse"), start(client, "history", model=known.name)]
    assert [wait_for(client, run, "Completed", "Failed", "Crashed").split(":")[0] for run in runs] == ["Completed"] * 2
    newest = champions.read(known.store, known.name).current
    assert (newest.action, newest.version, newest.reason) == ("rollback", "1", "worse")
    assert newest.by.startswith("flow run ")
    assert known.alias == "1"
