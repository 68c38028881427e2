from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmom.evaluation.metrics import METRICS
from medmom.labels import Labels

TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "recall": "Recall",
    "precision": "Precision",
    "hd95_mm": "HD95 (mm)",
    "nsd": "Surface Dice",
}
DEFINITION_TITLES = TITLES | {
    "surface": "Surfaces",
    "empty": "Empty masks",
    "ignored": "Not annotated",
    "mean": "Means, intervals",
}
# Heights of the dots of a strip in percent, so that near neighbours do not hide each other.
JITTER = (50, 30, 70, 40, 60, 22, 78, 35, 65)


def _number(value: float | None, metric: str) -> str:
    """A score as it is shown: three digits, or millimetres with two; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.2f}" if metric == "hd95_mm" else f"{value:.3f}"


def _interval(summary: Mapping[str, Any], metric: str) -> str:
    """A 95 % interval as it is shown, empty where there is none."""
    if summary.get("low") is None:
        return ""
    return f"{_number(summary['low'], metric)} – {_number(summary['high'], metric)}"


def _case_mean(case: Mapping[str, Any], metric: str) -> float | None:
    """Mean of a score over the classes of a case that have one."""
    values = [found[metric] for found in case["scores"].values() if found[metric] is not None]
    return sum(values) / len(values) if values else None


def ranked(scores: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cases with a prediction and a mean Dice, the best first."""
    means = [(_case_mean(case, "dice"), case) for case in scores["cases"] if not case["missing"]]
    known = [(mean, case) for mean, case in means if mean is not None]
    return [case for _, case in sorted(known, key=lambda pair: (-pair[0], pair[1]["name"]))]


def without_folders(text: str) -> str:
    """The text with each path cut to its file name: a report may travel further than the folders it was made in."""
    return " ".join(Path(word).name + word[len(word.rstrip("/")) :] if "/" in word else word for word in text.split())


def headline(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers at the top of the report."""
    mean, unit = scores["mean"], scores.get("distance_unit", "mm")
    titles = {
        "dice": "Mean Dice",
        "nsd": f"Surface Dice at {scores['nsd_tolerance_mm']:g} {unit}",
        "hd95_mm": f"HD95 in {unit}",
    }
    return [
        {"title": title, "value": _number(mean[metric]["mean"], metric), "interval": _interval(mean[metric], metric)}
        for metric, title in titles.items()
    ]


def class_rows(scores: Mapping[str, Any], labels: Labels) -> list[dict[str, Any]]:
    """A row a class, and the mean over classes as the last."""
    rows = []
    for name in labels.foreground:
        summary = scores["classes"][name]
        rows.append({"name": name, "colour": labels.colour(name), "num": summary["dice"]["num"], **_cells(summary)})
    return [*rows, {"name": "Mean", "colour": None, "num": scores["num_cases"], **_cells(scores["mean"])}]


def case_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a case, the worst first; cases without any score come last."""
    rows = []
    for case in scores["cases"]:
        dice = _case_mean(case, "dice")
        rows.append(
            {
                "name": case["name"],
                "patient": case["patient"],
                "missing": case["missing"],
                "error": case.get("error"),
                "order": 2.0 if dice is None else dice - case["missing"],
                "mean": {metric: _number(_case_mean(case, metric), metric) for metric in ("dice", "nsd", "hd95_mm")},
                "percent": _percent(dice),
                "dice": [_class_cell(case["scores"].get(name)) for name in scores["classes"]],
            }
        )
    return sorted(rows, key=lambda row: (row["order"], row["name"]))


def strip(scores: Mapping[str, Any], labels: Labels) -> dict[str, Any]:
    """Where the Dice of every case lies, in percent of an axis that spans the values found.

    Returns:
        ``ticks`` (place and text) and ``rows`` (a class each, with its dots, mean and interval).
    """
    values = [found["dice"] for case in scores["cases"] for found in case["scores"].values()]
    low = _axis_start([value for value in values if value is not None])
    step = 0.2 if low < 0.45 else 0.1 if low < 0.85 else 0.05
    first, last = math.ceil(low / step - 1e-9), round(1 / step)
    ticks = [{"left": _place(k * step, low), "text": f"{k * step:.2g}"} for k in range(first, last + 1)]
    rows = []
    for name in labels.foreground:
        summary = scores["classes"][name]["dice"]
        rows.append(
            {
                "name": name,
                "colour": labels.colour(name),
                "dots": _dots(scores["cases"], name, low),
                "mean": None if summary["mean"] is None else _place(summary["mean"], low),
                "low": None if summary["low"] is None else _place(max(summary["low"], low), low),
                "high": None if summary["high"] is None else _place(summary["high"], low),
            }
        )
    return {"ticks": ticks, "rows": rows}


def _cells(summary: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    cells = [
        {
            "title": TITLES[metric],
            "value": _number(summary[metric]["mean"], metric),
            "interval": _interval(summary[metric], metric),
        }
        for metric in METRICS
    ]
    return {"cells": cells}


def _class_cell(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"text": "n/a", "percent": None}
    return {"text": _number(found["dice"], "dice"), "percent": _percent(found["dice"])}


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 1)


def _axis_start(values: Sequence[float]) -> float:
    """The tenth below the lowest value, with a fifth of the range at least on the axis."""
    return min(0.8, math.floor(10 * min(values, default=0.0) - 1e-9) / 10) if min(values, default=0.0) > 0 else 0.0


def _place(value: float, low: float) -> float:
    return round(100 * (value - low) / (1 - low), 2)


def _dots(cases: Sequence[Mapping[str, Any]], name: str, low: float) -> list[dict[str, Any]]:
    found = [(case, case["scores"][name]["dice"]) for case in cases if name in case["scores"]]
    known = sorted(((case, dice) for case, dice in found if dice is not None), key=lambda pair: pair[1])
    return [
        {
            "left": _place(dice, low),
            "top": JITTER[k % len(JITTER)],
            "missing": case["missing"],
            "text": f"{case['name']}: {'missed' if case['missing'] else _number(dice, 'dice')}",
        }
        for k, (case, dice) in enumerate(known)
    ]
