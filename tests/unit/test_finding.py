"""A run by the beginning of its key: the only one, or a refusal that says which there are."""

from __future__ import annotations

import pytest

from tests.unit.fakes import MemoryStore
from training.errors import DamagedError, UserError
from training.runs.finding import all_runs, find_run
from training.runs.record import RunRecord

KEYS = ("aa11", "aa22", "bb33")


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore({"runs/aa0/identity.json": b"{}"})
    for key in KEYS:
        RunRecord(store, key).create_if_missing()
    return store


@pytest.mark.parametrize("beginning", ["b", "bb33"])
def test_the_only_one_is_found(store: MemoryStore, beginning: str) -> None:
    assert find_run(store, beginning).run_key == "bb33"


@pytest.mark.parametrize(
    ("beginning", "found"),
    [
        ("", "must not be empty"),
        ("c", "no run with a key that begins with 'c': see"),
        ("bb333", "no run"),
        ("aa", r"2 runs with a key that begins with 'aa' \(aa11, aa22\)"),
    ],
)
def test_none_and_several_are_refused(store: MemoryStore, beginning: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        find_run(store, beginning)


def test_a_run_whose_record_was_removed_is_listed_but_is_not_found(store: MemoryStore) -> None:
    assert [run.run_key for run in all_runs(store)] == ["aa0", *KEYS]
    with pytest.raises(UserError, match="no run"):
        find_run(store, "aa0")


def test_a_damaged_record_is_named(store: MemoryStore) -> None:
    store.put("runs/bb33/record.json", b"{}")
    with pytest.raises(DamagedError, match="runs/bb33/record"):
        find_run(store, "b")
    assert find_run(store, "aa11").run_key == "aa11"
