"""What a statistician makes of scores: intervals, slices, calibration, and the file that keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.evaluation import samples as kept
from tasks.evaluation.report import MAX_SLICES, slices_of, summarize
from tasks.evaluation.samples import Samples, find_or_score, from_parquet, scores_key, to_parquet
from tasks.evaluation.scoring import _checked, joined
from tasks.evaluation.statistics import (
    bootstrap,
    by_record,
    calibration,
    lower_bound,
    mcnemar_p,
    paired_lower_bound,
    sign_flip_p,
)
from tests.unit.tiny import Tiny
from training.config import EvaluateConfig
from training.errors import DeterministicError, UserError
from training.s3.objectstore import Store

CONFIG = EvaluateConfig(bootstrap_samples=200)


def samples_of(scores: dict[str, Any], *, slices: tuple[str, ...] = (), per_record: int = 1) -> Samples:
    columns = {name: np.asarray(score) for name, score in scores.items()}
    count = len(next(iter(columns.values())))
    ids = tuple(f"a.csv:{number // per_record}#{number % per_record}" for number in range(count))
    return Samples(ids=ids, scores=columns, metrics={"accuracy": "max"}, slices=slices)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_interval_is_that_of_the_plain_bootstrap_if_each_record_is_one_sample() -> None:
    values = np.random.default_rng(3).normal(size=57).astype(np.float32)
    found = bootstrap(by_record(values, np.arange(57)), num_resamples=300, confidence=0.9)
    generator = np.random.Generator(np.random.PCG64(0))
    wide = values.astype(np.float64)
    means = [wide[generator.integers(0, 57, size=57)].mean() for _ in range(300)]
    tail = (1 - 0.9) / 2
    assert (found.value, found.low, found.high) == (wide.mean(), *np.quantile(means, [tail, 1 - tail]))


def test_samples_of_one_record_do_not_make_it_surer() -> None:
    values = np.random.default_rng(3).normal(size=40)
    once = bootstrap(by_record(values, np.arange(40)), num_resamples=300, confidence=0.9)
    thrice = bootstrap(by_record(np.repeat(values, 3), np.repeat(np.arange(40), 3)), num_resamples=300, confidence=0.9)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_lower_bound_holds_as_often_as_it_says_for_long_tails() -> None:
    generator = np.random.default_rng(5)
    draws = [generator.lognormal(size=60) - generator.lognormal(size=60) for _ in range(200)]
    bounds = [lower_bound(by_record(one, np.arange(60)), num_resamples=300, confidence=0.9) for one in draws]
    assert 0.84 <= np.mean([bound <= 0 for bound in bounds]) <= 0.96
    assert lower_bound(by_record(np.full(9, 0.25), np.arange(9)), num_resamples=100, confidence=0.9) == 0.25


def test_flipped_signs_are_as_probable_as_coins() -> None:
    """Of five equal differences all have one sign in 1 of 32; of none, always."""
    same = by_record(np.full(5, 0.1), np.arange(5))
    assert sign_flip_p(same, above=0, num_resamples=3200) == pytest.approx(1 / 32, abs=0.01)
    assert sign_flip_p(same, above=0.1, num_resamples=100) == 1
    pieces = by_record(np.full(10, 0.1), np.repeat(np.arange(5), 2))
    assert sign_flip_p(pieces, above=0, num_resamples=3200) == pytest.approx(1 / 32, abs=0.01), "by record"


def test_shares_of_few_samples_have_a_bound_although_nothing_differs() -> None:
    z2 = 1.6448536269514722**2
    assert paired_lower_bound(0, 0, 20, confidence=0.95) == pytest.approx(-z2 / (20 + z2))
    assert paired_lower_bound(30, 5, 100, confidence=0.95) < paired_lower_bound(300, 50, 1000, confidence=0.95) < 0.25
    bounds = [paired_lower_bound(won, 12 - won, 80, confidence=0.95) for won in range(13)]
    assert bounds == sorted(bounds)


def test_mcnemars_test_counts_coins() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(5, 0) == 1 / 32
    assert mcnemar_p(3, 2) == 16 / 32


def test_calibration_error_is_the_gap_between_said_and_true() -> None:
    said, right = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 1.0, 0.0]), np.array([1, 1, 1, 0, 1, 0, 1, 0], dtype=bool)
    found = calibration(said, right)
    assert found.error == pytest.approx(4 / 8 * 0.15)
    assert [one.num_samples for one in found.bins] == [1, 2, 4, 1]
    assert [one.accuracy for one in found.bins] == [0, 0.5, 0.75, 1]


# ---- the report ------------------------------------------------------------------------------------------------------


def test_each_value_of_a_slice_is_judged_by_itself() -> None:
    samples = samples_of({"accuracy": [1, 0, 1, 1], "label": [2, 0, 2, 0]}, slices=("label",))
    found = summarize(samples, CONFIG, "key", "sha")
    assert [(one.name, one.num_samples, one.metrics["accuracy"].value) for one in found.slices] == [
        ("label=0", 2, 0.5),
        ("label=2", 2, 1.0),
    ]
    assert found.metrics["accuracy"].value == 0.75
    assert found.calibration is None
    assert found.confusion is None


def test_a_score_of_too_many_values_tells_nothing_apart(caplog: pytest.LogCaptureFixture) -> None:
    count = MAX_SLICES + 1
    assert slices_of(samples_of({"accuracy": np.ones(count), "word": np.arange(count)}, slices=("word",))) == {}
    assert f"word has {count} values" in caplog.text


def test_confidence_beside_label_and_predicted_gives_calibration() -> None:
    scores = {"accuracy": [1.0, 0.0], "label": [0, 1], "predicted": [0, 0], "confidence": [0.75, 0.75]}
    found = summarize(samples_of(scores), CONFIG, "key", "sha").calibration
    assert found is not None
    assert found.error == pytest.approx(0.25)
    with pytest.raises(UserError, match="`confidence` that is not between 0 and 1"):
        summarize(samples_of(scores | {"confidence": [0.5, 1.5]}), CONFIG, "key", "sha")


# ---- scores ----------------------------------------------------------------------------------------------------------


class Sliced(Tiny):
    slices = ("region",)


LOSS = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("recipe", "scores", "says"),
    [
        (Tiny(), {"accuracy": LOSS}, r"scores\(\) lacks loss"),
        (Sliced(), {"loss": LOSS}, r"scores\(\) lacks region"),
        (Sliced(), {"loss": LOSS, "region": LOSS}, "'region', which .* torch.float32: whole numbers"),
        (Tiny(), {"loss": LOSS.sum()}, r"'loss' of shape \[\] for 2 samples"),
        (Tiny(), {"loss": LOSS, "id": LOSS}, "'id', which names a column of ours"),
        (Tiny(), {"loss": LOSS / torch.tensor([1.0, 0.0])}, "sample b#0: the recipe's 'loss' is inf"),
    ],
)
def test_scores_that_cannot_be_judged_are_named(recipe: Tiny, scores: dict[str, Tensor], says: str) -> None:
    with pytest.raises((UserError, DeterministicError), match=says):
        _checked(recipe, scores, ["a#0", "b#0"])


def test_parquet_gives_back_what_it_was_given() -> None:
    samples = samples_of({"accuracy": np.float32([1, 0.5]), "label": [1, 7], "flag": [True, False]}, slices=("label",))
    data = to_parquet(samples)
    found = from_parquet(data)
    assert to_parquet(found) == data
    assert (found.ids, found.metrics, found.slices) == (samples.ids, samples.metrics, samples.slices)
    assert all((found.scores[name] == score).all() for name, score in samples.scores.items())
    assert found.records().tolist() == [0, 1]


def test_parts_are_put_together_in_their_order_although_one_is_empty() -> None:
    whole = samples_of({"accuracy": [0.0, 1.0, 0.5], "label": [1, 2, 1]}, slices=("label",))
    cuts = ((0, 1), (1, 1), (1, 3))
    parts = [
        Samples(
            ids=whole.ids[start:stop],
            scores={name: score[start:stop] for name, score in whole.scores.items()} if stop > start else {},
            metrics=whole.metrics,
            slices=whole.slices if stop > start else (),
        )
        for start, stop in cuts
    ]
    assert to_parquet(joined([from_parquet(to_parquet(part)) for part in parts])) == to_parquet(whole)


def test_kept_scores_are_found_again_unless_damaged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    whole, asked = samples_of({"accuracy": [0.0, 1.0]}), []

    def find(weights: str = "w") -> str:
        def score() -> Samples:
            asked.append(weights)
            return whole

        sha256, found = find_or_score(
            store, run_key="k", weights_sha256=weights, dataset_digest="d", config=CONFIG, score=score
        )
        assert to_parquet(found) == to_parquet(whole)
        return sha256

    sha256 = find()
    assert (find(), asked) == (sha256, ["w"])
    store.put(scores_key("k", sha256), b"PAR1")
    assert (find(), asked) == (sha256, ["w", "w"])
    assert "is damaged" in caplog.text
    assert (find(), asked) == (sha256, ["w", "w"])
    assert find("other") == sha256
    assert asked == ["w", "w", "other"]


def test_scores_of_another_format_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FORMAT", "9")
    data = to_parquet(samples_of({"accuracy": [1.0]}))
    monkeypatch.undo()
    with pytest.raises(Exception, match="scores of format '9'"):
        from_parquet(data)
