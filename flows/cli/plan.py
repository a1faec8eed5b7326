"""`plan`: what each layout of a model over so many ranks costs, before anything starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from flows.cli.output import print_json, print_table
from flows.cli.run import Set, overrides_of
from flows.cli.stack import Json
from training.config import Preset
from training.errors import UserError
from training.preset_file import load_preset

if TYPE_CHECKING:
    from training.layout import Layout
    from training.parallel.plan import Cost
    from training.recipe import Recipe, Sample
    from training.s3.objectstore import StoreLocation


def add_to(app: App) -> None:
    app.command(plan)


def plan(
    preset: str,
    *,
    nodes: Annotated[int | None, Parameter(help="Else the preset's launch.nodes.")] = None,
    memory: Annotated[
        int | None, Parameter(help="Bytes that a rank may take; else its share of launch.memory_bytes_per_node.")
    ] = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Show what each layout of PRESET costs a rank (memory, bytes sent, waiting), and which to take. Starts nothing."""
    config = load_preset(preset, overrides_of(set_))
    num_nodes = _positive("--nodes", nodes, config.launch.nodes)
    num_ranks = num_nodes * config.launch.processes_per_node
    maybe_memory = _positive(
        "--memory", memory, config.launch.memory_bytes_per_node // config.launch.processes_per_node
    )
    from training.parallel.measure import measure
    from training.parallel.plan import costs, recommended
    from training.recipe import load_recipe

    recipe = load_recipe(config)
    train = config.train
    model = measure(
        recipe,
        _one_sample(config, recipe),
        batch_size=train.batch_size // train.virtual_workers,
        precision=train.precision,
    )
    found = costs(model, num_ranks=num_ranks, virtual_workers=train.virtual_workers)
    if not found:
        raise UserError(
            f"{num_ranks} ranks: none of their layouts has a virtual worker for each, and blocks to cut between: raise"
            f" train.virtual_workers = {train.virtual_workers}, or take fewer nodes"
        )
    best = recommended(found, memory_bytes=maybe_memory or None)
    if json:
        rows = [{**asdict(one), "memory_bytes": one.memory_bytes, "recommended": one is best} for one in found]
        print_json({"ranks": num_ranks, "weight_bytes": model.weight_bytes, "layouts": rows})
        return
    has_whole_sequences = best.layout.tensor in model.whole_sequences
    _print(found, best, maybe_memory)
    print(advice(best.layout, best.schedule, num_nodes, has_whole_sequences=has_whole_sequences))


def _positive(name: str, maybe_given: int | None, otherwise: int) -> int:
    if maybe_given is not None and maybe_given < 1:
        raise UserError(f"{name} {maybe_given}: must be at least 1")
    return otherwise if maybe_given is None else maybe_given


def _one_sample(preset: Preset, recipe: Recipe) -> Sample:
    """The first of the source, decoded. Raises `UserError` if there is none."""
    from training.data.builder import encoded
    from training.data.source import classes_of, open_source, partitions, read_records
    from training.recipe import Table

    source = open_source(preset.data, folder=preset.folder, location=_location(preset))
    parts = partitions(source, preset.data)
    classes = classes_of(parts) if preset.data.format == "folders" else ()
    for part in parts:
        for record in read_records(source, part, preset.data, classes):
            for given in encoded(recipe, record):
                if not isinstance(given, Table):
                    return recipe.decode(given, None)
                if len(given):
                    return recipe.decode(given.row(0), None)
    raise UserError(f"data.source = {preset.data.source!r}: the recipe makes no sample of any of its records")


def _location(preset: Preset) -> StoreLocation:
    """Of raw data in S3; for what lies on this machine nobody asks."""
    from training.s3.objectstore import StoreLocation

    if not preset.data.source.startswith("s3://"):
        return StoreLocation(endpoint=None, bucket="")
    from infra.store import store_location
    from tasks.stack import open_stack

    settings, _ = open_stack()
    return store_location(settings)


def _print(found: list[Cost], best: Cost, memory_bytes: int) -> None:
    rows = [
        [
            "→" if one is best else "",
            one.layout,
            one.schedule or "-",
            *(
                _mebibytes(number)
                for number in (
                    one.memory_bytes,
                    one.weight_bytes,
                    one.gradient_bytes,
                    one.optimizer_bytes,
                    one.activation_bytes,
                    one.sent_bytes,
                )
            ),
            f"{one.bubble:.1%}",
        ]
        for one in found
    ]
    print_table(
        ["", "layout", "schedule", "MiB", "weights", "gradients", "optimizer", "activations", "sent a step", "bubble"],
        rows,
    )
    if not memory_bytes:
        print("Nobody says how much memory a rank has: --memory BYTES, or launch.memory_bytes_per_node.")
    elif best.memory_bytes > memory_bytes:
        print(f"None fits into {_mebibytes(memory_bytes)} MiB: take more nodes, or more virtual workers.")


def advice(layout: Layout, maybe_schedule: str | None, num_nodes: int, *, has_whole_sequences: bool = False) -> str:
    """What to write into the preset."""
    if layout.shard > 1 and layout.pipeline * layout.tensor > 1:
        return (
            "`unbroken run` trains in replicas of shards alone so far, or of stages, of parts of matrices, or of"
            " both: docs/parallelism.md."
        )
    lines = []
    if layout.shard > 1:
        lines += [f"shard = {layout.shard}"]
    if layout.pipeline > 1:
        lines += [f"pipeline = {layout.pipeline}", f'schedule = "{maybe_schedule}"']
    if layout.tensor > 1:
        lines += [f"tensor = {layout.tensor}", *(['sequences = "whole"'] if has_whole_sequences else [])]
    parallel = "\n".join(["\n\n[parallel]", *lines]) if lines else ""
    return f"For the preset:\n\n[launch]\nnodes = {num_nodes}{parallel}"


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f}"
