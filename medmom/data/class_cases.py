"""Cases that are classified as a whole: what every layout lists them as, before any image is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError

TRAIN, VALIDATION, TEST = "train", "val", "test"

FOLDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
"""How the parts of a data set that was split before are spelt."""


@dataclass(frozen=True)
class ClassFolder:
    """The cases of a data folder and the classes that they are of.

    Attributes:
        folder: The folder that relative paths start from, or the file that holds the images.
        cases: In the natural order of their names. ``classes`` is known of each: exactly one name, or any number of
            names where ``classes.is_multilabel``.
        classes: What they are told apart by.
        notes: Lines to tell the user, such as how cases were grouped.
    """

    folder: Path
    cases: tuple[CaseFiles, ...]
    classes: Classes
    notes: tuple[str, ...] = ()


class ClassEntry(NamedTuple):
    """One case as a layout lists it; a name, a fold or a group that is not known is empty."""

    images: tuple[Path, ...]
    classes: tuple[str, ...]
    name: str = ""
    fold: str = ""
    group: str = ""
    item: int | None = None


@dataclass(frozen=True)
class Listing:
    """What a folder or a file lists.

    Attributes:
        folder: Where relative paths start, or the file that holds the images.
        source: What to name where something is wrong with the whole.
        entries: The cases, as listed.
        names: The classes in the order of the channels; None: those of the entries in natural order.
        is_multilabel: Whether an image may be of any number of classes.
        notes: Lines to tell the user.
    """

    folder: Path
    source: Path
    entries: tuple[ClassEntry, ...]
    names: tuple[str, ...] | None = None
    is_multilabel: bool = False
    notes: tuple[str, ...] = ()


def with_cases(folder: ClassFolder, cases: Sequence[CaseFiles]) -> ClassFolder:
    """Gives the folder with some of its cases only, and without the classes that no case is of any more.

    Raises:
        MedmomError: Fewer than two classes are left (one, where an image may be of several).
    """
    counts = Counter(name for case in cases for name in case.classes or ())
    names = tuple(name for name in folder.classes.names if counts[name])
    gone = [name for name in folder.classes.names if not counts[name]]
    check_classes_of(folder.folder, names, is_multilabel=folder.classes.is_multilabel)
    notes = [f"no case of class {', '.join(gone)} takes part"] if gone else []
    return replace(
        folder,
        cases=tuple(cases),
        classes=replace(folder.classes, names=names),
        notes=(*folder.notes, *notes),
    )


def check_classes_of(source: Path, names: Sequence[str], *, is_multilabel: bool) -> None:
    """Demands that there is something to tell apart.

    Raises:
        MedmomError: There is none, or one class that every image is of.
    """
    if not names or (len(names) == 1 and not is_multilabel):
        found = f"one class only ({names[0]})" if names else "no class"
        raise MedmomError(f"{source}: {found}, so there is nothing to tell apart. Add images of another class.")


def natural_key(text: str) -> list[str | int]:
    """Sorts numbers in a text by their value: ``slice_9`` comes before ``slice_10``."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", text))]


def spell_fold(text: str) -> str | None:
    """Gives ``train``, ``val``, ``test`` or a number, however a table spells it; None where it is none of these."""
    number = re.fullmatch(r"(\d+)(\.0*)?", text)
    return str(int(number[1])) if number else FOLDS.get(text.lower())
