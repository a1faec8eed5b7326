"""The champion's document: each change in order, races with one winner, the way back, and what older releases wrote."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.lifecycle import champions
from tasks.lifecycle.alias import ChampionAlias
from tasks.lifecycle.champion import Champion, begun, earlier, from_json, predecessor, to_json, with_change
from tasks.lifecycle.policy import moved_by_hand
from tasks.lifecycle.projection import AliasVerdict, judge_alias
from tests.unit.champions import change
from training.errors import DamagedError, OvertakenError, UserError
from training.s3.objectstore import Store

FORMAT_1 = {"format": 1, "model": "digits", "version_of_registry": "3", "run_key": "k", "version": 1, "nonce": "n"}


def history(*steps: str) -> Champion:
    """`history("1", "2", "<1")`: version 1, then 2, then rolled back to 1; `+2` is adopted. One second apart."""
    champion = begun("digits", change(steps[0], "first"), now=1.0)
    for second, step in enumerate(steps[1:], start=2):
        action = {"<": "rollback", "+": "adopt"}.get(step[0], "promote")
        made = change(step.lstrip("<+"), action)
        champion = with_change(champion, made, replaces=champion.current.sequence, now=float(second))
    return champion


def test_each_change_is_an_entry_in_order() -> None:
    champion = history("1", "2", "<1", "+3")
    told = [(entry.sequence, entry.action, entry.version) for entry in champion.entries]
    assert told == [(1, "first", "1"), (2, "promote", "2"), (3, "rollback", "1"), (4, "adopt", "3")]
    assert from_json(to_json(champion)) == champion


def test_change_that_was_judged_against_another_champion_is_told_who_won() -> None:
    champion = history("1", "2")
    with pytest.raises(OvertakenError, match=r"version 2 has become champion meanwhile \(promote by somebody, 1970"):
        with_change(champion, change("3"), replaces=1, now=9.0)


def test_clock_that_goes_back_puts_no_entry_before_the_last() -> None:
    champion = with_change(history("1", "2"), change("3"), replaces=2, now=0.5)
    assert [entry.time for entry in champion.entries] == [1.0, 2.0, 2.0]


def test_history_says_who_was_champion_at_a_time() -> None:
    champion = history("1", "2", "3")
    assert [champion.at(time).version for time in (1.0, 1.9, 2.0, 99.0)] == ["1", "1", "2", "3"]
    with pytest.raises(UserError, match="no champion before 1970-01-01T00:00:01"):
        champion.at(0.5)


@pytest.mark.parametrize(
    ("steps", "version"),
    [
        (("1", "2"), "1"),
        (("1", "2", "3", "<2"), "1"),
        (("1", "2", "1"), "2"),
        (("1", "2", "1", "3"), "1"),
        (("1", "2", "1", "3", "<1"), "2"),
        (("1", "2", "3", "<2", "4"), "2"),
        (("1", "2", "3", "<2", "<3"), "2"),
        (("1", "+2"), "1"),
    ],
)
def test_rollback_goes_one_further_back_each_time(steps: tuple[str, ...], version: str) -> None:
    assert predecessor(history(*steps)).version == version


@pytest.mark.parametrize("steps", [("1",), ("1", "2", "<1"), ("1", "2", "3", "<1")])
def test_first_champion_has_none_before_it(steps: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="no champion before version 1"):
        predecessor(history(*steps))


def test_version_that_never_was_champion_is_no_way_back() -> None:
    assert earlier(history("1", "2", "1"), "1").sequence == 3
    with pytest.raises(UserError, match="version 9 never was champion"):
        earlier(history("1"), "9")


def test_document_of_format_1_is_a_history_of_one() -> None:
    champion = from_json(FORMAT_1)
    assert (champion.model, champion.current.version, champion.current.action) == ("digits", "3", "first")
    assert with_change(champion, change("4"), replaces=1, now=5.0).current.sequence == 2
    assert champion.at(0.0).when == "unknown"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"format": 3, "model": "m", "entries": []},
        {**to_json(history("1", "2")), "entries": to_json(history("1", "2"))["entries"][1:]},
        {**to_json(history("1")), "entries": []},
    ],
)
def test_damaged_document_is_named(store: Store, document: dict[str, object]) -> None:
    store.create_versioned(champions.champion_key("digits"), document)
    with pytest.raises(DamagedError, match=r"models/digits/champion\.json: "):
        champions.read(store, "digits")


def test_only_the_first_begins_a_history(store: Store) -> None:
    assert champions.begin(store, "m", change("1", "first")) == champions.begin(store, "m", change("2", "first"))
    assert champions.models(store) == ["m"]
    with pytest.raises(UserError, match="no model 'other' has a champion"):
        champions.read(store, "other")


def test_of_changes_that_race_one_wins(store: Store) -> None:
    champions.begin(store, "m", change("1", "first"))
    together = threading.Barrier(4)

    def promote(version: str) -> str:
        together.wait()
        try:
            champions.change(store, "m", lambda c: with_change(c, change(version), replaces=1, now=2.0))
        except OvertakenError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(promote, "2345"))
    winner = champions.read(store, "m").current
    assert (told.count("won"), winner.sequence) == (1, 2)
    assert all(f"version {winner.version} has become champion" in line for line in told if line != "won")


def alias(version: str | None, shown: int, *, is_being_pointed: bool = False) -> ChampionAlias:
    tags = ("unbroken.champion_due.somebody",) if is_being_pointed else ()
    return ChampionAlias(version=version, shown=shown, pointing_tags=tags, owner=None)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (alias("2", 2), AliasVerdict.LEAVE),
        (alias("2", 1), AliasVerdict.NOTE),
        (alias("1", 1), AliasVerdict.PROJECT),
        (alias("1", 0), AliasVerdict.PROJECT),
        (alias(None, 0), AliasVerdict.PROJECT),
        (alias("1", 2), AliasVerdict.MOVED),
        (alias(None, 2), AliasVerdict.MOVED),
        (alias("1", 2, is_being_pointed=True), AliasVerdict.PROJECT),
        (alias("2", 2, is_being_pointed=True), AliasVerdict.LEAVE),
    ],
)
def test_alias_was_moved_by_hand_only_if_nobody_of_ours_can_have(seen: ChampionAlias, verdict: AliasVerdict) -> None:
    assert judge_alias(seen, history("1", "2").current) is verdict


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (alias("3", 0), AliasVerdict.NOTE),
        (alias("4", 0), AliasVerdict.MOVED),
        (alias(None, 0), AliasVerdict.PROJECT),
        (alias("4", 0, is_being_pointed=True), AliasVerdict.PROJECT),
    ],
)
def test_alias_that_a_person_gave_before_the_first_was_shown(seen: ChampionAlias, verdict: AliasVerdict) -> None:
    assert judge_alias(seen, from_json(FORMAT_1).current) is verdict


def test_policy_is_one_of_two_words(tmp_path: Path) -> None:
    path = tmp_path / "registry.toml"
    assert moved_by_hand(path) == "adopt"
    path.write_text('[champion]\nmoved_by_hand = "revert"\n')
    assert moved_by_hand(path) == "revert"
    for wrong in ('[champion]\nmoved_by_hand = "undo"\n', 'champion = "adopt"\n', "[champion\n"):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"registry\.toml: "):
            moved_by_hand(path)


def test_policy_of_this_project_can_be_read() -> None:
    assert moved_by_hand() == "adopt"
