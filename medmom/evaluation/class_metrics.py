"""Scores of classified images. The one file of this room that knows torch, and only while it scores."""

from __future__ import annotations

import numpy as np

from medmom.evaluation.calibration import BINS, calibration_error, reliability
from medmom.evaluation.class_counts import Answers, Counts, Scores, brier_terms, macro_means

ROC_POINTS = 200


def definitions(*, is_multilabel: bool) -> dict[str, str]:
    """Says in words what each score means, for the files and reports that show them."""
    texts = {
        "accuracy": "Share of images whose class is right.",
        "balanced_accuracy": "Mean of recall over classes.",
        "kappa": "Cohen's kappa: (a - e) / (1 - e), a the accuracy and e the accuracy expected by chance from how "
        "often each class is predicted and referenced.",
        "brier": "Mean over images of the sum over classes of (probability - reference)²; 0 is best, 2 worst.",
        "ece": f"Expected calibration error of the top class, in {BINS} bins of equal width: mean of "
        "|probability - share that was right|, weighted by the number of images in the bin.",
    }
    if is_multilabel:
        del texts["kappa"]
        texts |= {
            "accuracy": "Share of images whose set of classes (probability of 0.5 or more) is exactly right.",
            "balanced_accuracy": "Mean over classes of (sensitivity + specificity) / 2.",
            "brier": "Mean over images and classes of (probability - reference)²; 0 is best, 1 worst.",
            "ece": f"Expected calibration error over every class of every image, in {BINS} bins of equal width: mean "
            "of |probability - share that was true|, weighted by the number of probabilities in the bin.",
        }
    return texts | {
        "precision": "Of the images that were given the class, the share that is of it; 0 where none was given it.",
        "recall": "Of the images of the class, the share that was given it.",
        "f1": "Harmonic mean of precision and recall.",
        "auroc": "Chance that an image of the class is given a higher probability of it than an image without it: "
        "the area under the ROC curve of one class against the rest.",
        "auprc": "Average precision: sum over thresholds of precision times the step in recall.",
        "mean": "Macro means run over the classes that the references have. A class without a reference has no score "
        "(null); AUROC and AUPRC need images with the class and images without it.",
        "failed": "An image that could not be predicted is wrong: it counts in accuracy, recall, F1 and kappa, and is "
        "given no class in precision. AUROC, AUPRC, Brier and calibration error speak of the predicted images.",
        "intervals": "95 % percentile bootstrap over patients, where a draw without a class keeps that class's score "
        "over all cases; none for a single patient, nor for a class that a single patient has.",
    }


def measure(answers: Answers) -> tuple[Scores, Scores]:
    """Scores predictions against references; ``definitions`` says how, nan stands where there is no score.

    Returns:
        Scores of each class, shape (K,): precision, recall, f1, auroc, auprc, balanced_accuracy; and of all,
        shape (): their macro means, accuracy, kappa (single-label), brier and ece.
    """
    by_class, overall = _counts(answers).scores(is_multilabel=answers.is_multilabel)
    by_class |= _areas(answers)
    kept = answers.answered
    judged, targets = answers.judged[kept], answers.targets[kept]
    table = reliability(judged, targets, is_multilabel=answers.is_multilabel)
    terms = brier_terms(judged, targets, is_multilabel=answers.is_multilabel)
    overall |= {
        "brier": np.asarray(terms.mean() if len(terms) else np.nan),
        "ece": np.asarray(calibration_error(table)),
    }
    return by_class, overall | macro_means(by_class)


def confusion(answers: Answers) -> np.ndarray:
    """Counts of the predicted cases.

    Returns:
        Single-label (K, K), the reference down and the prediction across; multi-label (K, 2, 2), of no and yes.
    """
    import torch  # noqa: PLC0415 - whoever scores segmentations shall not wait for it
    from torchmetrics.functional.classification import (  # noqa: PLC0415
        binary_confusion_matrix,
        multiclass_confusion_matrix,
    )

    kept = answers.answered
    # Decisions, not probabilities: to torchmetrics 0.5 is a no, to us a yes.
    given, true = (torch.from_numpy(table[kept].astype(np.int64)) for table in (answers.decisions, answers.targets))
    if answers.is_multilabel:
        counts = [binary_confusion_matrix(given[:, k], true[:, k]).numpy() for k in range(given.shape[1])]
        return np.stack(counts)
    return np.asarray(multiclass_confusion_matrix(given.argmax(1), true.argmax(1), given.shape[1]).numpy())


def roc(answers: Answers) -> list[list[list[float]] | None]:
    """The ROC curve of each class against the rest, thinned to 200 points that lie evenly along it.

    Returns:
        A list a class of (false positive rate, true positive rate) from (0, 0) to (1, 1); None where the predicted
        cases do not lie on both sides.
    """
    import torch  # noqa: PLC0415
    from torchmetrics.functional.classification import binary_roc  # noqa: PLC0415

    curves: list[list[list[float]] | None] = []
    for scores, true in _columns(answers):
        if not 0 < true.sum() < len(true):
            curves.append(None)
            continue
        rates = binary_roc(torch.from_numpy(scores), torch.from_numpy(true))[:2]
        curves.append(_thinned(np.stack([rate.numpy() for rate in rates], axis=1)).round(6).tolist())
    return curves


def _counts(answers: Answers) -> Counts:
    """Counts of all cases, those without a prediction included."""
    matrix, references = confusion(answers), answers.targets.sum(0)
    right, total = np.asarray(answers.right.sum()), np.asarray(float(len(answers.targets)))
    if answers.is_multilabel:
        hits, claims, rejections = matrix[:, 1, 1], matrix[:, :, 1].sum(1), matrix[:, 0, 0]
    else:
        hits, claims = np.diag(matrix), matrix.sum(0)
        rejections = matrix.sum() - matrix.sum(0) - matrix.sum(1) + hits
    return Counts(hits, claims, references, rejections, right, total)


def _areas(answers: Answers) -> Scores:
    """AUROC and AUPRC of each class against the rest, nan where there are not both."""
    import torch  # noqa: PLC0415
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision  # noqa: PLC0415

    areas = np.full((2, answers.targets.shape[1]), np.nan)
    for k, (scores, true) in enumerate(_columns(answers)):
        # Of one kind alone torchmetrics gives 0 and a warning; there is no such score.
        if 0 < true.sum() < len(true):
            pair = torch.from_numpy(scores), torch.from_numpy(true)
            areas[:, k] = float(binary_auroc(*pair)), float(binary_average_precision(*pair))
    return {"auroc": areas[0], "auprc": areas[1]}


def _columns(answers: Answers) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probabilities and references of the predicted cases, class by class."""
    kept = answers.answered
    tables = answers.probabilities[kept].astype(np.float64), answers.targets[kept].astype(np.int64)
    return [tuple(np.ascontiguousarray(table[:, k]) for table in tables) for k in range(tables[0].shape[1])]  # type: ignore[misc]


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most so many points of a rising curve, evenly along it, both ends kept."""
    if len(points) <= ROC_POINTS:
        return points
    way = points.sum(axis=1)
    return points[np.unique(np.searchsorted(way, np.linspace(way[0], way[-1], ROC_POINTS)))]
