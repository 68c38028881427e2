"""Intervals of the scores of classified images, from draws of patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from medmom.evaluation.calibration import BINS, binned_claims
from medmom.evaluation.class_counts import Answers, Counts, Scores, brier_terms, macro_means

DRAWS = 1000
SEED = 0
# So many weights at a time: draws times cases.
CHUNK = 2_000_000


def draw_scores(
    answers: Answers, groups: Sequence[str], by_class: Mapping[str, np.ndarray], *, progress: bool = False
) -> tuple[Scores, Scores]:
    """Scores of 1000 draws; each takes as many patients as there are, with replacement, and all cases of each.

    Where a draw leaves a class without a score, it takes the class's score over all cases: without it, the macro
    means of draws would differ in the classes they speak of.

    Args:
        answers: N cases and K classes.
        groups: The patient of each case.
        by_class: Scores over all cases, of ``measure``.
        progress: Whether to show a bar on standard error.

    Returns:
        As ``measure``, of shape (1000, K) and (1000,).
    """
    _, group = np.unique(np.asarray(groups, str), return_inverse=True)
    tables = _Tables(answers)
    parts = []
    with tqdm(total=DRAWS, desc="intervals", unit="draw", disable=not progress, leave=False) as bar:
        for weights in _weights(group):
            parts.append(tables.scores(weights, by_class))
            bar.update(weights.shape[1])
    return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])


def interval(value: float, draws: np.ndarray, *, num_groups: int) -> dict[str, float | None]:
    """A score with its 95 % percentile interval, None for what there is not.

    Args:
        value: The score, or nan.
        draws: The score in each draw, shape (draws,).
        num_groups: Patients that the score is of; one alone gives no interval.
    """
    known = draws[~np.isnan(draws)]
    if np.isnan(value) or num_groups < 2 or not len(known):
        return {"value": None if np.isnan(value) else float(value), "low": None, "high": None}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _weights(group: np.ndarray) -> Iterator[np.ndarray]:
    """How often each draw takes each case, shape (N, draws), a few draws at a time."""
    rng = np.random.default_rng(SEED)
    num = int(group.max()) + 1
    size = max(1, CHUNK // len(group))
    for start in range(0, DRAWS, size):
        draws = [np.bincount(rng.integers(num, size=num), minlength=num) for _ in range(min(size, DRAWS - start))]
        yield np.stack(draws, axis=1).astype(np.float64)[group]


def _joined(parts: Sequence[Scores]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Tables:
    """What of the cases is the same in every draw; sums over cases are products with the draws' weights."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        kept, given, true = answers.answered, answers.decisions, np.asarray(answers.targets, np.float64)
        neither = kept[:, None] * (1 - given) * (1 - true)
        self.counted = np.concatenate([given * true, given, true, neither, answers.right[:, None]], axis=1)
        self.kept = np.nonzero(kept)[0]
        self.ranked = [_Ranks(answers.probabilities[kept, k], true[kept, k]) for k in range(true.shape[1])]
        judged, is_multilabel = answers.judged[kept], answers.is_multilabel
        self.brier = brier_terms(judged, true[kept], is_multilabel=is_multilabel)
        place, claimed, came_true = binned_claims(judged, true[kept], is_multilabel=is_multilabel)
        self.gaps = np.zeros((len(self.kept), BINS))
        np.add.at(self.gaps, (np.arange(len(self.kept))[:, None], place), claimed - came_true)
        self.num_claims = place.shape[1]

    def scores(self, weights: np.ndarray, points: Mapping[str, np.ndarray]) -> tuple[Scores, Scores]:
        """Scores under weights of shape (N, draws), as ``draw_scores`` gives them."""
        num_classes, kept = self.answers.targets.shape[1], weights[self.kept]
        sums = weights.T @ self.counted
        hits, claims, references, rejections = sums[:, :-1].reshape(-1, 4, num_classes).swapaxes(0, 1)
        counts = Counts(hits, claims, references, rejections, sums[:, -1], weights.sum(axis=0))
        by_class, overall = counts.scores(is_multilabel=self.answers.is_multilabel)
        areas = np.array([ranks.areas(kept) for ranks in self.ranked])
        by_class |= {"auroc": areas[:, 0].T, "auprc": areas[:, 1].T}
        by_class = {name: np.where(np.isnan(table), points[name], table) for name, table in by_class.items()}
        total = kept.sum(axis=0)
        with np.errstate(invalid="ignore"):
            overall["brier"] = self.brier @ kept / total
            # Of a bin, num * |confidence - observed| is |sum of their differences|.
            overall["ece"] = np.abs(self.gaps.T @ kept).sum(axis=0) / (total * self.num_claims)
        return by_class, overall | macro_means(by_class)


class _Ranks:
    """One class's cases from the highest probability down; equal ones make one step of the curves."""

    def __init__(self, scores: np.ndarray, true: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.starts = np.nonzero(np.diff(ranked, prepend=np.inf))[0]
        self.true = true[self.order][:, None]

    def areas(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Area under the ROC curve and average precision under weights (N, draws): shapes (draws,), nan for none."""
        if not len(self.order):
            return np.full(weights.shape[1], np.nan), np.full(weights.shape[1], np.nan)
        ranked = weights[self.order]
        all_steps = np.add.reduceat(ranked, self.starts, axis=0)
        hit_steps = np.add.reduceat(ranked * self.true, self.starts, axis=0)
        hits, seen = hit_steps.cumsum(axis=0), all_steps.cumsum(axis=0)
        num_hits, num_others = hits[-1], seen[-1] - hits[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            # Each step adds a trapezium: its share of the others times the mean height.
            auroc = ((all_steps - hit_steps) * (hits - hit_steps / 2)).sum(axis=0) / (num_hits * num_others)
            precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
            auprc = (hit_steps * precision).sum(axis=0) / num_hits
        is_both = (num_hits > 0) & (num_others > 0)
        return np.where(is_both, auroc, np.nan), np.where(is_both, auprc, np.nan)
