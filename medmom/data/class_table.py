"""CSV tables of images and the classes that they are of."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medmom.data.class_cases import ClassEntry, Listing, spell_fold
from medmom.data.files import is_image
from medmom.data.table import Table
from medmom.errors import MedmomError

IMAGE_COLUMNS = ("image", "filename")
CLASS_COLUMNS = ("label", "class")
FLAG_PREFIX = "label_"
PATIENT = "patient"

PREDICTED = {"probability", "flag"}
"""Columns of a table that predict wrote: nobody wants to train on that by mistake."""

Find = Callable[[str], Path | None]
"""Gives the file that a cell names, None where it is not there."""


class Directories:
    """Tells which files are there by listing each folder once: a million questions to a disk take minutes."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def has(self, path: Path) -> bool:
        """Whether there is such a file."""
        names = self._names.get(path.parent)
        if names is None:
            try:
                names = frozenset(os.listdir(path.parent))  # noqa: PTH208
            except OSError:
                names = frozenset()
            self._names[path.parent] = names
        # A disk that takes no notice of case has a file that its listing spells otherwise.
        return path.name in names or (bool(names) and path.is_file())


def is_class_table(table: Table) -> bool:
    """Whether a table has a column of images and one, or several, of classes, and is no table of predictions."""
    if PREDICTED <= {*table.columns}:
        return False
    return bool(image_columns(table)) and (bool(_flags(table)) or _first(table, CLASS_COLUMNS) is not None)


def read_class_table(table: Table, *, group: str | None) -> Listing:
    """Reads cases from a CSV file; its paths start from its own folder.

    Columns: ``image`` or ``filename`` (or ``image_0``, ``image_1``, ... where channels lie in files of their own);
    ``label`` or ``class`` with a class's name, several parted by ``;``, or one column ``label_<class>`` of 0 and 1
    for each; where wanted ``name``, ``patient`` or the group column, and ``fold``. Without a class a case is
    left out, with a note; where any case has several, it is of none of them.

    Raises:
        MedmomError: The table is not of this form, or names a file that is not there.
    """
    directories = Directories()

    def find(cell: str) -> Path | None:
        full = table.path.parent / cell
        return full if directories.has(full) else None

    entries, known = table_entries(table, find, group=group)
    flags = _flags(table)
    is_multilabel = bool(flags) or any(len(entry.classes) > 1 for entry in entries)
    notes = [] if _group_column(table, group) else [group_note(table)]
    labelled = entries
    if not is_multilabel or flags:
        labelled = [entry for entry, has_class in zip(entries, known, strict=True) if has_class]
        if len(labelled) < len(entries):
            first = next(e.images[0].name for e, has_class in zip(entries, known, strict=True) if not has_class)
            notes.append(f"{len(entries) - len(labelled)} images without a class, such as {first}, are left out")
    names = tuple(name.removeprefix(FLAG_PREFIX) for name in flags) if flags else None
    return Listing(table.path.parent, table.path, tuple(labelled), names, is_multilabel, tuple(notes))


def table_entries(table: Table, find: Find, *, group: str | None) -> tuple[list[ClassEntry], list[bool]]:
    """Gives one entry a row of a class table, and whether its row says anything about the classes.

    Raises:
        MedmomError: A cell is empty or wrong, a file is not there or is listed twice, or there is no group column.
    """
    if PREDICTED <= {*table.columns}:
        raise MedmomError(
            f"{table.path}: predictions (probability, flag), not what was known. Give the table of classes."
        )
    if not is_class_table(table):
        raise MedmomError(
            f"{table.path}: no columns image and label among {', '.join(table.columns)}. Add them: the path of each "
            "image from this folder, and its class."
        )
    if _flags(table) and _first(table, CLASS_COLUMNS):
        raise MedmomError(
            f"{table.path}: the columns {_first(table, CLASS_COLUMNS)} and {_flags(table)[0]} both give classes. "
            "Keep one of the two forms."
        )
    check_group_column(table, group)
    entries, known, missing = [], [], []
    for number, row in enumerate(table.rows, start=2):
        place = f"{table.path}: row {number}"
        cells = _image_cells(table, row, place)
        classes = _classes(table, row, place)
        images = [find(cell) for cell in cells]
        missing += [(number, cell) for cell, image in zip(cells, images, strict=True) if image is None]
        found = tuple(image for image in images if image is not None)
        fold, patient = _fold(row, place), _group(table, row, group, place)
        entries.append(ClassEntry(found, classes or (), _name(row, place), fold, patient))
        known.append(classes is not None)
    if missing:
        raise MedmomError(
            f"{table.path}: row {missing[0][0]} names {missing[0][1]}, which is not there "
            f"({len(missing)} of {len(entries)} images are missing). Correct the path, or take the row out."
        )
    if not entries:
        raise MedmomError(f"{table.path}: no row below the header. List images.")
    _check_twice(table, entries)
    return entries, known


def image_columns(table: Table) -> list[str]:
    """Gives the columns that name an image's files: one, or one a channel; none where there is no such column."""
    column = _first(table, IMAGE_COLUMNS)
    numbered = [name for name in table.columns if re.fullmatch(r"image_\d+", name)]
    return [column] if column else sorted(numbered, key=lambda name: int(name[6:]))


def check_group_column(table: Table, group: str | None) -> None:
    """Demands the column that says which cases belong together, where one is asked for.

    Raises:
        MedmomError: There is no such column.
    """
    if group is not None and group not in table.columns:
        raise MedmomError(f"{table.path}: no column {group} among {', '.join(table.columns)}. Set --data.group to one.")


def group_note(table: Table | None = None) -> str:
    """Says that nothing is known of patients."""
    found = f" ({table.path.name} has {', '.join(table.columns)}; --data.group names one)" if table else ""
    return f"no column {PATIENT}: each image is a group of its own{found}"


def _first(table: Table, columns: Sequence[str]) -> str | None:
    return next((name for name in columns if name in table.columns), None)


def _flags(table: Table) -> list[str]:
    return [name for name in table.columns if name.startswith(FLAG_PREFIX) and name != FLAG_PREFIX]


def _group_column(table: Table, group: str | None) -> str | None:
    return group or (PATIENT if PATIENT in table.columns else None)


def _image_cells(table: Table, row: Mapping[str, str], place: str) -> list[str]:
    cells = [row[column].replace("\\", "/") for column in image_columns(table)]
    if not all(cells):
        raise MedmomError(f"{place} has no path in {', '.join(image_columns(table))}. Give the image's path.")
    strange = next((cell for cell in cells if not is_image(cell)), None)
    if strange is not None:
        raise MedmomError(f"{place} names {strange}, which is no picture or volume by its name. Give an image.")
    return cells


def _classes(table: Table, row: Mapping[str, str], place: str) -> tuple[str, ...] | None:
    """Gives the classes of a row, None where it says nothing."""
    flags = _flags(table)
    if flags:
        return _flagged(row, flags, place)
    cell = row[_first(table, CLASS_COLUMNS) or ""]
    if is_image(cell):
        raise MedmomError(
            f"{place}: the label {cell} is a file, so this is a table of label maps. Choose a model.preset that "
            "segments, or write the name of a class."
        )
    names = tuple(dict.fromkeys(name.strip() for name in cell.split(";") if name.strip()))
    return names or None


def _flagged(row: Mapping[str, str], flags: Sequence[str], place: str) -> tuple[str, ...] | None:
    if not any(row[flag] for flag in flags):
        return None
    wrong = next((flag for flag in flags if not re.fullmatch(r"[01](\.0*)?", row[flag])), None)
    if wrong is not None:
        raise MedmomError(f"{place}: {wrong} is {row[wrong]!r}. Write 1 where the image is of the class, else 0.")
    return tuple(flag.removeprefix(FLAG_PREFIX) for flag in flags if row[flag].startswith("1"))


def _fold(row: Mapping[str, str], place: str) -> str:
    cell = row.get("fold", "")
    fold = spell_fold(cell) if cell else ""
    if fold is None:
        raise MedmomError(f"{place}: the fold is {cell!r}. Write train, val, test or a number.")
    return fold


def _group(table: Table, row: Mapping[str, str], group: str | None, place: str) -> str:
    column = _group_column(table, group)
    if column is not None and not row[column]:
        raise MedmomError(f"{place} has no {column}. Fill it in.")
    return "" if column is None else row[column]


def _name(row: Mapping[str, str], place: str) -> str:
    name = row.get("name", "")
    # Results are written under a case's name.
    if re.search(r"[/\\\x00]", name) or name.startswith("."):
        raise MedmomError(f"{place}: the name {name!r} cannot be that of a file. Leave out / and a dot at the start.")
    return name


def _check_twice(table: Table, entries: Sequence[ClassEntry]) -> None:
    (images, count), *_ = Counter(entry.images for entry in entries).most_common(1)
    if count > 1:
        raise MedmomError(
            f"{table.path}: {images[0]} is listed {count} times. Keep one row; write several classes parted by ;."
        )
