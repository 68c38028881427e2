"""Cases that a CSV file lists, one a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from medmom.data.casefiles import CaseFiles
from medmom.data.class_table import PATIENT, image_columns
from medmom.data.files import is_image, stem
from medmom.data.table import Table, read_table
from medmom.errors import MedmomError

NAMES = ("name", "case")


def is_case_table(path: Path) -> bool:
    """Whether an input is a table of cases, by its name."""
    return path.suffix.lower() == ".csv" and not path.is_dir()


def cases_of_table(path: Path) -> list[CaseFiles]:
    """Reads cases from a CSV file, as training reads it; commas, semicolons or tabs part the columns.

    Columns: ``image``, or ``image_0``, ``image_1``, ... where channels lie in files of their own; where wanted ``name``
    (else the first file's), ``patient``, and ``label``, which counts where it names a file: the reference that
    ``medmom evaluate`` compares with. Others are passed over. Paths start from the table's folder. A file that is not
    there is named when its case is read.

    Args:
        path: The table.

    Returns:
        One case a row, at least one.

    Raises:
        MedmomError: The table cannot be read, has no column of images or no row, a row has no path or a name that no
            file can have, or two rows have one name.
    """
    table = read_table(path)
    if not image_columns(table):
        raise MedmomError(
            f"{path}: no column image among {', '.join(table.columns)}. Add it, with paths from this folder."
        )
    rows: dict[str, int] = {}
    cases = []
    for number, row in enumerate(table.rows, start=2):
        case = _case(table, row, f"{path}: row {number}")
        if rows.setdefault(case.name, number) != number:
            raise MedmomError(
                f"{path}: rows {rows[case.name]} and {number} have the same name {case.name}. Give each a name of its "
                "own in the column name."
            )
        cases.append(case)
    if not cases:
        raise MedmomError(f"{path}: no row below the header. List images.")
    return cases


def _case(table: Table, row: Mapping[str, str], place: str) -> CaseFiles:
    columns = image_columns(table)
    # As spreadsheets on Windows write paths.
    cells = [row[column].replace("\\", "/") for column in columns]
    bad = next((column for column, cell in zip(columns, cells, strict=True) if not cell or "\0" in cell), None)
    if bad is not None:
        raise MedmomError(f"{place} has no path in {bad}. Give the image's path.")
    images = tuple(table.path.parent / cell for cell in cells)
    name = next((row[column] for column in NAMES if row.get(column)), stem(images[0]))
    if not name or name.startswith(".") or re.search(r"[/\\\x00]", name):
        raise MedmomError(f"{place}: the name {name!r} cannot be that of a file. Leave out / and a dot at the start.")
    label = row.get("label", "").replace("\\", "/")
    return CaseFiles(
        name=name,
        images=images,
        label=table.path.parent / label if is_image(label) else None,
        group=row.get(PATIENT) or name,
    )
