from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import scipy
from tqdm import tqdm

from medmom import __version__
from medmom.data.files import Volume, check_same_grid, is_picture, read_label
from medmom.errors import MedmomError
from medmom.evaluation.matching import Matched, Matching, match
from medmom.evaluation.metrics import Scores, definitions, missed_scores, score_classes
from medmom.evaluation.summary import format_scores, summarise
from medmom.evaluation.voxel_counts import count_voxels
from medmom.labels import Labels

__all__ = ["evaluate", "format_scores"]

NSD_TOLERANCE = 2.0
"""Of the surface Dice, in mm, where nobody names one."""


def evaluate(
    predictions: Path,
    references: Path | None = None,
    *,
    cases: Path | None = None,
    nsd_tolerance: float | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores label maps against references, file by file, on the reference's own grid.

    Pictures have no pixel size: their distances are in pixels, and ``notes`` and ``distance_unit`` say so.

    Args:
        predictions: A folder of label maps, or one label map.
        references: A folder with a label map of the same case name for each (its ``labels``,
            ``labelsTr`` or ``masks`` folder will do), or one label map. None takes the paths that ``cases.json``
            of the predictions gives.
        cases: List of the cases to score, as ``read_case_list`` reads it. None takes ``cases.json`` in
            the folder of predictions, else every reference. A listed case without a prediction counts
            as missed.
        nsd_tolerance: Of the surface Dice, in mm. None takes that of the recipe the predicting model was trained
            by, else 2.
        progress: Whether to show a bar on standard error.

    Returns:
        What ``scores.json`` holds, in plain JSON types. Of each case ``counts`` has the voxels that are not ignored
        by class: ``tp``, ``fp``, ``fn``, ``tn``; a missing prediction counts as an empty one there.

    Raises:
        MedmomError: A folder, file or reference is missing, a label map lies on another grid or holds
            an unknown value, or no prediction fits a reference.
    """
    matching = match(Path(predictions), None if references is None else Path(references), cases)
    if nsd_tolerance is None:
        nsd_tolerance = _model_tolerance(matching.model)
    if not 0 <= nsd_tolerance < float("inf"):
        raise MedmomError(f"nsd_tolerance is {nsd_tolerance}: give 0 or more mm.")
    book = _label_book(matching)
    rows = []
    for case in tqdm(matching.cases, desc="evaluate", unit="case", disable=not progress):
        scores, counts = _score_case(case, book, nsd_tolerance)
        rows.append({**_describe(case), "scores": scores, "counts": counts})
    names = book.labels.foreground
    unit, unit_notes = _distance_unit(matching.cases)
    both_empty = Counter(name for row in rows for name, found in row["scores"].items() if found["dice"] is None)
    return {
        "definitions": definitions(nsd_tolerance, unit),
        "distance_unit": unit,
        "nsd_tolerance_mm": float(nsd_tolerance),
        "labels": book.labels.as_dict(),
        "reference_labels": book.references.as_dict(),
        "num_cases": len(rows),
        "num_missing": sum(row["missing"] for row in rows),
        "num_both_empty": {name: both_empty[name] for name in names},
        **summarise(rows, names),
        "cases": rows,
        "notes": [*unit_notes, *matching.notes, *book.notes],
        "model": matching.model,
        "versions": {
            "medmom": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "nibabel": nib.__version__,
        },
    }


def _distance_unit(cases: Sequence[Matched]) -> tuple[str, tuple[str, ...]]:
    """Gives the unit of distances, and a sentence where it is not mm for all cases."""
    pictures = sum(is_picture(case.reference) for case in cases)
    if not pictures:
        return "mm", ()
    where = "The references are" if pictures == len(cases) else f"{pictures} of {len(cases)} references are"
    note = f"{where} pictures without a pixel size: there hd95_mm and the tolerance of nsd are in pixels."
    return "pixels" if pictures == len(cases) else "mm", (note,)


def _model_tolerance(model: Any) -> float:
    """The tolerance that a list of predictions carries from the model's recipe."""
    settings = model.get("evaluation") if isinstance(model, dict) else None
    value = settings.get("nsd_tolerance") if isinstance(settings, dict) else None
    return float(value) if isinstance(value, int | float) else NSD_TOLERANCE


@dataclass(frozen=True)
class _LabelBook:
    """Class tables of predictions and references; channels of a score are those of ``labels``."""

    labels: Labels
    references: Labels
    notes: tuple[str, ...] = ()

    @property
    def comparable(self) -> tuple[str, ...]:
        """Classes that both tables have."""
        return tuple(name for name in self.labels.foreground if name in self.references.foreground)


def _label_book(matching: Matching) -> _LabelBook:
    labels = matching.prediction_labels or matching.reference_labels or _stored_values(matching.cases)
    book = _LabelBook(labels, matching.reference_labels or labels)
    if not book.comparable:
        raise MedmomError(
            f"{matching.cases[0].reference}: the references have the classes {', '.join(book.references.foreground)}, "
            f"the predictions {', '.join(labels.foreground)}. Give references of the same classes."
        )
    left_out = [name for name in labels.foreground if name not in book.comparable]
    if left_out:
        return _LabelBook(labels, book.references, (f"Not in the references, left out: {', '.join(left_out)}.",))
    return book


def _stored_values(cases: Sequence[Matched]) -> Labels:
    """Classes named by their stored values, where no file names them."""
    values: set[int] = set()
    for case in cases:
        for path in (case.prediction, case.reference):
            values |= set() if path is None else _values(path)
    values.discard(0)
    if not values:
        raise MedmomError(f"{cases[0].reference}: no label map has any class (all voxels 0). Give label maps.")
    ordered = sorted(values)
    return Labels(("background", *map(str, ordered)), (0, *ordered))


def _values(path: Path) -> set[int]:
    values = set(np.unique(read_label(path).array).tolist())
    # A black and white mask and one of 0 and 1 say the same.
    return {0, 1} if is_picture(path) and values <= {0, 255} and values != {0} else values


def _describe(case: Matched) -> dict[str, Any]:
    return {
        "name": case.name,
        "patient": case.patient,
        "missing": case.prediction is None,
        "error": case.error,
        "prediction": None if case.prediction is None else str(case.prediction.resolve()),
        "reference": str(case.reference.resolve()),
        "image": None if case.image is None else str(case.image.resolve()),
    }


def _score_case(
    case: Matched, book: _LabelBook, tolerance: float
) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:
    """Scores, and voxels counted, by class; a missing prediction counts as an empty one."""
    names = [name for name in book.comparable if case.annotated is None or name in case.annotated]
    channels = {book.labels.channel(name): name for name in names}
    reference = read_label(case.reference, book.references)
    wanted, geometry = _channels(reference, book.references, book.labels), reference.geometry
    if case.prediction is None:
        found = np.zeros_like(wanted)
        scores = {channel: missed_scores(geometry.diagonal) for channel in channels}
    else:
        prediction = read_label(case.prediction, book.labels)
        check_same_grid(reference, prediction)
        found = _channels(prediction, book.labels, book.labels)
        scores = score_classes(
            found, wanted, channels, geometry.spacing, diagonal=geometry.diagonal, tolerance=tolerance
        )
    counts = count_voxels(found, wanted, channels)
    return {name: scores[k] for k, name in channels.items()}, {name: counts[k] for k, name in channels.items()}


def _channels(volume: Volume, own: Labels, wanted: Labels) -> np.ndarray:
    """Channel indices of ``wanted`` for a label map stored by the table ``own``; other classes become 0."""
    try:
        channels = own.to_channels(volume.array)
    except ValueError as error:
        raise MedmomError(f"{volume.path}: {error}. Correct the label map, or name the value in its labels.") from error
    if own.names == wanted.names:
        return channels
    table = np.arange(256, dtype=np.uint8)
    table[: own.num_channels] = [wanted.channel(name) if name in wanted.names else 0 for name in own.names]
    return np.asarray(table[channels])
