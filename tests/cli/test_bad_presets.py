"""A preset or option that is wrong: exit code 2, one line that names the field, and nothing is launched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.commands import complaint, unbroken
from tests.conftest import Stack
from training.preset_file import PRESETS

pytestmark = pytest.mark.usefixtures("nothing_launched")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """Arguments of `unbroken run`, and what its complaint must name."""

    name: str
    arguments: tuple[str, ...]
    named: tuple[str, ...]


def setting(name: str, text: str, *named: str) -> Mistake:
    return Mistake(name=name, arguments=("digits", "--set", text), named=named)


OPTIONS = [
    Mistake(name="unknown preset", arguments=("digit",), named=("'digit'", "did you mean 'digits'?")),
    Mistake(name="no preset", arguments=("/tmp",), named=("'/tmp'", "no such file", "(known: digits, stdlib, words)")),
    setting("unknown key", "train.stepz=5", "train.stepz", "did you mean 'steps'?"),
    setting("unknown table", "trian.steps=5", "'trian'", "did you mean 'train'?"),
    setting("wrong type", "train.steps=many", "train.steps = 'many'", "valid integer"),
    setting("number for a table", "train=5", "train must be a table"),
    setting("table in a number", "seed.x=5", "'seed.x'", "not a table"),
    setting("out of range", "data.test_percent=100", "data.test_percent", "between 1 and 99"),
    setting("batch not divisible", "train.batch_size=60", "train.batch_size = 60", "train.virtual_workers = 8", "64"),
    setting("more ranks than work", "launch.nodes=9", "launch.nodes", "9 ranks", "train.virtual_workers = 8"),
    setting("glob of a path", "data.glob=raw/*.csv", "data.glob = 'raw/*.csv'", "without folders"),
    setting("missing source", "data.source=nowhere.csv", "data.source = 'nowhere.csv'", "does not exist"),
    setting("missing package", "data.source=package://nowhere/x", "data.source", "no installed package 'nowhere'"),
    setting("source without a bucket", "data.source=s3://", "data.source = 's3://'"),
    setting("unknown recipe module", "recipe=nowhere:Recipe", "'nowhere:Recipe'", "no module 'nowhere'"),
    setting("recipe that is none", "recipe=pathlib:Path", "'pathlib:Path'", "not a subclass"),
    setting("recipe without class", "recipe=training.recipes.digits", "recipe", "module:Class"),
    setting("unknown hyperparameter", "hyperparameters.droput=0.1", "hyperparameters.droput", "did you mean 'dropout'"),
    setting("malformed option", "train.steps", "--set 'train.steps'", "train.steps=20"),
    Mistake(name="given twice", arguments=("digits", "--set", "seed=1", "--set", "seed=2"), named=("--set seed",)),
]


@pytest.mark.parametrize("mistake", OPTIONS, ids=lambda mistake: mistake.name)
def test_wrong_option_is_refused(stack: Stack, mistake: Mistake, tmp_path: Path) -> None:
    line = complaint(unbroken(stack, "run", *mistake.arguments, cwd=tmp_path))
    for text in mistake.named:
        assert text in line


FILES = [
    ("unknown key", "steps = 300", "stepz = 300", ("train.stepz", "did you mean 'steps'?")),
    ("missing keys", "steps = 300\nbatch_size = 64\n", "", ("missing keys: train.steps, train.batch_size",)),
    ("invalid TOML", "steps = 300", "steps = = 300", ("not valid TOML", "line")),
    ("empty folder", "package://sklearn/datasets/data/digits.csv.gz", "empty", ("data.source = 'empty'", "no file")),
    ("text for a number", "seed = 1", 'seed = "one"', ("seed = 'one'", "valid integer")),
]


@pytest.mark.parametrize(("old", "new", "named"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_wrong_file_is_refused(stack: Stack, tmp_path: Path, old: str, new: str, named: tuple[str, ...]) -> None:
    text = (PRESETS / "digits.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    (tmp_path / "empty").mkdir()
    line = complaint(unbroken(stack, "run", "mine.toml", cwd=tmp_path))
    for expected in named:
        assert expected in line
    assert "mine.toml" in line or "data.source" in line


def test_file_that_is_not_text_is_refused(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert "mine.toml: not valid TOML" in complaint(unbroken(stack, "run", "mine.toml", cwd=tmp_path))


def test_recipe_that_refuses_its_own_fields_is_quoted(stack: Stack, tmp_path: Path) -> None:
    """Its own check, a ValueError as in `encode`, is the user's message and not a bug of ours."""
    (tmp_path / "strict_recipe.py").write_text(
        "from dataclasses import dataclass\n"
        "from training.recipes.digits import Digits\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Strict(Digits):\n"
        "    def __post_init__(self):\n"
        "        raise ValueError('num_channels must be even')\n"
    )
    text = (PRESETS / "digits.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("training.recipes.digits:Digits", "strict_recipe:Strict"))
    assert "num_channels must be even" in complaint(unbroken(stack, "run", "mine.toml", cwd=tmp_path))


def test_recipe_that_cannot_be_imported_is_quoted(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "broken_recipe.py").write_text("import training.recipes\n\nraise RuntimeError('not today')\n")
    text = (PRESETS / "digits.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("training.recipes.digits:Digits", "broken_recipe:Recipe"))
    line = complaint(unbroken(stack, "run", "mine.toml", cwd=tmp_path))
    assert "importing it failed: RuntimeError: not today" in line


@pytest.mark.parametrize("arguments", [("run",), ("run", "digits", "--fresch"), ("rum", "digits")], ids=" ".join)
def test_command_that_does_not_exist_is_the_users_mistake(stack: Stack, arguments: tuple[str, ...]) -> None:
    done = unbroken(stack, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_record_that_cannot_be_read_is_named_by_its_line(stack: Stack, tmp_path: Path) -> None:
    """Found only while sharding; training never begins."""
    assert unbroken(stack, "init", "broken", cwd=tmp_path).returncode == 0
    with (tmp_path / "broken" / "records.jsonl").open("a") as file:
        file.write('{"x": 1.0, "y":\n')
    done = unbroken(stack, "train", "broken/broken.toml", "--json", cwd=tmp_path)
    assert "records.jsonl:601" in complaint(done)
