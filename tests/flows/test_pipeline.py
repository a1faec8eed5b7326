"""The chain as its users start it: `unbroken run`, from raw data to a model that answers."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psutil
import pytest
import requests
import torch
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from infra.local.ports import LOOPBACK, free_port
from tasks.evaluation.samples import from_parquet, scores_key, to_parquet
from tasks.evaluation.scoring import score_samples
from tasks.initial import initial_weights
from tasks.lifecycle import champions, model_file
from tasks.mlflow_client import connect
from tasks.registry import find_version
from tests.conftest import Stack
from tests.flows.runs import last_json, loss_history, mlflow_runs, run_keys
from tests.unit.reading import make_reader
from tests.waiting import wait_until
from training.data.manifest import load_manifest
from training.errors import InfrastructureError, UserError
from training.preset_file import load_preset
from training.runs.job import read_jobs
from training.runs.record import RunRecord
from training.s3.objectstore import Store


@pytest.fixture(scope="module")
def digits(stack: Stack) -> dict[str, Any]:
    """The result of one whole run of the built-in digits preset."""
    done = stack.command("run", "digits", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return last_json(done.stdout)


@pytest.fixture(scope="module")
def language_model(stack: Stack) -> dict[str, Any]:
    """The result of a short run of the other built-in preset."""
    return _stdlib(stack)


def test_digits_are_learned(digits: dict[str, Any]) -> None:
    accuracy = digits["evaluation"]["metrics"]["accuracy"]
    assert accuracy["value"] >= 0.97
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert sum(map(sum, digits["evaluation"]["confusion"])) == digits["evaluation"]["num_samples"]
    assert set(digits["links"]) == {"s3", "mlflow", "prefect", "registry", "report"}


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_scores(stack: Stack, digits: dict[str, Any]) -> None:
    """And each sample's scores are beside the run, on the store and in MLflow."""
    model, dataset = digits["model"], digits["dataset"]["digest"]
    (job,) = read_jobs(stack.store, model["run_key"])
    small = replace(job.preset, evaluate=replace(job.preset.evaluate, batch_size=50))
    found = [
        to_parquet(
            score_samples(
                stack.store,
                replace(small, launch=replace(small.launch, evaluate_processes=n)),
                dataset,
                model["run_key"],
            )
        )
        for n in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]
    kept = stack.store.get(scores_key(model["run_key"], digits["evaluation"]["scores_sha256"]))
    assert from_parquet(kept).ids == from_parquet(found[0]).ids
    (run,) = mlflow_runs(stack, model["run_key"])
    client = connect(stack.settings.mlflow_uri)
    names = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert {"scores.parquet", "evaluation.json", "report.html"} <= names
    assert "figures/reliability.png" in {one.path for one in client.list_artifacts(run.info.run_id, "figures")}
    assert run.data.metrics["test.calibration_error"] == digits["evaluation"]["calibration"]["error"] < 0.1
    assert [one["name"] for one in digits["evaluation"]["slices"]] == [f"label={digit}" for digit in range(10)]


def parts() -> list[psutil.Process]:
    """The processes of ours that score."""
    found = psutil.Process().children()
    return [process for process in found if "tasks.evaluation.part" in process.cmdline()]


def test_a_process_that_fails_or_dies_is_told(stack: Stack, digits: dict[str, Any], tmp_path: Path) -> None:
    model, dataset = digits["model"], digits["dataset"]["digest"]
    (job,) = read_jobs(stack.store, model["run_key"])
    shared = replace(job.preset, launch=replace(job.preset.launch, evaluate_processes=2))
    with pytest.raises(UserError, match="recipe"):
        score_samples(stack.store, replace(shared, recipe="training.recipes.digits:Nobody"), dataset, model["run_key"])
    held = tmp_path / "held"
    held.touch()
    fields = {**shared.hyperparameters, "held_while": str(held)}
    patient = replace(shared, recipe="tests.patient_recipe:Patient", hyperparameters=fields)
    with ThreadPoolExecutor() as pool:
        scoring = pool.submit(score_samples, stack.store, patient, dataset, model["run_key"])
        processes = wait_until(lambda: parts() if len(parts()) == 2 else None, what="two processes that score")
        processes[1].kill()
        held.unlink()
        with pytest.raises(InfrastructureError, match=r"process . of 2 .* died with code -9"):
            scoring.result()
    assert not parts()


def test_mlflow_has_one_run_and_one_point_per_step(stack: Stack, digits: dict[str, Any]) -> None:
    (run,) = mlflow_runs(stack, digits["model"]["run_key"])
    assert run.info.status == "FINISHED"
    assert [step for step, _ in loss_history(stack, run.info.run_id)] == list(range(1, 301))
    assert run.data.params["train.batch_size"] == "64"
    assert run.data.tags["unbroken.dataset_digest"] == digits["dataset"]["digest"]
    assert run.data.tags["unbroken.commit"]
    assert run.inputs.dataset_inputs[0].dataset.digest == digits["dataset"]["digest"][:36]
    files = {item.path for item in connect(stack.settings.mlflow_uri).list_artifacts(run.info.run_id, "figures")}
    assert files == {"figures/loss.png", "figures/confusion.png", "figures/reliability.png"}


def test_version_says_where_it_came_from(stack: Stack, digits: dict[str, Any]) -> None:
    client = connect(stack.settings.mlflow_uri)
    version = client.get_model_version("digits", digits["registration"]["version"])
    assert version.tags["unbroken.run_key"] == digits["model"]["run_key"]
    assert version.tags["unbroken.dataset_digest"] == digits["dataset"]["digest"]
    assert {"unbroken.commit", "unbroken.preset", "unbroken.weights_sha256"} <= set(version.tags)


def test_first_version_is_champion_and_newest_challenger(stack: Stack, digits: dict[str, Any]) -> None:
    client = connect(stack.settings.mlflow_uri)
    versions = [int(version.version) for version in client.search_model_versions("name = 'digits'")]
    assert int(client.get_model_version_by_alias("digits", "champion").version) == min(versions)
    assert int(client.get_model_version_by_alias("digits", "challenger").version) == max(versions)
    first = champions.read(stack.store, "digits").entries[0]
    assert first.run_key == client.get_model_version_by_alias("digits", "champion").tags["unbroken.run_key"]


def test_model_file_is_on_the_store_and_needs_nothing_else(stack: Stack, digits: dict[str, Any]) -> None:
    registration = digits["registration"]
    kept = model_file.find(stack.store, "digits", registration["version"])
    assert (kept.run_key, kept.weights_sha256) == (digits["model"]["run_key"], digits["model"]["weights_sha256"])
    assert (kept.model_sha256, kept.num_bytes) == (registration["model_sha256"], registration["model_bytes"])
    assert kept.signature.inputs.shape == (-1, 1, 8, 8)
    tags = connect(stack.settings.mlflow_uri).get_model_version("digits", kept.version).tags
    assert tags["unbroken.model_sha256"] == kept.model_sha256
    program = torch.export.load(io.BytesIO(model_file.prove(stack.store, kept))).module()
    for batch in (1, 3):
        assert program(torch.zeros(batch, 1, 8, 8)).shape == (batch, *kept.signature.outputs.shape[1:])


def test_second_run_reuses_every_stage(stack: Stack, digits: dict[str, Any]) -> None:
    client = connect(stack.settings.mlflow_uri)
    versions = len(client.search_model_versions("name = 'digits'"))
    keys = run_keys(stack)
    again = stack.command("run", "digits")
    assert again.returncode == 0, again.stdout + again.stderr
    stages = [line.split()[:2] for line in again.stdout.splitlines() if " s" in line and "Cached" in line]
    assert sorted(stages) == [[name, "Cached"] for name in ("evaluate", "register", "shard", "train")]
    assert len(client.search_model_versions("name = 'digits'")) == versions
    assert run_keys(stack) == keys
    assert len(mlflow_runs(stack, digits["model"]["run_key"])) == 1


@pytest.mark.slow
def test_training_begins_with_a_registered_models_weights(stack: Stack, digits: dict[str, Any]) -> None:
    warm = ("--set", "train.validate_every_steps=1", "--set", "train.warm_start=digits@champion")
    done = stack.command("train", "digits", "--json", "--steps", "1", "--ranks", "1", *warm)
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_json(done.stdout)
    client = connect(stack.settings.mlflow_uri)
    champion = client.get_model_version_by_alias("digits", "champion")
    (job,) = read_jobs(stack.store, result["run_key"])
    assert job.initial is not None
    assert job.initial.weights_sha256 == champion.tags["unbroken.weights_sha256"]
    assert job.preset.train.warm_start == f"digits/{champion.version}", "an alias may move"
    (run,) = mlflow_runs(stack, result["run_key"])
    (point,) = client.get_metric_history(run.info.run_id, "validation.accuracy")
    assert point.step == 1
    assert point.value >= 0.9, "a new model would guess"
    assert result["num_samples"] == 64


@pytest.mark.parametrize("model", ["digits/9999", "digits", "nothing@champion", "digits@nobody"])
def test_warm_start_from_no_model_is_named(stack: Stack, digits: dict[str, Any], model: str) -> None:
    with pytest.raises(UserError, match=f"train.warm_start = '{model}'"):
        find_version(stack.settings.mlflow_uri, model)


@pytest.mark.slow
def test_warm_start_from_weights_that_do_not_fit_or_are_gone_is_refused(stack: Stack, digits: dict[str, Any]) -> None:
    """Before anything is launched."""
    keys = run_keys(stack)
    warm = ("--set", "train.warm_start=digits@champion", "--set", "hyperparameters.num_channels=8")
    done = stack.command("train", "digits", "--steps", "1", *warm)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "train.warm_start: 0.bias has shape [24] there, and [8] here" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_keys(stack) == keys
    preset = load_preset("digits", {"train.warm_start": "digits@champion"})
    elsewhere = Store(replace(stack.location, prefix="elsewhere/"))
    with pytest.raises(UserError, match=r"are no more the result of run .* the run was removed, or trained anew"):
        initial_weights(stack.settings, elsewhere, preset)


def test_run_that_gave_a_model_is_not_removed_by_a_slip(stack: Stack, digits: dict[str, Any]) -> None:
    done = stack.command("runs", "rm", digits["model"]["run_key"])
    assert done.returncode == 2
    assert "gave model 'digits' version" in done.stderr
    assert RunRecord(stack.store, digits["model"]["run_key"]).read().result is not None


def test_prefect_command_runs_the_deployment(stack: Stack, digits: dict[str, Any]) -> None:
    prefect = str(Path(sysconfig.get_path("scripts")) / "prefect")
    done = stack.execute([prefect, "deployment", "run", "pipeline/digits", "--watch"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(mlflow_runs(stack, digits["model"]["run_key"])) == 1


def test_flow_run_shows_a_table_and_links(stack: Stack, digits: dict[str, Any]) -> None:
    run_id = UUID(digits["links"]["prefect"].rpartition("/")[2])
    ours = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        artifacts = {artifact.key: str(artifact.data) for artifact in client.read_artifacts(artifact_filter=ours)}
    assert "accuracy" in artifacts["results"]
    assert digits["model"]["run_key"] in artifacts["links"]
    assert digits["links"]["mlflow"] in artifacts["links"]
    assert digits["links"]["report"] in artifacts["links"]


@pytest.mark.slow
def test_stdlib_language_model_goes_the_same_way(language_model: dict[str, Any]) -> None:
    assert language_model["dataset"]["num_train_samples"] > 10_000
    assert 0 < language_model["evaluation"]["metrics"]["bits_per_byte"]["value"] < 8.5
    assert language_model["registration"]["name"] == "stdlib"


def test_model_holds_no_pickle_that_can_name_code(stack: Stack, digits: dict[str, Any], tmp_path: Path) -> None:
    import mlflow

    folder = Path(
        mlflow.artifacts.download_artifacts(
            f"models:/digits/{digits['registration']['version']}", dst_path=str(tmp_path)
        )
    )
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "data/model.pt2", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pth", ".pickle"))]
    assert _dangerous_opcodes((folder / "data" / "model.pt2").read_bytes()) == set()


@pytest.mark.slow
def test_a_version_deleted_in_mlflow_is_registered_again(stack: Stack, language_model: dict[str, Any]) -> None:
    """Although every stage is cached."""
    client = connect(stack.settings.mlflow_uri)
    client.delete_registered_model("stdlib")
    registration = _stdlib(stack)["registration"]
    version = client.get_model_version("stdlib", registration["version"])
    assert version.tags["unbroken.run_key"] == language_model["model"]["run_key"]


def _stdlib(stack: Stack) -> dict[str, Any]:
    short = ("--set", "train.steps=6", "--set", "evaluate.max_samples=64", "--set", "launch.nodes=1")
    done = stack.command("run", "stdlib", "--json", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    return last_json(done.stdout)


def _dangerous_opcodes(archive: bytes) -> set[str]:
    """Opcodes that import or call something, in any pickle at any depth of a zip archive."""
    import pickletools

    found: set[str] = set()
    with zipfile.ZipFile(io.BytesIO(archive)) as outer:
        for name in outer.namelist():
            data = outer.read(name)
            if data[:4] == b"PK\x03\x04":
                found |= _dangerous_opcodes(data)
            elif name.endswith(".pkl"):
                found |= {opcode.name for opcode, _, _ in pickletools.genops(data)}
    return found & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"}


def test_served_model_answers_as_the_held_out_labels_say(stack: Stack, digits: dict[str, Any], tmp_path: Path) -> None:
    dataset = digits["dataset"]
    manifest = load_manifest(stack.store, dataset["name"], dataset["digest"])
    batch = make_reader(stack.store, dataset["name"], manifest, "test").read(range(64)).fields
    inputs = batch["pixels"][:, None].astype(np.float32) / 16
    port = free_port()
    scripts = Path(sysconfig.get_path("scripts"))
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu"}
    server = subprocess.Popen(
        [
            *(scripts / "mlflow", "models", "serve", "--model-uri", "models:/digits@champion"),
            *("--env-manager", "local", "--host", LOOPBACK, "--port", str(port)),
        ],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _pings(port), what="the model server")
        reply = requests.post(f"http://{LOOPBACK}:{port}/invocations", json={"inputs": inputs.tolist()}, timeout=120)
        assert reply.status_code == 200, reply.text
        predicted = np.array(reply.json()["predictions"]).argmax(axis=1)
        assert (predicted == batch["label"]).mean() >= 0.95
        wrong = requests.post(f"http://{LOOPBACK}:{port}/invocations", json={"inputs": [[1.0]]}, timeout=120)
        assert wrong.status_code == 400
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(120)


def _pings(port: int) -> bool:
    try:
        return requests.get(f"http://{LOOPBACK}:{port}/ping", timeout=2).status_code == 200
    except requests.RequestException:  # it does not listen yet, or has no answer yet
        return False
