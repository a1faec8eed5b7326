"""The alias `champion` in MLflow, with the notes beside it that tell whose doing it is (tasks.lifecycle.projection)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tasks.mlflow_client import STORE_TAG, ask, connect
from tasks.registry import tag_version
from training.documents import MAX_DIGITS
from training.errors import UserError

CHAMPION = "champion"
SHOWN_TAG = "unbroken.champion_change"
"""On a registered model: the change of champion that its alias shows."""
POINTING_TAG = "unbroken.champion_due."
"""With a mark of whoever is at work, on a version that the alias is about to point at: for which change of champion."""
NOT_ADOPTED_TAG = "unbroken.not_adopted"
"""On a version that a person pointed the alias at, and that could not become champion: why."""


@dataclass(frozen=True, kw_only=True)
class ChampionAlias:
    """What MLflow shows of a model's champion."""

    version: str | None
    """Where the alias points, if there is one."""
    shown: int
    """The newest change that somebody noted as shown; 0 if nobody did."""
    pointing_tags: tuple[str, ...]
    """On the version that it points at: of those who were about to point it there, and are not done."""
    owner: str | None
    """The store whose champion it shows."""


def look_at(uri: str, name: str) -> ChampionAlias | None:
    """Raises `InfrastructureError` if MLflow is away; None if it has no such model.

    Model and version are two answers: they are asked for until nothing has moved in between.
    """
    client = connect(uri)
    before: ChampionAlias | None = None
    while True:
        found = ask(lambda: client.search_registered_models(f"name = '{name}'"))
        if not found:
            return None
        version = found[0].aliases.get(CHAMPION)
        seen = ChampionAlias(
            version=str(version) if version is not None else None,
            shown=shown_change(found[0].tags),
            pointing_tags=before.pointing_tags if before is not None else (),
            owner=found[0].tags.get(STORE_TAG),
        )
        if seen == before:
            return seen
        before = replace(seen, pointing_tags=_pointing_tags(uri, name, seen.version))


def shown_change(tags: Mapping[str, str]) -> int:
    """What a registered model's tag says; a person may write there what is no number."""
    text = str(tags.get(SHOWN_TAG, ""))
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else 0


def _pointing_tags(uri: str, name: str, version: str | None) -> tuple[str, ...]:
    if version is None:
        return ()
    tags = ask(lambda: connect(uri).get_model_version(name, version)).tags
    return tuple(tag for tag in tags if tag.startswith(POINTING_TAG))


def require_owner(uri: str, name: str, owner: str) -> None:
    """Raises `UserError` if the alias of this model shows another store's champion."""
    alias = look_at(uri, name)
    if alias is not None and alias.owner not in (None, owner):
        raise UserError(f"the champion of model {name!r} is kept at {alias.owner}, and this is {owner}")


def point(uri: str, name: str, version: str, change: int, *, owner: str, mark: str) -> None:
    """Move the alias, and note that it shows this change. `mark` says on the version who is at work, until `leave`."""
    client = connect(uri)
    tag_version(uri, name, version, POINTING_TAG + mark, str(change))
    ask(lambda: client.set_registered_model_alias(name, CHAMPION, version))
    note_shown(uri, name, change, owner=owner)


def leave(uri: str, name: str, version: str, tags: Collection[str]) -> None:
    """Take such marks off a version."""
    for tag in tags:
        tag_version(uri, name, version, tag, None)


def note_shown(uri: str, name: str, change: int, *, owner: str) -> None:
    client = connect(uri)
    ask(lambda: client.set_registered_model_tag(name, STORE_TAG, owner))
    ask(lambda: client.set_registered_model_tag(name, SHOWN_TAG, str(change)))
