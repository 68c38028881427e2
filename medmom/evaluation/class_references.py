"""What images truly are of, from a CSV file or a folder for each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmom.classes import Classes
from medmom.data.files import is_image, stem
from medmom.data.table import read_table
from medmom.errors import MedmomError
from medmom.evaluation.class_listing import Answer

NAME_COLUMNS = ("case", "name", "image", "file", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "reference")
PATIENT_COLUMNS = ("patient", "group")


@dataclass(frozen=True)
class ClassReference:
    """What one image is of.

    Attributes:
        name: As the list spells the image.
        path: The image file, were it there.
        classes: Class names; None where the list says nothing.
        patient: Whom the image shows, or None.
    """

    name: str
    path: Path
    classes: tuple[str, ...] | None
    patient: str | None = None


class ClassReferences:
    """References by name, by path and by file name.

    Args:
        source: Where they come from, for messages.
        references: At least one.
    """

    def __init__(self, source: Path, references: Sequence[ClassReference]) -> None:
        self.source = source
        self.references = tuple(references)
        self._by_name = {reference.name: reference for reference in references}
        self._by_path = {reference.path.resolve(): reference for reference in references}
        self._by_stem: dict[str, list[ClassReference]] = {}
        for reference in references:
            self._by_stem.setdefault(_bare(reference.name), []).append(reference)

    def find(self, answer: Answer) -> ClassReference | None:
        """Finds the reference of a case: by its name, else by its image's path, else by its image's name alone.

        Raises:
            MedmomError: Only names could tell, and two references have the same.
        """
        if answer.name in self._by_name:
            return self._by_name[answer.name]
        paths = [Path(image) for image in answer.images[:1]]
        for path in paths:
            if path.resolve() in self._by_path:
                return self._by_path[path.resolve()]
        for name in (answer.name, *(path.name for path in paths)):
            found = self._by_stem.get(_bare(name), [])
            if len(found) > 1:
                raise MedmomError(
                    f"{self.source}: {found[0].name} and {found[1].name} may both be the case {answer.name}. "
                    "Give a CSV file that names each case as the table of predictions does."
                )
            if found:
                return found[0]
        return None


def read_class_references(path: Path, classes: Classes) -> ClassReferences:
    """Reads what images are of.

    Args:
        path: A CSV file with a column ``case``, ``name``, ``image`` or ``file``; a column ``label`` or ``class``
            (several classes parted by ";"), or for each class a column ``label_<class>`` of 0 and 1; and, where it is
            known, ``patient``. Or a folder with a folder of images for each class.
        classes: What the predictions tell apart.

    Returns:
        The references. An empty label means none of the classes in multi-label, else that it is not known.

    Raises:
        MedmomError: There is no such file or column, a class is unknown, or an image is listed twice.
    """
    if path.is_dir():
        found = list(_folder(path))
    elif path.is_file():
        found = list(_table(path, classes))
    else:
        raise MedmomError(
            f"{path}: there are no such references. Give a CSV file, or a folder with one for each class."
        )
    if not found:
        raise MedmomError(
            f"{path}: lists no image. Give a CSV file, or a folder with a folder of images for each class."
        )
    for reference in found:
        check_classes(f"{path}: {reference.name}", reference.classes, classes)
    return ClassReferences(path, found)


def check_classes(place: str, names: Sequence[str] | None, classes: Classes) -> None:
    """Refuses classes that the predictions do not tell apart, and several where there is one.

    Raises:
        MedmomError: The line starts with ``place``.
    """
    unknown = [name for name in names or () if name not in classes.names]
    if unknown:
        listed = ", ".join(classes.names[:12]) + (", ..." if classes.num_channels > 12 else "")
        raise MedmomError(f"{place} is of the class {unknown[0]}, which the model does not know ({listed}). Rename it.")
    if not classes.is_multilabel and names is not None and len(names) != 1:
        raise MedmomError(f"{place} is of {len(names)} classes, the model gives each image one. Name one class.")


def _bare(name: str) -> str:
    file = Path(name).name
    return stem(file) if is_image(file) else file


def _folder(path: Path) -> Iterator[ClassReference]:
    for folder in sorted(place for place in path.iterdir() if place.is_dir() and place.name[0] != "."):
        for file in sorted(folder.iterdir()):
            if file.is_file() and is_image(file) and file.name[0] != ".":
                yield ClassReference(f"{folder.name}/{file.name}", file, (folder.name,))


def _table(path: Path, classes: Classes) -> Iterator[ClassReference]:
    table = read_table(path)
    name_column = next((name for name in NAME_COLUMNS if name in table.columns), None)
    label_column = next((name for name in LABEL_COLUMNS if name in table.columns), None)
    has_yes_no = all(f"label_{name}" in table.columns for name in classes.names)
    if name_column is None or (label_column is None and not has_yes_no):
        wanted = "case, name, image or file" if name_column is None else "label or class"
        raise MedmomError(f"{path}: none of the columns {', '.join(table.columns)} is called {wanted}. Add one.")
    patient_column = next((name for name in PATIENT_COLUMNS if name in table.columns), "")
    listed: set[str] = set()
    for row in table.rows:
        name = row[name_column]
        if name in listed:
            raise MedmomError(f"{path}: two rows are of {name}. Keep one.")
        listed.add(name)
        cells = _yes_no(path, row, classes) if label_column is None else _parted(row[label_column], classes)
        yield ClassReference(name, path.parent / name, cells, row.get(patient_column) or None)


def _parted(cell: str, classes: Classes) -> tuple[str, ...] | None:
    names = tuple(dict.fromkeys(part.strip() for part in cell.split(";") if part.strip()))
    return names if names or classes.is_multilabel else None


def _yes_no(path: Path, row: Mapping[str, str], classes: Classes) -> tuple[str, ...]:
    for name in classes.names:
        if row[f"label_{name}"] not in ("0", "1", "0.0", "1.0"):
            raise MedmomError(f"{path}: label_{name} is {row[f'label_{name}']!r} in a row. Give 0 or 1.")
    return tuple(name for name in classes.names if row[f"label_{name}"][0] == "1")
