"""What mlflow/registry.toml says of the alias `champion`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, cast

from infra.settings import PROJECT_ROOT
from training.errors import UserError

REGISTRY_POLICY = PROJECT_ROOT / "mlflow" / "registry.toml"
MovedByHand = Literal["adopt", "revert"]


def moved_by_hand(path: Path = REGISTRY_POLICY) -> MovedByHand:
    """What becomes of an alias that a person moved in MLflow: "adopt" if the file is not there.

    Raises `UserError`, naming the key, for any other word.
    """
    if not path.is_file():
        return "adopt"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("champion", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: champion must be a table, as in [champion]")
    word = found.get("moved_by_hand", "adopt")
    if word not in ("adopt", "revert"):
        raise UserError(f'{path}: champion.moved_by_hand = {word!r} must be "adopt" or "revert"')
    return cast(MovedByHand, word)
