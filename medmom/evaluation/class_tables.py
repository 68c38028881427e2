"""Scores of classified images as lines and rows, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medmom.evaluation.class_counts import CLASS_SCORES

TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "ece": "Calibration error",
}
DEFINITION_TITLES = TITLES | {"mean": "Macro means", "failed": "Not predicted", "intervals": "Intervals"}
MACRO = "macro mean"
MAX_NAMES = 10


def format_class_scores(scores: Mapping[str, Any]) -> str:
    """The table for the terminal: a line a class, their macro mean, the scores of all, and what was counted.

    Args:
        scores: What ``evaluate_classes`` gives.
    """
    columns = ("f1", "auroc", "auprc", "recall", "precision")
    rows = [["class", "f1", "95 % interval", *columns[1:], "cases"]]
    for name, found in [*scores["classes_scores"].items(), (MACRO, scores["summary"])]:
        num = found.get("num", scores["num_cases"])
        cells = [_number(found[score]["value"]) for score in columns]
        rows.append([name, cells[0], _interval(found["f1"], " to ") or "-", *cells[1:], str(num)])
    lines = _aligned(rows)
    lines.insert(len(lines) - 1, "-" * max(map(len, lines)))
    overall = [
        [TITLES[name].lower(), _number(found["value"]), _interval(found, " to ")]
        for name, found in scores["summary"].items()
        if name not in CLASS_SCORES
    ]
    return "\n".join([*lines, "", *_aligned(overall), "", *counted(scores)])


def counted(scores: Mapping[str, Any]) -> list[str]:
    """Says how many cases were scored, failed and left out, and what calibration was measured on.

    Args:
        scores: What ``evaluate_classes`` gives.

    Returns:
        A sentence an item.
    """
    patients = scores["bootstrap"]["num_patients"]
    lines = [
        f"{_plural(scores['num_cases'], 'case')} of {_plural(patients, 'patient')}, "
        f"{scores['num_failed']} not predicted (counted as wrong), {scores['num_flagged']} flagged."
    ]
    absent = [name for name, found in scores["classes_scores"].items() if not found["num"]]
    if absent:
        lines.append(f"Without a reference, so without scores: {_listed(absent)}.")
    if scores["without_reference"]:
        names = scores["without_reference"]
        lines.append(f"{_plural(len(names), 'case')} without a reference, left out: {_listed(names)}.")
    return [*lines, *_calibration(scores["reliability"]), *scores.get("notes", [])]


def headline(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers at the top of the report."""
    summary = scores["summary"]
    first = "auroc" if scores["is_multilabel"] else "balanced_accuracy"
    second = "f1" if scores["is_multilabel"] else "auroc"
    titles = {first: TITLES[first], second: f"Macro {TITLES[second]}", "ece": "Calibration error"}
    if scores["is_multilabel"]:
        titles[first] = "Macro AUROC"
    return [
        {"title": title, "value": _number(summary[name]["value"], "–"), "interval": _interval(summary[name])}
        for name, title in titles.items()
    ]


def summary_rows(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each score of all cases, with its interval."""
    return [
        {
            "title": f"Macro {TITLES[name]}" if name in CLASS_SCORES else TITLES[name],
            "value": _number(found["value"], "–"),
            "interval": _interval(found),
        }
        for name, found in scores["summary"].items()
    ]


def score_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a class, and the macro mean as the last."""
    found = [*scores["classes_scores"].items(), (MACRO, scores["summary"])]
    return [
        {
            "name": name,
            "is_mean": k == len(found) - 1,
            "num": row.get("num", scores["num_cases"]),
            "num_given": row.get("num_given", ""),
            "cells": [
                {
                    "title": TITLES[score],
                    "value": _number(row[score]["value"], "–"),
                    "interval": _interval(row[score]),
                }
                for score in CLASS_SCORES
            ],
        }
        for k, (name, row) in enumerate(found)
    ]


def _calibration(found: Mapping[str, Any]) -> list[str]:
    before, after = found["before"], found["after"]
    if before is None or after is None:
        return []
    temperatures = " and ".join(f"{value:.3g}" for value in found["temperatures"])
    change = f"{before['ece']:.3f} before temperature scaling, {after['ece']:.3f} after"
    lines = [f"Calibration error {change} (T = {temperatures})."]
    if found["is_cross_fitted"]:
        lines.append(
            "The model's temperature was fitted on these validation cases; calibration after scaling is therefore "
            "cross-fitted: two halves by patient, each scaled by the temperature of the other."
        )
    elif found["is_own_fold"]:
        lines.append("The model's temperature was fitted on these cases: their calibration after scaling is flattered.")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _number(value: float | None, nothing: str = "-") -> str:
    return nothing if value is None else f"{value:.3f}"


def _interval(found: Mapping[str, Any], between: str = " – ") -> str:
    return "" if found["low"] is None else f"{found['low']:.3f}{between}{found['high']:.3f}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
