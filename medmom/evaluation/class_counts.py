"""Classified images as arrays, and the scores that follow from counting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CLASS_SCORES = ("precision", "recall", "f1", "auroc", "auprc")
"""Names of the scores of one class, in the order in which they are shown."""

Scores = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Answers:
    """Predictions and references of N cases and K classes.

    Attributes:
        probabilities: Shape (N, K); a row of nan is a case that could not be predicted.
        targets: 0 or 1, shape (N, K); in single-label one 1 a row.
        is_multilabel: Whether an image may be of any number of classes.
        calibrated: Probabilities that Brier score and calibration error are of, where they are others.
    """

    probabilities: np.ndarray
    targets: np.ndarray
    is_multilabel: bool
    calibrated: np.ndarray | None = None

    @cached_property
    def answered(self) -> np.ndarray:
        """Which cases have a prediction, shape (N,)."""
        return np.asarray(~np.isnan(self.probabilities).any(axis=1))

    @cached_property
    def decisions(self) -> np.ndarray:
        """Classes given, 0 or 1, shape (N, K): the top one (of equals the first), or all of 0.5 and more."""
        if self.is_multilabel:
            return np.asarray(np.nan_to_num(self.probabilities) >= 0.5, np.float64)
        given = np.zeros(self.probabilities.shape)
        (rows,) = np.nonzero(self.answered)
        given[rows, self.probabilities[rows].argmax(axis=1)] = 1
        return given

    @cached_property
    def right(self) -> np.ndarray:
        """Cases of which everything is right, 0 or 1, shape (N,)."""
        return np.asarray(self.answered & (self.decisions == self.targets).all(axis=1), np.float64)

    @property
    def judged(self) -> np.ndarray:
        """Probabilities for Brier score and calibration error, shape (N, K)."""
        return self.probabilities if self.calibrated is None else self.calibrated


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of cases, or sums of their weights; of shape (..., K), the last two of shape (...).

    Attributes:
        hits: Of the class and given it.
        claims: Given the class.
        references: Of the class, cases without a prediction among them.
        rejections: Predicted, not of the class and not given it.
        right: Cases of which everything is right.
        total: All cases.
    """

    hits: np.ndarray
    claims: np.ndarray
    references: np.ndarray
    rejections: np.ndarray
    right: np.ndarray
    total: np.ndarray

    def scores(self, *, is_multilabel: bool) -> tuple[Scores, Scores]:
        """Gives what counts tell, nan where there is no score: of each class, shape (..., K), and of all, (...)."""
        recall = _ratio(self.hits, self.references)
        is_there = self.references > 0
        by_class = {
            "precision": np.where(is_there, np.nan_to_num(_ratio(self.hits, self.claims)), np.nan),
            "recall": recall,
            "f1": np.where(is_there, _ratio(2 * self.hits, self.claims + self.references), np.nan),
        }
        overall = {"accuracy": _ratio(self.right, self.total)}
        if is_multilabel:
            specificity = _ratio(self.rejections, self.total[..., None] - self.references)
            return by_class | {"balanced_accuracy": (recall + specificity) / 2}, overall
        chance = (self.claims * self.references).sum(-1) / self.total**2
        overall["kappa"] = _ratio(overall["accuracy"] - chance, 1 - chance)
        return by_class | {"balanced_accuracy": recall}, overall


def macro_means(by_class: Mapping[str, np.ndarray]) -> Scores:
    """Means over the classes that have a score, shape (...) from (..., K); nan where none has.

    Classes are last; the mean of no class is nan.
    """
    means = {}
    for name, table in by_class.items():
        is_known = ~np.isnan(table)
        means[name] = _ratio(np.nan_to_num(table).sum(-1), is_known.sum(-1).astype(np.float64))
    return means


def brier_terms(probabilities: np.ndarray, targets: np.ndarray, *, is_multilabel: bool) -> np.ndarray:
    """Each case's part of the Brier score, shape (N,) from (N, K).

    Source:
        Brier 1950, Monthly Weather Review 78(1): the sum of squares over classes; over several labels, their mean.
    """
    squares = (probabilities - targets) ** 2
    return np.asarray(squares.mean(axis=1) if is_multilabel else squares.sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotient, nan where the whole is not above 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    quotient: np.ndarray = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return quotient
