"""Records that make the training fail, each in a way of its own: named, left out, and the rest is trained to the bits
of a run that never saw them. All processes are real, and so is their death."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import quarantine
from tasks.results import Dataset, TrainedModel
from tests.conftest import Stack
from tests.flows import poisoned_recipe
from tests.flows.poisoned_recipe import DIES, DIES_DECODED, NO_SLOPE, NOT_FINITE, RAISES
from tests.flows.runs import last_json, mlflow_runs, run_keys
from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.tiny import Tiny, tiny_preset
from training.config import Preset
from training.data.withdrawn import QUARANTINED, quarantined_records, withdrawn_key
from training.data.writer import split_of, write_dataset
from training.diagnosis.poison import max_replays
from training.errors import DeterministicError
from training.recipe import Record
from training.runs.record import RunRecord

NUM_RECORDS = 200
SHARE = 10
"""Samples of a virtual worker in a step."""
POISON = {30: RAISES, 50: NO_SLOPE, 80: NOT_FINITE, 120: DIES, 170: DIES_DECODED}
"""Lines."""
EXPECTED = {
    RAISES: "ValueError: what is this?",
    NOT_FINITE: "the loss is nan",
    NO_SLOPE: "the gradient norm nan",
    DIES: "workers died twice alike",
    DIES_DECODED: "workers died twice alike",
}
# A search may take half of collective_timeout_seconds, however slow this machine is just now.
PRESET = """
name = "poisoned"
recipe = "poisoned_recipe:Poisoned"
[data]
name = "{name}"
source = "{name}.csv"
format = "csv"
[train]
steps = 12
batch_size = 40
virtual_workers = 4
checkpoint_every_steps = 5
[launch]
nodes = 1
processes_per_node = 1
collective_timeout_seconds = 240
"""


def line(number: int, mark: int) -> str:
    """What is poison is of the train split, whatever the hash says."""
    candidates = (f"{mark},{number},{last},{number % 2}" for last in range(100))
    return (
        next(candidates)
        if mark == 1
        else next(text for text in candidates if split_of(Record(id="", data=text.encode()), 10) == "train")
    )


def write_source(folder: Path, name: str, mark: Callable[[int], str]) -> Path:
    """A preset, its recipe and its data."""
    shutil.copy(poisoned_recipe.__file__, folder)
    (folder / f"{name}.csv").write_text("".join(mark(number) + "\n" for number in range(1, NUM_RECORDS + 1)))
    path = folder / f"{name}.toml"
    path.write_text(PRESET.format(name=name))
    return path


def failures_of(stack: Stack, before: set[str]) -> dict[str, str]:
    """By the record that each names: the messages of the runs that failed since."""
    records = [RunRecord(stack.store, key).read() for key in run_keys(stack) - before]
    failures = [record.failure for record in records if record.failure is not None]
    assert {failure.kind for failure in failures} == {"DeterministicError"}
    return {record: failure.message for failure in failures for record in failure.records}


@pytest.fixture(scope="module")
def clean_weights(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run on data without any poison: where it would stand, there are empty lines."""
    preset = write_source(
        tmp_path_factory.mktemp("clean"), "p-clean", lambda number: "" if number in POISON else line(number, 1)
    )
    done = stack.command("train", str(preset), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return str(last_json(done.stdout)["weights_sha256"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "ranks"),
    [
        pytest.param((30, 50, 80), 2, id="fails"),
        pytest.param((120, 170), 1, id="dies"),
    ],
)
def test_each_poison_is_named_and_without_it_the_bits_are_those_of_a_clean_run(
    stack: Stack, tmp_path: Path, clean_weights: str, lines: tuple[int, ...], ranks: int
) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    marks = {number: POISON[number] for number in lines}

    def text(number: int) -> str:
        return "" if number in POISON.keys() - marks.keys() else line(number, marks.get(number, 1))

    preset, before = write_source(tmp_path, name, text), run_keys(stack)
    found = stack.command("train", str(preset), "--quarantine", "--json", "--ranks", str(ranks))
    assert found.returncode == 0, found.stdout + found.stderr
    result, named = last_json(found.stdout), failures_of(stack, before)

    ids = {f"{name}.csv:{number}": mark for number, mark in marks.items()}
    assert named.keys() == ids.keys()
    for record, mark in ids.items():
        message = named[record]
        assert f"record {record} makes it fail by itself; without, it does not fail" in message
        assert EXPECTED[mark] in message
        among = NUM_RECORDS if "decoded" in message else SHARE
        assert int(re.findall(r"\((\d+) replays\)", message)[0]) <= max_replays(among)

    noted = stack.store.read_versioned(withdrawn_key(name)).document["ids"]
    assert {record: about["reason"] for record, about in noted.items()} == {
        record: QUARANTINED + message for record, message in named.items()
    }
    (tracked,) = mlflow_runs(stack, result["run_key"])
    assert tracked.data.tags["unbroken.quarantined"] == ", ".join(sorted(ids))
    assert tracked.info.status == "FINISHED"
    assert result["weights_sha256"] == clean_weights


# ---- how often -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(stack: Stack, tmp_path: Path) -> Dataset:
    """Of the tiny recipe."""
    config = data_config(name=f"q{uuid.uuid4().hex[:8]}")
    write_csv(tmp_path / "raw/0.csv", range(60))
    digest = write_dataset(stack.store, local_source(tmp_path, config), config, Tiny()).manifest.digest
    return Dataset(name=config.name, digest=digest, num_train_samples=1, num_test_samples=1, num_shards=1, num_bytes=1)


def preset_allowing(number: int) -> Preset:
    preset = tiny_preset()
    object.__setattr__(preset.launch, "max_quarantined", number)
    return preset


def failing_by(*records: tuple[str, ...]) -> Callable[[Dataset], TrainedModel]:
    """A training that fails by these records, one time after another, and then for good by none."""
    left = iter([*records, ()])

    def train(dataset: Dataset) -> TrainedModel:
        raise DeterministicError("it fails", records=next(left))

    return train


def attempt(dataset: Dataset, train: Callable[[Dataset], TrainedModel], **options: Any) -> DeterministicError:
    with pytest.raises(DeterministicError) as caught:
        quarantine.trained(preset_allowing(2), shard=lambda: dataset, train=train, **options)
    return caught.value


def test_no_more_records_are_left_out_than_allowed(stack: Stack, dataset: Dataset) -> None:
    error = attempt(dataset, failing_by(("0.csv:1",), ("0.csv:2",), ("0.csv:3",)), quarantine=True)
    assert "it fails. This would be record 3 in quarantine, and launch.max_quarantined is 2" in str(error)
    assert quarantined_records(stack.store, dataset.name) == ["0.csv:1", "0.csv:2"]


def test_nothing_is_left_out_unasked_or_for_a_failure_of_no_record(stack: Stack, dataset: Dataset) -> None:
    said = str(attempt(dataset, failing_by(("0.csv:1",)), quarantine=False))
    assert said == "it fails. Mend the data, or go on without: --quarantine"
    assert str(attempt(dataset, failing_by(), quarantine=True)) == "it fails"
    assert quarantined_records(stack.store, dataset.name) == []
    assert not json.dumps(quarantined_records(stack.store, "no such dataset")).strip("[]")
