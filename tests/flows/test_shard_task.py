"""What the shard stage's cache takes for the same work."""

from __future__ import annotations

import uuid
from pathlib import Path

from tasks.shard import shard, shard_cache_key
from tests.conftest import Stack
from tests.unit.data_source import data_config, write_csv
from training.config import Preset, TrainConfig
from training.data.activity import distrust
from training.data.versions import remove_version, versions
from training.data.withdraw import withdraw


def test_what_was_removed_withdrawn_or_damaged_is_not_taken_for_finished(stack: Stack, tmp_path: Path) -> None:
    write_csv(tmp_path / "raw/0.csv", range(100))
    preset = Preset(
        name="tiny",
        recipe="tests.unit.tiny:Tiny",
        data=data_config(name=f"d{uuid.uuid4().hex[:12]}"),
        train=TrainConfig(steps=1, batch_size=8),
        folder=str(tmp_path),
    )
    name = preset.data.name

    def key() -> str:
        return shard_cache_key(None, {"preset": preset})

    fresh = key()
    digest = shard.fn(preset).digest
    assert key() == fresh, "sharding alone changes nothing"
    distrust(stack.store, name)
    damaged = key()
    withdraw(stack.store, name, digest, ["0.csv:5"])
    withdrawn = key()
    remove_version(stack.store, name, digest)
    assert digest not in versions(stack.store, name)
    assert len({fresh, damaged, withdrawn, key()}) == 4
