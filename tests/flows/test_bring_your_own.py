"""A recipe and data from outside the repository, as docs/bring-your-own.md tells: from disk, and from S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stack
from tests.flows.runs import last_json
from training.objectstore import Store, StoreLocation


@pytest.fixture
def spirals(stack: Stack, tmp_path: Path) -> Path:
    """What `unbroken init spirals` writes."""
    done = stack.command("init", "spirals", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "spirals"


def test_scaffold_runs_as_it_is_written(stack: Stack, spirals: Path) -> None:
    result = _run(stack, "run", "spirals/spirals.toml", cwd=spirals.parent)
    assert result["evaluation"]["metrics"]["accuracy"]["value"] >= 0.9
    assert result["registration"]["name"] == "spirals"
    assert result["dataset"]["num_train_samples"] + result["dataset"]["num_test_samples"] == 600


def test_records_from_s3_give_the_same_dataset(stack: Stack, spirals: Path) -> None:
    """The raw data in a bucket of its own, beside a longer neighbour that must not be read."""
    raw = Store(StoreLocation(endpoint=stack.location.endpoint, bucket="raw-data"))
    raw.create_bucket_if_missing()
    data = (spirals / "records.jsonl").read_bytes()
    raw.put("spirals/records.jsonl", data)
    raw.put("spirals-old/records.jsonl", data)
    short = ("--set", "train.steps=10")
    local = _run(stack, "train", "spirals/spirals.toml", *short, cwd=spirals.parent)
    remote = _run(
        stack, "train", "spirals/spirals.toml", *short, "--set", "data.source=s3://raw-data/spirals", cwd=spirals.parent
    )
    assert remote == local


def _run(stack: Stack, *arguments: str, cwd: Path) -> Any:
    done = stack.command(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return last_json(done.stdout)
