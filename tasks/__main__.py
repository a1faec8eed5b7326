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
from training.config import Preset
from training.documents import parse
from training.errors import DamagedError, UnbrokenError, UserError
from training.preset_file import load_preset

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
    STAGES[stage](_Folder(preset, config, folder))


class _Folder:
    """Where the stages leave their results, of one preset as it was read. Nothing is written of what has changed since:
    a stage that outlived its `dvc repro` must not answer for the next one."""

    def __init__(self, name: str, preset: Preset, path: Path) -> None:
        self.preset = preset
        self._name = name
        self._path = path
        self._read: dict[Path, str] = {}

    def dataset(self) -> Dataset:
        return self.read("dataset.json", Dataset)

    def model(self) -> TrainedModel:
        """Raises `UserError` if it is not of the run that this preset and dataset stand for."""
        from tasks.opening import identify

        model, key = self.read("model.json", TrainedModel), identify(self.preset, self.dataset()).run_key
        if model.run_key != key:
            raise UserError(
                f"{self._path / 'model.json'} is of run {model.run_key[:12]}, and this preset and dataset are of run"
                f" {key[:12]}: run the stage before this one again"
            )
        return model

    def read(self, name: str, kind: type[Result]) -> Result:
        path = self._path / name
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage before this one first")
        text = self._read.setdefault(path, path.read_text())
        try:
            return parse(kind, json.loads(text))
        except (ValueError, DamagedError) as error:
            raise UserError(f"{path} is not what a stage leaves there: run the stage before this one again") from error

    def write_json(self, name: str, document: Any) -> None:
        self._write(name, json.dumps(document, indent=1, sort_keys=True) + "\n")

    def write_csv(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self._write(name, text.getvalue())

    def _write(self, name: str, text: str) -> None:
        changed = [str(path) for path, read in self._read.items() if not path.is_file() or path.read_text() != read]
        if load_preset(self._name) != self.preset:
            changed.append(self._name)
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed while this stage ran: nothing is written to {self._path / name}."
                " Run it again"
            )
        write_whole(self._path / name, text)


def _shard(folder: _Folder) -> None:
    from tasks.shard import shard

    folder.write_json("dataset.json", asdict(shard.fn(folder.preset)))


def _train(folder: _Folder) -> None:
    from tasks import tracking
    from tasks.train import train
    from training.runs.history import committed_steps
    from training.runs.record import RunRecord

    tracking.require_shown(open_stack()[0].mlflow_uri, folder.preset)
    model = train.fn(folder.preset, folder.dataset())
    folder.write_json("model.json", asdict(model))
    run = RunRecord(open_stack()[1], model.run_key)
    rows = [(event.step, event.values["loss"]) for event in committed_steps(run, run.read())]
    folder.write_csv("loss.csv", ("step", "loss"), rows)


def _evaluate(folder: _Folder) -> None:
    from tasks.evaluate import evaluate

    result = evaluate.fn(folder.preset, folder.dataset(), folder.model())
    folder.write_json("evaluation.json", asdict(result))
    folder.write_json("metrics.json", {name: estimate.value for name, estimate in result.metrics.items()})
    counts = result.confusion or ()
    rows = [(label, guess) for label, row in enumerate(counts) for guess, n in enumerate(row) for _ in range(n)]
    folder.write_csv("confusion.csv", ("label", "predicted"), rows)


def _register(folder: _Folder) -> None:
    from tasks.register import register

    model = folder.model()
    version = register.fn(folder.preset, folder.dataset(), model, folder.read("evaluation.json", Evaluation))
    fixed = {"name": version.name, "run_key": version.run_key, "weights_sha256": version.weights_sha256}
    folder.write_json("registration.json", fixed)


STAGES: dict[str, Callable[[_Folder], None]] = {
    "shard": _shard,
    "train": _train,
    "evaluate": _evaluate,
    "register": _register,
}


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
