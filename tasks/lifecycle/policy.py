"""What mlflow/registry.toml says of the alias `champion`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from infra.settings import PROJECT_ROOT
from training.documents import read_toml
from training.errors import UserError

REGISTRY_POLICY = PROJECT_ROOT / "mlflow" / "registry.toml"
MovedByHand = Literal["adopt", "revert"]


def moved_by_hand(path: Path = REGISTRY_POLICY) -> MovedByHand:
    """What becomes of an alias that a person moved in MLflow: "adopt" if the file is not there.

    Raises `UserError`, naming the key, for any other word.
    """
    if not path.is_file():
        return "adopt"
    found = read_toml(path).get("champion", {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: champion must be a table, as in [champion]")
    word = found.get("moved_by_hand", "adopt")
    if word not in ("adopt", "revert"):
        raise UserError(f'{path}: champion.moved_by_hand = {word!r} must be "adopt" or "revert"')
    return cast(MovedByHand, word)
