"""What does not need a stack: help that is instant, and a scaffold that never overwrites."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import complaint
from tests.conftest import UNBROKEN

DVC = str(Path(UNBROKEN).parent / "dvc")
HEAVY = ("torch", "prefect", "mlflow", "boto3", "botocore", "sklearn", "matplotlib", "jinja2", "starlette", "uvicorn")
HELPS: tuple[list[str], ...] = (
    *(
        [],
        ["up"],
        ["down"],
        ["status"],
        ["doctor"],
        ["init"],
        ["run"],
        ["train"],
        ["drill"],
        ["serve"],
        ["report"],
        ["plan"],
    ),
    *(
        ["runs"],
        ["runs", "ls"],
        ["runs", "cancel"],
        ["runs", "render"],
        ["data", "ls"],
        ["ckpt", "ls"],
        ["ckpt", "sign"],
        ["models", "ls"],
        ["models", "promote"],
        ["models", "rollback"],
        ["models", "history"],
        ["models", "predict"],
        ["models", "export"],
        ["models", "sign"],
    ),
    *(["data", verb] for verb in ("show", "diff", "verify", "withdraw", "rm", "gc", "export", "import")),
)
SHOW_ALL_HELP = f"""
import contextlib, io, json, sys
from flows.cli import main
shown = []
for verb in {HELPS!r}:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*verb, "--help"])
    shown.append(text.getvalue())
print(json.dumps([shown, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_help_imports_nothing_heavy() -> None:
    """One process shows the help of every verb, and then looks at what it had to import."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_ALL_HELP], capture_output=True, text=True, timeout=240, check=True
    )
    shown, imported = json.loads(done.stdout)
    assert all("Usage: unbroken" in text for text in shown)
    assert imported == []


def test_help_lists_the_verbs() -> None:
    done = subprocess.run([UNBROKEN, "--help"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    servers_and_runs = ("up", "down", "status", "doctor", "init", "run", "train", "drill", "serve", "report", "plan")
    for verb in (*servers_and_runs, "runs", "data", "ckpt", "models"):
        assert f" {verb} " in done.stdout


def test_scaffold_is_never_written_over(tmp_path: Path) -> None:
    assert _init("spirals", tmp_path).returncode == 0
    files = _files(tmp_path / "spirals")
    own, dvc = {"spirals.toml", "spirals_recipe.py", "records.jsonl"}, {"dvc.yaml", ".dvc/config", ".dvc/.gitignore"}
    assert files.keys() == own | dvc | {".gitignore"}
    assert "spirals exists already" in complaint(_init("spirals", tmp_path))
    assert _files(tmp_path / "spirals") == files


def test_scaffold_is_dvcs_with_and_without_git(tmp_path: Path) -> None:
    (tmp_path / "mine/below").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path / "mine"], check=True)
    for folder, has_git in ((tmp_path, False), (tmp_path / "mine/below", True)):
        assert _init("spirals", folder).returncode == 0
        shown = subprocess.run(
            [DVC, "stage", "list", "--name-only"],
            cwd=folder / "spirals",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert shown.stdout.split() == ["shard", "train", "evaluate", "register"], shown.stderr
        assert ("no_scm" in (folder / "spirals/.dvc/config").read_text()) != has_git


@pytest.mark.parametrize("name", ["a/b", "../up", "", "1st", "naïve", "x" * 49])
def test_names_that_cannot_be_modules_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    assert f"{name!r} cannot be a name" in complaint(_init(name, folder))
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _init(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNBROKEN, "init", name], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
