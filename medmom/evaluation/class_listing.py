"""The table of classes that predict writes, read back with all that lies beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmom.classes import Classes
from medmom.data.files import read_json
from medmom.data.table import Table, read_table
from medmom.errors import MedmomError
from medmom.evaluation.calibration import probabilities

TABLE = "classes.csv"
SUM_TOLERANCE = 1e-3
# The table holds six digits, and a network may have worked in 16 bits.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Answer:
    """What became of one case.

    Attributes:
        name: Of the case.
        images: Its files.
        item: Its place in a file of many images, or None.
        patient: Whom it shows.
        reference: The classes it is of; None is not known.
        probabilities: One a class; None where the case failed.
        logits: The same before temperature and softmax; None also where they were not kept.
        flag: Why not to trust the answer, or "".
        error: Why the case failed, or None.
    """

    name: str
    images: tuple[str, ...]
    item: int | None
    patient: str
    reference: tuple[str, ...] | None
    probabilities: tuple[float, ...] | None
    logits: tuple[float, ...] | None
    flag: str = ""
    error: str | None = None


@dataclass(frozen=True)
class ClassListing:
    """A table of classes.

    Attributes:
        path: The CSV file.
        classes: What is told apart.
        answers: The cases, in the table's order, then those that failed and have no row.
        temperature: That the logits were divided by.
        model: What made the predictions, as the JSON file says.
        fold: The part of a run's cases that was predicted; None: the file does not say.
    """

    path: Path
    classes: Classes
    answers: tuple[Answer, ...]
    temperature: float
    model: Any = None
    fold: str | None = None


def is_class_table(path: str | Path) -> bool:
    """Whether a path is a table of classes (any CSV file), or a folder with ``classes.csv`` and no ``cases.json``."""
    path = Path(path)
    if path.is_dir():
        return (path / TABLE).is_file() and not (path / "cases.json").exists()
    return path.suffix.lower() == ".csv"


def read_class_table(path: str | Path) -> ClassListing:
    """Reads ``classes.csv`` (or a table of another name) and the JSON file of the same stem beside it.

    Probabilities are those of the table; where logits are kept as well, they are computed from them again, because
    six digits cannot tell very small ones apart.

    Args:
        path: The table, or a folder with ``classes.csv``.

    Raises:
        MedmomError: A file is missing or damaged, the two do not fit each other, a case is listed twice, or
            probabilities are none.
    """
    path = Path(path) / TABLE if Path(path).is_dir() else Path(path)
    table, json_path = read_table(path), path.with_suffix(".json")
    if not json_path.is_file():
        raise MedmomError(f"{path}: {json_path.name} is not beside it. Keep the two files of medmom predict together.")
    head = read_json(json_path)
    try:
        listing = _parse(path, head)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MedmomError(f"{json_path}: not as medmom predict wrote it ({error!r}). Predict again.") from error
    rows = _rows(table, listing.classes)
    known = {answer.name: answer for answer in listing.answers}
    if len(known) < len(listing.answers):
        names = [answer.name for answer in listing.answers]
        twice = next(name for name in names if names.count(name) > 1)
        raise MedmomError(f"{json_path}: lists the case {twice} twice. Give each case a name of its own.")
    _check_same_cases(path, json_path, rows, known)
    merged = [_merged(path, row, known[name], listing) for name, row in rows.items()]
    merged += [answer for name, answer in known.items() if name not in rows]
    if not merged:
        raise MedmomError(f"{path}: lists no case. Predict at least one image.")
    return replace(listing, answers=tuple(merged))


def _parse(path: Path, head: Mapping[str, Any]) -> ClassListing:
    return ClassListing(
        path=path,
        classes=Classes.from_dict(head["classes"]),
        answers=tuple(_answer(case) for case in head["cases"]),
        temperature=_above_zero(head.get("temperature", 1.0)),
        model=head.get("model"),
        fold=head.get("fold"),
    )


def _above_zero(value: Any) -> float:
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"temperature {value}")
    return float(value)


def _answer(case: Mapping[str, Any]) -> Answer:
    images, reference, logits, error = (case.get(key) for key in ("image", "reference", "logits", "error"))
    name, item = str(case["name"]), case.get("item")
    return Answer(
        name=name,
        images=(images,) if isinstance(images, str) else tuple(str(image) for image in images or ()),
        item=None if item is None else int(item),
        patient=name if case.get("patient") is None else str(case["patient"]),
        reference=None if reference is None else tuple(str(value) for value in reference),
        probabilities=None,
        logits=None if logits is None else tuple(float(value) for value in logits),
        error=None if error is None else str(error),
    )


def _rows(table: Table, classes: Classes) -> dict[str, Mapping[str, str]]:
    """The table's rows by case."""
    missing = [name for name in ("case", *(f"p_{name}" for name in classes.names)) if name not in table.columns]
    if missing:
        raise MedmomError(f"{table.path}: has no column {missing[0]}. Give the table as medmom predict wrote it.")
    rows: dict[str, Mapping[str, str]] = {}
    for row in table.rows:
        if row["case"] in rows:
            raise MedmomError(f"{table.path}: two rows are of the case {row['case']}. Keep one.")
        rows[row["case"]] = row
    return rows


def _check_same_cases(path: Path, json_path: Path, rows: Mapping[str, Any], known: Mapping[str, Answer]) -> None:
    mend = "Keep the two files of one medmom predict, unchanged."
    for name in rows:
        if name not in known:
            raise MedmomError(f"{path}: the case {name} is not in {json_path.name}. {mend}")
    # A row taken out would better every score.
    for name, answer in known.items():
        if name not in rows and answer.error is None:
            raise MedmomError(f"{path}: has no row of the case {name}, which {json_path.name} lists. {mend}")


def _merged(path: Path, row: Mapping[str, str], answer: Answer, listing: ClassListing) -> Answer:
    """The case with its row's probabilities; one that failed has none."""
    if answer.error is not None:
        return replace(answer, logits=None)
    classes = listing.classes
    found = [_probability(path, row, f"p_{name}") for name in classes.names]
    if not classes.is_multilabel and abs(sum(found) - 1) > SUM_TOLERANCE:
        raise MedmomError(
            f"{path}: the probabilities of the case {row['case']} add up to {sum(found):.6g}, not to 1. Predict again."
        )
    if answer.logits is not None:
        exact = _from_logits(answer.logits, listing)
        if exact is None or np.abs(exact - found).max() > AGREEMENT:
            raise MedmomError(
                f"{path}: the probabilities of the case {row['case']} are not those of its logits in "
                f"{path.with_suffix('.json').name}. Keep the two files of one medmom predict, unchanged."
            )
        found = exact.tolist()
    return replace(answer, probabilities=tuple(found), flag=row.get("flag", ""))


def _from_logits(logits: Sequence[float], listing: ClassListing) -> np.ndarray | None:
    """Probabilities, shape (K,); None of logits that are not K finite numbers."""
    if len(logits) != listing.classes.num_channels or not np.isfinite(logits).all():
        return None
    return probabilities(np.asarray(logits), listing.temperature, is_multilabel=listing.classes.is_multilabel)


def _probability(path: Path, row: Mapping[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise MedmomError(
            f"{path}: {column} of the case {row['case']} is {row[column]!r}, no number from 0 to 1. Predict again."
        )
    return value
