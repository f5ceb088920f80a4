"""Guessing topics from what a platform sees: sizes and times, a classifier, and how good it is.

Owns features, classifier and figures. The figure is the area under the precision-recall curve of
"is it this topic?", averaged over the topics; by chance it is about a topic's share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import cross_val_predict, train_test_split

_SEEN_CHUNKS = 64
_DEALT = 5000


@dataclass(frozen=True)
class Seen:
    """What the platform saw of one answer: each chunk's size, and when it came."""

    topic: str
    sizes: list[int]
    times_s: list[float]
    """Since the worker was given the job."""


def _features(seen: Sequence[Seen]) -> list[Any]:
    """Return what a classifier may be given: sizes alone, times alone, or both."""
    sizes = np.array([_first(one.sizes) for one in seen])
    kinds = np.unique(sizes)
    counts = np.array([[(row == kind).sum() for kind in kinds] for row in sizes])
    times = np.array([_first(one.times_s) for one in seen])
    gaps = np.diff(times, prepend=0)
    sums = np.array([[len(one.sizes), sum(one.sizes), one.times_s[-1]] for one in seen])
    by_size = np.hstack([sizes, counts, sums[:, :2]])
    by_time = np.hstack([times, gaps, np.quantile(gaps, (0.1, 0.5, 0.9), axis=1).T, sums[:, 2:]])
    return [by_size, by_time, np.hstack([by_size, by_time])]


def _first(values: Sequence[float]) -> list[float]:
    """Return as many for each answer."""
    return [*values[:_SEEN_CHUNKS], *[0.0] * (_SEEN_CHUNKS - len(values))]


@dataclass(frozen=True)
class Guessed:
    """How well topics were told that the classifier had not seen, and how well by chance."""

    auprc: float
    chance: float
    low: float
    high: float
    """Between these are 99 of 100 answers to labels that were dealt at random."""
    p: float
    """How often such labels are told as well as the true ones."""

    def __str__(self) -> str:
        return f"{self.auprc:.2f} (p {'<' if self.p < 0.001 else '='} {max(self.p, 0.001):.3f})"


def guess(seen: Sequence[Seen], seed: int = 0) -> Guessed:
    """Train on half of each topic's answers, and judge what is guessed of the others.

    What the classifier looks at is what serves it best among the first half.
    The labels of these are independent of the guesses if the features tell nothing, so dealing
    them anew shows what chance is.
    """
    _, labels = np.unique([one.topic for one in seen], return_inverse=True)
    known, unknown = train_test_split(
        range(len(seen)), test_size=0.5, stratify=labels, random_state=seed
    )
    forest = ExtraTreesClassifier(200, min_samples_leaf=2, random_state=seed)

    def told(features: Any) -> float:
        """Return how well these features do among the answers that are known."""
        guesses = cross_val_predict(
            forest, features[known], labels[known], cv=3, method="predict_proba"
        )
        return _auprc(labels[known], _best_first(guesses))

    features = max(_features(seen), key=told)
    forest.fit(features[known], labels[known])
    order = _best_first(forest.predict_proba(features[unknown]))
    truth = labels[unknown]
    generator = np.random.default_rng(seed)
    dealt = [_auprc(generator.permutation(truth), order) for _ in range(_DEALT)]
    found = _auprc(truth, order)
    low, high = np.quantile(dealt, (0.005, 0.995))
    as_well = sum(other >= found for other in dealt)
    return Guessed(
        found, float(np.mean(dealt)), float(low), float(high), (1 + as_well) / (1 + _DEALT)
    )


def _best_first(scores: Any) -> Any:
    """Return for each topic the answers, those first that are likeliest of it."""
    return np.argsort(-scores, axis=0, kind="stable")


def _auprc(truth: Any, order: Any) -> float:
    """Return the mean over the topics of the average precision of their guesses, best first."""
    found = []
    for topic in range(order.shape[1]):
        is_it = truth[order[:, topic]] == topic
        precision = np.cumsum(is_it) / np.arange(1, len(is_it) + 1)
        found.append(precision[is_it].mean())
    return float(np.mean(found))
