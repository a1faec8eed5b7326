"""Which version of a model a person means, by the store alone where that knows it."""

from __future__ import annotations

from infra.settings import Settings
from tasks import registry
from tasks.lifecycle import model_file
from tasks.lifecycle.alias import CHAMPION
from tasks.lifecycle.model_file import KeptVersion
from tasks.serving import published
from training.config import require_name
from training.errors import UserError
from training.s3.objectstore import Store


def find_kept(settings: Settings, store: Store, text: str) -> KeptVersion:
    """What is kept of `MODEL` (its champion), `MODEL@champion`, `MODEL@VERSION`, `MODEL/VERSION` or `MODEL@ALIAS`.

    Only another alias than `champion` is asked of MLflow. Raises `UserError` if there is no such version,
    `DamagedError` if the champion's is not the one that became champion.
    """
    name, sign, which = text.partition("@" if "@" in text else "/")
    if sign and not which:
        raise UserError(f"{text!r}: must read MODEL, MODEL@champion, MODEL@VERSION or MODEL@ALIAS")
    require_name("MODEL", name)
    if not sign or which == CHAMPION:
        return published.of_champion(store, name, published.find_champion(store, name))
    if not which.isdecimal():
        _, which = registry.find_version(settings.mlflow_uri, f"{name}@{which}", what="VERSION")
    return model_file.find(store, name, which)
