from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medmom.evaluation.metrics import METRICS

DRAWS = 2000
SEED = 0


def summarise(cases: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Means over cases, then over classes, with 95 % bootstrap intervals over patients.

    A draw takes as many patients as there are, with replacement, and all cases of each. Where a draw
    leaves a class without a score, the mean over classes takes the class's mean over all cases: without
    it, draws would differ in the classes they speak of.

    Args:
        cases: Each with ``patient`` and ``scores``, a mapping from class to score to number or None.
        classes: Foreground class names; a class that a case does not have is left out of it.

    Returns:
        ``classes`` (class -> score -> ``mean``, ``low``, ``high``, ``num`` of cases), ``mean`` (score ->
        ``mean``, ``low``, ``high``; ``miou`` is the mean of ``iou``) and ``bootstrap`` (how it was drawn).
        None stands where there is no score, and as interval where there is a single patient.
    """
    patients, group = np.unique([str(case["patient"]) for case in cases], return_inverse=True)
    values = _table(cases, classes)
    known = ~np.isnan(values)
    totals, counts = _by_patient(np.nan_to_num(values), group), _by_patient(known.astype(float), group)
    weights = np.random.default_rng(SEED).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), DRAWS)
    means, drawn = (
        _ratio(w @ totals.reshape(len(patients), -1), w @ counts.reshape(len(patients), -1))
        for w in (np.ones((1, len(patients))), weights)
    )
    means, drawn = (table.reshape(-1, len(classes), len(METRICS)) for table in (means, drawn))
    num_patients = (counts > 0).sum(0)
    rows = {
        name: {
            metric: _interval(means[0, c, m], drawn[:, c, m], int(num_patients[c, m]))
            | {"num": int(known[:, c, m].sum())}
            for m, metric in enumerate(METRICS)
        }
        for c, name in enumerate(classes)
    }
    over, drawn_over = _mean_over_classes(means), _mean_over_classes(np.where(np.isnan(drawn), means, drawn))
    mean = {metric: _interval(over[0, m], drawn_over[:, m], len(patients)) for m, metric in enumerate(METRICS)}
    mean["miou"] = mean["iou"]
    bootstrap = {"draws": DRAWS, "seed": SEED, "level": 0.95, "unit": "patient", "num_patients": len(patients)}
    return {"classes": rows, "mean": mean, "bootstrap": bootstrap}


def format_scores(scores: Mapping[str, Any]) -> str:
    """The table for the terminal: a line a class, their mean, and what was counted.

    Args:
        scores: What ``evaluate`` gives.
    """
    rows = [["class", "dice", "95 % interval", "iou", "recall", "precision", "hd95_mm", "nsd", "cases"]]
    rows += [_row(name, summary, str(summary["dice"]["num"])) for name, summary in scores["classes"].items()]
    rows.append(_row("mean", scores["mean"], str(scores["num_cases"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(len(lines) - 1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *counted(scores)])


def counted(scores: Mapping[str, Any]) -> list[str]:
    """Says how many cases were scored, missed and left out, a sentence an item.

    Args:
        scores: What ``evaluate`` gives.
    """
    lines = [
        f"{_plural(scores['num_cases'], 'case')} of {_plural(scores['bootstrap']['num_patients'], 'patient')}, "
        f"{scores['num_missing']} without a prediction (counted as missed)."
    ]
    empty = [f"{name} in {_plural(num, 'case')}" for name, num in scores["num_both_empty"].items() if num]
    if empty:
        lines.append(f"Empty in prediction and reference, left out: {', '.join(empty)}.")
    return [*lines, *scores.get("notes", [])]


def _table(cases: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> np.ndarray:
    """Scores as an array (cases, classes, metrics), nan where there is none."""
    values = np.full((len(cases), len(classes), len(METRICS)), np.nan)
    for row, case in zip(values, cases, strict=True):
        for c, name in enumerate(classes):
            found = case["scores"].get(name) or {}
            row[c] = [np.nan if found.get(metric) is None else found[metric] for metric in METRICS]
    return values


def _by_patient(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sums (cases, ...) over the cases of each patient."""
    sums = np.zeros((int(group.max()) + 1, *values.shape[1:]))
    np.add.at(sums, group, values)
    return sums


def _ratio(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    return ratio


def _mean_over_classes(means: np.ndarray) -> np.ndarray:
    """Mean of (draws, classes, metrics) over the classes that have one."""
    known = ~np.isnan(means)
    return _ratio(np.nan_to_num(means).sum(1), known.sum(1).astype(float))


def _interval(mean: float, draws: np.ndarray, num_patients: int) -> dict[str, Any]:
    draws = draws[~np.isnan(draws)]
    if np.isnan(mean):
        return {"mean": None, "low": None, "high": None}
    if num_patients < 2:
        return {"mean": float(mean), "low": None, "high": None}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _row(name: str, summary: Mapping[str, Any], count: str) -> list[str]:
    dice = summary["dice"]
    interval = "-" if dice["low"] is None else f"{dice['low']:.3f} to {dice['high']:.3f}"
    cells = [_number(summary[metric]["mean"], 2 if metric == "hd95_mm" else 3) for metric in METRICS[1:]]
    return [name, _number(dice["mean"], 3), interval, *cells, count]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
