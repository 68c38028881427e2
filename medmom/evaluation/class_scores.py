from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from medmom import __version__
from medmom.data.files import read_json
from medmom.errors import MedmomError
from medmom.evaluation.calibration import calibration_error, cross_fitted_probabilities, probabilities, reliability
from medmom.evaluation.class_bootstrap import DRAWS, SEED, draw_scores, interval
from medmom.evaluation.class_counts import CLASS_SCORES, Answers, Scores, brier_terms
from medmom.evaluation.class_listing import Answer, ClassListing, is_class_table, read_class_table
from medmom.evaluation.class_metrics import confusion, definitions, measure, roc
from medmom.evaluation.class_references import check_classes, read_class_references
from medmom.evaluation.class_tables import format_class_scores

__all__ = ["evaluate_classes", "format_class_scores", "is_class_table"]


def evaluate_classes(table: Path, references: Path | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Scores a table of classes against references.

    A case that failed is wrong, see ``definitions``; one without a reference is left out and named. Where the cases
    are those that the run was validated on, the temperature was fitted on them: Brier score and calibration error
    are then of cross-fitted probabilities (``cross_fitted_probabilities``), every other score of the table's.

    Args:
        table: ``classes.csv`` of predict with its JSON file beside it, or the folder of both.
        references: As ``read_class_references`` reads them. None takes those that the JSON file gives.
        progress: Whether to show a bar on standard error.

    Returns:
        What ``scores.json`` holds, in plain JSON types; ``kind`` is "classification", None stands where there is
        no score. ``confusion`` is (K, K) over predicted cases, the reference down and the prediction across, in
        multi-label (K, 2, 2); ``roc`` has the points of the curve by class.

    Raises:
        MedmomError: A file is missing or damaged, a class is unknown, or no case has a reference.
    """
    listing = read_class_table(Path(table))
    notes: list[str] = []
    if references is not None:
        listing, notes = _with_references(listing, Path(references))
    for answer in listing.answers:
        check_classes(f"{listing.path}: {answer.name}", answer.reference, listing.classes)
    cases = [answer for answer in listing.answers if answer.reference is not None]
    if not cases:
        raise MedmomError(f"{listing.path}: no case has a reference. Name a CSV file or a folder of references.")
    groups = [answer.patient for answer in cases]
    answers, calibration = _calibrated(_arrays(cases, listing), cases, listing)
    by_class, overall = measure(answers)
    draws = draw_scores(answers, groups, by_class, progress=progress)
    without = [answer.name for answer in listing.answers if answer.reference is None]
    is_multilabel = listing.classes.is_multilabel
    return {
        "kind": "classification",
        "definitions": definitions(is_multilabel=is_multilabel),
        "classes": list(listing.classes.names),
        "is_multilabel": is_multilabel,
        "num_cases": len(cases),
        "num_failed": int(np.count_nonzero(~answers.answered)),
        "num_flagged": sum(bool(answer.flag) for answer in cases),
        "without_reference": without,
        "summary": _summary(overall, draws[1], len(set(groups))),
        "classes_scores": _class_scores(answers, groups, by_class, draws[0], listing.classes.names),
        "bootstrap": {"draws": DRAWS, "seed": SEED, "level": 0.95, "unit": "patient", "num_patients": len(set(groups))},
        "confusion": confusion(answers).tolist(),
        "reliability": calibration,
        "roc": dict(zip(listing.classes.names, roc(answers), strict=True)),
        "temperature": listing.temperature,
        "cases": [_row(answer, k, answers, listing.classes.names) for k, answer in enumerate(cases)],
        "notes": notes,
        "table": str(listing.path.resolve()),
        "model": listing.model,
        "versions": {
            "medmom": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }


def _with_references(listing: ClassListing, path: Path) -> tuple[ClassListing, list[str]]:
    """The listing with the references of a file or folder, and what of them fits no case."""
    shelf = read_class_references(path, listing.classes)
    answers, used = [], set()
    for answer in listing.answers:
        found = shelf.find(answer)
        used.add(found)
        classes = None if found is None else found.classes
        patient = answer.patient if found is None or found.patient is None else found.patient
        answers.append(replace(answer, reference=classes, patient=patient))
    if used == {None}:
        raise MedmomError(
            f"{path}: has none of the cases of {listing.path}; it names {shelf.references[0].name}, the table "
            f"{listing.answers[0].name}. Give the references of the same images."
        )
    unused = [reference.name for reference in shelf.references if reference not in used]
    notes = [f"{len(unused)} of the references fit no case, such as {unused[0]}."] if unused else []
    return replace(listing, answers=tuple(answers)), notes


def _arrays(cases: Sequence[Answer], listing: ClassListing) -> Answers:
    names = listing.classes.names
    given = np.array([case.probabilities or (math.nan,) * len(names) for case in cases], np.float64)
    targets = np.array([[name in (case.reference or ()) for name in names] for case in cases], np.float64)
    return Answers(given, targets, listing.classes.is_multilabel)


def _calibrated(answers: Answers, cases: Sequence[Answer], listing: ClassListing) -> tuple[Answers, dict[str, Any]]:
    """The answers with the probabilities that calibration is measured on, and its tables before and after scaling."""
    kept, is_multilabel = answers.answered, answers.is_multilabel
    targets = answers.targets[kept]
    answered = [case for case, is_kept in zip(cases, kept, strict=True) if is_kept]
    logits = np.array([case.logits for case in answered]) if all(case.logits for case in answered) else None
    groups, is_seen = [case.patient for case in answered], _is_own_fold(listing)
    before, after = None, answers.probabilities[kept]
    temperatures = [listing.temperature]
    is_cross_fitted = is_seen and logits is not None and len(set(groups)) > 1
    if logits is not None and len(logits):
        before = _calibration(probabilities(logits, 1.0, is_multilabel=is_multilabel), targets, is_multilabel)
        if is_cross_fitted:
            after, pair = cross_fitted_probabilities(logits, targets, groups, is_multilabel=is_multilabel)
            temperatures = list(pair)
    if is_cross_fitted:
        calibrated = np.full(answers.probabilities.shape, np.nan)
        calibrated[kept] = after
        answers = replace(answers, calibrated=calibrated)
    return answers, {
        "before": before,
        "after": _calibration(after, targets, is_multilabel) if len(after) else None,
        "temperatures": temperatures,
        "is_own_fold": is_seen,
        "is_cross_fitted": is_cross_fitted,
    }


def _calibration(given: np.ndarray, targets: np.ndarray, is_multilabel: bool) -> dict[str, Any]:
    bins = reliability(given, targets, is_multilabel=is_multilabel)
    brier = brier_terms(given, targets, is_multilabel=is_multilabel).mean()
    return {"ece": calibration_error(bins), "brier": float(brier), "bins": bins}


def _is_own_fold(listing: ClassListing) -> bool:
    """Whether the temperature was fitted on one of these cases: those that the model's run was validated on."""
    if listing.fold is not None:
        return listing.fold == "validation"
    path = listing.model.get("path") if isinstance(listing.model, Mapping) else None
    if not isinstance(path, str):
        return False
    for place in (Path(path) / "split.json", Path(path).parent / "split.json"):
        if place.is_file():
            split = read_json(place)
            rows = split.get("validation") if isinstance(split, dict) else None
            cases = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            seen = {(row.get("name"), *(row.get("images") or ())[:1]) for row in cases}
            return any((answer.name, *answer.images[:1]) in seen for answer in listing.answers)
    return False


def _summary(overall: Scores, draws: Scores, num_patients: int) -> dict[str, Any]:
    names = ("accuracy", "balanced_accuracy", *CLASS_SCORES, "kappa", "brier", "ece")
    return {
        name: interval(float(overall[name]), draws[name], num_groups=num_patients) for name in names if name in overall
    }


def _class_scores(
    answers: Answers, groups: Sequence[str], points: Scores, draws: Scores, names: Sequence[str]
) -> dict[str, Any]:
    failed = answers.targets[~answers.answered].sum(axis=0)
    rows = {}
    for k, name in enumerate(names):
        patients = {group for group, is_of in zip(groups, answers.targets[:, k], strict=True) if is_of}
        scores = {
            score: interval(float(points[score][k]), draws[score][:, k], num_groups=len(patients))
            for score in CLASS_SCORES
        }
        rows[name] = scores | {
            "num": int(answers.targets[:, k].sum()),
            "num_given": int(answers.decisions[:, k].sum()),
            "num_failed": int(failed[k]),
        }
    return rows


def _row(answer: Answer, k: int, answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """A case; ``doubt`` is the decision about it that was furthest from the truth, if one was wrong."""
    given = [name for name, is_given in zip(names, answers.decisions[k], strict=True) if is_given]
    row = {
        "name": answer.name,
        "patient": answer.patient,
        "image": list(answer.images),
        "item": answer.item,
        "reference": list(answer.reference or ()),
        "predicted": None if answer.probabilities is None else given,
        "right": bool(answers.right[k]),
        "flag": answer.flag,
        "error": answer.error,
    }
    if answer.probabilities is None or row["right"]:
        return row | {"mistake": None}
    # Single-label: the class given. Multi-label: given or left out against the reference, whichever is furthest off.
    wrong = answers.decisions[k] > 0 if not answers.is_multilabel else answers.decisions[k] != answers.targets[k]
    worst = int(np.argmax(np.where(wrong, np.abs(answers.probabilities[k] - answers.targets[k]), -1)))
    return row | {"mistake": {"class": names[worst], "probability": float(answers.probabilities[k, worst])}}
