"""The list of cases that were asked for, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmom.data.casefiles import CaseFiles
from medmom.inference.skipping import is_standing, read_sidecar


def list_cases(
    cases: Sequence[CaseFiles],
    predictions: Sequence[Path],
    records: Mapping[str, Mapping[str, Any]],
    *,
    checksum: str,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Gives the rows of ``cases.json``.

    Args:
        cases: What was asked for.
        predictions: The label map of each, there or not.
        records: ``prediction`` (a file name or None) and ``error`` of the cases that processes told of, by name. Of
            another the files decide: it is done if its prediction stands (see ``is_standing``), else not reached.
        checksum: Of the model package.
        settings: All that can change a label.
    """
    rows = []
    for case, path in zip(cases, predictions, strict=True):
        record = records.get(case.name)
        if record is not None:
            rows.append(_row(case, record["prediction"], record["error"]))
        elif is_standing(case, path, checksum=checksum, settings=settings):
            rows.append(_row(case, path.name, None))
        else:
            rows.append(_row(case, None, f"{case.images[0]}: not reached. Run again with --skip-existing."))
    return rows


def collect_statistics(rows: Sequence[Mapping[str, Any]], predictions: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Gives the statistics of all cases that are done, by name, from their sidecars.

    Args:
        rows: As ``list_cases`` gives them.
        predictions: The label map of each.
    """
    found = {}
    for row, path in zip(rows, predictions, strict=True):
        told = None if row["prediction"] is None else read_sidecar(path)
        if told is not None and isinstance(told.get("statistics"), dict):
            found[str(row["name"])] = told["statistics"]
    return found


def _row(case: CaseFiles, prediction: str | None, error: str | None) -> dict[str, Any]:
    return {
        "name": case.name,
        "image": [str(path.absolute()) for path in case.images],
        # From the list's own folder, so that the folder may be moved.
        "prediction": prediction,
        "patient": case.group,
        "annotated": None if case.annotated is None else list(case.annotated),
        "reference": None if case.label is None else str(case.label.absolute()),
        "error": error,
    }
