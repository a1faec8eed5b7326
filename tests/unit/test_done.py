"""Results that stages leave for whoever comes next."""

from __future__ import annotations

import json

import pytest

from tasks.done import find_result, keep_result
from tasks.results import Estimate, Evaluation
from training.s3.objectstore import Store

EVALUATION = Evaluation(
    run_key="k",
    num_samples=3,
    confidence=0.9,
    metrics={"loss": Estimate(value=0.5, low=0.25, high=1.0)},
    scores_sha256="s",
)


def test_result_is_found_as_it_was_kept(store: Store) -> None:
    assert find_result(store, "results/a.json", Evaluation) is None
    keep_result(store, "results/a.json", EVALUATION)
    assert find_result(store, "results/a.json", Evaluation) == EVALUATION


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"result": 1}', None])
def test_damaged_result_is_made_anew_and_replaced(
    store: Store, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    keep_result(store, "results/a.json", EVALUATION)
    whole = store.get("results/a.json")
    if damage is None:  # another number, and as well formed
        document = json.loads(whole)
        document["result"]["num_samples"] = 4
        damage = json.dumps(document).encode()
    store.put("results/a.json", damage)
    assert find_result(store, "results/a.json", Evaluation) is None
    assert "results/a.json is damaged" in caplog.text
    keep_result(store, "results/a.json", EVALUATION)
    assert store.get("results/a.json") == whole
