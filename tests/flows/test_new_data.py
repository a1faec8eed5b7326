"""New data in a watched source: the pipeline runs by itself, once, and not before the source is quiet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

from flows.reaper import sources
from flows.reaper.sources import NEW_DATA_TAG, Sources
from tasks.mlflow_client import DATASET_TAG, connect
from tests.conftest import Stack
from tests.waiting import wait_until


@pytest.fixture
def preset(stack: Stack, tmp_path: Path) -> Path:
    """One that reads a folder with one file."""
    done = stack.command("init", "arms", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "arms"
    (folder / "raw").mkdir()
    (folder / "records.jsonl").rename(folder / "raw/0.jsonl")
    path = folder / "arms.toml"
    text = path.read_text().replace('source = "records.jsonl"', 'source = "raw"').replace("steps = 200", "steps = 8")
    path.write_text(text)
    return path


@pytest.fixture
def client(stack: Stack) -> Any:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        yield client


@pytest.mark.slow
def test_new_file_makes_a_new_version_and_nothing_else_does(
    stack: Stack, client: SyncPrefectClient, preset: Path
) -> None:
    settings = stack.home / "unbroken.toml"  # the reaper looks there
    settings.write_text(f'[watch]\npresets = ["{preset}"]\n')
    try:
        first = wait_until(lambda: _versions(stack), what="a first model version")
        add_file(preset)
        both = wait_until(lambda: _versions(stack) - first, what="one of the new data") | first
        assert len(both) == 2
        wait_until(lambda: _states(client) == ["COMPLETED"] * 2, what="both flow runs to end")
        (preset.parent / "raw/more0.jsonl").unlink()
        wait_until(lambda: _states(client) == ["COMPLETED"] * 3, what="one of the data that was there before")
    finally:
        settings.unlink()
    receipts = [entry.modified for entry in stack.store.list_entries("datasets/arms/")]
    begun_anew = Sources(client)
    for _ in range(3):
        begun_anew.look([str(preset)])
    assert _states(client) == ["COMPLETED"] * 3, "a flow run of the same listing"
    assert _versions(stack) == both
    assert [entry.modified for entry in stack.store.list_entries("datasets/arms/")] == receipts


def test_source_is_left_alone_while_it_changes_and_a_wrong_preset_hides_no_other(
    stack: Stack, preset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[str] = []
    monkeypatch.setattr(Sources, "_start", lambda self, preset, listing: started.append(listing))
    watched = Sources(client=None)  # type: ignore[arg-type]  # asked for nothing
    with caplog.at_level(logging.WARNING, logger=sources.__name__):
        for number in range(3):
            watched.look(["no-such-preset", str(preset)])
            add_file(preset, number)
            assert started == []
        for _ in range(3):
            watched.look(["no-such-preset", str(preset)])
    assert started == [sources.listing_digest(str(preset))]
    assert len([message for message in caplog.messages if "no-such-preset" in message]) == 1, "told once"


def add_file(preset: Path, number: int = 0) -> None:
    lines = (preset.parent / "raw/0.jsonl").read_text().splitlines()[:60]
    (preset.parent / f"raw/more{number}.jsonl").write_text("\n".join(reversed(lines)) + "\n")


def _versions(stack: Stack) -> set[str]:
    """The dataset digest of each model version."""
    found = connect(stack.settings.mlflow_uri).search_model_versions("name = 'arms'")
    digests = [version.tags[DATASET_TAG] for version in found]
    assert len(digests) == len(set(digests)), "two versions of one dataset"
    return set(digests)


def _states(client: SyncPrefectClient) -> list[str]:
    ours = FlowRunFilter(tags=FlowRunFilterTags(all_=[NEW_DATA_TAG]))
    return [run.state_type.value for run in client.read_flow_runs(flow_run_filter=ours) if run.state_type]
