"""The alias `champion` in MLflow as the projection of champion.json, and what is done if a person moved it there.

MLflow cannot compare and set, nor say who moved an alias. So each projection notes on the registered model which change
it has shown, once it has; and on the version, before, that it is about to point at it. An alias that is elsewhere, with
the newest change shown and nobody about to point, was moved by hand (docs/lifecycle.md).
"""

from __future__ import annotations

import logging
import time
import uuid
from enum import Enum

from tasks import registry
from tasks.lifecycle import alias as alias_in_mlflow
from tasks.lifecycle import champions, model_file
from tasks.lifecycle.alias import NOT_ADOPTED_TAG, POINTING_TAG, ChampionAlias, look_at
from tasks.lifecycle.champion import Change, Entry, with_change
from tasks.lifecycle.policy import MovedByHand
from training.errors import DamagedError, OvertakenError, UserError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

BY_HAND = "MLflow UI"


class AliasVerdict(Enum):
    LEAVE = "it shows the champion"
    PROJECT = "to be pointed at the champion"
    NOTE = "it points at the champion, and nobody noted that"
    MOVED = "moved by hand"


def judge_alias(alias: ChampionAlias, current: Entry) -> AliasVerdict:
    if alias.version == current.version:
        return AliasVerdict.LEAVE if alias.shown == current.sequence else AliasVerdict.NOTE
    if current.sequence == 1 and alias.shown == 0 and alias.version is not None and not alias.pointing_tags:
        return AliasVerdict.MOVED  # a person gave it before the first champion was shown
    if alias.shown != current.sequence or alias.pointing_tags:
        return AliasVerdict.PROJECT
    return AliasVerdict.MOVED


def _is_older_releases(entry: Entry) -> bool:
    """That noted nothing, and left the alias to people."""
    return not entry.model_sha256


def project(uri: str, store: Store, name: str) -> None:
    """Point the alias at the champion, until that is still the champion afterwards.

    Raises `InfrastructureError` if MLflow is away, `UserError` if its version of that number is another run's.
    """
    mark, pointed = uuid.uuid4().hex, set[str]()
    current: Entry | None = None
    while (newest := champions.read(store, name).current) != current:
        current = newest
        registry.require_run_key(uri, name, current.version, current.run_key)
        pointed.add(current.version)
        alias_in_mlflow.point(uri, name, current.version, current.sequence, owner=store.location.uri(), mark=mark)
    for version in pointed:  # not before: until then it may be a newer champion's alias that was moved
        alias_in_mlflow.leave(uri, name, version, [POINTING_TAG + mark])


def show_first(uri: str, store: Store, name: str, current: Entry) -> None:
    """Point the alias at a model's first champion. One that a person gave before is left to `set_right`."""
    alias = look_at(uri, name)
    if alias is None or alias.owner not in (None, store.location.uri()):
        return
    if judge_alias(alias, current) in (AliasVerdict.PROJECT, AliasVerdict.NOTE):
        project(uri, store, name)


def set_right(uri: str, store: Store, name: str, policy: MovedByHand) -> str:
    """Look at one model's alias and do what follows; says what was done, or nothing.

    Raises `InfrastructureError` if a server is away, `DamagedError` or `UserError` for what a person must mend.
    """
    champion = champions.find(store, name)
    alias = look_at(uri, name)
    if champion is None or alias is None or alias.owner not in (None, store.location.uri()):
        return ""
    current = champion.current
    verdict = judge_alias(alias, current)
    if verdict is AliasVerdict.LEAVE:
        return ""
    if verdict is AliasVerdict.NOTE:
        alias_in_mlflow.note_shown(uri, name, current.sequence, owner=store.location.uri())
        return ""
    if verdict is AliasVerdict.PROJECT:
        project(uri, store, name)
        alias_in_mlflow.leave(uri, name, str(alias.version), alias.pointing_tags)  # from now on it is a person's there
        return f"its alias was due: version {current.version}"
    if policy == "revert" or alias.version is None:
        project(uri, store, name)
        return f"its alias was moved to {_shown(alias)} by hand: put back to version {current.version}"
    return _adopt(uri, store, name, alias.version, current)


def _adopt(uri: str, store: Store, name: str, version: str, current: Entry) -> str:
    try:
        kept = model_file.find(store, name, version)
        model_file.prove(store, kept)
        registry.require_run_key(uri, name, version, kept.run_key)
    except (DamagedError, UserError) as error:
        if _is_older_releases(current):  # whose versions have no file: that is no reason to change the champion
            raise
        registry.tag_version(uri, name, version, NOT_ADOPTED_TAG, str(error))
        project(uri, store, name)
        return f"its alias was moved to version {version} by hand, which cannot be champion ({error}): put back"
    change = Change(
        action="adopt",
        version=version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        by=BY_HAND,
        reason="the alias was moved by hand",
    )
    try:
        after = champions.change(
            store,
            name,
            lambda champion: with_change(champion, change, replaces=current.sequence, now=time.time()),
        )
    except OvertakenError:  # another reaper adopted it, or somebody promoted one: the next look sees which
        return ""
    alias_in_mlflow.note_shown(uri, name, after.current.sequence, owner=store.location.uri())
    return f"its alias was moved to version {version} by hand: adopted"


def _shown(alias: ChampionAlias) -> str:
    return f"version {alias.version}" if alias.version is not None else "no version"
