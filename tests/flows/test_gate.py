"""Judging registered versions: what is scored, what is kept, and what a person then sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.gate import judge as module
from tasks.gate.judge import judge
from tasks.lifecycle import champions
from tasks.mlflow_client import connect
from tests.conftest import Stack
from tests.flows.runs import register_one
from training.documents import sha256_hex
from training.errors import RefusedError, UserError
from training.preset_file import load_preset

SHORT = {"name": "judged", "launch.nodes": 1}


@pytest.fixture(scope="module")
def versions(stack: Stack) -> tuple[str, str]:
    """Of one model: a good one, and a poor one with another recipe's fields, which has seen less."""
    found = []
    for values in ({"train.steps": 60}, {"train.steps": 2, "hyperparameters.num_channels": 8}):
        found.append(register_one(load_preset("digits", {**SHORT, **values})).version)
    return found[0], found[1]


def tags_of(stack: Stack, version: str) -> dict[str, str]:
    return dict(connect(stack.settings.mlflow_uri).get_model_version("judged", version).tags)


def test_a_worse_challenger_is_refused_with_reasons_where_people_look(stack: Stack, versions: tuple[str, str]) -> None:
    good, poor = versions
    judgement = judge(stack.settings, stack.store, "judged", poor, champion=good)
    assert not judgement.passed
    tags = tags_of(stack, poor)
    assert tags["unbroken.gate"] == "refused"
    assert tags["unbroken.gate.champion"] == good
    assert (tags["unbroken.gate.reason"],) == judgement.reasons == (judgement.decision.reasons[0].text,)
    assert tags["unbroken.gate.decision"] == judgement.sha256
    data = stack.store.get(judgement.key)
    assert sha256_hex(data) == judgement.sha256
    kept: dict[str, Any] = json.loads(data)
    assert kept["decision"]["reasons"][0]["rule"] == "not_worse"
    client = connect(stack.settings.mlflow_uri)
    run_id = client.get_model_version("judged", poor).run_id
    assert f"gate/{judgement.sha256}.json" in {one.path for one in client.list_artifacts(run_id, "gate")}
    assert str(client.get_registered_model("judged").aliases["challenger"]) == poor, "it stays what it is"
    again = judge(stack.settings, stack.store, "judged", poor, champion=good)
    assert again == judgement


def test_promotion_asks_the_gate(stack: Stack, versions: tuple[str, str]) -> None:
    good, poor = versions
    refused = stack.command("models", "promote", f"judged/{poor}")
    assert refused.returncode == RefusedError.exit_code, refused.stdout + refused.stderr
    assert tags_of(stack, poor)["unbroken.gate.reason"] in refused.stderr
    assert champions.read(stack.store, "judged").current.version == good


def test_the_better_one_passes_with_the_proof_of_its_ledger(
    stack: Stack, versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, poor = versions
    policy = tmp_path / "gate.toml"
    policy.write_text("[default]\nrequire_ledger = true\n[[default.better]]\n[[default.better]]\nmetric = 'loss'\n")
    monkeypatch.setenv("UNBROKEN_MLFLOW_GATE", str(policy))
    judgement = judge(stack.settings, stack.store, "judged", good, champion=poor)
    assert [reason.rule for reason in judgement.decision.reasons] == ["ledger", "better", "better"]
    assert judgement.passed
    assert tags_of(stack, good)["unbroken.gate"] == "passed"
    policy.write_text("[default]\nrequire_drill = true\n")
    first = judge(stack.settings, stack.store, "judged", good, champion=None)
    assert not first.passed
    assert tags_of(stack, good)["unbroken.gate.champion"] == "none"
    assert tags_of(stack, good)["unbroken.gate.reason"].startswith("drill: none is attached")


def test_a_champion_is_scored_on_the_challengers_samples(
    stack: Stack, versions: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other batches it has no scores yet. And one that does not fit its recipe any more is named."""
    good, poor = versions
    find, asked = module.find_job, []

    def score(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return module_score(*arguments)

    module_score = module.score_samples
    monkeypatch.setattr(module, "score_samples", score)
    monkeypatch.setattr(module, "find_job", lambda store, key: _with_batch_size(find(store, key), 41))
    judgement = judge(stack.settings, stack.store, "judged", poor, champion=good)
    assert len(set(asked)) == 2, "both were scored"
    assert not judgement.passed
    judge(stack.settings, stack.store, "judged", poor, champion=good)
    assert len(asked) == 2, "once"
    monkeypatch.setattr(module, "find_job", lambda store, key: _with_channels(find(store, key), 16))
    with pytest.raises(UserError, match="has other hyperparameters than its run key is of"):
        judge(stack.settings, stack.store, "judged", poor, champion=good)
    monkeypatch.setattr(module, "own_recipe", lambda *_, **__: None)  # as of a recipe whose model has changed
    with pytest.raises(UserError, match=r"version . cannot be scored: the weights do not fit the recipe: 0.bias"):
        judge(stack.settings, stack.store, "judged", poor, champion=good)


def _with_batch_size(job: Any, size: int) -> Any:
    return replace(job, preset=replace(job.preset, evaluate=replace(job.preset.evaluate, batch_size=size)))


def _with_channels(job: Any, number: int) -> Any:
    fields = {**job.preset.hyperparameters, "num_channels": number}
    return _with_batch_size(replace(job, preset=replace(job.preset, hyperparameters=fields)), 43)
