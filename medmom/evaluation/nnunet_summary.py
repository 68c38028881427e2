"""Scores in the form of nnU-Net's ``summary.json``, for tools that read that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmom.data.atomic import write_text
from medmom.errors import MedmomError

METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")

NAN = float("nan")


def write_summary(path: str | Path, scores: Mapping[str, Any]) -> None:
    """Writes the ``summary.json`` of nnU-Net v2: ``foreground_mean``, ``mean`` and ``metric_per_case``.

    Classes go by the values they are stored by in the predictions. Rules are nnU-Net's, which differ from those of
    ``scores.json``: Dice and IoU are nan (which JSON does not know; nnU-Net writes and reads ``NaN``) where a class is
    in neither label map, means over cases leave nan out, the mean over classes does not. nnU-Net has no case without a
    prediction; here it counts as one whose label map is empty, and its ``prediction_file`` is null. Classes that are
    not annotated in a case are left out of it, those that the references do not have out of everything.

    Args:
        path: The file; replaced if it is there.
        scores: What ``evaluate`` gives, or the content of ``scores.json``.

    Raises:
        MedmomError: The scores hold no counts of voxels, as those of whole images, or the file cannot be written.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; the form is that of nnunetv2 2.8.
    """
    if not all("counts" in case for case in scores.get("cases", [{}])):
        raise MedmomError(f"{path}: a summary needs counts of voxels. Score label maps anew with medmom evaluate.")
    table = scores["labels"]
    values = {name: str(value) for name, value in zip(table["names"], table["values"], strict=True)}
    cases = [_case(case, values) for case in scores["cases"]]
    # A class that the references do not have is in no case.
    found = [value for value in values.values() if any(value in case["metrics"] for case in cases)]
    mean = {value: _mean_over_cases(value, cases) for value in found}
    overall = {metric: _mean([row[metric] for row in mean.values()]) for metric in METRICS}
    summary = {"foreground_mean": overall, "mean": mean, "metric_per_case": cases}
    write_text(path, json.dumps(summary, indent=4, sort_keys=True, ensure_ascii=False) + "\n")


def _case(case: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    metrics = {values[name]: _metrics(**counts) for name, counts in case["counts"].items()}
    return {"metrics": metrics, "prediction_file": case["prediction"], "reference_file": case["reference"]}


def _metrics(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    num = tp + fp + fn
    return {
        "Dice": 2 * tp / (num + tp) if num else NAN,
        "IoU": tp / num if num else NAN,
        "FP": fp,
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "n_pred": fp + tp,
        "n_ref": fn + tp,
    }


def _mean_over_cases(value: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rows = [case["metrics"][value] for case in cases if value in case["metrics"]]
    return {metric: _mean([row[metric] for row in rows if not math.isnan(row[metric])]) for metric in METRICS}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else NAN
