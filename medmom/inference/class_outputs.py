"""The files that a prediction of classes writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from medmom.classes import Classes
from medmom.data.atomic import read_json, write_json, write_text
from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError
from medmom.inference.explain import SOFTWARE
from medmom.inference.outputs import check_writable

SLICES = ("case", "slice")
"""First columns of the table of slices; those of the classes follow."""


@dataclass(frozen=True)
class ClassOutcome:
    """What became of one case.

    Attributes:
        case: Its name and files.
        classes: What it is of: one class, or any number where an image may be of several. Empty where it failed.
        probabilities: One for each class, calibrated; None where it failed.
        logits: The same before temperature and softmax or sigmoid.
        flag: Why not to trust the answer; empty where nothing speaks against it.
        slices: Index and probabilities of each slice that was looked at; empty where the image was seen as a whole.
        error: Why it failed: one line that names the file, the fact and the mend; else None.
    """

    case: CaseFiles
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] | None = None
    logits: tuple[float, ...] | None = None
    flag: str = ""
    slices: tuple[tuple[int, tuple[float, ...]], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class ClassOutputs:
    """Where a prediction of classes goes.

    Attributes:
        table: One row a case.
        listing: The JSON file that says what the table is.
        slices: One row a slice, where volumes were seen slice by slice.
        pictures: Folder of the explanations.
    """

    table: Path
    listing: Path
    slices: Path
    pictures: Path

    def picture(self, case: CaseFiles) -> Path:
        """The explanation of a case."""
        return self.pictures / f"{case.name}.png"


def plan_class_outputs(cases: Sequence[CaseFiles], out: Path, *, explain: bool) -> ClassOutputs:
    """Decides where the table goes, and refuses before any work what could not, or must not, be written.

    Args:
        cases: What is to be predicted.
        out: The table; its name ends in ``.csv``.
        explain: Whether there will be pictures.

    Returns:
        Paths; nothing is written yet, and no folder made.

    Raises:
        MedmomError: ``out`` has another ending, cannot be written, or something would be replaced that an earlier
            predict did not write.
    """
    if out.suffix.lower() != ".csv" or out.is_dir():
        raise MedmomError(f"{out}: classes are written as one table. Name a file that ends in .csv.")
    slices = "slices.csv" if out.stem == "classes" else f"{out.stem}_slices.csv"
    pictures = out.with_name(f"{out.stem}_explain")
    outputs = ClassOutputs(out, out.with_suffix(".json"), out.with_name(slices), pictures)
    try:
        _check_is_ours(outputs)
        if explain:
            _check_pictures(outputs, cases)
        check_writable(out.parent)
    except OSError as error:
        raise MedmomError(f"{out}: cannot be written ({error.strerror}). Name another output.") from error
    return outputs


def write_classes(
    outputs: ClassOutputs, outcomes: Sequence[ClassOutcome], classes: Classes, about: dict[str, Any]
) -> None:
    """Writes the table, its JSON file and, where volumes were seen slice by slice, the table of slices.

    A case that failed has no row: the JSON file names it with its error.

    Args:
        outputs: Where.
        outcomes: One a case.
        classes: The columns.
        about: What the JSON file says beside classes and cases.

    Raises:
        MedmomError: The place cannot be written.
    """
    names = [f"p_{name}" for name in classes.names]
    done = [outcome for outcome in outcomes if outcome.probabilities is not None]
    by_slice = [[outcome.case.name, index, *map(_digits, found)] for outcome in done for index, found in outcome.slices]
    # The JSON file comes first: it marks the tables as some that a later run may replace.
    cases = [_listed(outcome) for outcome in outcomes]
    write_json(outputs.listing, {"classes": classes.as_dict(), **about, "cases": cases})
    write_text(
        outputs.table, _csv(["case", "image", "class", "probability", "flag", *names], (_row(each) for each in done))
    )
    if by_slice:
        write_text(outputs.slices, _csv([*SLICES, *names], by_slice))
    elif outputs.slices.exists():
        # Of an earlier run; these would be taken for slices of this one.
        outputs.slices.unlink()


def _row(outcome: ClassOutcome) -> list[Any]:
    probabilities = outcome.probabilities or ()
    images = ";".join(str(path.absolute()) for path in outcome.case.images)
    top = _digits(max(probabilities))
    return [
        outcome.case.name,
        images,
        ";".join(outcome.classes),
        top,
        outcome.flag,
        *map(_digits, probabilities),
    ]


def _listed(outcome: ClassOutcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "name": case.name,
        "image": [str(path.absolute()) for path in case.images],
        "item": case.item,
        "patient": case.group,
        "reference": None if case.classes is None else list(case.classes),
        "logits": None if outcome.logits is None else list(outcome.logits),
        "error": outcome.error,
    }


def _digits(value: float) -> str:
    return f"{value:.6f}"


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def _check_is_ours(outputs: ClassOutputs) -> None:
    """Refuses to replace a table that no earlier predict wrote, such as one of references."""
    if outputs.slices.exists():
        with outputs.slices.open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline()
        if not first.startswith(",".join((*SLICES, "p_"))):
            raise _foreign(outputs.slices)
    if not outputs.table.exists() and not outputs.listing.exists():
        return
    try:
        about = read_json(outputs.listing)
    except MedmomError:
        about = None
    if not (isinstance(about, dict) and {"classes", "model", "cases"} <= about.keys()):
        raise _foreign(outputs.table if outputs.table.exists() else outputs.listing)


def _check_pictures(outputs: ClassOutputs, cases: Sequence[CaseFiles]) -> None:
    for case in cases:
        path = outputs.picture(case)
        if path.parent != outputs.pictures:
            raise MedmomError(f"{case.images[0]}: a picture cannot be named {case.name!r}. Rename the case.")
        if path.exists() and not _is_our_picture(path):
            raise _foreign(path)
    if outputs.pictures.exists() and not outputs.pictures.is_dir():
        raise _foreign(outputs.pictures)


def _is_our_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return bool(picture.info.get("Software") == SOFTWARE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _foreign(path: Path) -> MedmomError:
    return MedmomError(f"{path}: exists and was not written by medmom predict. Move it, or name another output.")
