"""`python -m tasks STAGE --preset P`: one stage without Prefect, as dvc.yaml calls it.

Each stage reads what the stages before it wrote into the output folder, and writes its own result there: documents
that hold no time, run id, version or attempt, so that a rerun locks the same bytes. They are written whole or not at
all: a stage whose `dvc repro` was killed lives on, beside that of the next one.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from cyclopts import App, Parameter

from infra.local.files import write_whole
from tasks.results import Dataset, Evaluation, TrainedModel
from tasks.stack import open_stack
from training.config import Preset, load_preset
from training.documents import parse
from training.errors import DamagedError, UnbrokenError, UserError

Result = TypeVar("Result")

app = App(name="python -m tasks", help="Run one stage of the pipeline.", version_flags=[])


@app.default
def run_stage(
    stage: Annotated[str, Parameter(help="shard, train, evaluate or register.")],
    *,
    preset: Annotated[str, Parameter(help="A built-in preset's name, or a TOML file.")],
    out: Annotated[Path, Parameter(help="Each stage leaves its result in OUT/NAME, where the next one looks.")] = Path(
        "data"
    ),
) -> None:
    """Run one stage of the pipeline, without Prefect: `python -m tasks shard --preset digits`."""
    if stage not in STAGES:
        raise UserError(f"no stage {stage!r}: the stages are {', '.join(STAGES)}")
    config = load_preset(preset)
    open_stack()  # before anything imports Prefect, which reads its settings then
    folder = out / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out = {str(out)!r}: cannot make {folder}: {error.strerror}") from error
    STAGES[stage](config, folder)


def _shard(preset: Preset, folder: Path) -> None:
    from tasks.shard import shard

    _write_json(folder / "dataset.json", asdict(shard.fn(preset)))


def _train(preset: Preset, folder: Path) -> None:
    from tasks.train import train
    from training.runs.history import committed_steps
    from training.runs.record import RunRecord

    model = train.fn(preset, _dataset(folder))
    _write_json(folder / "model.json", asdict(model))
    run = RunRecord(open_stack()[1], model.run_key)
    rows = [(event.step, event.values["loss"]) for event in committed_steps(run, run.read())]
    _write_csv(folder / "loss.csv", ("step", "loss"), rows)


def _evaluate(preset: Preset, folder: Path) -> None:
    from tasks.evaluate import evaluate

    result = evaluate.fn(preset, _dataset(folder), _model(folder))
    _write_json(folder / "evaluation.json", asdict(result))
    _write_json(folder / "metrics.json", {name: estimate.value for name, estimate in result.metrics.items()})
    counts = result.confusion or ()
    rows = [(label, guess) for label, row in enumerate(counts) for guess, n in enumerate(row) for _ in range(n)]
    _write_csv(folder / "confusion.csv", ("label", "predicted"), rows)


def _register(preset: Preset, folder: Path) -> None:
    from tasks.register import register

    evaluation = _read(folder / "evaluation.json", Evaluation)
    version = register.fn(preset, _dataset(folder), _model(folder), evaluation)
    fixed = {"name": version.name, "run_key": version.run_key, "weights_sha256": version.weights_sha256}
    _write_json(folder / "registration.json", fixed)


STAGES: dict[str, Callable[[Preset, Path], None]] = {
    "shard": _shard,
    "train": _train,
    "evaluate": _evaluate,
    "register": _register,
}


def _dataset(folder: Path) -> Dataset:
    return _read(folder / "dataset.json", Dataset)


def _model(folder: Path) -> TrainedModel:
    return _read(folder / "model.json", TrainedModel)


def _read(path: Path, kind: type[Result]) -> Result:
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage before this one first")
    try:
        return parse(kind, json.loads(path.read_text()))
    except (ValueError, DamagedError) as error:
        raise UserError(f"{path} is not what a stage leaves there: run the stage before this one again") from error


def _write_json(path: Path, document: Any) -> None:
    write_whole(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_whole(path, text.getvalue())


class _LiveHandler(logging.StreamHandler[TextIO]):
    """On a terminal, lines of progress are shown in one place."""

    def emit(self, record: logging.LogRecord) -> None:
        is_progress = getattr(record, "is_progress", False) and self.stream.isatty()
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        self.terminator = "" if is_progress else "\n"
        super().emit(record)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LiveHandler(sys.stderr)])
    for name in ("tasks", "training"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        app()
    except UnbrokenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
