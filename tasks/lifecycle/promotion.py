"""Promotion and rollback: prove the bytes, ask the gate, replace the document, move the alias."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from infra.settings import Settings
from tasks import registry
from tasks.lifecycle import champions, model_file, projection
from tasks.lifecycle.alias import require_owner
from tasks.lifecycle.champion import Change, Entry, earlier, predecessor, require_current, with_change
from tasks.lifecycle.model_file import KeptVersion
from training.errors import InfrastructureError, RefusedError, UserError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)


class Decision(Protocol):
    """What a gate says of a version: whether it may become champion, and why, or why not."""

    @property
    def passed(self) -> bool: ...

    @property
    def reasons(self) -> Sequence[str]: ...

    @property
    def sha256(self) -> str: ...


class Judge(Protocol):
    """A gate: may `version` of model `name` follow `champion`, the version that it is now?"""

    def __call__(self, settings: Settings, store: Store, name: str, version: str, *, champion: str) -> Decision: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Who is champion after a command."""

    model: str
    entry: Entry
    is_new: bool
    """False if it was champion already, and nothing was changed."""
    is_shown: bool
    """False if the alias in MLflow is to follow."""


def promote(
    settings: Settings,
    store: Store,
    text: str,
    *,
    by: str,
    reason: str = "",
    replaces: int | None = None,
    judge: Judge | None = None,
) -> Outcome:
    """Make a version (NAME/VERSION or NAME@ALIAS) champion in place of change `replaces`: the newest, if not given.

    Raises `UserError` if there is no such version or file, `DamagedError` if the file's bytes are not those that were
    kept, `RefusedError` with the gate's reasons, `OvertakenError` if another champion came first. Then nothing is
    changed.
    """
    name, version = registry.find_version(settings.mlflow_uri, text, what="VERSION")
    champion = champions.read(store, name)
    current = champion.current
    if current.version == version:
        return _settled(settings, store, name, current)
    if replaces is not None:
        require_current(champion, replaces)
    change = check(settings, store, name, version, against=current.version, by=by, reason=reason, judge=judge)
    return _replace(settings, store, name, change, replaces=current.sequence)


def check(
    settings: Settings,
    store: Store,
    name: str,
    version: str,
    *,
    against: str,
    by: str,
    reason: str = "",
    judge: Judge | None = None,
) -> Change:
    """The change that would make this version champion: its bytes are proven, and the gate lets it follow version
    `against`."""
    kept = _proven(settings, store, name, version)
    decision = judge(settings, store, name, version, champion=against) if judge is not None else None
    if decision is not None and not decision.passed:
        raise RefusedError(f"the gate refuses model {name!r} version {version}: {'; '.join(decision.reasons)}")
    return Change(
        action="promote",
        version=version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        by=by,
        reason=reason,
        decision_sha256=decision.sha256 if decision is not None else None,
    )


def roll_back(
    settings: Settings,
    store: Store,
    name: str,
    *,
    to: str | None = None,
    by: str,
    reason: str = "",
    replaces: int | None = None,
) -> Outcome:
    """Make the champion before the current one champion again, or the newest that was version `to`.

    Raises as `promote` does; no gate is asked: it was champion.
    """
    champion = champions.read(store, name)
    current = champion.current
    if to == current.version:
        return _settled(settings, store, name, current)
    entry = earlier(champion, to) if to is not None else predecessor(champion)
    kept = _proven(settings, store, name, entry.version)
    if entry.model_sha256 not in ("", kept.model_sha256) or entry.run_key != kept.run_key:
        raise UserError(
            f"model {name!r} version {entry.version} is no more the one that was champion: the registry was emptied,"
            " and numbers its versions anew; promote a version instead"
        )
    change = Change(
        action="rollback",
        version=entry.version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        by=by,
        reason=reason,
    )
    return _replace(settings, store, name, change, replaces=current.sequence if replaces is None else replaces)


def way_back(store: Store, name: str, to: str | None) -> tuple[str, int]:
    """The version that a rollback would make champion, and the change that it would replace."""
    champion = champions.read(store, name)
    entry = earlier(champion, to) if to is not None else predecessor(champion)
    return entry.version, champion.current.sequence


def _proven(settings: Settings, store: Store, name: str, version: str) -> KeptVersion:
    """What is kept of a version, whose bytes are there, and which is what MLflow calls by that number."""
    kept = model_file.find(store, name, version)
    model_file.prove(store, kept)
    registry.require_run_key(settings.mlflow_uri, name, version, kept.run_key)
    require_owner(settings.mlflow_uri, name, store.location.uri())
    return kept


def _replace(settings: Settings, store: Store, name: str, change: Change, *, replaces: int) -> Outcome:
    after = champions.change(
        store, name, lambda champion: with_change(champion, change, replaces=replaces, now=time.time())
    )
    return _shown(settings, store, Outcome(model=name, entry=after.current, is_new=True, is_shown=True))


def _settled(settings: Settings, store: Store, name: str, entry: Entry) -> Outcome:
    """Whoever made it champion may have died before the alias was moved."""
    return _shown(settings, store, Outcome(model=name, entry=entry, is_new=False, is_shown=True))


def _shown(settings: Settings, store: Store, outcome: Outcome) -> Outcome:
    """What was decided stands, be MLflow away by now: the reaper shows it there later."""
    try:
        projection.project(settings.mlflow_uri, store, outcome.model)
    except InfrastructureError as error:
        log.warning("the alias of model %s is moved later: %s", outcome.model, error)
        return replace(outcome, is_shown=False)
    return outcome
