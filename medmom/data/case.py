"""Cases: which files of a folder make one, and one in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.casefiles import CaseFiles, CaseFolder
from medmom.data.files import check_same_grid, read_images, read_json, read_label
from medmom.data.folds import Split, check_leakage, split_cases
from medmom.data.layouts import Entry, Layout, read_layout
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

__all__ = [
    "Case",
    "CaseFiles",
    "CaseFolder",
    "Split",
    "check_leakage",
    "find_cases",
    "read_case",
    "split_cases",
]

PATIENT = "patient"
ANNOTATED = "annotated"


@dataclass(frozen=True, eq=False)
class Case:
    """One case in memory, on its own grid or on the working grid.

    Attributes:
        name: Its name.
        image: Shape (C, X, Y, Z); float32 once prepared, before that of any real type.
        label: Channel indices, uint8, shape (X, Y, Z), 255 where ignored; None without one. Classes that are
            not annotated in this case are background.
        geometry: The grid of both.
        annotated: For each label channel whether it was looked for; the background always is.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry
    annotated: tuple[bool, ...]


def find_cases(folder: str | Path, *, group: str | None = None) -> CaseFolder:
    """Lists the cases of a folder; reads no image.

    Read as they are: the decathlon folder, the nnU-Net raw folder, ``images`` with ``labels`` and
    ``dataset.json``, and a CSV file (or a folder with one) with the columns ``image`` (or ``image_0``,
    ``image_1``, ...), ``label`` and, where wanted, ``name``, a group column and ``annotated``
    (``liver;colon``); its paths start from its own folder, and ``dataset.json`` lies beside it. A
    ``cases.csv`` in the folder gives the same columns to the other layouts, by ``file``, ``name`` or
    ``case``; a ``cases.json`` in the folder or one above lists ``annotated`` label values or names by case.
    Hidden files are passed over.

    Args:
        folder: The folder, or a CSV file.
        group: Column that says which cases belong together. None: ``patient`` where there is such a column,
            else every case is a group of its own, and a note says so.

    Raises:
        MedmomError: The folder cannot be understood, or the group column is missing or has no value for a
            case. Faults of single files are not looked for.
    """
    layout = read_layout(Path(folder))
    if not layout.entries:
        raise MedmomError(f"{folder}: no case is listed. Add images.")
    _check_names(layout)
    groups, notes = _groups(layout, group)
    annotated, more = _annotated(layout)
    cases = [
        CaseFiles(entry.name, entry.images, entry.label, groups[entry.name], annotated.get(entry.name))
        for entry in sorted(layout.entries)
    ]
    return CaseFolder(
        layout.folder,
        tuple(cases),
        layout.dataset.labels,
        layout.dataset.channels,
        (*layout.notes, *_count_note(layout), *notes, *more),
        layout.unused,
    )


def read_case(files: CaseFiles, labels: Labels) -> Case:
    """Reads image and label map of a case.

    Raises:
        MedmomError: A file cannot be read, the grids differ, or a label value is not in ``labels``.
    """
    image = read_images(files.images)
    names = labels.foreground if files.annotated is None else files.annotated
    annotated = (True, *(name in names for name in labels.foreground))
    if files.label is None:
        return Case(files.name, image.array, None, image.geometry, annotated)
    label = read_label(files.label, labels)
    check_same_grid(image, label)
    try:
        channels = labels.to_channels(label.array)
    except ValueError as error:
        raise MedmomError(f"{files.label}: {error}. Add the class to dataset.json or correct the label map.") from error
    if not all(annotated):
        table = np.arange(256, dtype=np.uint8)
        table[: len(annotated)][~np.array(annotated)] = 0
        channels = table[channels]
    return Case(files.name, image.array, channels, image.geometry, annotated)


def _check_names(layout: Layout) -> None:
    seen: dict[str, Entry] = {}
    for entry in layout.entries:
        if entry.name in seen:
            first = seen[entry.name].images[0]
            raise MedmomError(
                f"{entry.images[0]}: the case name {entry.name} belongs to {first} too. Rename one, or give a CSV "
                "file with a column name."
            )
        seen[entry.name] = entry


def _groups(layout: Layout, column: str | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Gives the group of each case, and a line where none is known."""
    names = [entry.name for entry in layout.entries]
    columns = layout.table.columns if layout.table else ()
    if column is None and PATIENT not in columns:
        found = f" (cases.csv has {', '.join(columns)}; --data.group names one)" if columns else ""
        return dict(zip(names, names, strict=True)), (f"no column {PATIENT}: each case is a group of its own{found}",)
    column = column or PATIENT
    if layout.table is None:
        raise MedmomError(f"{layout.folder}: no cases.csv with the column {column}. Add it, or leave out --data.group.")
    if column not in columns:
        raise MedmomError(
            f"{layout.table.path}: no column {column} among {', '.join(columns)}. Set --data.group to one."
        )
    for name in names:
        if not layout.rows.get(name, {}).get(column):
            raise MedmomError(f"{layout.table.path}: no {column} for the case {name}. Fill it in.")
    return {name: layout.rows[name][column] for name in names}, ()


def _annotated(layout: Layout) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Gives the annotated classes of the cases for which they are listed, and a line on the others."""
    if layout.table and ANNOTATED in layout.table.columns:
        path: Path | None = layout.table.path
        cells = {name: row[ANNOTATED] for name, row in layout.rows.items() if row[ANNOTATED]}
        listed: Mapping[str, Any] = {name: cell.replace(",", ";").split(";") for name, cell in cells.items()}
    else:
        path, listed = _cases_json(layout.folder)
    names = {entry.name for entry in layout.entries}
    # A list one folder above may be about other data.
    if path is None or not names & listed.keys():
        return {}, ()
    labels = layout.dataset.labels
    annotated = {name: _classes(path, name, listed[name], labels) for name in names & listed.keys()}
    rest = sorted(names - listed.keys())
    return annotated, (f"{path.name} does not list {rest[0]}: all classes count as annotated",) if rest else ()


def _cases_json(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Finds the list of annotated classes in the folder, or one above."""
    for path in (folder / "cases.json", folder.resolve().parent / "cases.json"):
        content = read_json(path) if path.is_file() else None
        cases = content.get("cases", content) if isinstance(content, dict) else None
        if isinstance(cases, dict):
            found = {
                name: case[ANNOTATED] for name, case in cases.items() if isinstance(case, dict) and ANNOTATED in case
            }
            if found:
                return path, found
    return None, {}


def _classes(path: Path, case: str, listed: Any, labels: Labels) -> tuple[str, ...]:
    """Turns a list of class names or stored values into class names, in the order of the labels."""
    found = set()
    for item in listed if isinstance(listed, Sequence) and not isinstance(listed, str) else [listed]:
        text = str(item).strip()
        by_value = {str(value): name for name, value in zip(labels.names, labels.values, strict=True)}
        name = text if text in labels.names else by_value.get(text)
        if text and name is None:
            raise MedmomError(
                f"{path}: {text!r} is annotated in case {case}, but the classes are {', '.join(labels.foreground)}. "
                "Write one of them."
            )
        found.add(name)
    return tuple(name for name in labels.foreground if name in found)


def _count_note(layout: Layout) -> tuple[str, ...]:
    announced, found = layout.dataset.content.get("numTraining"), len(layout.entries)
    if isinstance(announced, int) and announced != found:
        return (f"dataset.json announces {announced} cases (numTraining), the folder has {found}",)
    return ()
