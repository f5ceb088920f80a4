"""Guessing topics from what a platform sees: sizes and times, a classifier, and how good it is.

Owns features, classifier and figures. The figure is the area under the precision-recall curve of
"is it this topic?", averaged over the topics; by chance it is about a topic's share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import train_test_split

_SEEN_CHUNKS = 64
_DEALT = 5000


@dataclass(frozen=True)
class Seen:
    """What the platform saw of one answer: each chunk's size, and when it came."""

    topic: str
    sizes: list[int]
    times_s: list[float]
    """Since the worker was given the job."""

    def features(self) -> list[float]:
        """Return what the classifier is given: sizes, gaps and times in order, and their sums."""
        sizes = np.zeros(_SEEN_CHUNKS)
        times = np.zeros(_SEEN_CHUNKS)
        gaps = np.zeros(_SEEN_CHUNKS)
        count = min(len(self.sizes), _SEEN_CHUNKS)
        sizes[:count] = self.sizes[:count]
        times[:count] = self.times_s[:count]
        gaps[:count] = np.diff(self.times_s[:count], prepend=0)
        every = np.diff(self.times_s, prepend=0)
        sums = [len(self.sizes), sum(self.sizes), self.times_s[-1]]
        spread = [*np.quantile(every, (0.1, 0.5, 0.9)), every.std(), np.std(self.sizes)]
        return [*sizes, *times, *gaps, *sums, *map(float, spread)]


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

    The labels of these are independent of the guesses if the features tell nothing, so dealing
    them anew shows what chance is.
    """
    features = np.array([one.features() for one in seen])
    _, labels = np.unique([one.topic for one in seen], return_inverse=True)
    known, unknown = train_test_split(
        range(len(seen)), test_size=0.5, stratify=labels, random_state=seed
    )
    forest = ExtraTreesClassifier(500, min_samples_leaf=2, random_state=seed)
    forest.fit(features[known], labels[known])
    # Best guesses first, topic by topic.
    order = np.argsort(-forest.predict_proba(features[unknown]), axis=0, kind="stable")
    truth = labels[unknown]
    generator = np.random.default_rng(seed)
    dealt = [_auprc(generator.permutation(truth), order) for _ in range(_DEALT)]
    found = _auprc(truth, order)
    low, high = np.quantile(dealt, (0.005, 0.995))
    as_well = sum(other >= found for other in dealt)
    return Guessed(
        found, float(np.mean(dealt)), float(low), float(high), (1 + as_well) / (1 + _DEALT)
    )


def _auprc(truth: Any, order: Any) -> float:
    """Return the mean over the topics of the average precision of their guesses, best first."""
    found = []
    for topic in range(order.shape[1]):
        is_it = truth[order[:, topic]] == topic
        precision = np.cumsum(is_it) / np.arange(1, len(is_it) + 1)
        found.append(precision[is_it].mean())
    return float(np.mean(found))
