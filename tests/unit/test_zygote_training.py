"""Training by forked workers: the same bits as by workers that begin from nothing, and nothing left to import."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.unit.data_source import data_config, local_source, write_files
from tests.unit.tiny import Tiny, tiny_preset
from training import membership
from training.agent import Agent
from training.data.writer import write_dataset
from training.job import Job
from training.objectstore import Store
from training.record import Member, Result, run_key, start_fresh
from training.zygote import Zygote


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


def result(job: Job) -> Result:
    found = job.open_run().read().result
    assert found is not None
    return found


def train_without_zygote(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        me = Member(node=0, incarnation="me", address="127.0.0.1", port=listener.getsockname()[1])
        record = job.open_run().update(lambda record: membership.join(record, me, num_nodes=1))
        (order,) = Agent(job=job, node=0, address="127.0.0.1").orders(record, listener, Path("/nowhere"))
        subprocess.run(
            [sys.executable, "-m", "training.worker"],
            input=json.dumps(asdict(order)).encode() + b"\n",
            pass_fds=[listener.fileno()],
            timeout=100,
            check=True,
        )


def test_forked_workers_import_nothing_and_train_to_the_same_bits(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPORTS_PATH", str(tmp_path / "imports.json"))
    agent = Agent(job=job, node=0, address="127.0.0.1")
    agent.zygote = Zygote(job.preset, entry="tests.unit.zygote_work:train_and_list_imports")
    assert agent.run() == 0
    agent.zygote.close()
    forked = result(job)
    again = replace(job, generation=job.open_run().update(start_fresh).generation)
    train_without_zygote(again)
    assert result(again).state_sha256 == forked.state_sha256
    imports = json.loads((tmp_path / "imports.json").read_text())
    assert [name for name in imports if not name.startswith("torch.profiler.")] == []  # a small one, of torch's own
