from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from medmom.data.case import CaseFiles, CaseFolder, find_cases
from medmom.data.files import read_json, stem
from medmom.errors import MedmomError
from medmom.evaluation.listing import Entry, files_by_case, parse_labels
from medmom.labels import Labels

LABEL_FOLDERS = ("labels", "labelsTr", "masks")


class References:
    """The references that are there, and what the folders they lie in say about them.

    Args:
        files: Label maps by case name, or None where each case's list names its own.
        path: Where they come from, for messages.
    """

    def __init__(self, files: Mapping[str, Path] | None, path: Path | None) -> None:
        self._files = files
        self._path = path
        self._folders: dict[Path, CaseFolder | None] = {}
        self._known: dict[Path, CaseFiles] = {}

    @classmethod
    def find(cls, path: Path | None, *, single: str | None) -> References:
        """Lists a folder of label maps, or the one that belongs to a single case.

        Args:
            path: A folder with label maps in it or in its ``labels``, ``labelsTr`` or ``masks``, one file, or None.
            single: Name of the case where there is only one prediction, else None.

        Raises:
            MedmomError: There is no label map, or one file for a folder of predictions.
        """
        if path is None:
            return cls(None, None)
        if path.is_file():
            if single is None:
                raise MedmomError(f"{path}: one reference for a folder of predictions. Give a folder of references.")
            return cls({single: path}, path)
        for folder in (path, *(path / name for name in LABEL_FOLDERS)):
            files = files_by_case(folder) if folder == path or folder.is_dir() else {}
            if files:
                return cls(files, path)
        raise MedmomError(f"{path}: there is no label map in this folder. Give a folder of references.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all cases for which there is a reference."""
        return tuple(self._files or ())

    def file(self, entry: Entry) -> Path:
        """Finds the reference of a case.

        Raises:
            MedmomError: There is none.
        """
        found = entry.reference
        if self._files is not None:
            other_name = stem(entry.reference) if entry.reference else entry.name
            found = self._files.get(entry.name) or self._files.get(other_name)
        if found is None:
            fact = "no list names a reference" if self._path is None else f"{self._path}: there is no reference"
            raise MedmomError(f"{fact} of the case {entry.name}. Add it, or take the case off the list.")
        if not found.is_file():
            raise MedmomError(f"{found}: there is no such reference of the case {entry.name}. Correct the path.")
        return found

    def facts(self, reference: Path) -> CaseFiles | None:
        """Patient, image and annotated classes of a reference that lies in a folder of cases."""
        place = reference.resolve().parent
        if place not in self._folders:
            folder = self._folders[place] = _case_folder(place)
            cases = () if folder is None else folder.cases
            self._known.update({case.label.resolve(): case for case in cases if case.label is not None})
        return self._known.get(reference.resolve())

    def labels(self, references: Iterable[Path]) -> Labels | None:
        """Classes named beside the references, or None.

        Raises:
            MedmomError: They lie in folders with different classes.
        """
        places = dict.fromkeys(reference.resolve().parent for reference in references)
        found = {self._labels_beside(place): place for place in places}
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise MedmomError(f"{one}: other classes than in {other}. Score the two folders of references one by one.")
        return next(iter(found), None)

    def _labels_beside(self, place: Path) -> Labels | None:
        folder = self._folders.get(place)
        if folder is not None:
            return folder.labels
        for path in (place / "dataset.json", place.parent / "dataset.json"):
            if path.is_file() and (path.parent == place or place.name in LABEL_FOLDERS):
                table = read_json(path)
                return parse_labels(table.get("labels")) if isinstance(table, dict) else None
        return None


def _case_folder(place: Path) -> CaseFolder | None:
    """The folder of cases in which label maps lie, or None where it is none."""
    try:
        return find_cases(place.parent if place.name in LABEL_FOLDERS else place)
    except MedmomError:
        return None
