"""Means and differences of means with their uncertainty. Pure functions of arrays; the same resamples every time.

Samples of one record are not independent (pieces of one file, say): records are resampled, with all their samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.results import Bin, Calibration, Estimate

Floats = NDArray[np.float64]
NUM_BINS = 15
BISECTIONS = 60


@dataclass(frozen=True)
class ByRecord:
    """Numbers of samples, summed up record by record."""

    sums: Floats
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Of the samples."""
        return float(self.sums.sum() / self.counts.sum())


def by_record(values: NDArray[Any], records: NDArray[np.int64]) -> ByRecord:
    """`values` and the number of each one's record, both of shape [samples]."""
    _, places = np.unique(records, return_inverse=True)
    sums = np.asarray(np.bincount(places, weights=values.astype(np.float64)), dtype=np.float64)
    return ByRecord(sums, np.bincount(places))


def resampled_means(values: ByRecord, num_resamples: int) -> Floats:
    """The mean of the samples in each of so many sets of records, drawn with replacement."""
    generator = np.random.Generator(np.random.PCG64(0))
    size = len(values.sums)
    draws = (generator.integers(0, size, size=size) for _ in range(num_resamples))
    return np.array([values.sums[drawn].sum() / values.counts[drawn].sum() for drawn in draws])


def bootstrap(values: ByRecord, *, num_resamples: int, confidence: float) -> Estimate:
    """The mean and its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means(values, num_resamples), [tail, 1 - tail])
    return Estimate(value=values.mean, low=float(low), high=float(high))


def lower_bound(values: ByRecord, *, num_resamples: int, confidence: float) -> float:
    """What the true mean is not below, with this confidence: the bootstrap's one-sided percentile.

    Differences of two models of like quality are about symmetric and have long tails: there it misses as often as it
    says, where bounds that correct for skewness (BCa, bootstrap-t) miss more often.
    """
    return float(np.quantile(resampled_means(values, num_resamples), 1 - confidence))


def sign_flip_p(values: ByRecord, *, above: float, num_resamples: int) -> float:
    """How probable a mean as far above `above` as this one is, or farther, if each record's difference from it might as
    well have had the other sign, as it might if neither model is better (Fisher's randomization test, one-sided).

    Right for any number of records: it never says less than is true.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    excess = values.sums - above * values.counts
    seen = excess.sum() - 1e-12 * np.abs(excess).sum()  # a sum of the same numbers may round otherwise
    signs = (generator.integers(0, 2, size=len(excess)) * 2 - 1 for _ in range(num_resamples))
    return (1 + sum(bool((excess * sign).sum() >= seen) for sign in signs)) / (1 + num_resamples)


def paired_lower_bound(num_won: int, num_lost: int, num_pairs: int, *, confidence: float) -> float:
    """The same for the difference of two shares of the same samples (Tango 1998), where a bootstrap of few samples
    errs: without one difference among 20 samples, it would be sure that there is none.

    `num_won`: samples that only the first got right; `num_lost`: that only the second did.
    """
    z = NormalDist().inv_cdf(confidence)
    low, high = -1.0, (num_won - num_lost) / num_pairs
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_refuted = _tango(num_won, num_lost, num_pairs, middle) > z
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def _tango(num_won: int, num_lost: int, num_pairs: int, difference: float) -> float:
    """How many standard errors the seen difference lies above this one, which is the true one for the moment."""
    n, d = num_pairs, difference
    b = -num_won - num_lost + (2 * n - num_won + num_lost) * d
    c = -num_lost * d * (1 - d)
    lost = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # the likeliest share of losses then
    variance = n * (2 * lost + d * (1 - d))
    return (num_won - num_lost - n * d) / math.sqrt(variance) if variance > 0 else math.inf


def mcnemar_p(num_won: int, num_lost: int) -> float:
    """McNemar's exact test, one-sided: how probable so many wins or more among the samples that told the two apart are,
    if neither is better."""
    count = num_won + num_lost
    return float(sum(math.comb(count, wins) for wins in range(num_won, count + 1)) / 2**count)


def calibration(confidence: NDArray[Any], is_right: NDArray[np.bool_]) -> Calibration:
    """How far a classifier's confidence is from the share that it gets right: the expected calibration error over 15
    bins of equal width (Guo et al. 2017). Both of shape [samples]; `confidence` from 0 to 1."""
    places = np.minimum((confidence.astype(np.float64) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(places, minlength=NUM_BINS)
    said = np.bincount(places, weights=confidence.astype(np.float64), minlength=NUM_BINS)
    right = np.bincount(places, weights=is_right.astype(np.float64), minlength=NUM_BINS)
    bins = tuple(
        Bin(num_samples=int(count), confidence=float(s / count), accuracy=float(r / count))
        for count, s, r in zip(counts, said, right, strict=True)
        if count
    )
    return Calibration(error=float(np.abs(said - right).sum() / len(places)), bins=bins)


def values_of(column: NDArray[Any]) -> Sequence[int]:
    """The values by which samples are told apart, in order."""
    return [int(value) for value in np.unique(column)]
