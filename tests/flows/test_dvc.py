"""`dvc repro`: the same stages without Prefect; nothing is done twice, and what is locked is always the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local.stack import dvc_remote
from tasks.mlflow_client import RUN_KEY_TAG, connect
from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.flows.runs import VIRTUAL_WORKERS, last_json, loss_history, mlflow_runs, processes, run_keys, wait_for_step
from tests.waiting import wait_until
from training.runs.record import RunRecord
from training.s3.objectstore import Store

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
PRESET = "training/presets/digits.toml"
FLOWS_VALUES = ("--set", "train.steps=60", "--set", "seed=31", "--set", "launch.nodes=1")
STARTERS_SEEDS, KILLS_SEEDS = range(33, 38), range(42, 45)
NUM_QUICK = 50 * VIRTUAL_WORKERS // 2
"""Of each of two ranks, in 50 steps."""
Clone = Callable[..., Path]


@pytest.fixture
def clone(stack: Stack, tmp_path: Path) -> Clone:
    """Makes a copy of the project as git would clone it, with values of its preset changed (`seed = 1` to another), and
    the stack as its DVC remote. As long as `maybe_slow` is there, its training takes its time after the first steps."""

    def make(maybe_slow: Path | None = None, **values: int) -> Path:
        folder = tmp_path / uuid.uuid4().hex[:8]
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        for name in listed.stdout.decode().splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        preset = folder / PRESET
        lines = preset.read_text().splitlines()
        for key, value in values.items():
            (number,) = (number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
            lines[number] = f"{key} = {value}"
        text = "\n".join(lines) + "\n"
        preset.write_text(text if maybe_slow is None else patient(text, maybe_slow))
        (folder / ".dvc/config.local").write_text(dvc_remote(stack.settings))
        _git(folder, "init", "-q")
        _git(folder, "add", "-A")
        _git(folder, "commit", "-qm", "a clone")
        return folder

    return make


def patient(preset: str, slow: Path) -> str:
    """As `at_leisure_while` and `PATIENT` have it."""
    for before, after in (
        ("training.recipes.digits:Digits", "tests.patient_recipe:Patient"),
        ("[hyperparameters]\n", f'[hyperparameters]\nslow_while = "{slow}"\nnum_quick = {NUM_QUICK}\n'),
        ("[launch]\n", "[launch]\nsilence_seconds = 60\njoin_seconds = 240\n"),
    ):
        assert before in preset
        preset = preset.replace(before, after)
    return preset


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Written down at the end, if every soak of this file passed."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == len(STARTERS_SEEDS) + len(KILLS_SEEDS) + 1:
        write_evidence("dvc", rows=sorted(found, key=lambda row: (str(row["case"]), int(row["seed"]))))


@pytest.mark.slow
def test_repro_does_what_is_needed_and_a_flow_and_dvc_find_what_the_other_did(stack: Stack, clone: Clone) -> None:
    """No shard is sent, no step is run, no sample is scored again. That what is locked never changes, a killed `repro`
    shows."""
    before = run_keys(stack)
    _run_flow(stack, *FLOWS_VALUES)
    (key,) = run_keys(stack) - before
    done = _work(stack, key)
    checkout = clone(steps=60, seed=31, nodes=1)
    assert len(_ran(_dvc(stack, checkout, "repro"))) == 4
    assert _work(stack, key) == done, "dvc did again what a flow had done"
    lock = (checkout / "dvc.lock").read_bytes()
    model = _model(checkout)
    assert (model["run_key"], model["step"]) == (key, 60)
    assert len((checkout / "data/digits/loss.csv").read_text().splitlines()) == 61

    assert _ran(_dvc(stack, checkout, "repro")) == ["shard"], "which is always asked, for new data"
    assert (checkout / "dvc.lock").read_bytes() == lock
    assert "accuracy" in _dvc(stack, checkout, "metrics", "show")
    assert "pushed" in _dvc(stack, checkout, "push")

    preset = checkout / PRESET
    preset.write_text(preset.read_text().replace("confidence = 0.95", "confidence = 0.9"))
    assert _ran(_dvc(stack, checkout, "repro")) == ["shard", "evaluate", "register"]
    done = _work(stack, key)
    _run_flow(stack, *FLOWS_VALUES, "--set", "evaluate.confidence=0.9")
    assert _work(stack, key) == done, "a flow did again what dvc had done"
    assert len(mlflow_runs(stack, key)) == len(_versions(stack, key)) == 1


@pytest.mark.soak
def test_a_scaffold_outside_the_repository_is_reproduced(stack: Stack, tmp_path: Path) -> None:
    """What `unbroken init` writes, as it is written, without git."""
    assert stack.command("init", "helix", cwd=tmp_path).returncode == 0
    folder = tmp_path / "helix"
    assert _ran(_dvc(stack, folder, "repro")) == ["shard", "train", "evaluate", "register"]
    lock = (folder / "dvc.lock").read_bytes()
    model = json.loads((folder / "data/helix/model.json").read_text())
    assert model["step"] == 200
    record = RunRecord(stack.store, model["run_key"]).read()

    assert _ran(_dvc(stack, folder, "repro")) == ["shard", "train"], "which are always asked"
    assert (folder / "dvc.lock").read_bytes() == lock
    found = last_json(stack.command("train", "helix/helix.toml", "--json", cwd=tmp_path).stdout)
    assert found["run_key"] == model["run_key"]
    assert RunRecord(stack.store, model["run_key"]).read() == record, "it was trained again"
    assert len(mlflow_runs(stack, model["run_key"])) == 1
    assert "pushed" in _dvc(stack, folder, "push")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", STARTERS_SEEDS)
def test_three_starters_at_once_are_one_execution(
    stack: Stack, clone: Clone, seed: int, rows: list[dict[str, Any]]
) -> None:
    _one_execution(stack, [clone(steps=60, seed=seed), clone(steps=60, seed=seed)])
    rows.append({"case": "three starters at once", "seed": seed, "num_runs": 1, "num_steps": 60})


@pytest.mark.slow
def test_killed_repro_goes_on_and_locks_the_same_bytes(stack: Stack, clone: Clone, tmp_path: Path) -> None:
    _kill_and_compare(stack, clone, tmp_path / "slow", num_kills=1, steps=240, seed=41)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", KILLS_SEEDS)
def test_repro_killed_three_times_locks_the_same_bytes(
    stack: Stack, clone: Clone, seed: int, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    row = _kill_and_compare(stack, clone, tmp_path / "slow", num_kills=3, steps=2400, seed=seed)
    rows.append({"case": "dvc repro killed three times", "seed": seed, **row})


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_queued_experiments_are_runs_of_their_own(stack: Stack, clone: Clone, rows: list[dict[str, Any]]) -> None:
    """A sweep over the preset's values, trained in folders of DVC's own."""
    checkout = clone(steps=20, seed=51)
    before = run_keys(stack)
    _dvc(stack, checkout, "exp", "run", "--queue", "-S", f"{PRESET}:hyperparameters.num_channels=4,8")
    _dvc(stack, checkout, "exp", "run", "--run-all", "--jobs", "2")
    shown = _experiments(json.loads(_dvc(stack, checkout, "exp", "show", "--json"))).values()
    values = {found["params"][PRESET]["data"]["hyperparameters"]["num_channels"] for found in shown}
    assert values == {4, 8}
    assert all(0 < found["metrics"]["data/digits/metrics.json"]["data"]["accuracy"] <= 1 for found in shown)
    keys = run_keys(stack) - before
    assert len(keys) == 2
    assert all(len(mlflow_runs(stack, key)) == len(_versions(stack, key)) == 1 for key in keys)
    rows.append({"case": "queued experiments", "seed": 51, "num_runs": 2, "num_steps": 20})


def _one_execution(stack: Stack, checkouts: list[Path]) -> None:
    """`dvc repro` in each, and the same from Prefect, all at once."""
    before = run_keys(stack)
    seed = next(line for line in (checkouts[0] / PRESET).read_text().splitlines() if line.startswith("seed"))
    started = [_start_dvc(stack, checkout, "repro") for checkout in checkouts]
    started.append(stack.start("run", "digits", "--set", "train.steps=60", "--set", seed.replace(" ", "")))
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    (key,) = run_keys(stack) - before
    record = RunRecord(stack.store, key).read()
    assert (len(record.attempt_starts), record.departures) == (1, ())
    (tracked,) = mlflow_runs(stack, key)
    assert tracked.info.status == "FINISHED"
    assert [step for step, _ in loss_history(stack, tracked.info.run_id)] == list(range(1, 61))
    assert len(_versions(stack, key)) == 1
    assert len({(checkout / "dvc.lock").read_bytes() for checkout in checkouts}) == 1


def _kill_and_compare(stack: Stack, clone: Clone, slow: Path, *, num_kills: int, **values: int) -> dict[str, Any]:
    """`kill -9` of dvc, its stage and the agents while it trains; at last, the same from nothing in another clone."""
    before = run_keys(stack)
    checkout = clone(slow, checkpoint_every_steps=20, **values)
    slow.touch()
    step = 0
    for _ in range(num_kills):
        running = _start_dvc(stack, checkout, "repro")
        stage = _stage_of(running)
        run = wait_for_step(stack, before, step=step + 40)
        step = run.read().checkpoints[-1].step
        agents = [agent for agent in processes(stack, "training.cluster.agent") if run.run_key in agent.cmdline()]
        victims = [psutil.Process(running.pid), stage, *agents]
        assert len(victims) == 4
        for victim in victims:
            victim.kill()
        running.communicate(timeout=240)
        assert run.read().result is None, "it was killed after its training"
    slow.unlink()
    _dvc(stack, checkout, "repro")
    record = run.read()
    assert len(record.attempt_starts) > num_kills
    assert all(start >= 20 for start in record.attempt_starts[1:]), "it began anew"
    assert len(mlflow_runs(stack, run.run_key)) == 1

    clean = clone(slow, checkpoint_every_steps=20, **values)
    elsewhere = f"clean-{uuid.uuid4().hex}"
    _dvc(stack, clean, "repro", UNBROKEN_S3_PREFIX=elsewhere)
    calm = RunRecord(Store(replace(stack.location, prefix=f"{elsewhere}/")), run.run_key).read()
    assert (len(calm.attempt_starts), calm.departures) == (1, ())
    lock = (checkout / "dvc.lock").read_bytes()
    assert (clean / "dvc.lock").read_bytes() == lock
    return {
        "went_on_from_steps": list(record.attempt_starts[1:]),
        "num_steps": values["steps"],
        "lock_sha256": hashlib.sha256(lock).hexdigest(),
    }


def _stage_of(dvc: subprocess.Popen[str]) -> psutil.Process:
    """The training stage that a `dvc repro` runs."""

    def look() -> psutil.Process | None:
        for child in psutil.Process(dvc.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[1:4] == ["-m", "tasks", "train"]:
                    return child
        return None

    return wait_until(look, what="the training stage of dvc repro")


def _work(stack: Stack, key: str) -> tuple[dict[str, Any], Any]:
    """All that shard, train and evaluate write, each object with the time at which it was; and the attempts."""
    kinds = ("/shards/", "/parts/", "/manifests/", "/results/", "/events/", "/checkpoints/")
    prefixes = ("datasets/digits/", f"runs/{key}/")
    entries = [entry for prefix in prefixes for entry in stack.store.list_entries(prefix)]
    written = {entry.key: entry.modified for entry in entries if any(kind in entry.key for kind in kinds)}
    for kind in kinds:
        assert any(kind in name for name in written), f"no object of the kind {kind}: this would prove nothing"
    return written, RunRecord(stack.store, key).read().attempt_starts


def _versions(stack: Stack, key: str) -> list[Any]:
    client = connect(stack.settings.mlflow_uri)
    return list(client.search_model_versions(f"name = 'digits' and tags.`{RUN_KEY_TAG}` = '{key}'"))


def _model(checkout: Path) -> Any:
    return json.loads((checkout / "data/digits/model.json").read_text())


def _ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def _experiments(shown: list[dict[str, Any]]) -> dict[str, Any]:
    """What `dvc exp show` tells of each experiment, by its name."""
    found = [experiment for revision in shown for experiment in revision["experiments"] or ()]
    return {experiment["name"]: experiment["revs"][0]["data"] for experiment in found}


def _start_dvc(stack: Stack, checkout: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPTS / "dvc", *arguments],
        cwd=checkout,
        env=_environment(stack),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _dvc(stack: Stack, checkout: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [SCRIPTS / "dvc", *arguments],
        cwd=checkout,
        env=_environment(stack) | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run_flow(stack: Stack, *options: str) -> None:
    running = stack.start("run", "digits", *options)
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output


def _environment(stack: Stack) -> dict[str, str]:
    """As in a shell without a Prefect server."""
    found = {**stack.environment(), "PATH": f"{SCRIPTS}:/usr/bin:/bin"}
    found.pop("PREFECT_API_URL", None)
    return found


def _git(folder: Path, *arguments: str) -> None:
    person = ("-c", "user.name=A Person", "-c", "user.email=person@example.org")
    subprocess.run(["git", *person, *arguments], cwd=folder, check=True)
