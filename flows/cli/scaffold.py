"""`init`: write a runnable starting point for a recipe and data of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path

from cyclopts import App

from training.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
NUM_RECORDS = 600


def add_to(app: App) -> None:
    app.command(init)


def init(name: str) -> None:
    """Write a folder NAME with a recipe, a preset and a little data, ready for `unbroken run NAME/NAME.toml`."""
    if not (name.isidentifier() and name.isascii() and len(name) <= 48):
        raise UserError(f"{name!r} cannot be a name: use letters, digits and '_', not beginning with a digit")
    folder = Path(name)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another name, or remove it")
    folder.mkdir()
    for template, target in (("recipe.py", f"{name}_recipe.py"), ("preset.toml", f"{name}.toml")):
        text = (TEMPLATES / template).read_text().replace("NAME", name)
        (folder / target).write_text(text)
    lines = (json.dumps(_record(number)) for number in range(NUM_RECORDS))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {folder}/{name}_recipe.py, {folder}/{name}.toml and {folder}/records.jsonl")
    print(f"next: unbroken run {folder}/{name}.toml")


def _record(number: int) -> dict[str, object]:
    """One point of two interleaved spirals: a problem that a straight line cannot solve."""
    label = number % 2
    turn = number / NUM_RECORDS * 1.5 * math.pi + 0.5
    angle = turn + label * math.pi
    return {"x": round(turn * math.cos(angle) / 4, 5), "y": round(turn * math.sin(angle) / 4, 5), "label": label}
