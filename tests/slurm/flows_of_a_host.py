"""`python -m tests.slurm.flows_of_a_host FOLDER NAME…`: processes that train FOLDER/preset.json as flows do.

Forked from one that has imported all. NAME begins when FOLDER/NAME.start is there, for the owner that this names,
writes FOLDER/NAME.log, and leaves its model in FOLDER/NAME.json. At the end their exit codes are printed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlflow  # noqa: F401  # imported once, for all

from tasks.results import Dataset, TrainedModel
from tasks.train import train
from tests.waiting import wait_until
from training.config import Preset
from training.errors import InfrastructureError
from training.preset_file import preset_from_json
from training.recipe import load_recipe

NUM_RETRIES = 3


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    preset = preset_from_json(json.loads((folder / "preset.json").read_text()))
    dataset = Dataset(**json.loads((folder / "dataset.json").read_text()))
    load_recipe(preset)
    fork = multiprocessing.get_context("fork")
    flows = {name: fork.Process(target=_flow, args=(folder, name, preset, dataset)) for name in names}
    for name, process in flows.items():
        process.start()
        (folder / f"{name}.pid").write_text(str(process.pid))
    for process in flows.values():
        process.join()
    print(json.dumps({name: process.exitcode for name, process in flows.items()}))


def _flow(folder: Path, name: str, preset: Preset, dataset: Dataset) -> None:
    logging.basicConfig(filename=folder / f"{name}.log", level=logging.INFO, force=True)  # libraries have set it up
    start = folder / f"{name}.start"
    owner = wait_until(lambda: start.exists() and start.read_text(), what="a start")
    model = _tried_again(lambda: train.fn(preset, dataset, owner=str(owner)))
    (folder / f"{name}.json").write_text(json.dumps(asdict(model)))


def _tried_again(stage: Callable[[], TrainedModel]) -> TrainedModel:
    """As Prefect does: so many ask Slurm's controller at once that one may not be answered in time."""
    for _ in range(NUM_RETRIES):
        try:
            return stage()
        except InfrastructureError as error:
            logging.warning("it is tried again: %s", error)
    return stage()


if __name__ == "__main__":
    main()
