"""Of what ranks found wrong at once, one thing is believed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from training.diagnosis.explain import Explainer
from training.errors import DeterministicError

NAN = "step 3: the loss is nan"
BROKEN = "rank 1 of the replica is gone"


def explained(
    monkeypatch: pytest.MonkeyPatch, others: list[Any], **own: Any
) -> tuple[DeterministicError | RuntimeError, Any]:
    """What this rank says in the end, and what it told the others; its own replay finds nothing."""
    told: list[Any] = []

    def texts(own_text: str) -> list[str]:
        told.append(json.loads(own_text))
        return [own_text, *map(json.dumps, others)]

    monkeypatch.setattr("training.diagnosis.explain.texts_of_all_ranks", texts)
    monkeypatch.setattr(Explainer, "of_workers", lambda self, error, *_: error)
    explainer = Explainer.__new__(Explainer)
    explainer._handover = cast(Any, SimpleNamespace(waiting=nullcontext))
    nobody = cast(Any, None)
    return explainer.of_ranks(DeterministicError(NAN), [0], nobody, nobody, **own), told[0]


def test_a_loss_that_nobody_can_explain_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = explained(monkeypatch, [None])
    assert (type(found), str(found), told) == (DeterministicError, NAN, None)


def test_a_connection_that_broke_between_ranks_that_live_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those who have only heard of the loss."""
    found, told = explained(monkeypatch, [None], maybe_broken=BROKEN)
    assert (type(found), str(found)) == (RuntimeError, BROKEN)
    found, _ = explained(monkeypatch, [told])
    assert (type(found), str(found)) == (RuntimeError, BROKEN)


def test_a_record_goes_before_a_connection_that_broke_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = explained(monkeypatch, [["it is bad", ["a:1"], False]], maybe_broken=BROKEN)
    assert isinstance(found, DeterministicError)
    assert (str(found), found.records) == ("it is bad", ("a:1",))
