"""Lists of training, validation and test images, one CSV file each, as RadImageNet is published."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from medmom.data.class_cases import FOLDS, TRAIN, VALIDATION, ClassEntry, Listing
from medmom.data.class_table import Directories, group_note, image_columns, table_entries
from medmom.data.table import Table
from medmom.errors import MedmomError

MODALITIES = ("CT", "MR", "US")

TOP_FOLDER = "radiology_ai"
"""What RadImageNet's paths start with, whatever folder it was unpacked into."""


def find_lists(tables: Sequence[Table]) -> dict[str, Table]:
    """Gives the list of each part by ``train``, ``val`` and ``test``; empty unless the first two are there.

    Args:
        tables: Class tables of one folder; a list is told by the word in its name, as in ``RadiologyAI_train.csv``.
    """
    found: dict[str, Table] = {}
    for table in tables:
        words = [FOLDS[word] for word in re.split(r"[^a-z]+", table.path.stem.lower()) if word in FOLDS]
        if len(words) == 1:
            if words[0] in found:
                return {}
            found[words[0]] = table
    return found if {TRAIN, VALIDATION} <= found.keys() else {}


def read_lists(lists: Mapping[str, Table], *, group: str | None) -> Listing:
    """Reads the lists of one folder together; the fold of a case is the list that names it.

    Paths start from the lists' folder or from the one above, with or without ``radiology_ai/`` before them. Images
    of a region of the body, such as ``US`` or ``MR/knee``, whose folder is not there at all are left out with a note:
    so the published lists serve for a part of RadImageNet too.

    A class is called by its folder from the modality on (``ct/abd/normal``), which tells the normal CT from the
    normal MRI; where labels and folders do not agree one to one, by modality, region and label; where paths tell no
    modality, by its label.

    Raises:
        MedmomError: As for a CSV file; or an image stands in two lists.

    Source:
        Mei et al. 2022, doi:10.1148/ryai.210315.
    """
    finder, entries, places, left_out = _Finder(lists[TRAIN].path.parent), [], [], 0
    notes: list[str] = []
    for fold, listed in lists.items():
        table, dropped = finder.present(listed)
        left_out += dropped
        if not table.rows:
            continue
        found, known = table_entries(table, finder.find, group=group)
        unlabelled = next((e for e, has_class in zip(found, known, strict=True) if not has_class), None)
        if unlabelled is not None:
            raise MedmomError(
                f"{table.path}: {unlabelled.images[0].name} has no label. Fill it in, or take the row out."
            )
        entries += [entry._replace(fold=fold) for entry in found]
        places += [finder.place(entry.images[0]) for entry in found]
        notes = notes or ([] if found[0].group else [group_note(table)])
    if left_out:
        notes.append(f"{left_out} listed images are left out: the folders of their regions are not there")
    folder, source = finder.folder, lists[TRAIN].path
    _check_twice(entries, source)
    several = any(len(entry.classes) > 1 for entry in entries)
    renamed = entries if several or not all(places) else _with_places(entries, places)
    return Listing(folder, source, tuple(renamed), None, several, tuple(notes))


class _Finder:
    """Looks up listed files below a folder and the one above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directories = Directories()
        self.regions: dict[str, bool] = {}

    def find(self, cell: str) -> Path | None:
        """Gives the file, None where it is nowhere."""
        return next((path for path in self._candidates(cell) if self.directories.has(path)), None)

    def present(self, table: Table) -> tuple[Table, int]:
        """Gives the table without the rows of regions that have no folder, and their number."""
        column = image_columns(table)[0]
        rows = tuple(row for row in table.rows if self._has_region(row[column].replace("\\", "/")))
        return Table(table.path, table.columns, rows), len(table.rows) - len(rows)

    def place(self, path: Path) -> tuple[str, ...]:
        """Gives the folders of a file from its modality on; empty where none is told."""
        base = next(base for base in self._bases() if path.is_relative_to(base))
        parts = path.relative_to(base).parts[:-1]
        start = next((k for k, part in enumerate(parts) if part in MODALITIES), None)
        return () if start is None or start == len(parts) - 1 else parts[start:]

    def _bases(self) -> tuple[Path, Path]:
        return self.folder, self.folder.absolute().parent

    def _candidates(self, cell: str) -> list[Path]:
        short = cell.removeprefix(f"{TOP_FOLDER}/")
        return [base / text for base in self._bases() for text in dict.fromkeys((cell, short))]

    def _has_region(self, cell: str) -> bool:
        parts = cell.split("/")
        start = next((k for k, part in enumerate(parts) if part in MODALITIES), None)
        if start is None:
            return True
        # Ultrasound has no folder for the region: the classes lie in US itself.
        region = "/".join(parts[: max(start + 1, min(start + 2, len(parts) - 2))])
        if region not in self.regions:
            self.regions[region] = any(path.is_dir() for path in self._candidates(region))
        return self.regions[region]


def _with_places(entries: Sequence[ClassEntry], places: Sequence[tuple[str, ...]]) -> list[ClassEntry]:
    labels_of, places_of = defaultdict(set), defaultdict(set)
    for entry, place in zip(entries, places, strict=True):
        labels_of[place].add(entry.classes)
        places_of[place[:-1], entry.classes].add(place)
    agree = all(len(found) == 1 for found in (*labels_of.values(), *places_of.values()))
    last = [place[-1].lower() if agree else e.classes[0] for e, place in zip(entries, places, strict=True)]
    names = ["/".join((*(part.lower() for part in place[:-1]), end)) for place, end in zip(places, last, strict=True)]
    return [entry._replace(classes=(name,)) for entry, name in zip(entries, names, strict=True)]


def _check_twice(entries: Sequence[ClassEntry], source: Path) -> None:
    folds: dict[tuple[Path, ...], str] = {}
    for entry in entries:
        if folds.setdefault(entry.images, entry.fold) != entry.fold:
            raise MedmomError(
                f"{source}: {entry.images[0]} stands in the lists of {folds[entry.images]} and {entry.fold}. "
                "Keep it in one."
            )
