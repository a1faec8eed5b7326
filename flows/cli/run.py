"""`run` and `train`: start work, follow it, and say where everything is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from flows.cli.output import print_json
from flows.cli.stack import Json
from training.config import Preset
from training.errors import UserError
from training.preset_file import has_built_in_recipe, load_preset, parse_override

if TYPE_CHECKING:
    from tasks.results import Dataset, TrainedModel

Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="A preset value to change, as in train.steps=20. May be repeated."),
]
Fresh = Annotated[bool, Parameter(negative="", help="Train again from step 0, although this run is finished or begun.")]
Quarantine = Annotated[
    bool,
    Parameter(
        negative="",
        help="Go on without records that make the training fail: they are withdrawn, launch.max_quarantined at most.",
    ),
]
Queue = Annotated[
    Literal["urgent", "default", "background"],
    Parameter(help="Where it waits for its turn, if as many runs as may are under way."),
]


def add_to(app: App) -> None:
    for verb in (run, train):
        app.command(verb)


def run(
    preset: str,
    *,
    set_: Set = None,
    fresh: Fresh = False,
    quarantine: Quarantine = False,
    queue: Queue = "default",
    json: Json = False,
) -> None:
    """Run the whole pipeline for PRESET (a name, or a TOML file) as a Prefect deployment, and follow it.

    Ctrl-C cancels the run. If this command is killed, the run goes on.
    """
    overrides = overrides_of(set_)
    config = load_preset(preset, overrides)
    check_input(config)
    from flows.cli.follow import follow_deployment

    where = f"{config.folder}/{preset.rpartition('/')[2]}" if preset.endswith(".toml") else preset
    parameters = {"preset": where, "overrides": overrides, "fresh": fresh, "quarantine": quarantine}
    result = follow_deployment(config, parameters, queue=queue, quiet=json)
    if json:
        print_json(result)


def train(
    preset: str,
    *,
    ranks: Annotated[int | None, Parameter(help="Train with so many processes of this machine.")] = None,
    steps: Annotated[int | None, Parameter(help="The same as --set train.steps=STEPS.")] = None,
    set_: Set = None,
    resume: Annotated[bool, Parameter(negative="", help="Only go on with a run that was begun.")] = False,
    fresh: Fresh = False,
    quarantine: Quarantine = False,
    json: Json = False,
) -> None:
    """Shard and train PRESET alone, without Prefect. A run that was begun goes on, on any number of ranks.

    Ctrl-C cancels the training. If this command is killed, the training goes on.
    """
    import logging
    import uuid

    if resume and (fresh or quarantine):
        other = "--fresh" if fresh else "--quarantine"
        raise UserError(f"--resume goes on with a run, and {other} begins another: give one of them")
    config = load_preset(preset, _overrides(_shortcuts(ranks, steps), overrides_of(set_)))
    check_input(config)
    from tasks.initial import pinned
    from tasks.opening import identify, require_begun
    from tasks.quarantine import trained
    from tasks.shard import shard as shard_stage
    from tasks.stack import open_stack
    from tasks.train import train as train_stage

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.WARNING if json else logging.INFO)
    settings, store = open_stack()
    config = pinned(settings, config)
    mark = uuid.uuid4().hex if fresh else None

    def train_it(dataset: Dataset) -> TrainedModel:
        if resume:
            require_begun(store, identify(config, dataset))
        return train_stage.fn(config, dataset, fresh=mark)

    _, model = trained(config, shard=lambda: shard_stage.fn(config), train=train_it, quarantine=quarantine)
    shown = {**asdict(model), "num_samples": model.step * config.train.batch_size}
    if json:
        print_json(shown)
        return
    for name, value in shown.items():
        print(f"{name:15} {value}")


def _shortcuts(ranks: int | None, steps: int | None) -> dict[str, Any]:
    """Raises `UserError` for a number that makes no sense."""
    for name, number in (("--ranks", ranks), ("--steps", steps)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: must be at least 1")
    found = {"launch.nodes": 1, "launch.processes_per_node": ranks} if ranks is not None else {}
    return {**found, **({"train.steps": steps} if steps is not None else {})}


def _overrides(shortcuts: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Both. Raises `UserError` for what is given twice."""
    for key in shortcuts.keys() & overrides.keys():
        option = "--steps" if key == "train.steps" else "--ranks"
        raise UserError(f"--set {key} and {option} say the same: give one of them")
    return {**shortcuts, **overrides}


def check_input(preset: Preset) -> None:
    """Everything that can be known to be wrong before anything is launched. Raises `UserError`."""
    import shutil

    from infra.local.stack import require_free_disk
    from infra.store import store_location
    from tasks.stack import open_stack
    from training.data.source import open_source, partitions
    from training.recipe import load_recipe

    settings, store = open_stack()
    if settings.s3_is_local:
        require_free_disk(shutil.disk_usage(settings.home).free, settings.home)
    partitions(open_source(preset.data, folder=preset.folder, location=store_location(settings)), preset.data)
    if not has_built_in_recipe(preset):  # to import that too, and torch with it, takes seconds
        load_recipe(preset)
    store.require_bucket()


def overrides_of(texts: list[str] | None) -> dict[str, Any]:
    """`["a.b=1"]` → `{"a.b": 1}`. Raises `UserError` for a key given twice."""
    pairs = [parse_override(text) for text in texts or ()]
    for key, _ in pairs:
        if sum(key == other for other, _ in pairs) > 1:
            raise UserError(f"--set {key} is given more than once")
    return dict(pairs)
