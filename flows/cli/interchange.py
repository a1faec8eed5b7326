"""`models predict | export`: what a registered model says of a dataset; its weights, for others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from flows.cli.lineage import Version
from flows.cli.output import print_json
from flows.cli.stack import Json, open_store


def add_to(models: App) -> None:
    for verb in (predict, export):
        models.command(verb)


def predict(
    model: Version,
    /,
    *,
    data: Annotated[str, Parameter(help="A dataset's name (its newest version), or NAME@DIGEST.")],
    processes: Annotated[
        int, Parameter(help="That share the shards; the predictions are the same for any number.")
    ] = 2,
    json: Json = False,
) -> None:
    """Predict every sample of a dataset version: one Parquet object per shard, and last a manifest of all.

    Ctrl-C stops it. Run again, here or on several machines at once, it does what is missing.
    """
    import logging

    store = open_store()
    from tasks.predict import predict as predict_stage
    from tasks.prediction.wanted import find_wanted
    from tasks.stack import open_stack

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    wanted = find_wanted(open_stack()[0], store, model, data)
    done = predict_stage.fn(wanted, processes=processes)
    if json:
        print_json(asdict(done))
        return
    found = f", {done.num_shards_found} of them found done" if done.num_shards_found else ""
    print(f"{done.model} version {done.version} on {done.dataset} {done.dataset_digest[:12]}")
    print(f"{done.num_samples} predictions in {done.num_shards} shards{found}")
    print(done.manifest)


def export(
    model: Version,
    /,
    *,
    to: Annotated[Path, Parameter(help="A file, NAME.safetensors.")],
    force: Annotated[bool, Parameter(negative="", help="Although the file exists.")] = False,
    json: Json = False,
) -> None:
    """Write a version's weights as one safetensors file, once they are shown to give what the registered file gives.

    `model.load_state_dict(safetensors.torch.load_file(FILE))`
    """
    store = open_store()
    from tasks.lifecycle.interchange import export_weights, require_free
    from tasks.lineage.named import find_kept
    from tasks.stack import open_stack

    require_free(to, force=force)
    about = export_weights(store, find_kept(open_stack()[0], store, model), to, force=force)
    if json:
        print_json({"file": str(to), **about})
        return
    print(f"{about['model']} version {about['version']} is in {to}; outputs: {about['outputs']}")
