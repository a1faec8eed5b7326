"""Reading a preset: its TOML file with overrides, or a job's JSON. Whatever is wrong, the complaint names its field."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

from training.config import Preset, require
from training.documents import read_toml, require_shallow
from training.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_NAME = 100
"""Characters of a name that is compared with the known ones."""
PRESETS = Path(__file__).parent / "presets"
T = TypeVar("T")


def preset_from_json(document: Mapping[str, Any]) -> Preset:
    """The inverse of `Preset.to_json`."""
    return build(Preset, document, where="")


def load_preset(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Read a preset by its name among the built-in ones or by the path of its file.

    `overrides` maps dotted keys to values (`{"train.steps": 20}`). Raises `UserError` naming the file and the field.
    """
    path = _find(name_or_path)
    document = read_toml(path)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    if "folder" in document:
        raise UserError(f"{path}: unknown key 'folder'")
    try:
        preset = build(Preset, document, where="")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return replace(preset, folder=str(path.parent.resolve()))


def has_built_in_recipe(preset: Preset) -> bool:
    """Whether recipe and hyperparameters are those of a built-in preset: they are known to fit."""
    known = (read_toml(path) for path in PRESETS.glob("*.toml"))
    ours = (preset.recipe, preset.hyperparameters)
    return any((one["recipe"], one.get("hyperparameters", {})) == ours for one in known)


def _find(name_or_path: str) -> Path:
    built_in = {path.stem: path for path in PRESETS.glob("*.toml")}
    if name_or_path in built_in:
        return built_in[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise UserError(
        f"no preset {name_or_path!r}: there is no such file, and no built-in one of that name"
        + _nearest(name_or_path, built_in)
    )


def _override(document: dict[str, Any], dotted: str, value: Any) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        document = document.setdefault(table, {})
        if not isinstance(document, dict):
            raise UserError(f"cannot set {dotted!r}: {table!r} is not a table")
    document[key] = value


def parse_override(text: str) -> tuple[str, Any]:
    """`train.steps=20` → ("train.steps", 20): the value is read as TOML, else as a plain string."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"--set {text!r}: must read key=value, as in train.steps=20")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
        require_shallow([read])
    except (ValueError, RecursionError):
        return key, value
    return key, read


def build(kind: type[T], document: Any, *, where: str) -> T:
    """Make the dataclass `kind` from a parsed document; every complaint names its field.

    Raises `UserError` for an unknown key (with the nearest name), a missing key or a wrong type.
    """
    from pydantic import ValidationError

    if not isinstance(document, Mapping):
        raise UserError(f"{where or 'the document'} must be a table")
    hints = _hints(cast(Any, kind))
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # T is a dataclass
    prefix = f"{where}." if where else ""
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in names:
            raise UserError(f"unknown key {prefix + key!r}{_nearest(key, names)}")
        if is_dataclass(hints[key]):
            values[key] = build(hints[key], value, where=prefix + key)
            continue
        if isinstance(value, list):
            value = tuple(value)
        try:
            values[key] = _strict(cast(Any, kind), key).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{prefix + key} = {value!r}: {reason[0].lower()}{reason[1:]}") from error
        if isinstance(value, float):
            require(math.isfinite(value), prefix + key, f"= {value}: must be finite")
        if isinstance(value, int):
            require(abs(value) < 1 << 63, prefix + key, "must fit into 64 bits")
    missing = [prefix + item.name for item in fields(kind) if _is_required(item) and item.name not in values]  # type: ignore[arg-type]
    if missing:
        raise UserError(f"missing key{'s' * (len(missing) > 1)}: {', '.join(missing)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a recipe's own check of its fields
        raise UserError(f"{where or kind.__name__}: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _strict(kind: Any, name: str) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_hints(kind)[name], config=ConfigDict(strict=True))


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name[:MAX_NAME], list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(sorted(known))})"
