"""The gate's decision: a pure function of policy, scores and proofs.

All rules must be met. So it takes no correction for their number: a challenger that breaks one of them in truth passes
that one by chance with probability 1 - confidence at most, and the others cannot raise it (intersection-union test;
Berger 1982). More rules only make it harder for a good one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.report import slices_of
from tasks.evaluation.samples import Samples
from tasks.evaluation.statistics import by_record, lower_bound, mcnemar_p, paired_lower_bound, sign_flip_p
from tasks.gate.policy import Better, NotWorse, Policy, Threshold
from training.errors import UserError

EVERYTHING = "all samples"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One rule, and what was found."""

    rule: str
    """`threshold`, `not_worse`, `better`, `ledger` or `drill`."""
    passed: bool
    text: str
    metric: str = ""
    slice: str = ""
    num_samples: int = 0
    challenger: float | None = None
    """Means, and by how much the challenger's is better: negative if it is worse, whichever way the metric goes."""
    champion: float | None = None
    difference: float | None = None
    bound: float | None = None
    """What the true difference is not below, with the policy's confidence."""
    limit: float | None = None
    """What the bound must not be below."""
    p_value: float | None = None
    """Of `better`: McNemar's exact test on a metric that is 0 or 1, else Fisher's test by flipped signs."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether the challenger may be promoted, and why."""

    passed: bool
    reasons: tuple[Reason, ...]


def decide(policy: Policy, challenger: Samples, champion: Samples | None, proofs: Sequence[Reason] = ()) -> Decision:
    """`champion` has scored the same samples; None if the model has none yet, and so nothing to compare with.

    Raises `UserError` naming a metric of the policy that the challenger does not have.
    """
    assert champion is None or champion.ids == challenger.ids, "both must have scored the same samples"
    reasons = [*proofs]
    for threshold in policy.threshold:
        for part in _parts(threshold, "threshold", challenger):
            reasons.append(_not_judged(policy, part) or _within(threshold, part))
    rules: list[NotWorse | Better] = [*policy.not_worse, *policy.better]
    for rule in rules:
        name = "better" if isinstance(rule, Better) else "not_worse"
        if champion is None:
            reasons.append(Reason(rule=name, passed=True, text=f"{name}: there is no champion to compare with"))
            continue
        for part in _parts(rule, name, challenger):
            reasons.append(_not_judged(policy, part) or _compared(policy, rule, part, champion))
    return Decision(passed=all(reason.passed for reason in reasons), reasons=tuple(reasons))


@dataclass(frozen=True)
class _Part:
    """Some samples of the challenger's, to be judged by one rule and in one metric."""

    rule: str
    metric: str
    slice: str
    challenger: Samples
    mask: NDArray[np.bool_]

    def values(self, samples: Samples) -> NDArray[np.float64]:
        return samples.scores[self.metric][self.mask].astype(np.float64)

    def reason(self, *, passed: bool, text: str, **numbers: float | None) -> Reason:
        count = int(self.mask.sum())
        return Reason(
            rule=self.rule,
            metric=self.metric,
            slice=self.slice,
            num_samples=count,
            passed=passed,
            text=f"{self.rule} {self.metric}, {self.slice} ({count}): {text}",
            **numbers,
        )


def _parts(rule: Threshold | NotWorse | Better, name: str, challenger: Samples) -> Iterator[_Part]:
    """What a rule speaks of: all samples, or each of the slices that it names."""
    metric = rule.metric or next(iter(challenger.metrics))
    if metric not in challenger.metrics:
        known = ", ".join(challenger.metrics)
        raise UserError(f"the gate's policy has a rule {name} of metric {metric!r}, and the recipe has {known}")
    if not rule.slices:
        yield _Part(name, metric, EVERYTHING, challenger, np.ones(len(challenger.ids), dtype=np.bool_))
    slices = slices_of(challenger) if rule.slices else {}
    for wanted in rule.slices:
        named = [one for one in slices if wanted in (one, one.partition("=")[0])]
        if not named:
            yield _Part(name, metric, wanted, challenger, np.zeros(len(challenger.ids), dtype=np.bool_))
        for one in named:
            yield _Part(name, metric, one, challenger, slices[one])


def _not_judged(policy: Policy, part: _Part) -> Reason | None:
    """A slice that was asked for and is not there fails; one of too few samples says nothing."""
    count = int(part.mask.sum())
    if count == 0:
        return part.reason(passed=False, text="no held-out sample belongs to it")
    if part.slice != EVERYTHING and count < policy.min_slice_samples:
        return part.reason(
            passed=True, text=f"not judged, of fewer samples than min_slice_samples = {policy.min_slice_samples}"
        )
    return None


def _within(rule: Threshold, part: _Part) -> Reason:
    mean = float(part.values(part.challenger).mean())
    passed = (rule.at_least is None or mean >= rule.at_least) and (rule.at_most is None or mean <= rule.at_most)
    bounds = [f"at least {rule.at_least:g}"] if rule.at_least is not None else []
    bounds += [f"at most {rule.at_most:g}"] if rule.at_most is not None else []
    return part.reason(passed=passed, text=f"{mean:.4f}, {' and '.join(bounds)} is required", challenger=mean)


def _compared(policy: Policy, rule: NotWorse | Better, part: _Part, champion: Samples) -> Reason:
    if part.metric not in champion.scores:
        return part.reason(passed=False, text="the champion has no such score")
    ours, theirs = part.values(part.challenger), part.values(champion)
    better_by = ours - theirs if part.challenger.metrics[part.metric] == "max" else theirs - ours
    records = part.challenger.records()[part.mask]
    mean, won, lost = float(better_by.mean()), int((better_by > 0).sum()), int((better_by < 0).sum())
    values, limit = by_record(better_by, records), _limit(rule, float(theirs.mean()))
    are_shares = set(np.unique([ours, theirs])) <= {0.0, 1.0} and len(values.sums) == len(records)
    if are_shares:
        bound = paired_lower_bound(won, lost, len(records), confidence=policy.confidence)
    else:
        bound = lower_bound(values, num_resamples=policy.resamples, confidence=policy.confidence)
    passed = bound > limit if isinstance(rule, Better) else bound >= limit
    said = f"{ours.mean():.4f} against {theirs.mean():.4f}: better by {mean:+.4f}, and with {policy.confidence:g}"
    text = f"{said} confidence by no less than {bound:+.4f}; {limit:+.4f} is required"
    p_value = None
    if isinstance(rule, Better) and not (are_shares and limit):
        p_value = (
            mcnemar_p(won, lost) if are_shares else sign_flip_p(values, above=limit, num_resamples=policy.resamples)
        )
        passed = passed and p_value <= 1 - policy.confidence
        text += f"; {won} won, {lost} lost, {'McNemar' if are_shares else 'sign-flip'} p {p_value:.4f}"
    return part.reason(
        passed=passed,
        text=text,
        challenger=float(ours.mean()),
        champion=float(theirs.mean()),
        difference=mean,
        bound=bound,
        limit=limit,
        p_value=p_value,
    )


def _limit(rule: NotWorse | Better, champion_mean: float) -> float:
    """What the lower bound of the difference has to reach."""
    if isinstance(rule, Better):
        return rule.by
    if rule.margin is not None:
        return -rule.margin
    assert rule.margin_percent is not None
    return -abs(champion_mean) * rule.margin_percent / 100
