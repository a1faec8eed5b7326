"""`models why | verify | replay` of a model that four ranks trained: told, proven, and done again on one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tasks.lifecycle import model_file
from tasks.lineage.gather import lineage_of
from tasks.lineage.named import find_kept
from tasks.lineage.page import HEADING
from tasks.lineage.verify import Checked, verify
from tasks.mlflow_client import connect
from tests.conftest import Stack
from tests.flows.runs import PATIENT, last_json
from training.checkpoints.checkpoint import folder, load_manifest
from training.data.manifest import load_manifest as load_dataset
from training.data.manifest import manifest_key, shard_key
from training.errors import DamagedError, InfrastructureError, UserError
from training.runs.events import chunk_key
from training.runs.history import committed_steps
from training.runs.identity import identity_key
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store

STEPS = 24
NAME = "descended"
SHORT = ("--set", f"train.steps={STEPS}", "--set", "train.checkpoint_every_steps=8", "--set", "launch.nodes=4")


@dataclass(frozen=True)
class Model:
    """A registered version, and all that it came from."""

    stack: Stack
    folder: Path
    result: dict[str, Any]

    @property
    def store(self) -> Store:
        return self.stack.store

    @property
    def run(self) -> RunRecord:
        return RunRecord(self.store, self.result["model"]["run_key"])

    @property
    def record(self) -> Record:
        return self.run.read()

    @property
    def recipe(self) -> Path:
        return self.folder / f"{NAME}_recipe.py"

    def verified(self) -> list[Checked]:
        """What `models verify` looks at; raises as it does."""
        settings = self.stack.settings
        return list(verify(settings, self.store, find_kept(settings, self.store, NAME)))

    def command(self, verb: str, *arguments: str, code: int = 0) -> str:
        """What it said; of a failure, in one line."""
        done = self.stack.command("models", verb, *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def model(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Model:
    parent = tmp_path_factory.mktemp("own")
    assert stack.command("init", NAME, cwd=parent).returncode == 0
    done = stack.command("run", f"{NAME}/{NAME}.toml", "--json", *SHORT, *PATIENT, cwd=parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return Model(stack=stack, folder=parent / NAME, result=last_json(done.stdout))


@contextmanager
def one_byte_changed(store: Store, key: str) -> Iterator[None]:
    whole = store.get(key)
    middle = len(whole) // 2
    store.put(key, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    yield
    store.put(key, whole)


def test_why_tells_all_of_it(model: Model) -> None:
    told = json.loads(model.command("why", NAME, "--json"))
    record = model.record
    assert told["kept"]["model_sha256"] == model.result["registration"]["model_sha256"]
    assert told["data"]["digest"] == model.result["dataset"]["digest"]
    assert sum(len(shards) for shards in told["data"]["shards"].values()) == model.result["dataset"]["num_shards"]
    assert told["training"]["environment"] == record.environment
    assert [attempt["ranks"] for attempt in told["training"]["attempts"]] == [4]
    assert [c["step"] for c in told["training"]["checkpoints"]] == [8, 16, 24]
    assert told["code"]["sources"].keys() == {f"{NAME}_recipe"}
    assert model.result["links"]["prefect"].endswith(told["code"]["starts"][0]["flow_run"])
    assert told["code"]["starts"][0]["commit"] == "none", "the folder is in no repository"
    assert [entry["action"] for entry in told["history"]] == ["first"]
    assert told["links"]["mlflow"] == model.result["links"]["mlflow"]
    assert told["unknown"] == []
    tree = model.command("why", f"{NAME}@champion")
    for part in (*(c.sha256 for c in record.checkpoints), told["code"]["recipe_source"], "order: seed 1"):
        assert part in tree


def test_the_page_in_mlflow_has_it_and_a_persons_words_stay(model: Model) -> None:
    client = connect(model.stack.settings.mlflow_uri)
    version = client.get_model_version(NAME, "1")
    assert version.description.startswith(HEADING)
    assert model.result["dataset"]["digest"] in version.description
    assert [one.path for one in client.list_artifacts(version.run_id, "lineage")] == [f"lineage/{NAME}-1.json"]
    client.update_model_version(NAME, "1", "mine")
    assert "is a person's" in model.command("why", NAME, "--page")
    client.update_model_version(NAME, "1", "")
    model.command("why", NAME, "--page")
    assert client.get_model_version(NAME, "1").description.startswith(HEADING)


def test_verify_finds_all_as_it_was(model: Model) -> None:
    assert "things are what they were" in model.command("verify", f"{NAME}@1")
    assert all(one.is_whole for one in model.verified())


@pytest.mark.parametrize("which", ["shard", "manifest", "checkpoint", "model file", "identity"])
def test_one_byte_is_named(model: Model, which: str) -> None:
    key = stored(model, which)
    with (
        one_byte_changed(model.store, key),
        pytest.raises(DamagedError, match=re.escape(model.store.location.uri(key))),
    ):
        model.verified()


def test_exit_code_and_json_name_what_differs(model: Model) -> None:
    key = stored(model, "shard")
    with one_byte_changed(model.store, key):
        done = model.stack.command("models", "verify", NAME, "--json")
    assert done.returncode == DamagedError.exit_code
    assert key in json.loads(done.stdout)["differs"]
    assert key in done.stderr
    assert "Traceback" not in done.stderr


def stored(model: Model, which: str) -> str:
    record, dataset = model.record, model.result["dataset"]
    if which == "shard":
        manifest = load_dataset(model.store, dataset["name"], dataset["digest"])
        return shard_key(dataset["name"], manifest.splits["train"][-1].sha256)
    if which == "manifest":
        return manifest_key(dataset["name"], dataset["digest"])
    if which == "checkpoint":
        prefix, reference = model.run.prefix(record), record.checkpoints[0]
        part = load_manifest(model.store, prefix, reference).parts[-1]
        return folder(prefix, reference.step, reference.token) + part.name
    if which == "identity":
        return identity_key(model.run.run_key)
    return model_file.file_key(NAME, model.result["registration"]["model_sha256"])


def test_a_changed_line_of_source_is_named_and_stops_a_replay(model: Model) -> None:
    whole = model.recipe.read_text()
    number = next(n for n, line in enumerate(whole.splitlines(), start=1) if "nn.Tanh()" in line)
    model.recipe.write_text(whole.replace("nn.Tanh()", "nn.ReLU()", 1))
    try:
        for verb in ("verify", "replay"):
            assert f"{model.recipe}:{number} differs" in model.command(verb, NAME, code=DamagedError.exit_code)
    finally:
        model.recipe.write_text(whole)


def test_a_removed_run_is_said_to_be_missing(model: Model) -> None:
    whole = model.store.get(model.run.object_key)
    model.store.delete(model.run.object_key)
    try:
        with pytest.raises(DamagedError, match="is missing: the run was removed"):
            model.verified()
        assert "was removed" in model.command("why", NAME)
        assert "was removed" in model.command("replay", NAME, code=DamagedError.exit_code)
    finally:
        model.store.put(model.run.object_key, whole)


def test_why_tells_the_rest_beside_what_is_damaged(model: Model) -> None:
    settings, prefix = model.stack.settings, model.run.prefix(model.record)
    for key in (
        chunk_key(prefix, 1, 0),
        next(key for key, _ in model.store.list_keys(f"runs/{model.run.run_key}/jobs/")),
    ):
        whole = model.store.get(key)
        model.store.put(key, b"[" + whole[1:])
        try:
            found = lineage_of(settings, model.store, find_kept(settings, model.store, NAME))
        finally:
            model.store.put(key, whole)
        assert any(model.store.location.uri(key) in line for line in found.unknown), found.unknown
        assert found.history


def test_a_version_that_was_deleted_in_mlflow_is_said_to_be_missing(model: Model) -> None:
    settings = model.stack.settings
    kept = replace(find_kept(settings, model.store, NAME), version="99")
    with pytest.raises(DamagedError, match=r"MLflow's version 99 of model .* is missing"):
        list(verify(settings, model.store, kept))


def test_one_rank_replays_what_four_did(model: Model) -> None:
    told = {event.step: event.values["weights"] for event in committed_steps(model.run, model.record)}
    assert sorted(told) == [*range(1, STEPS + 1)]
    window = json.loads(model.command("replay", NAME, "--steps", "10:20", "--json"))
    assert window["began_after_step"] == 8
    assert {one["step"]: one["weights"] for one in window["steps"]} == {n: told[n] for n in range(9, 21)}
    assert "steps 23 to 24 are equal, 2 of 2 by the digest" in model.command("replay", NAME, "--steps", "23:")
    assert "--steps" in model.command("replay", NAME, "--steps", "5:99", code=UserError.exit_code)


@pytest.mark.parametrize("text", ["nobody", f"{NAME}@9", f"{NAME}@", f"{NAME}@nobody", "a b", "@champion", "/", ""])
def test_what_is_no_version_is_named(model: Model, text: str) -> None:
    with pytest.raises(UserError):
        find_kept(model.stack.settings, model.store, text)


@pytest.mark.slow
def test_without_mlflow_all_but_its_own_page_is_told_and_proven(model: Model) -> None:
    away = replace(model.stack.settings, maybe_mlflow_uri="http://127.0.0.1:9")
    kept = find_kept(away, model.store, f"{NAME}@champion")
    assert lineage_of(away, model.store, kept).training is not None
    assert [one.what for one in verify(away, model.store, kept) if not one.is_whole] == ["MLflow's version 1"]
    with pytest.raises(InfrastructureError):
        find_kept(away, model.store, f"{NAME}@challenger")
