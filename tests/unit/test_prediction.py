"""What predictions are called, what is found of them, and what is refused before it is computed."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tasks.lifecycle.interchange import EQUAL, _require_same, _Sample, _written, require_free
from tasks.prediction.inputs import _require_fit
from tasks.prediction.kept import Found, find_shards, predictions_prefix, shard_key, whole_shards
from tasks.prediction.sharing import _turned
from tasks.prediction.table import ABOUT, to_parquet
from tasks.prediction.wanted import preset_of
from tests.unit.champions import keep
from training.documents import sha256_hex
from training.errors import InfrastructureError, UserError
from training.preset_file import load_preset
from training.recipe import load_recipe
from training.runs.identity import keep_identity
from training.runs.job import Job, store_job
from training.runs.record import run_key
from training.s3.objectstore import Store

PREFIX = predictions_prefix("m", model_sha256="a" * 64, dataset_digest="b" * 64)
ONE, OTHER = "1" * 64, "2" * 64


def test_same_predictions_are_the_same_bytes_and_tell_their_shape() -> None:
    outputs = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    data = to_parquet(["x", "y"], outputs, {"shard": ONE})
    assert data == to_parquet(["x", "y"], outputs.copy(), {"shard": ONE})
    table = pq.read_table(io.BytesIO(data))
    assert json.loads(table.schema.metadata[ABOUT]) == {"shard": ONE, "shape": [3, 2]}
    assert np.array_equal(np.stack(table["prediction"].to_numpy()).reshape(2, 3, 2), outputs)
    numbers = pq.read_table(io.BytesIO(to_parquet(["x"], np.array([7], dtype=np.int64), {})))
    assert numbers.to_pylist() == [{"id": "x", "prediction": 7}]


def test_where_they_lie_is_a_function_of_model_and_data() -> None:
    assert predictions_prefix("m", model_sha256="a" * 64, dataset_digest="b" * 64) == PREFIX
    assert predictions_prefix("m", model_sha256="c" * 64, dataset_digest="b" * 64) != PREFIX
    assert predictions_prefix("m", model_sha256="a" * 64, dataset_digest="c" * 64) != PREFIX


def test_finished_shards_are_found_by_name_and_a_damaged_one_is_made_again(store: Store) -> None:
    keys = {shard: shard_key(PREFIX, shard, sha256_hex(shard.encode())) for shard in (ONE, OTHER)}
    for shard, key in keys.items():
        store.put(key, shard.encode())
    store.put(f"{PREFIX}shards/notes.txt", b"")
    store.put(shard_key(PREFIX, ONE, "f" * 64), b"of another kind of machine")
    assert find_shards(store, PREFIX)[ONE] == Found(sha256=sha256_hex(ONE.encode()), num_bytes=64)
    assert find_shards(store, PREFIX).keys() == {ONE, OTHER}
    assert find_shards(store, PREFIX, OTHER).keys() == {OTHER}
    store.put(keys[OTHER], b"damaged")
    assert whole_shards(store, PREFIX).keys() == {ONE}
    assert not store.exists(keys[OTHER])


def test_of_many_at_once_one_writes(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: store.create_immutable("an-object", b"the same"), range(8)))
    assert sorted(written) == [False] * 7 + [True]
    store.put("an-object", b"damaged")
    assert store.create_immutable("an-object", b"the same")
    assert store.get("an-object") == b"the same"


def test_each_shard_is_dealt_out_once_wherever_one_begins() -> None:
    shards: Any = [1, 2, 3, 4, 5]
    assert _turned(shards, 3) == [4, 5, 1, 2, 3]
    assert _turned(shards, 0) == shards


def test_version_whose_run_was_removed_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="its run run 1 was removed"):
        preset_of(store, keep(store, "m", "1"))


@pytest.mark.parametrize("has_identity", [True, False])
def test_recipe_that_changed_since_is_refused(store: Store, has_identity: bool) -> None:
    preset = load_preset("digits")
    run: Any = {"recipe": load_recipe(preset), "preset": preset, "dataset_digest": "d" * 64}
    key = run_key(**run)
    if has_identity:
        keep_identity(store, key, **run)
    store_job(store, Job(key=key, generation=0, preset=preset, dataset_digest="d" * 64, location=store.location))
    assert preset_of(store, keep(store, "m", "1", run_key=key)) == preset
    other: Any = {**run, "recipe": load_recipe(load_preset("stdlib"))}
    wrong = run_key(**other)
    if has_identity:
        keep_identity(store, wrong, **other)
    store_job(store, Job(key=wrong, generation=0, preset=preset, dataset_digest="d" * 64, location=store.location))
    with pytest.raises(UserError, match="is another one today"):
        preset_of(store, keep(store, "m", "2", run_key=wrong))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [(np.zeros((2, 1, 8, 8)), "float64"), (np.zeros((2, 64), np.float32), r"shape \[2, 64\]")],
)
def test_data_that_do_not_fit_the_signature_are_named(store: Store, inputs: np.ndarray[Any, Any], found: str) -> None:
    kept = keep(store, "m", "1")
    _require_fit(np.zeros((2, 1, 8, 8), np.float32), 2, "d", kept)
    with pytest.raises(UserError, match=f"dataset 'd' does not fit model 'm' version 1.*{found}"):
        _require_fit(inputs, 2, "d", kept)


# ---- weights in a file -----------------------------------------------------------------------------------------------


class _Linear:
    """What of a recipe is asked for here."""

    def __init__(self, size: int = 2) -> None:
        self._size = size

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(self._size, 1, bias=False)


def judge(outputs: list[list[float]], size: int = 2) -> str:
    sample = _Sample(inputs=np.ones((1, 2), np.float32), outputs=np.array(outputs, np.float32))
    recipe: Any = _Linear(size)
    return sample.judge(recipe, {"weight": torch.tensor([[1.0, 2.0]])})


def test_outputs_are_equal_or_within_the_bound_or_refused() -> None:
    assert judge([[3.0]]) == EQUAL
    assert judge([[3.00001]]).startswith("within")
    with pytest.raises(UserError, match="does not give what the registered model file gives"):
        judge([[3.001]])
    with pytest.raises(UserError, match="the weights do not fit the recipe's model"):
        judge([[3.0]], size=3)


def test_file_with_other_bytes_never_takes_its_place(tmp_path: Path) -> None:
    import safetensors.torch

    weights, about = {"w": torch.tensor([1.0, -0.0])}, {"version": "1"}
    content = safetensors.torch.save(weights, metadata=about)
    changed = safetensors.torch.save({"w": torch.tensor([1.0, 0.0])}, metadata=about)
    for wrong in (changed, content[:-1], safetensors.torch.save(weights, metadata={"version": "2"})):
        path = tmp_path / "weights.safetensors"
        with pytest.raises(InfrastructureError, match="read back"), _written(path, wrong, force=True) as written:
            _require_same(written, weights, about)
        assert not list(tmp_path.iterdir())
    with _written(path, content, force=False) as written:
        _require_same(written, weights, about)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, content)]


def test_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="exists"), _written(path, b"ours", force=False):
        path.write_bytes(b"another's")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, b"another's")]


def test_places_where_no_file_can_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a file in a folder that is there"):
        require_free(tmp_path / "no" / "file", force=True)
    with pytest.raises(UserError, match="is a folder"):
        require_free(tmp_path, force=True)
    with pytest.raises(InfrastructureError, match="cannot write"), _written(tmp_path / ("x" * 300), b"", force=True):
        pass
