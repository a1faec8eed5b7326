"""`init`: write a runnable starting point for a recipe and data of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path

from cyclopts import App

from training.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"recipe.py": "NAME_recipe.py", "preset.toml": "NAME.toml", "pipeline.yaml": "dvc.yaml"}
"""What is written of each template. (The last is not called dvc.yaml, or it would be a pipeline of this repository.)"""
GIT_IGNORES = "/data/\n__pycache__/\n"
DVC_IGNORES = "/config.local\n/tmp\n/cache\n"
DVC_CONFIG = """\
[core]
    remote = stack
    analytics = false
    check_update = false
"""
DVC_REMOTE = """\
['remote "stack"']
    url = s3://unbroken/dvc
"""
NUM_RECORDS = 600


def add_to(app: App) -> None:
    app.command(init)


def init(name: str) -> None:
    """Write a folder NAME with a recipe, a preset and some data, for `unbroken run NAME/NAME.toml` or `dvc repro`."""
    if not (name.isidentifier() and name.isascii() and len(name) <= 48):
        raise UserError(f"{name!r} cannot be a name: use letters, digits and '_', not beginning with a digit")
    folder = Path(name)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another name, or remove it")
    folder.mkdir()
    for template, target in FILES.items():
        text = (TEMPLATES / template).read_text().replace("NAME", name)
        (folder / target.replace("NAME", name)).write_text(text)
    _make_dvc_project(folder)
    lines = (json.dumps(_record(number)) for number in range(NUM_RECORDS))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {folder}/{name}_recipe.py, {folder}/{name}.toml, {folder}/records.jsonl and {folder}/dvc.yaml")
    print(f"next: unbroken run {folder}/{name}.toml   or: cd {folder} && dvc repro")


def _make_dvc_project(folder: Path) -> None:
    """What `dvc init` makes, which needs git; outside of git, DVC is told to do without."""
    is_in_git = any((above / ".git").exists() for above in folder.resolve().parents)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text(DVC_CONFIG + ("" if is_in_git else "    no_scm = true\n") + DVC_REMOTE)
    (folder / ".dvc/.gitignore").write_text(DVC_IGNORES)
    (folder / ".gitignore").write_text(GIT_IGNORES)


def _record(number: int) -> dict[str, object]:
    """One point of two interleaved spirals: a problem that a straight line cannot solve."""
    label = number % 2
    turn = number / NUM_RECORDS * 1.5 * math.pi + 0.5
    angle = turn + label * math.pi
    return {"x": round(turn * math.cos(angle) / 4, 5), "y": round(turn * math.sin(angle) / 4, 5), "label": label}
