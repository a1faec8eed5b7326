"""`run` and `train`: start work, follow it, and say where everything is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import App, Parameter

from flows.cli.output import print_json
from flows.cli.stack import Json
from training.config import Preset, load_preset, parse_override
from training.errors import UserError

Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="A preset value to change, as in train.steps=20. May be repeated."),
]
Fresh = Annotated[bool, Parameter(negative="", help="Train again from step 0, although this run is finished or begun.")]


def add_to(app: App) -> None:
    for verb in (run, train):
        app.command(verb)


def run(preset: str, *, set_: Set = None, fresh: Fresh = False, json: Json = False) -> None:
    """Run the whole pipeline for PRESET (a name, or a TOML file) as a Prefect deployment, and follow it.

    Ctrl-C cancels the run. If this command is killed, the run goes on.
    """
    overrides = overrides_of(set_)
    config = load_preset(preset, overrides)
    check_input(config)
    from flows.cli.follow import follow_deployment

    where = f"{config.folder}/{preset.rpartition('/')[2]}" if preset.endswith(".toml") else preset
    result = follow_deployment(config, preset=where, overrides=overrides, fresh=fresh, quiet=json)
    if json:
        print_json(result)


def train(preset: str, *, set_: Set = None, fresh: Fresh = False, json: Json = False) -> None:
    """Shard and train PRESET alone, without Prefect.

    Ctrl-C cancels the training. If this command is killed, the training goes on.
    """
    import logging
    import uuid

    config = load_preset(preset, overrides_of(set_))
    check_input(config)
    from tasks.shard import shard as shard_stage
    from tasks.train import train as train_stage

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.WARNING if json else logging.INFO)
    dataset = shard_stage.fn(config)
    model = train_stage.fn(config, dataset, fresh=uuid.uuid4().hex if fresh else None)
    if json:
        print_json(asdict(model))
    else:
        for name, value in asdict(model).items():
            print(f"{name:15} {value}")


def check_input(preset: Preset) -> None:
    """Everything that can be known to be wrong before anything is launched. Raises `UserError`."""
    import shutil

    from infra.local.stack import require_free_disk
    from tasks.stack import open_stack, store_location
    from training.data.source import open_source, partitions
    from training.recipe import load_recipe

    settings, store = open_stack()
    if settings.s3_is_local:
        require_free_disk(shutil.disk_usage(settings.home).free, settings.home)
    partitions(open_source(preset.data, folder=preset.folder, location=store_location(settings)), preset.data)
    load_recipe(preset)
    store.require_bucket()


def overrides_of(texts: list[str] | None) -> dict[str, Any]:
    """`["a.b=1"]` → `{"a.b": 1}`. Raises `UserError` for a key given twice."""
    pairs = [parse_override(text) for text in texts or ()]
    for key, _ in pairs:
        if sum(key == other for other, _ in pairs) > 1:
            raise UserError(f"--set {key} is given more than once")
    return dict(pairs)
