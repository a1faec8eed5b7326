"""The preset: every mistake is found before anything starts, and its message names the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import LaunchConfig, ParallelConfig, Preset
from training.documents import canonical_json, parse
from training.errors import UserError
from training.preset_file import PRESETS, has_built_in_recipe, load_preset, parse_override, preset_from_json
from training.recipe import load_recipe
from training.runs.job import Job
from training.s3.objectstore import StoreLocation

GOOD = """
name = "demo"
recipe = "demo:Demo"
[data]
name = "demo"
source = "raw"
format = "jsonl"
exclude = ["a", "b"]
[train]
steps = 10
batch_size = 16
[hyperparameters]
width = 3
sizes = [1, 2]
"""
SERVED = 'strategy = "parameter_server"'
STALE = f"batch_size = 16\n{SERVED}\nstaleness = 2"
SHARDED = "[parallel]\nshard = 2\n[launch]\n"
PIPELINED = SHARDED.replace("shard", "pipeline")


@pytest.fixture
def preset_file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(GOOD)
    return path


def load_with(path: Path, old: str, new: str) -> Preset:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return load_preset(str(path))


def test_a_good_preset(preset_file: Path) -> None:
    preset = load_preset(str(preset_file))
    assert (preset.name, preset.train.steps, preset.data.exclude) == ("demo", 10, ("a", "b"))
    assert preset.folder == str(preset_file.parent)
    assert preset.hyperparameters == {"width": 3, "sizes": [1, 2]}


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_built_in_preset_loads(name: str) -> None:
    assert load_preset(name).train.steps > 0


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_recipe_of_a_built_in_preset_is_looked_at_only_with_values_of_ones_own(name: str) -> None:
    assert has_built_in_recipe(load_preset(name, {"train.steps": 20}))
    load_recipe(load_preset(name))
    assert not has_built_in_recipe(load_preset(name, {"hyperparameters.learning_rate": 1.0}))


def test_there_are_built_in_presets() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} >= {"digits", "stdlib"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "stepz = 10", "unknown key 'train.stepz' (did you mean 'steps'?)"),
        ("[train]", "[trian]", "unknown key 'trian' (did you mean 'train'?)"),
        ("steps = 10", "qqqq = 10", "unknown key 'train.qqqq' (known: batch_size,"),
        ('name = "demo"\nrecipe', 'folder = "x"\nname = "demo"\nrecipe', "unknown key 'folder'"),
        ("steps = 10", 'steps = "ten"', "train.steps = 'ten': input should be a valid integer"),
        ("steps = 10", "steps = 10.5", "train.steps = 10.5: input should be a valid integer"),
        ("steps = 10", "steps = true", "train.steps = True: input should be a valid integer"),
        ("steps = 10", f"steps = {1 << 63}", "train.steps must fit into 64 bits"),
        (
            'format = "jsonl"',
            'format = "tfrecord"',
            "data.format = 'tfrecord': input should be 'files', 'folders', 'jsonl', 'csv', 'parquet' or 'webdataset'",
        ),
        ('exclude = ["a", "b"]', "exclude = [1]", "data.exclude"),
        ("steps = 10", "steps = 0", "train.steps must be at least 1"),
        ("steps = 10\n", "", "missing key: train.steps"),
        ("steps = 10\nbatch_size = 16\n", "", "missing keys: train.steps, train.batch_size"),
        ('recipe = "demo:Demo"\n', "", "missing key: recipe"),
        ('"demo:Demo"', '"demo.Demo"', 'recipe must read "module:Class"'),
        ("batch_size = 16", "batch_size = 20", "set train.batch_size to 16"),
        ("batch_size = 16", "batch_size = 21", "set train.batch_size to 24"),
        ("batch_size = 16", "batch_size = 0", "set train.batch_size to 8"),
        ("batch_size = 16", "batch_size = -8", "set train.batch_size to 8"),
        ('name = "demo"\nsource', 'name = "a/b"\nsource', "data.name = 'a/b' must be 1 to 64 letters"),
        ('name = "demo"\nrecipe', 'name = ""\nrecipe', "name = '' must be 1 to 64 letters"),
        ("[data]", "seed = -1\n[data]", "seed must lie between 0 and 2^63"),
        ("[data]", "[launch]\nnodes = 9\n[data]", "launch.nodes gives 9 ranks, more than train.virtual_workers = 8"),
        ("batch_size = 16", "batch_size = 16\nstaleness = -1", "train.staleness must not be negative"),
        ("batch_size = 16", "batch_size = 16\nstaleness = 2", "train.staleness = 2 needs train.strategy = 'parameter_"),
        ("batch_size = 16", STALE, "launch.server_replicas must be 1 with train.staleness"),
        (
            "batch_size = 16",
            f"{STALE}\n[launch]\nserver_replicas = 1\nserver_nodes = 1",
            "launch.server_nodes must be 0 with train.staleness",
        ),
        ("[data]", "[parallel]\nshard = 0\n[data]", "parallel.shard must be at least 1"),
        ("[data]", "[parallel]\ncopy_every_steps = 2\n[data]", "copy_every_steps = 2 is for a state in shards"),
        ("[data]", "[parallel]\nshards = 2\n[data]", "unknown key 'parallel.shards' (did you mean 'shard'?)"),
        ("[data]", "[parallel]\nshard = 3\n[data]", "parallel.shard = 3 does not divide launch.nodes × launch.process"),
        ("[data]", f"{SHARDED}nodes = 10\n[data]", "launch.nodes gives 10 ranks, more than train.virtual_workers = 8"),
        ("[data]", f"{SHARDED}keep_spares = true\n[data]", "parallel.shard = 2 needs launch.keep_spares = false"),
        ("batch_size = 16", f'batch_size = 16\nmode = "fast"\n{SHARDED}', "shard = 2 needs train.mode = 'exact'"),
        ("batch_size = 16", f"batch_size = 16\n{SERVED}\n{SHARDED}", "shard = 2 needs train.strategy = 'all_reduce'"),
        ("[data]", "[parallel]\npipeline = 0\n[data]", "parallel.pipeline must be at least 1"),
        ("[data]", "[parallel]\npipeline = 3\n[data]", "parallel.pipeline = 3 does not divide launch.nodes × launch.p"),
        ("[data]", "[parallel]\npipeline = 2\nshard = 2\n[data]", "pipeline = 2 does not go with parallel.shard = 2"),
        (
            "[data]",
            f"{PIPELINED}nodes = 10\n[data]",
            "launch.nodes gives 10 ranks, more than train.virtual_workers = 8",
        ),
        ("[data]", f"{PIPELINED}keep_spares = true\n[data]", "parallel.pipeline = 2 needs launch.keep_spares = false"),
        ("batch_size = 16", f'batch_size = 16\nmode = "fast"\n{PIPELINED}', "pipeline = 2 needs train.mode = 'exact'"),
        ("batch_size = 16", f"batch_size = 16\n{SERVED}\n{PIPELINED}", "line = 2 needs train.strategy = 'all_reduce'"),
        (
            "batch_size = 16",
            "batch_size = 16\n[launch]\nnodes = 3\n[parallel]\npipeline = 3\nschedule = 'interleaved'",
            "'interleaved' needs train.virtual_workers as a multiple of parallel.pipeline = 3, and it is 8",
        ),
        ("[data]", "[parallel]\nschedule = '2f2b'\n[data]", "parallel.schedule"),
        ("[data]", "[parallel]\ntensor = 0\n[data]", "parallel.tensor must be at least 1"),
        ("[data]", "[parallel]\ntensor = 3\n[data]", "parallel.tensor = 3 does not divide launch.nodes × launch.proce"),
        ("[data]", "[parallel]\ntensor = 2\nshard = 2\n[data]", "tensor = 2 does not go with parallel.shard = 2"),
        (
            "[data]",
            "[launch]\nnodes = 6\n[parallel]\ntensor = 2\npipeline = 2\n[data]",
            "parallel.pipeline × parallel.tensor = 2 × 2 does not divide launch.nodes × launch.processes_per_node = 6",
        ),
        (
            "[data]",
            "[launch]\nnodes = 4\nkeep_spares = true\n[parallel]\ntensor = 2\npipeline = 2\n[data]",
            "parallel.pipeline × parallel.tensor = 2 × 2 needs launch.keep_spares = false",
        ),
        ("[data]", "[parallel]\nsequences = 'cut'\n[data]", "parallel.sequences"),
        (
            "[data]",
            "[launch]\nnodes = 18\n[parallel]\ntensor = 2\n[data]",
            "gives 18 ranks, more than train.virtual_workers = 8 × parallel.tensor = 2",
        ),
        ("[data]", "[data", "not valid TOML"),
        (
            "[hyperparameters]\nwidth = 3\nsizes = [1, 2]",
            "[evaluate]\nconfidence = 1.5",
            "evaluate.confidence must lie",
        ),
    ],
)
def test_a_mistake_is_named(preset_file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_with(preset_file, old, new)
    assert str(caught.value).startswith(f"{preset_file}: ")
    assert message in str(caught.value)


def test_the_suggested_batch_size_is_accepted(preset_file: Path) -> None:
    assert load_with(preset_file, "batch_size = 16", "batch_size = 24").train.batch_size == 24


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no preset 'digitz'.*did you mean 'digits'"):
        load_preset("digitz")


def test_overrides(preset_file: Path) -> None:
    preset = load_preset(
        str(preset_file),
        {"train.steps": 20, "launch.nodes": 3, "hyperparameters.width": 9, "seed": 5, "evaluate.confidence": 0.9},
    )
    assert (preset.train.steps, preset.launch.nodes, preset.seed) == (20, 3, 5)
    assert preset.hyperparameters["width"] == 9
    assert preset.evaluate.confidence == 0.9


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stepz", 1, "did you mean 'steps'"),
        ("train.steps.x", 1, "cannot set 'train.steps.x': 'steps' is not a table"),
        ("train", 5, "train must be a table"),
        ("train.steps", "many", "train.steps = 'many'"),
        ("folder", "/", "unknown key 'folder'"),
    ],
)
def test_a_wrong_override_is_named(preset_file: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_preset(str(preset_file), {key: value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=20", ("train.steps", 20)),
        ("a=1.5", ("a", 1.5)),
        ("a=true", ("a", True)),
        ('a="5"', ("a", "5")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("data.source=s3://bucket/raw", ("data.source", "s3://bucket/raw")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
    ],
)
def test_parse_override(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["train.steps", "=5", ""])
def test_parse_override_refuses(text: str) -> None:
    with pytest.raises(UserError, match="must read key=value"):
        parse_override(text)


def test_json_round_trips(preset_file: Path) -> None:
    preset = load_preset(str(preset_file), {"train.clip_norm": 1.0, "data.test_percent": 25})
    document = json.loads(canonical_json(preset.to_json()))
    assert parse(Preset, document) == preset
    assert preset_from_json(document) == preset


def test_a_job_round_trips(preset_file: Path) -> None:
    job = Job(
        key="k",
        generation=2,
        preset=load_preset(str(preset_file)),
        dataset_digest="d",
        location=StoreLocation(endpoint=None, bucket="b", prefix="p/"),
    )
    assert Job.from_json(json.loads(canonical_json(job.to_json()))) == job


def test_what_determines_the_result(preset_file: Path) -> None:
    base = load_preset(str(preset_file)).determining()

    def changed(key: str, value: object) -> bool:
        return load_preset(str(preset_file), {key: value}).determining() != base

    same: dict[str, object] = {
        "train.checkpoint_every_steps": 1,
        "train.keep_checkpoints": 1,
        "launch.nodes": 1,
        "launch.max_restarts": 0,
        "parallel.shard": 2,
        "parallel.pipeline": 2,
        "parallel.schedule": "gpipe",
        "parallel.sequences": "whole",
        "evaluate.confidence": 0.9,
        "name": "other",
    }
    other: dict[str, object] = {
        "train.steps": 11,
        "train.batch_size": 32,
        "train.virtual_workers": 4,
        "train.clip_norm": 0.5,
        "seed": 1,
        "hyperparameters.width": 4,
        "parallel.tensor": 2,
    }
    assert {key: changed(key, value) for key, value in same.items()} == dict.fromkeys(same, False)
    assert {key: changed(key, value) for key, value in other.items()} == dict.fromkeys(other, True)


def test_a_group_that_lost_ranks_goes_on_in_what_divides_them(preset_file: Path) -> None:
    train = load_preset(str(preset_file)).train  # of eight virtual workers
    interleaved = ParallelConfig(pipeline=4, schedule="interleaved")
    assert [interleaved.on(num_ranks, train) for num_ranks in (8, 7, 3, 2)] == [
        interleaved,
        ParallelConfig(),
        ParallelConfig(pipeline=3),
        ParallelConfig(pipeline=2, schedule="interleaved"),
    ]
    assert ParallelConfig(shard=2).on(3, train) == ParallelConfig()
    assert ParallelConfig(shard=2).is_spread
    assert not ParallelConfig().is_spread
    pair = ParallelConfig(tensor=2, sequences="whole")
    assert (pair.on(4, train), pair.is_spread) == (pair, True)
    with pytest.raises(UserError, match=r"3 are no multiple of 2: change launch\.nodes or"):
        pair.on(3, train)
    both = replace(pair, pipeline=2, schedule="interleaved")
    assert [both.on(num_ranks, train) for num_ranks in (8, 6)] == [both, replace(pair, schedule="1f1b")]
    with pytest.raises(UserError, match=r"5 are no multiple of 2"):
        both.on(5, train)


def test_a_group_has_whole_replicas_of_matrices_in_parts() -> None:
    def nodes(tensor: int, processes_per_node: int) -> int:
        launch = LaunchConfig(nodes=12, processes_per_node=processes_per_node)
        return ParallelConfig(tensor=tensor).nodes_per_replica(launch)

    assert [nodes(1, 3), nodes(2, 1), nodes(4, 2), nodes(2, 4), nodes(4, 6)] == [1, 2, 2, 1, 2]


def test_a_whole_number_for_a_fraction_is_the_same_preset(preset_file: Path) -> None:
    one, same = (canonical_json(load_preset(str(preset_file), {"train.clip_norm": v}).determining()) for v in (1, 1.0))
    assert one == same


@pytest.mark.parametrize("value", ["1979-05-27", "inf", "[nan]", "{a=" * 150 + "1" + "}" * 150])
def test_hyperparameters_are_what_a_job_can_say(preset_file: Path, value: str) -> None:
    with pytest.raises(
        UserError, match=r"demo\.toml: .*(hyperparameters must be numbers, texts|it is deeper than 100 levels)"
    ):
        load_with(preset_file, "width = 3", f"width = {value}")


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "[" * 150 + "]" * 150])
def test_an_override_that_is_no_toml_is_a_text(value: str) -> None:
    assert parse_override(f"a={value}") == ("a", value)


def test_a_preset_that_is_too_deep_is_named(preset_file: Path) -> None:
    with pytest.raises(UserError, match=r"demo\.toml: not valid TOML"):
        load_with(preset_file, "width = 3", f"width = {'[' * 5000}")
