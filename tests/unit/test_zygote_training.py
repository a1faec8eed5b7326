"""Training by forked workers: nothing is left to import."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.data_source import data_config, local_source, write_files
from tests.unit.tiny import Tiny, tiny_preset
from training.cluster.agent import Agent
from training.cluster.zygote import Zygote
from training.data.writer import write_dataset
from training.runs.job import Job
from training.runs.record import run_key
from training.s3.objectstore import Store


@pytest.fixture
def job(store: Store, tmp_path: Path) -> Job:
    """A run of one node on a small dataset."""
    config = data_config()
    write_files(tmp_path, num_files=2)
    digest = write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest.digest
    preset = replace(tiny_preset(), data=config)
    key = run_key(recipe=Tiny(), preset=preset, dataset_digest=digest)
    job = Job(key=key, generation=0, preset=preset, dataset_digest=digest, location=store.location)
    job.open_run().create_if_missing()
    return job


def test_forked_workers_import_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPORTS_PATH", str(tmp_path / "imports.json"))
    zygote = Zygote(job.preset, entry="tests.unit.zygote_work:train_and_list_imports")
    assert Agent(job=job, node=0, address="127.0.0.1", zygote=zygote).run() == 0
    zygote.close()
    assert job.open_run().read().result is not None
    imports = json.loads((tmp_path / "imports.json").read_text())
    assert [name for name in imports if not name.startswith("torch.profiler.")] == []  # a small one, of torch's own
