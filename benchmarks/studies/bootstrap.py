"""Intervals of accuracies and of their differences, from the verdicts on single images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

REPLICATES, LEVEL = 10_000, 0.95
_ABSENT = 9.0
#: Of one network: the numbers of the images, ascending, and whether each is right.
Verdicts = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A mean and its bounds, as shares; of how many images and seeds."""

    mean: float
    low: float
    high: float
    images: int
    seeds: int

    def points(self, sign: bool = True) -> str:
        form = "+.1f" if sign else ".1f"
        return f"{100 * self.mean:{form}} [{100 * self.low:{form}}, {100 * self.high:{form}}]"


def difference(one: Mapping[int, Verdicts], other: Mapping[int, Verdicts]) -> Interval | None:
    """By how much ``one`` is right more often than ``other``, networks by seed: of each seed the two on the same
    images. None where they have no seed or no image in common."""
    pairs: list[Verdicts] = []
    for seed in sorted(one.keys() & other.keys()):
        ids, mine, theirs = np.intersect1d(one[seed][0], other[seed][0], assume_unique=True, return_indices=True)
        if len(ids):
            pairs.append((ids, one[seed][1][mine].astype(float) - other[seed][1][theirs].astype(float)))
    return _interval(pairs) if pairs else None


def accuracy(verdicts: Mapping[int, Verdicts]) -> Interval:
    """The share that is right, over the seeds."""
    return _interval([(ids, right.astype(float)) for ids, right in verdicts.values()])


def _interval(values: list[Verdicts]) -> Interval:
    """The bootstrap's percentiles. Images are drawn anew, the same ones for all seeds that saw them, and then seeds,
    whose spread is widened by sqrt(n / (n - 1)), as that of n draws from n is too narrow. With few seeds the interval
    is still a little narrow: it knows no more seeds than these."""
    every, seeds = np.unique(np.concatenate([ids for ids, _ in values])), len(values)
    table = np.full((len(every), seeds), _ABSENT)
    for seed, (ids, own) in enumerate(values):
        table[np.searchsorted(every, ids), seed] = own
    # Images with the same values in all seeds are as good as one another: their numbers are drawn, not each of them.
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    rng, seen = np.random.default_rng(0), kinds != _ABSENT
    drawn = rng.multinomial(len(every), counts / len(every), size=REPLICATES)
    of_seeds = drawn @ np.where(seen, kinds, 0.0) / np.maximum(drawn @ seen, 1)
    means = of_seeds.mean(1)
    if seeds > 1:
        picked = np.take_along_axis(of_seeds, rng.integers(seeds, size=of_seeds.shape), axis=1).mean(1)
        means = means + (picked - means) * (seeds / (seeds - 1)) ** 0.5
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = float(np.mean([own.mean() for _, own in values]))
    return Interval(mean, float(low), float(high), len(every), seeds)
