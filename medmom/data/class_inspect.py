"""What is in a folder of classified images, and what is wrong with it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmom.data.class_cases import ClassFolder
from medmom.data.class_folders import visible
from medmom.data.class_layouts import find_class_cases
from medmom.data.class_survey import ClassSurvey, check_duplicates, survey_classes
from medmom.data.files import is_image
from medmom.data.folds import Split
from medmom.data.layouts import FOLDERS
from medmom.data.table import read_table
from medmom.errors import MedmomError

EDGES = (32, 64, 128, 224)
"""Sizes that pictures are proposed to be brought to: the least that is not below their usual size, or the last."""


@dataclass(frozen=True, eq=False)
class ClassInspection:
    """What was found.

    Attributes:
        folder: The cases.
        surveys: By case name, of the cases that could be read.
        faults: Lines with file, fact and mend.
        notes: Lines on what is odd, but no fault.
    """

    folder: ClassFolder
    surveys: dict[str, ClassSurvey]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def holds_classes(folder: Path) -> bool:
    """Whether a folder or file lists images and their classes rather than images and label maps.

    Where it lists neither as it should, it is what it looks like, so that the right mistake is named.
    """
    home = folder.parent if folder.is_file() else folder
    drawn = [folder / name for names in FOLDERS.values() for name in names]
    if (home / "dataset.json").is_file() or any(path.is_dir() for path in drawn):
        return False
    try:
        find_class_cases(folder)
    except MedmomError:
        return _looks_like_classes(folder)
    return True


def _looks_like_classes(path: Path) -> bool:
    if path.is_file() and path.suffix.lower() == ".csv":
        # Of label maps the cells would name files.
        return not any(is_image(row.get("label", "")) for row in read_table(path).rows)
    if path.is_file():
        return path.suffix.lower() == ".npz"
    inner = [below for below in visible(path) if below.is_dir() and below.name not in FOLDERS] if path.is_dir() else []
    return any(is_image(image) for below in inner for image in visible(below))


def inspect_classes(folder: Path, *, group: str | None = None, quiet: bool = False) -> ClassInspection:
    """Reads every image of a folder once.

    Args:
        folder: A folder a class, a CSV file, an ``.npz`` file or RadImageNet, see ``find_class_cases``.
        group: Column that says which cases belong together.
        quiet: Whether to leave out the progress bar.

    Returns:
        What was found; images that cannot be read are faults.

    Raises:
        MedmomError: The folder cannot be understood.
    """
    found = find_class_cases(folder, group=group)
    surveys: dict[str, ClassSurvey] = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="medmom-") as scratch:
        try:
            surveys = survey_classes(found.cases, Path(scratch), quiet=quiet)
        except MedmomError:
            # One that cannot be read hides all that come after it: look at each.
            for case in found.cases:
                try:
                    surveys |= survey_classes([case], Path(scratch), quiet=True)
                except MedmomError as error:
                    faults.append(str(error))
    everyone = Split(tuple(surveys), ())
    notes = check_duplicates(surveys, everyone, [case for case in found.cases if case.name in surveys])
    return ClassInspection(found, surveys, tuple(faults), (*found.notes, *notes))


def format_class_inspection(inspection: ClassInspection) -> str:
    """Gives an inspection as text for people."""
    found = inspection.folder
    kind = "any number of classes an image" if found.classes.is_multilabel else "one class an image"
    groups = len({case.group for case in found.cases})
    lines = [f"{found.folder}: {len(found.cases)} images of {found.classes.num_channels} classes, {kind}"]
    lines += [f"groups (patients): {groups}", *(f"note: {note}" for note in inspection.notes), ""]
    lines += [*_class_table(found), "", *_size_lines(list(inspection.surveys.values())), ""]
    lines += [f"{len(inspection.faults)} faults" if inspection.faults else "no fault found"]
    lines += [f"  {fault}" for fault in inspection.faults]
    return "\n".join([*lines, "", "proposal", *_proposal(list(inspection.surveys.values()))])


def _class_table(found: ClassFolder) -> Iterator[str]:
    folds = sorted({case.fold or "" for case in found.cases})
    counts = Counter((name, case.fold or "") for case in found.cases for name in case.classes or ())
    width = max(map(len, (*found.classes.names, "class")))
    titles = [fold or "images" for fold in folds]
    yield f"{'class':{width}}" + "".join(f"{title:>10}" for title in titles)
    for name in found.classes.names:
        yield f"{name:{width}}" + "".join(f"{counts[name, fold]:>10}" for fold in folds)


def _size_lines(surveys: Sequence[ClassSurvey]) -> Iterator[str]:
    shapes = Counter(survey.shape for survey in surveys)
    yield f"sizes: {len(shapes)}"
    for (channels, *shape), count in shapes.most_common(5):
        size = " x ".join(map(str, shape if shape[2] > 1 else shape[:2]))
        yield f"  {size}, {channels} channel{'s' if channels > 1 else ''}: {count} images"


def _proposal(surveys: Sequence[ClassSurvey]) -> Iterator[str]:
    """Writes what suits the images in the keys of a recipe, and why."""
    if not surveys:
        return
    shapes = np.array([survey.shape for survey in surveys])
    usual = int(np.median(shapes[:, 1:3].max(axis=1)))
    edge = next((size for size in EDGES if size >= usual), EDGES[-1])
    if (shapes[:, 3] > 1).any():
        yield f"  data.patch: [{edge}, {edge}], preparation.size: [{edge}, {edge}], data.slices: 16"
        yield f"  why volumes of usually {usual} voxels a slice: a 2-D network looks at 16 slices of each"
    else:
        yield f"  data.patch: [{edge}, {edge}], preparation.size: [{edge}, {edge}], preparation.intensity: unit"
        yield f"  why pictures of usually {usual} pixels along the longer edge"
    colours = {int(count) for count in shapes[:, 0]}
    yield f"  preparation.colour: {'rgb' if colours == {3} else 'grey' if colours <= {1, 3} else 'own'}"
