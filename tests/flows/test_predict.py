"""A registered model's predictions for a whole dataset, killed on the way; and its weights in a file for others."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from prefect.client.orchestration import SyncPrefectClient

from flows.cli import interchange
from tasks.lifecycle import model_file
from tasks.lifecycle.interchange import EQUAL, export_weights
from tasks.lifecycle.model_file import KeptVersion, Program
from tasks.prediction.kept import predictions_prefix
from tests.conftest import Stack
from tests.faults.proxy import LosingProxy
from tests.flows.runs import flow_processes, last_json
from tests.unit.champions import SIGNATURE
from tests.waiting import wait_until
from training.data.manifest import Manifest, load_manifest, shard_key
from training.documents import sha256_hex
from training.errors import DamagedError, InfrastructureError, UserError
from training.preset_file import load_preset
from training.recipe import Recipe, load_recipe
from training.runs.job import Job, store_job
from training.runs.record import run_key
from training.s3.objectstore import Store

SHARD_BYTES = 1024
"""Small, so that there are many shards."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model of four versions (equal, but for their weights) and a dataset of many shards, on the stack's store."""

    store: Store
    name: str
    digest: str
    kept: dict[str, KeptVersion]

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.store, self.name, self.digest)

    def prefix(self, version: str) -> str:
        return predictions_prefix(self.name, model_sha256=self.kept[version].model_sha256, dataset_digest=self.digest)

    def objects(self, version: str) -> dict[str, tuple[str, Any]]:
        """What is there of a version's predictions, by key: its ETag, and when it was written."""
        return {each.key: (each.etag, each.modified) for each in self.store.list_entries(self.prefix(version))}

    def shards(self, version: str) -> dict[str, tuple[str, Any]]:
        return {key: found for key, found in self.objects(version).items() if key.endswith(".parquet")}

    def contents(self, version: str) -> dict[str, bytes]:
        return {key: self.store.get(key) for key in self.objects(version)}


def programs(recipe: Recipe) -> Iterator[tuple[str, Program]]:
    """Each version's, exported once: to do so takes seconds."""
    torch.manual_seed(1)
    exported = torch.export.export(
        recipe.model().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    exported._example_inputs = ((None,), {})
    for version in "1234":
        file = io.BytesIO()
        torch.export.save(exported, file)
        yield version, Program(data=file.getvalue(), signature=SIGNATURE)
        with torch.no_grad():
            exported.state_dict["9.bias"].add_(1.0)


@pytest.fixture(scope="module")
def known(stack: Stack) -> Known:
    """As the pipeline leaves them, without a training: its bits are not looked at here."""
    from tasks.shard import shard

    name = f"predicted-{uuid.uuid4().hex[:8]}"
    preset = load_preset("digits", {"data.name": name, "data.shard_bytes": SHARD_BYTES})
    dataset = shard.fn(preset)
    recipe = load_recipe(preset)
    key = run_key(recipe=recipe, preset=preset, dataset_digest=dataset.digest)
    store_job(
        stack.store, Job(key=key, generation=0, preset=preset, dataset_digest=dataset.digest, location=stack.location)
    )
    kept = {
        version: model_file.keep(
            stack.store,
            name,
            version,
            run_key=key,
            weights_sha256=version * 64,
            dataset_digest=dataset.digest,
            fetch=lambda program=program: program,
        )
        for version, program in programs(recipe)
    }
    return Known(store=stack.store, name=name, digest=dataset.digest, kept=kept)


@pytest.fixture
def client(stack: Stack) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        yield client


def parts_below(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in process.children(recursive=True) if "tasks.prediction.part" in each.cmdline()]


def predict(stack: Stack, known: Known, version: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    arguments = ("--data", known.name, "--processes", str(processes), "--json")
    return stack.command("models", "predict", f"{known.name}/{version}", *arguments)


class Barred:
    """For a proxy to watch: as many predictions as it is told to may pass, and no other one before it is opened."""

    def __init__(self, num_passing: int) -> None:
        self._passes = threading.Semaphore(num_passing)
        self._opened = threading.Event()

    def __call__(self, method: str, path: str, status: int) -> None:
        is_new = method == "PUT" and ".parquet" in path and status == 0
        if is_new and not self._opened.is_set() and not self._passes.acquire(blocking=False):
            self._opened.wait()
            raise TimeoutError  # the proxy hangs up: whoever waited for this is dead

    def open(self) -> None:
        self._opened.set()


def strike(stack: Stack, known: Known, proxy: LosingProxy, *, child: bool) -> dict[str, tuple[str, Any]]:
    """Begin to predict by version 1, and kill -9 the command, or one of its processes, once some shards are finished,
    and before all are. Returns what was finished, when nothing is left that could finish more."""
    before, barred = known.shards("1"), Barred(3)
    proxy.watch = barred
    arguments = ("models", "predict", f"{known.name}/1", "--data", known.name, "--processes", "1")
    started = stack.start(*arguments, s3_endpoint=proxy.endpoint)
    process = psutil.Process(started.pid)
    enough = len(before) + 3
    wait_until(
        lambda: started.poll() is not None or len(known.shards("1")) >= enough,
        what="shards to be finished",
    )
    parts = parts_below(process) if started.poll() is None else []
    assert parts, started.communicate()
    (parts[0] if child else process).send_signal(signal.SIGKILL)
    out, _ = started.communicate(timeout=240)
    if child:
        assert started.returncode == InfrastructureError.exit_code, out
        assert f"died with code -{signal.SIGKILL.value}" in out
    else:
        assert started.returncode == -signal.SIGKILL
    wait_until(lambda: not any(part.is_running() for part in parts), what="no process to be left")
    barred.open()
    return known.shards("1")


@pytest.mark.soak
def test_killed_twice_it_gives_the_same_bytes_and_writes_no_shard_again(
    stack: Stack, known: Known, proxy: LosingProxy
) -> None:
    num_shards = len({info.sha256 for infos in known.manifest.splits.values() for info in infos})
    finished: list[dict[str, tuple[str, Any]]] = []
    for child in (False, True):
        finished.append(strike(stack, known, proxy, child=child))
        assert known.objects("1").keys() == finished[-1].keys()  # no manifest
    assert 3 <= len(finished[0]) < len(finished[1]) < num_shards
    done = predict(stack, known, "1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["num_shards"], told["num_shards_found"]) == (num_shards, len(finished[1]))
    after = known.objects("1")
    assert len(after) == num_shards + 1
    for before in finished:
        assert {key: after[key] for key in before} == before

    contents = known.contents("1")
    again = predict(stack, known, "1", processes=3)
    assert json.loads(again.stdout)["num_shards_found"] == num_shards
    assert known.objects("1") == after
    for key in after:
        known.store.delete(key)
    assert predict(stack, known, "1", processes=3).returncode == 0
    assert known.contents("1") == contents


def test_predictions_are_the_models_and_the_manifest_says_whose(stack: Stack, known: Known) -> None:
    """Beside it another process at the same work."""
    arguments = ("--data", f"{known.name}@{known.digest[:12]}", "--processes", "1")
    both = [stack.start("models", "predict", f"{known.name}/2", *arguments) for _ in range(2)]
    for each in both:
        out, _ = each.communicate(timeout=240)
        assert each.returncode == 0, out
    contents = known.contents("2")
    prefix = known.prefix("2")
    manifest = json.loads(contents.pop(f"{prefix}manifest.json"))["result"]
    kept = known.kept["2"]
    assert (manifest["model"], manifest["version"], manifest["model_sha256"]) == (known.name, "2", kept.model_sha256)
    assert (manifest["dataset"], manifest["dataset_digest"]) == (known.name, known.digest)
    program = torch.export.load(io.BytesIO(model_file.prove(known.store, kept))).module()
    torch.set_num_threads(1)
    named = set()
    for split, infos in known.manifest.splits.items():
        for info, told in zip(infos, manifest["splits"][split], strict=True):
            key = f"{prefix}shards/{info.sha256}-{told['sha256']}.parquet"
            named.add(key)
            assert sha256_hex(contents[key]) == told["sha256"]
            table = pq.read_table(io.BytesIO(contents[key]))
            assert (told["shard"], told["num_samples"]) == (info.sha256, table.num_rows)
            shard = safetensors.torch.load(known.store.get(shard_key(known.name, info.sha256)))
            inputs = shard["pixels"].clone().unsqueeze(1).to(torch.float32) / 16.0
            with torch.inference_mode():
                outputs = torch.cat([program(rows.clone()) for rows in inputs.split(64)])
            assert np.array_equal(np.stack(table["prediction"].to_numpy()), outputs.numpy())
    assert named == contents.keys()


@pytest.mark.slow
def test_deployment_whose_process_is_killed_goes_on_by_itself(
    stack: Stack, known: Known, client: SyncPrefectClient, proxy: LosingProxy
) -> None:
    deployment = client.read_deployment_by_name("predict/models")
    barred = proxy.watch = Barred(1)
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"model": f"{known.name}/3", "data": known.name, "processes": 1},
        job_variables={"env": {"UNBROKEN_S3_ENDPOINT": proxy.endpoint}},
    )
    wait_until(
        lambda: known.shards("3") or client.read_flow_run(run.id).end_time is not None,
        what="a shard to be finished",
    )
    (engine,) = (p for p in flow_processes(stack) if p.environ()["PREFECT__FLOW_RUN_ID"] == str(run.id))
    engine.kill()
    barred.open()
    before = known.shards("3")

    def is_over() -> bool:
        state = client.read_flow_run(run.id).state
        return state is not None and (state.is_completed() or state.is_failed())

    wait_until(is_over, what="the flow run to be over")
    assert client.read_flow_run(run.id).state.is_completed()  # type: ignore[union-attr]
    after = known.objects("3")
    assert f"{known.prefix('3')}manifest.json" in after
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_what_cannot_be_predicted_is_named(known: Known) -> None:
    kept, model = known.kept["4"], f"{known.name}/4"
    key = model_file.file_key(known.name, kept.model_sha256)
    whole = known.store.get(key)
    known.store.put(key, b"damaged")
    with pytest.raises(DamagedError, match=key):
        interchange.predict(model, data=known.name, processes=1)
    known.store.put(key, whole)
    info = known.manifest.splits["test"][0]
    shard = known.store.get(shard_key(known.name, info.sha256))
    known.store.put(shard_key(known.name, info.sha256), shard[:-1] + b"?")
    with pytest.raises(DamagedError, match=info.sha256):
        interchange.predict(model, data=known.name, processes=1)
    known.store.put(shard_key(known.name, info.sha256), shard)
    assert f"{known.prefix('4')}manifest.json" not in known.objects("4")
    interchange.predict(model, data=known.name, processes=1)
    some, *_ = known.shards("4")
    known.store.put(some, b"damaged")
    interchange.predict(model, data=known.name, processes=1)
    assert sha256_hex(known.store.get(some)) == some.rpartition("-")[2].removesuffix(".parquet")
    for other, data, words in (
        (f"{known.name}/9", known.name, "version 9 has no model file"),
        (f"{known.name}@champion", known.name, "has no champion"),
        ("nobody/1", known.name, "model 'nobody' version 1 has no model file"),
        (f"{known.name}/1", "nothing", "no dataset version is meant by 'nothing'"),
    ):
        with pytest.raises(UserError, match=words):
            interchange.predict(other, data=data)


# ---- weights in a file -----------------------------------------------------------------------------------------------


def test_exported_weights_are_the_registered_ones(stack: Stack, known: Known, tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    done = stack.command("models", "export", f"{known.name}/1", "--to", str(path), "--json")
    assert done.returncode == 0, done.stderr
    about = last_json(done.stdout)
    assert (about["version"], about["model_sha256"]) == ("1", known.kept["1"].model_sha256)
    assert (about["recipe"], about["run"]) == ("training.recipes.digits:Digits", known.kept["1"].run_key)
    assert about["outputs"] == EQUAL
    with safetensors.safe_open(path, "pt") as file:
        assert {"file": str(path), **file.metadata()} == about
    torch.manual_seed(1)
    module = load_recipe(load_preset("digits")).model()
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_export_replaces_nothing_unless_it_is_told_to(known: Known, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        export_weights(known.store, known.kept["2"], path)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, b"mine")]
    export_weights(known.store, known.kept["2"], path, force=True)
    assert safetensors.torch.load_file(path)


def test_damaged_model_file_is_not_exported(known: Known, tmp_path: Path) -> None:
    kept = replace(known.kept["3"], model_sha256="0" * 64)
    with pytest.raises(DamagedError, match=f"models/{known.name}/files/0000"):
        export_weights(known.store, kept, tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())
