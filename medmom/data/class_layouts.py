"""The layouts of classified images that are read as they are: which files make a case, and of which class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.data.class_cases import TEST, ClassEntry, ClassFolder, Listing, check_classes_of, natural_key, with_cases
from medmom.data.class_folders import read_class_folders, visible
from medmom.data.class_items import read_item, read_items
from medmom.data.class_lists import find_lists, read_lists
from medmom.data.class_split import split_class_cases
from medmom.data.class_table import is_class_table, read_class_table
from medmom.data.files import stem
from medmom.data.table import read_table
from medmom.errors import MedmomError

__all__ = ["ClassFolder", "find_class_cases", "read_item", "split_class_cases", "with_cases"]


def find_class_cases(folder: str | Path, *, group: str | None = None) -> ClassFolder:
    """Lists the classified images of a folder or file; reads none of them.

    Read as they are, in this order: a CSV file with the columns ``image`` and ``label`` (or a folder with exactly
    one), a MedMNIST ``.npz`` file (or a folder with exactly one), RadImageNet (a list each for training, validation
    and test), and a folder for each class, alone or below ``train``, ``val`` and ``test``. A ``cases.csv`` beside
    class folders may give ``patient`` and ``fold`` by ``file`` or ``name``. Hidden files are passed over. A split that
    comes with the data is told by ``fold`` of the cases; those of the fold ``test`` are listed too.

    Args:
        folder: The folder, a CSV file or an ``.npz`` file.
        group: Column that says which cases belong together. None: ``patient`` where there is such a column, else
            every case is a group of its own, and a note says so.

    Raises:
        MedmomError: The folder cannot be understood, names files that are not there, or has one class only. Faults of
            single images are not looked for.
    """
    listing = _listing(Path(folder), group)
    present = Counter(name for entry in listing.entries for name in entry.classes)
    names = listing.names or tuple(sorted(present, key=natural_key))
    check_classes_of(listing.source, names, is_multilabel=listing.is_multilabel)
    cases = [
        CaseFiles(
            name,
            entry.images,
            None,
            entry.group or name,
            classes=entry.classes,
            fold=entry.fold or None,
            item=entry.item,
        )
        for name, entry in zip(_case_names(listing), listing.entries, strict=True)
    ]
    cases.sort(key=lambda case: natural_key(case.name))
    classes = Classes(names, listing.is_multilabel)
    return ClassFolder(listing.folder, tuple(cases), classes, (*listing.notes, *_fold_notes(cases, listing.source)))


def _listing(folder: Path, group: str | None) -> Listing:
    if folder.is_file():
        kind = folder.suffix.lower()
        if kind == ".csv":
            return read_class_table(read_table(folder), group=group)
        if kind == ".npz":
            return _without_groups(read_items(folder), group)
        raise MedmomError(f"{folder}: a file, but no .csv and no .npz. Give the folder that holds the classes.")
    if not folder.is_dir():
        raise MedmomError(f"{folder}: no such folder. Check the path.")
    files = [path for path in visible(folder) if path.is_file()]
    tables = [table for table in map(read_table, _of_kind(files, ".csv")) if is_class_table(table)]
    packed = _of_kind(files, ".npz")
    lists = find_lists(tables)
    if len(tables) == 1:
        return read_class_table(tables[0], group=group)
    if len(packed) == 1:
        return _without_groups(read_items(packed[0]), group)
    if lists:
        return read_lists(lists, group=group)
    if tables or packed:
        several = ", ".join(path.name for path in ([table.path for table in tables] or packed)[:3])
        raise MedmomError(f"{folder}: several data sets ({several}). Give one of the files.")
    return read_class_folders(folder, group=group)


def _of_kind(files: Sequence[Path], kind: str) -> list[Path]:
    return [path for path in files if path.suffix.lower() == kind]


def _without_groups(listing: Listing, group: str | None) -> Listing:
    if group is not None:
        raise MedmomError(f"{listing.source}: an .npz file has no column {group}. Leave out --data.group.")
    return replace(listing, notes=("nothing tells which images are of one patient: each is a group of its own",))


def _case_names(listing: Listing) -> list[str]:
    """Names each case as its table does, or by its file."""
    entries = listing.entries
    spelt = iter(_by_files(listing.folder, [entry.images[0] for entry in entries if not entry.name]))
    names = [entry.name or next(spelt) for entry in entries]
    first: dict[str, ClassEntry] = {}
    for name, entry in zip(names, entries, strict=True):
        if name in first:
            raise MedmomError(
                f"{listing.source}: {first[name].images[0]} and {entry.images[0]} would both be called {name}. "
                "Rename one, or give each a name of its own in a CSV file."
            )
        first[name] = entry
    return names


def _by_files(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Gives the stem of each file, with as many of its folders before it as tell all of them apart."""
    full = [path.relative_to(folder) if path.is_relative_to(folder) else path for path in paths]
    parts = [(*(part for part in path.parts[:-1] if part not in ("/", "..")), stem(path)) for path in full]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _fold_notes(cases: Sequence[CaseFiles], source: Path) -> tuple[str, ...]:
    """Says how the data are split already; refuses a split that leaves cases out or is of two kinds."""
    counts = Counter(case.fold for case in cases)
    if set(counts) == {None}:
        return ()
    if None in counts:
        case = next(case for case in cases if case.fold is None)
        raise MedmomError(
            f"{source}: the case {case.name} has no fold, others have. Fill it in, or leave the column out."
        )
    numbers = [fold for fold in counts if fold and fold.isdigit()]
    if numbers and {*counts} - {*numbers, TEST}:
        raise MedmomError(
            f"{source}: folds {', '.join(map(str, counts))}. Write either numbers, or train, val and test."
        )
    spelt = ", ".join(f"{counts[fold]} {fold}" for fold in sorted(counts, key=lambda fold: natural_key(str(fold))))
    return (f"the data come split: {spelt}",)
