"""Whether a probability of 0.8 comes true in eight of ten images, and what mends it where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

BINS = 15
BOUNDS = (0.05, 20.0)
"""Least and largest temperature."""


def probabilities(logits: np.ndarray, temperature: float, *, is_multilabel: bool) -> np.ndarray:
    """Softmax (or sigmoid) of logits over a temperature.

    Args:
        logits: Shape (..., K), of any size: nothing overflows.
        temperature: Above 0; 1 leaves the logits as they are, more makes probabilities milder.
        is_multilabel: Whether each class stands for itself (sigmoid), else the K add up to 1.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    scaled = np.asarray(logits, np.float64) / temperature
    return np.asarray(expit(scaled) if is_multilabel else softmax(scaled, axis=-1))


def fit_temperature(logits: np.ndarray, targets: np.ndarray, *, is_multilabel: bool) -> float:
    """Temperature T under which the references are most likely: the least mean of -log p(reference; logits / T).

    Fit it on images that the network was not trained on. The loss is convex in 1 / T, so that the search over
    log T, from 0.05 to 20, finds the one minimum. Where every decision is right the loss only falls with T, no
    minimum is there to be found, and T is 1; without any case it is 1 as well.

    Args:
        logits: Shape (N, K), finite.
        targets: 0 or 1 of the same shape; in single-label one 1 a row.
        is_multilabel: As in ``probabilities``; the loss is then binary cross-entropy.

    Source:
        Guo et al. 2017, arXiv 1706.04599, section 4.2, temperature scaling.
    """
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    if not len(logits) or _is_all_right(logits, targets, is_multilabel):
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if is_multilabel:
            return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))
        return float(-np.mean(np.sum(targets * log_softmax(scaled, axis=1), axis=1)))

    low, high = np.log(BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def cross_fitted_probabilities(
    logits: np.ndarray, targets: np.ndarray, groups: Sequence[str], *, is_multilabel: bool, seed: int = 0
) -> tuple[np.ndarray, tuple[float, float]]:
    """Probabilities of two halves of the cases, each under the temperature fitted on the other half.

    A temperature fitted on the cases that are then scored flatters their calibration: this shows what such a
    temperature does to cases that it has not seen. No patient lies in both halves.

    Args:
        logits: Shape (N, K).
        targets: 0 or 1 of the same shape.
        groups: What must stay in one half, such as the patient of each case.
        is_multilabel: As in ``probabilities``.
        seed: Of the division into halves.

    Returns:
        Probabilities of shape (N, K), and the temperatures that the first and the second half were given.

    Raises:
        ValueError: There is a single group.
    """
    names, group, sizes = np.unique(np.asarray(groups, str), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError("a single patient cannot be divided into two halves")
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    is_second = np.empty(len(names), bool)
    is_second[order] = before >= len(group) / 2
    # One patient may have more than half of all cases.
    is_second[order[-1]] = True
    second = is_second[group]
    result = np.empty(np.shape(logits))
    temperatures = []
    for half in (~second, second):
        temperature = fit_temperature(logits[~half], targets[~half], is_multilabel=is_multilabel)
        result[half] = probabilities(logits[half], temperature, is_multilabel=is_multilabel)
        temperatures.append(temperature)
    return result, (temperatures[0], temperatures[1])


def binned_claims(
    probabilities: np.ndarray, targets: np.ndarray, *, is_multilabel: bool, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What calibration speaks of: single-label the top class of each case, multi-label every class of each.

    Args:
        probabilities: Shape (N, K).
        targets: 0 or 1 of the same shape.
        is_multilabel: Whether each class stands for itself.
        bins: Number of bins of equal width from 0 to 1; a bin holds its lower edge, the last one both.

    Returns:
        Number of the bin (from 0), probability, and 0 or 1 for what came true; shape (N, 1), or (N, K) in multi-label.
    """
    tables = [np.asarray(table, np.float64) for table in (probabilities, targets)]
    if not is_multilabel:
        top = tables[0].argmax(axis=1)[:, None]
        tables = [np.take_along_axis(table, top, axis=1) for table in tables]
    claimed, true = tables
    place = np.searchsorted(np.linspace(0, 1, bins + 1), claimed, side="right") - 1
    return np.clip(place, 0, bins - 1), claimed, true


def reliability(
    probabilities: np.ndarray, targets: np.ndarray, *, is_multilabel: bool, bins: int = BINS
) -> list[dict[str, Any]]:
    """How often what was claimed came true, bin by bin; ``binned_claims`` says which probabilities count.

    Args:
        probabilities: Shape (N, K).
        targets: 0 or 1 of the same shape.
        is_multilabel: Whether each class stands for itself.
        bins: Number of bins.

    Returns:
        A row a bin: ``low``, ``high``, ``num`` of probabilities, ``confidence`` (their mean) and ``observed``
        (share that came true), both None in an empty bin.
    """
    found = binned_claims(probabilities, targets, is_multilabel=is_multilabel, bins=bins)
    place, claimed, true = (table.ravel() for table in found)
    num, confidence, observed = (np.bincount(place, weights, bins) for weights in (None, claimed, true))
    edges = np.linspace(0, 1, bins + 1)
    return [
        {
            "low": float(edges[k]),
            "high": float(edges[k + 1]),
            "num": int(num[k]),
            "confidence": float(confidence[k] / num[k]) if num[k] else None,
            "observed": float(observed[k] / num[k]) if num[k] else None,
        }
        for k in range(bins)
    ]


def calibration_error(table: Sequence[Mapping[str, Any]]) -> float:
    """Expected calibration error: mean of |confidence - observed| over bins, weighted by their ``num``.

    Args:
        table: What ``reliability`` gives.

    Returns:
        A number in [0, 1]; nan of empty bins alone.

    Source:
        Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602; Guo et al. 2017, equation 3.
    """
    total = sum(row["num"] for row in table)
    gaps = [row["num"] * abs(row["confidence"] - row["observed"]) for row in table if row["num"]]
    return float(sum(gaps) / total) if total else float("nan")


def _is_all_right(logits: np.ndarray, targets: np.ndarray, is_multilabel: bool) -> bool:
    if is_multilabel:
        return bool(np.all((logits > 0) == (targets > 0)))
    return bool(np.all(logits.max(axis=1) <= (logits * targets).sum(axis=1)))
