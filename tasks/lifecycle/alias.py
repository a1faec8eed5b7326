"""The alias `champion` in MLflow, with the notes beside it that tell whose doing it is (tasks.lifecycle.projection)."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.mlflow_client import STORE_TAG, ask, connect
from tasks.registry import tag_version
from training.errors import UserError

CHAMPION = "champion"
SHOWN_TAG = "unbroken.champion_change"
"""On a registered model: the change of champion that its alias shows."""
POINTING_TAG = "unbroken.champion_due"
"""On a version that somebody is about to point the alias at: the change of champion that asks for it."""
NOT_ADOPTED_TAG = "unbroken.not_adopted"
"""On a version that a person pointed the alias at, and that could not become champion: why."""


@dataclass(frozen=True, kw_only=True)
class ChampionAlias:
    """What MLflow shows of a model's champion."""

    version: str | None
    """Where the alias points, if there is one."""
    shown: int
    """The newest change that somebody noted as shown; 0 if nobody did."""
    is_being_pointed: bool
    """Somebody was about to point it there, and has not noted yet that it was done."""
    owner: str | None
    """The store whose champion it shows."""


def look_at(uri: str, name: str) -> ChampionAlias | None:
    """Raises `InfrastructureError` if MLflow is away; None if it has no such model."""
    client = connect(uri)
    found = ask(lambda: client.search_registered_models(f"name = '{name}'"))
    if not found:
        return None
    model = found[0]
    version = model.aliases.get(CHAMPION)
    shown = str(model.tags.get(SHOWN_TAG, ""))
    pointing = version is not None and POINTING_TAG in ask(lambda: client.get_model_version(name, str(version))).tags
    return ChampionAlias(
        version=str(version) if version is not None else None,
        shown=int(shown) if shown.isdecimal() else 0,  # a person may write there
        is_being_pointed=pointing,
        owner=model.tags.get(STORE_TAG),
    )


def require_owner(uri: str, name: str, owner: str) -> None:
    """Raises `UserError` if the alias of this model shows another store's champion."""
    alias = look_at(uri, name)
    if alias is not None and alias.owner not in (None, owner):
        raise UserError(f"the champion of model {name!r} is kept at {alias.owner}, and this is {owner}")


def point(uri: str, name: str, version: str, change: int, *, owner: str) -> None:
    """Move the alias, and note that it shows this change. Who is killed in between leaves a tag that tells of it."""
    client = connect(uri)
    tag_version(uri, name, version, POINTING_TAG, str(change))
    ask(lambda: client.set_registered_model_alias(name, CHAMPION, version))
    note_shown(uri, name, change, owner=owner)
    tag_version(uri, name, version, POINTING_TAG, None)


def note_shown(uri: str, name: str, change: int, *, owner: str) -> None:
    client = connect(uri)
    ask(lambda: client.set_registered_model_tag(name, STORE_TAG, owner))
    ask(lambda: client.set_registered_model_tag(name, SHOWN_TAG, str(change)))
