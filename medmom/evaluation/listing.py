from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmom.data.files import is_image, read_json, stem
from medmom.data.table import read_table
from medmom.errors import MedmomError
from medmom.labels import Labels

# What other files of ours and of other people call the same thing.
_ALIASES = {
    "name": ("name", "case", "id", "SubjectID", "file", "filename"),
    "patient": ("patient", "group", "subject"),
    "reference": ("reference", "label", "Label"),
    "image": ("image", "images"),
}


@dataclass(frozen=True)
class Entry:
    """One line of a list of cases; None where the list does not say.

    Attributes:
        name: Of the case.
        has_prediction: Whether the list says where the prediction is, or that there is none.
        prediction: Path of the prediction; None also where it was not made.
        reference: Path of the reference.
        image: Path of the case's first image.
        patient: Whom the case shows.
        annotated: Foreground classes (names or stored values) annotated in this case; None is all.
        error: Why there is no prediction.
    """

    name: str
    has_prediction: bool = False
    prediction: Path | None = None
    reference: Path | None = None
    image: Path | None = None
    patient: str | None = None
    annotated: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class CaseList:
    """A list of cases with what else its file says.

    Attributes:
        entries: In the file's order.
        labels: Class names and stored values of the predictions, or None.
        model: What made the predictions, or None.
    """

    entries: tuple[Entry, ...] = ()
    labels: Labels | None = None
    model: Any = None
    by_name: dict[str, Entry] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Indexes the entries."""
        object.__setattr__(self, "by_name", {entry.name: entry for entry in self.entries})


def read_case_list(path: Path) -> CaseList:
    """Reads the cases that are to be scored.

    Args:
        path: JSON (the ``cases.json`` of predict, a ``scores.json``, a ``split.json``, whose
            validation cases are taken, or a list of names), CSV with a column ``name``, ``case`` or
            ``file``, or text with a name a line.

    Raises:
        MedmomError: The file cannot be read, holds no case, or a case twice.
    """
    if not path.is_file():
        raise MedmomError(f"{path}: there is no such list of cases. Give a JSON, CSV or text file with case names.")
    head: Mapping[str, Any] = {}
    if path.suffix.lower() == ".json":
        head, rows = _json_rows(path)
    elif path.suffix.lower() in (".csv", ".tsv"):
        rows = _csv_rows(path)
    else:
        rows = [{"name": line.strip()} for line in _text(path).splitlines() if line.strip() and line[0] != "#"]
    entries = tuple(_entry(row, path) for row in rows)
    names = [entry.name for entry in entries]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if not names:
        raise MedmomError(f"{path}: lists no case. Give at least one case name.")
    if twice:
        raise MedmomError(f"{path}: lists the case {twice[0]} {names.count(twice[0])} times. List each case once.")
    return CaseList(entries, parse_labels(head.get("labels")), head.get("model"))


def parse_labels(table: Any) -> Labels | None:
    """Reads a table of classes: ours, nnU-Net's (name to value) or the decathlon's (value to name).

    Returns:
        None where it is none of them (regions, for instance).
    """
    if not isinstance(table, Mapping) or not table:
        return None
    if "names" in table and "values" in table:
        return Labels.from_dict(table)
    try:
        if all(str(key).lstrip("-").isdigit() for key in table):
            pairs = {str(name): int(value) for value, name in table.items()}
        else:
            pairs = {str(name): int(value) for name, value in table.items()}
    except (TypeError, ValueError):
        return None
    ignore = pairs.pop("ignore", None)
    names = sorted(pairs, key=lambda name: (pairs[name] != 0, pairs[name]))
    return Labels(tuple(names), tuple(pairs[name] for name in names), ignore)


def files_by_case(folder: Path) -> dict[str, Path]:
    """Image files of a folder by case name.

    Raises:
        MedmomError: There is no such folder, or two files of it have one case name.
    """
    if not folder.is_dir():
        raise MedmomError(f"{folder}: there is no such folder. Give a folder with label maps.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_image(path) and path.is_file() and not path.name.startswith("."):
            other = found.setdefault(stem(path), path)
            if other != path:
                raise MedmomError(f"{path}: {other.name} has the same case name {stem(path)}. Remove one of them.")
    return found


def _case_name(text: str) -> str:
    """Case name of a file name or of a case name."""
    return stem(Path(text)) if is_image(Path(text)) else text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MedmomError(f"{path}: cannot be read as text ({error}). Give a JSON, CSV or text file.") from error


def _json_rows(path: Path) -> tuple[Mapping[str, Any], list[Any]]:
    data = read_json(path)
    head = data if isinstance(data, dict) else {}
    rows = head.get("cases", head.get("validation")) if head else data
    if isinstance(rows, dict):
        rows = [{"name": name, **(row if isinstance(row, dict) else {})} for name, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise MedmomError(f'{path}: has no list of cases. Give a list of names, or an object with "cases".')
    return head, rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    table = read_table(path)
    if not set(_ALIASES["name"]) & set(table.columns):
        raise MedmomError(
            f"{path}: none of the columns {', '.join(table.columns)} is called name, case or file. Add one."
        )
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        annotated = row.get("annotated", "").replace(",", ";").split(";")
        rows.append({**row, "annotated": [name.strip() for name in annotated] if any(annotated) else None})
    return rows


def _value(row: Mapping[str, Any], key: str) -> Any:
    """First value that is there under one of the names of ``key``."""
    found = [row[alias] for alias in _ALIASES.get(key, (key,)) if row.get(alias) not in (None, "", [])]
    return found[0] if found else None


def _entry(row: Any, path: Path) -> Entry:
    row = {"name": row} if isinstance(row, str) else row
    name = _value(row, "name")
    if name is None:
        raise MedmomError(f"{path}: a case has no name: {json.dumps(row)[:80]}. Name every case.")
    annotated = row.get("annotated")
    patient, error = _value(row, "patient"), row.get("error")
    return Entry(
        name=_case_name(str(name)),
        has_prediction="prediction" in row,
        **{key: _path(_value(row, key), path.parent) for key in ("prediction", "reference", "image")},
        patient=None if patient is None else str(patient),
        annotated=tuple(map(str, annotated)) if isinstance(annotated, list) else None,
        error=None if error is None else str(error),
    )


def _path(value: Any, folder: Path) -> Path | None:
    """A path of a list (of several channels the first), from the list's folder or the current one."""
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, str):
        return None
    return folder / value if (folder / value).exists() else Path(value)
