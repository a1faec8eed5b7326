"""The gate: what its policy may say, and what it decides of worse, equal and better challengers."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra.settings import PROJECT_ROOT, gate_policy_path
from tasks.drill.subject import code_digest
from tasks.evaluation.samples import Samples
from tasks.gate import judge
from tasks.gate.decide import Decision, decide
from tasks.gate.policy import Policy, load_policy, parse_policy
from training.data.audit import LedgerError
from training.errors import UserError

METRICS = {"accuracy": "max", "loss": "min"}
NUM_LABELS = 4


def samples_of(scores: dict[str, Any], *, per_record: int = 1) -> Samples:
    count = len(next(iter(scores.values())))
    return Samples(
        ids=tuple(f"a.csv:{number // per_record}#{number % per_record}" for number in range(count)),
        scores={"label": np.arange(count) % NUM_LABELS, **{name: np.asarray(score) for name, score in scores.items()}},
        metrics={name: METRICS[name] for name in scores},
        slices=("label",),
    )


def policy_of(text: str) -> Policy:
    return parse_policy(tomllib.loads(f"[default]\nresamples = 400\n{text}"), "digits")


def right(num_wrong: int, *, count: int = 400, first: int = 0) -> Any:
    """1 for each sample but some in a row."""
    accuracy = np.ones(count, dtype=np.float32)
    accuracy[first : first + num_wrong] = 0
    return accuracy


def verdicts(decision: Decision) -> list[tuple[str, str, bool]]:
    return [(reason.rule, reason.slice, reason.passed) for reason in decision.reasons]


# ---- decisions -------------------------------------------------------------------------------------------------------

NOT_WORSE = "[[default.not_worse]]\nmargin = 0.02\n"
BETTER = "[[default.better]]\n"
CHAMPION = samples_of({"accuracy": right(20)})


@pytest.mark.parametrize(
    ("num_wrong", "is_not_worse", "is_better"),
    [(40, False, False), (20, True, False), (5, True, True)],
    ids=["worse", "equal", "better"],
)
def test_worse_equal_and_better_challengers(num_wrong: int, is_not_worse: bool, is_better: bool) -> None:
    challenger = samples_of({"accuracy": right(num_wrong)})
    not_worse = decide(policy_of(NOT_WORSE), challenger, CHAMPION)
    better = decide(policy_of(BETTER), challenger, CHAMPION)
    assert (not_worse.passed, better.passed) == (is_not_worse, is_better)
    (reason,) = not_worse.reasons
    assert reason.difference == pytest.approx((20 - num_wrong) / 400)
    assert reason.limit == -0.02
    assert reason.bound is not None
    assert reason.bound < reason.difference
    assert (reason.bound >= reason.limit) == is_not_worse


def test_reason_names_rule_numbers_and_bound() -> None:
    (reason,) = decide(policy_of(BETTER), samples_of({"accuracy": right(5)}), CHAMPION).reasons
    assert reason.text == (
        "better accuracy, all samples (400): 0.9875 against 0.9500: better by +0.0375, and with 0.95 confidence by no"
        " less than +0.0247; +0.0000 is required; 15 won, 0 lost, McNemar p 0.0000"
    )


def test_better_on_average_but_worse_on_a_slice_is_refused() -> None:
    per_slice = NOT_WORSE + '[[default.not_worse]]\nslices = ["label"]\nmargin = 0.1\n'
    ours = right(0)
    ours[3:80:NUM_LABELS] = 0  # 20 of the 100 of label 3
    theirs = right(0)
    theirs[np.flatnonzero(np.arange(400) % NUM_LABELS != 3)[:50]] = 0
    decision = decide(policy_of(per_slice), samples_of({"accuracy": ours}), samples_of({"accuracy": theirs}))
    assert verdicts(decision) == [
        ("not_worse", "all samples", True),
        ("not_worse", "label=0", True),
        ("not_worse", "label=1", True),
        ("not_worse", "label=2", True),
        ("not_worse", "label=3", False),
    ]
    assert decision.reasons[0].difference > 0  # type: ignore[operator]
    assert not decision.passed


def test_a_smaller_loss_is_a_better_one() -> None:
    theirs = np.random.default_rng(1).lognormal(size=200)
    rule = '[[default.better]]\nmetric = "loss"\n'
    assert decide(policy_of(rule), samples_of({"loss": theirs * 0.9}), samples_of({"loss": theirs})).passed
    assert not decide(policy_of(rule), samples_of({"loss": theirs * 1.1}), samples_of({"loss": theirs})).passed
    percent = "[[default.not_worse]]\nmargin_percent = 10\n"
    slightly, much = samples_of({"loss": theirs * 1.05}), samples_of({"loss": theirs * 1.15})
    assert decide(policy_of(percent), slightly, samples_of({"loss": theirs})).passed
    assert not decide(policy_of(percent), much, samples_of({"loss": theirs})).passed


def test_thresholds_bind_the_first_model_too() -> None:
    rules = BETTER + "[[default.threshold]]\nat_least = 0.9\nat_most = 0.99\n"
    first = decide(policy_of(rules), CHAMPION, None)
    assert first.passed
    assert [reason.text for reason in first.reasons] == [
        "threshold accuracy, all samples (400): 0.9500, at least 0.9 and at most 0.99 is required",
        "better: there is no champion to compare with",
    ]
    assert not decide(policy_of(rules), samples_of({"accuracy": right(41)}), None).passed
    assert not decide(policy_of(rules), samples_of({"accuracy": right(0)}), None).passed


def test_a_slice_that_is_missing_fails_and_a_small_one_is_not_judged() -> None:
    missing = decide(policy_of('[[default.threshold]]\nslices = ["label=9"]\nat_least = 0.5\n'), CHAMPION, None)
    assert verdicts(missing) == [("threshold", "label=9", False)]
    assert "no held-out sample belongs to it" in missing.reasons[0].text
    small = "min_slice_samples = 101\n" + '[[default.threshold]]\nslices = ["label=0"]\nat_least = 1\n'
    (reason,) = decide(policy_of(small), CHAMPION, None).reasons
    assert reason.passed
    assert "not judged" in reason.text


def test_metrics_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="metric 'acuracy', and the recipe has accuracy"):
        decide(policy_of('[[default.better]]\nmetric = "acuracy"\n'), CHAMPION, CHAMPION)
    (reason,) = decide(policy_of(NOT_WORSE), CHAMPION, samples_of({"loss": np.ones(400)})).reasons
    assert not reason.passed
    assert "the champion has no such score" in reason.text


# ---- how often it errs -----------------------------------------------------------------------------------------------

NUM_SIMULATIONS, NUM_SAMPLES = 200, 300


def most_by_chance(rate: float) -> int:
    """Of the simulations: more than so many happen in less than one of a hundred experiments, if `rate` is true."""
    share, count = 0.0, -1
    while share < 0.99:
        count += 1
        share += math.comb(NUM_SIMULATIONS, count) * rate**count * (1 - rate) ** (NUM_SIMULATIONS - count)
    return count


def pairs(seed: int, *, shift: float = 0.0) -> tuple[Samples, Samples]:
    """Two models of one quality (or the first worse by `shift` in accuracy), each with errors of its own."""
    generator = np.random.default_rng(seed)
    difficulty = generator.beta(1, 9, size=NUM_SAMPLES)
    accuracy = [generator.random(NUM_SAMPLES) > difficulty + worse for worse in (shift, 0.0)]
    loss = [difficulty * generator.lognormal(size=NUM_SAMPLES) for _ in range(2)]
    ours, theirs = (
        samples_of({"accuracy": a.astype(np.float32), "loss": b}) for a, b in zip(accuracy, loss, strict=True)
    )
    return ours, theirs


@pytest.mark.parametrize(
    ("rules", "shift"),
    [
        (BETTER, 0.0),
        ('[[default.better]]\nmetric = "loss"\n', 0.0),
        (BETTER + '[[default.better]]\nmetric = "loss"\n', 0.0),
        ("[[default.not_worse]]\nmargin = 0.05\n", 0.05),
    ],
    ids=["accuracy", "loss", "both", "worse by the margin"],
)
def test_false_promotions_are_as_rare_as_stated(rules: str, shift: float) -> None:
    """Of 200 challengers that are no better than the champion (or worse by just the margin)."""
    policy = policy_of(rules)
    promoted = sum(decide(policy, *pairs(seed, shift=shift)).passed for seed in range(NUM_SIMULATIONS))
    assert promoted <= most_by_chance(1 - policy.confidence)


def test_more_rules_make_a_false_promotion_no_likelier() -> None:
    """Worse by the margin on one slice, and better by far on the others: the rule of that slice errs alone."""
    policy = policy_of('[[default.not_worse]]\nslices = ["label"]\nmargin = 0.05\n')
    promoted = 0
    for seed in range(NUM_SIMULATIONS):
        generator = np.random.default_rng(1000 + seed)
        is_bad = np.arange(4 * NUM_SAMPLES) % NUM_LABELS == 0
        ours = generator.random(len(is_bad)) > np.where(is_bad, 0.15, 0.01)
        theirs = generator.random(len(is_bad)) > 0.1
        both = (samples_of({"accuracy": one.astype(np.float32)}) for one in (ours, theirs))
        promoted += decide(policy, *both).passed
    assert promoted <= most_by_chance(1 - policy.confidence)


# ---- policies --------------------------------------------------------------------------------------------------------


def test_built_in_policy_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = load_policy(PROJECT_ROOT / "mlflow" / "gate.toml", "digits")
    assert policy.not_worse[0].margin_percent == 2
    (tmp_path / "unbroken.toml").touch()
    monkeypatch.setenv("UNBROKEN_SETTINGS", str(tmp_path / "unbroken.toml"))
    assert gate_policy_path() == PROJECT_ROOT / "mlflow" / "gate.toml"
    (tmp_path / "unbroken.toml").write_text('[mlflow]\ngate = "our/gate.toml"\n')
    assert gate_policy_path() == tmp_path / "our/gate.toml"
    monkeypatch.setenv("UNBROKEN_MLFLOW_GATE", "/etc/gate.toml")
    assert gate_policy_path() == Path("/etc/gate.toml")


def test_what_is_said_of_one_model_replaces_the_default() -> None:
    document = tomllib.loads("[default]\n[[default.better]]\n[models.digits]\nrequire_drill = true\n")
    assert parse_policy(document, "digits") == Policy(require_drill=True)
    assert len(parse_policy(document, "other").better) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "missing table \\[default\\]"),
        ("default = 3", "default must be a table"),
        ("[default]\n[digits]\n", "unknown key 'digits'"),
        ("models = 3\n[default]", "models must be a table of tables"),
        ("[default]\n[models.digits]\nconfidense = 0.9", "unknown key 'models.digits.confidense' .*'confidence'"),
        ("[default]\nconfidence = 1", "default.confidence = 1|confidence must lie"),
        ("[default]\nconfidence = 1.0", "default: confidence must lie between"),
        ("[default]\nconfidence = 0.99\nresamples = 500", r"default: resamples must be at least 10"),
        ("[default]\nmin_slice_samples = 0", "default: min_slice_samples must be at least 1"),
        ("[default.better]\nby = 1", r"default.better must be a list of tables, as in \[\[default.better\]\]"),
        ("[default]\n[[default.better]]\nby = -1.0", r"default.better\[0\]: by must not be negative"),
        ("[default]\n[[default.not_worse]]", r"default.not_worse\[0\]: needs either margin or margin_percent"),
        ("[default]\n[[default.not_worse]]\nmargin = 1.0\nmargin_percent = 1.0", "needs either"),
        ("[default]\n[[default.threshold]]", r"default.threshold\[0\]: needs at_least, at_most or both"),
        ('[default]\n[[default.threshold]]\nat_least = "much"', r"default.threshold\[0\].at_least = 'much'"),
        ("[default", "Expected"),
    ],
)
def test_wrong_policies_are_named_by_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_policy(path, "digits")
    assert str(error.value).startswith(f"{path}: ")


# ---- proofs ----------------------------------------------------------------------------------------------------------


def test_only_a_green_drill_of_the_same_recipe_and_code_counts() -> None:
    whole = {"unbroken.drill": "green", "unbroken.drill.subject": "s", "unbroken.drill.code": code_digest()}
    assert judge.drill_proof(whole, subject="s").passed
    for changed, says in (
        ({"unbroken.drill": "red"}, "drill: red"),
        ({"unbroken.drill.subject": "t"}, "of another subject"),
        ({"unbroken.drill.code": "c"}, "of another code"),
    ):
        proof = judge.drill_proof(whole | changed, subject="s")
        assert not proof.passed
        assert says in proof.text
    assert "none is attached" in judge.drill_proof({}, subject="s").text


def test_a_ledger_that_does_not_hold_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    version: Any = SimpleNamespace(run_key="k")

    def fail(store: Any, run_key: str) -> None:
        raise LedgerError("step 3 read other samples")

    monkeypatch.setattr(judge, "verify_run", fail)
    proof = judge._ledger(SimpleNamespace(), version)  # type: ignore[arg-type]
    assert (proof.passed, proof.text) == (False, "ledger: step 3 read other samples")
