"""A recipe and data from outside the repository, as docs/bring-your-own.md tells: from disk, and from S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stack
from tests.flows.runs import last_json
from training.s3.objectstore import Store, StoreLocation


@pytest.fixture(scope="module")
def spirals(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `unbroken init spirals` writes."""
    folder = tmp_path_factory.mktemp("own")
    done = stack.command("init", "spirals", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "spirals"


@pytest.fixture(scope="module")
def result(stack: Stack, spirals: Path) -> Any:
    """Of a whole run of the scaffold as it is written."""
    return _run(stack, "run", "spirals/spirals.toml", cwd=spirals.parent)


@pytest.mark.slow
def test_scaffold_runs_as_it_is_written(result: Any) -> None:
    assert result["evaluation"]["metrics"]["accuracy"]["value"] >= 0.9
    assert result["registration"]["name"] == "spirals"
    assert result["dataset"]["num_train_samples"] + result["dataset"]["num_test_samples"] == 600


@pytest.mark.slow
def test_records_from_s3_give_the_same_dataset(stack: Stack, spirals: Path, result: Any) -> None:
    """And so the same run, whose training is found. The raw data lies in a bucket of its own, beside a longer neighbour
    that must not be read."""
    raw = Store(StoreLocation(endpoint=stack.location.endpoint, bucket="raw-data"))
    raw.create_bucket_if_missing()
    data = (spirals / "records.jsonl").read_bytes()
    raw.put("spirals/records.jsonl", data)
    raw.put("spirals-old/records.jsonl", data)
    from_s3 = ("--set", "data.source=s3://raw-data/spirals")
    remote = _run(stack, "train", "spirals/spirals.toml", *from_s3, cwd=spirals.parent)
    assert {name: remote[name] for name in result["model"]} == result["model"]


def _run(stack: Stack, *arguments: str, cwd: Path) -> Any:
    done = stack.command(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return last_json(done.stdout)
