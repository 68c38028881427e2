from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medmom.data.case import CaseFiles
from medmom.data.files import read_json, stem
from medmom.errors import MedmomError
from medmom.evaluation.listing import CaseList, Entry, files_by_case, parse_labels, read_case_list
from medmom.evaluation.references import References
from medmom.labels import Labels


@dataclass(frozen=True)
class Matched:
    """A case with the files it is scored from.

    Attributes:
        name: Of the case.
        patient: Whom it shows; the case's name where nothing says.
        prediction: None where it is missing.
        reference: What annotators drew.
        image: First image, or None where nothing says.
        annotated: Foreground classes annotated in the reference; None is all.
        error: Why the prediction is missing, or None.
    """

    name: str
    patient: str
    prediction: Path | None
    reference: Path
    image: Path | None = None
    annotated: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Matching:
    """All cases to score, with the tables of classes that lie beside their files.

    Attributes:
        cases: At least one.
        prediction_labels: Of the predictions, or None.
        reference_labels: Of the references, or None.
        model: What made the predictions, as ``cases.json`` says.
        notes: Sentences for the reader of the scores.
    """

    cases: tuple[Matched, ...]
    prediction_labels: Labels | None
    reference_labels: Labels | None
    model: Any
    notes: tuple[str, ...]


def match(predictions: Path, references: Path | None, cases: Path | None) -> Matching:
    """Finds the cases to score and their files; see ``evaluate`` for the rules.

    Raises:
        MedmomError: A file or folder is missing, a case has no reference, or names do not fit.
    """
    place = _Predictions.find(predictions)
    own = place.case_list()
    chosen = CaseList() if cases is None else read_case_list(cases)
    shelf = References.find(references, single=next(iter(place.files)) if place.is_file else None)
    names = _names(place, chosen, own, shelf)
    matched = []
    for name in names:
        entry = _merge(chosen.by_name.get(name), own.by_name.get(name), name)
        reference = shelf.file(entry)
        matched.append(_matched(entry, place.file(entry), reference, shelf.facts(reference)))
    _check_names_fit(matched, place, listed=bool(own.entries or chosen.entries))
    reference_labels = shelf.labels([case.reference for case in matched])
    prediction_labels = own.labels or place.sidecar_labels(matched) or chosen.labels
    labels = prediction_labels or reference_labels
    return Matching(
        cases=tuple(replace(case, annotated=_class_names(case.annotated, labels)) for case in matched),
        prediction_labels=prediction_labels,
        reference_labels=reference_labels,
        model=own.model or chosen.model,
        notes=_notes(matched, place),
    )


@dataclass(frozen=True)
class _Predictions:
    """The predictions that are there: a folder's, or one file."""

    path: Path
    folder: Path
    files: dict[str, Path]

    @classmethod
    def find(cls, path: Path) -> _Predictions:
        if path.is_file():
            return cls(path, path.parent, {stem(path): path})
        return cls(path, path, files_by_case(path))

    @property
    def is_file(self) -> bool:
        return self.path != self.folder

    def case_list(self) -> CaseList:
        path = self.folder / "cases.json"
        return read_case_list(path) if path.is_file() else CaseList()

    def file(self, entry: Entry) -> Path | None:
        """The prediction of a case; one that the list calls failed is not looked for."""
        if self.is_file or not entry.has_prediction:
            return self.files.get(entry.name)
        if entry.prediction is None:
            return None
        moved = self.folder / entry.prediction.name
        found = moved if moved.is_file() else entry.prediction
        return found if found.is_file() else None

    def sidecar_labels(self, cases: list[Matched]) -> Labels | None:
        """Classes named beside the first prediction."""
        paths = [case.prediction for case in cases if case.prediction is not None]
        return parse_labels(_sidecar(paths[0]).get("labels")) if paths else None


def _names(place: _Predictions, chosen: CaseList, own: CaseList, shelf: References) -> tuple[str, ...]:
    """Case names in the order in which they are scored."""
    if place.is_file and chosen.entries:
        raise MedmomError(f"{place.path}: a single prediction with a list of cases. Give the folder of predictions.")
    if place.is_file:
        return tuple(place.files)
    names = tuple(chosen.by_name) or tuple(own.by_name) or shelf.names
    if not names:
        raise MedmomError(f"{place.path}: has no cases.json that would name the references. Give their folder.")
    return names


def _merge(chosen: Entry | None, own: Entry | None, name: str) -> Entry:
    """What two lists say about a case; the first is asked first, but for the prediction."""
    if chosen is None or own is None:
        return chosen or own or Entry(name)
    return Entry(
        name,
        has_prediction=own.has_prediction or chosen.has_prediction,
        prediction=own.prediction if own.has_prediction else chosen.prediction,
        reference=chosen.reference or own.reference,
        image=chosen.image or own.image,
        patient=chosen.patient or own.patient,
        annotated=own.annotated if chosen.annotated is None else chosen.annotated,
        error=own.error or chosen.error,
    )


def _matched(entry: Entry, prediction: Path | None, reference: Path, facts: CaseFiles | None) -> Matched:
    patient, image, annotated = entry.patient, entry.image, entry.annotated
    if image is None and prediction is not None:
        image = _sidecar_image(prediction)
    if facts is not None:
        # A list without patients gives each case its own name.
        patient = facts.group if patient in (None, entry.name) else patient
        image = image or next(iter(facts.images), None)
        annotated = facts.annotated if annotated is None else annotated
    error = entry.error if prediction is None else None
    return Matched(entry.name, patient or entry.name, prediction, reference, image, annotated, error)


def _sidecar(prediction: Path) -> Mapping[str, Any]:
    path = prediction.with_name(f"{stem(prediction)}.json")
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) else {}


def _sidecar_image(prediction: Path) -> Path | None:
    found = _sidecar(prediction).get("image")
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str):
        return None
    beside = prediction.parent / found
    return beside if beside.exists() else Path(found)


def _check_names_fit(cases: list[Matched], place: _Predictions, *, listed: bool) -> None:
    if any(case.prediction for case in cases):
        return
    if place.files:
        raise MedmomError(
            f"{place.path}: no prediction has the name of a case ({next(iter(place.files))} against {cases[0].name}). "
            "Name predictions as their references."
        )
    if not listed:
        raise MedmomError(f"{place.path}: there is no label map in this folder. Give a folder of predictions.")


def _class_names(annotated: tuple[str, ...] | None, labels: Labels | None) -> tuple[str, ...] | None:
    """Classes given by stored value become names."""
    if annotated is None or labels is None:
        return annotated
    by_value = {str(value): name for name, value in zip(labels.names, labels.values, strict=True)}
    return tuple(name if name in labels.names else by_value.get(name, name) for name in annotated)


def _notes(cases: list[Matched], place: _Predictions) -> tuple[str, ...]:
    notes = []
    extra = sorted(set(place.files.values()) - {case.prediction for case in cases if case.prediction})
    if extra:
        names = ", ".join(path.name for path in extra[:3]) + (", ..." if len(extra) > 3 else "")
        notes.append(f"Label maps that belong to no case, not scored: {len(extra)} ({names}).")
    if all(case.patient == case.name for case in cases) and len(cases) > 1:
        notes.append("No patients are named: every case counts as a patient of its own.")
    return tuple(notes)
