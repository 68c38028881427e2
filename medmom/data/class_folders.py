"""A folder for each class, alone or below the parts of a split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medmom.data.class_cases import FOLDS, TRAIN, ClassEntry, Listing, spell_fold
from medmom.data.class_table import PATIENT, check_group_column, group_note
from medmom.data.files import is_image, stem
from medmom.data.nifti import VOXEL_SUFFIXES, suffix
from medmom.data.table import NAME_COLUMNS, Table, read_table
from medmom.errors import MedmomError


def read_class_folders(folder: Path, *, group: str | None) -> Listing:
    """Lists ``<class>/<image>``, or ``train/<class>/<image>`` with ``val`` and ``test`` beside it.

    What is passed over is told by a note: files that are no images, folders inside a class, images beside the classes.

    Raises:
        MedmomError: There are no class folders, one holds no image, or ``cases.csv`` does not fit them.
    """
    notes: list[str] = []
    tops = _folders(folder)
    spelt = [FOLDS.get(path.name.lower()) for path in tops]
    if TRAIN in spelt and all(spelt):
        if len({*spelt}) < len(spelt):
            raise MedmomError(f"{folder}: two of {', '.join(p.name for p in tops)} are the same part. Join them.")
        parts = [(fold or "", _folders(path)) for fold, path in zip(spelt, tops, strict=True)]
    else:
        parts = [("", tops)]
    entries = []
    for fold, classes in parts:
        for path in classes:
            entries += [ClassEntry((image,), (path.name,), fold=fold) for image in _images(path, notes)]
    if not entries:
        raise MedmomError(
            f"{folder}: no folder of images lies in it, no CSV file with the columns image and label, and no .npz. "
            "Give a folder that holds a folder for each class."
        )
    loose = [path for path in visible(folder) if path.is_file() and is_image(path)]
    if loose:
        notes.append(
            f"{len(loose)} images beside the class folders, such as {loose[0].name}, are of no class: left out"
        )
    path = folder / "cases.csv"
    table = read_table(path) if path.is_file() else None
    if table is not None:
        entries = _with_rows(folder, entries, table, group)
    elif group is not None:
        raise MedmomError(f"{folder}: no cases.csv with the column {group}. Add it, or leave out --data.group.")
    if not entries[0].group:
        notes.append(group_note(table))
    return Listing(folder, folder, tuple(entries), notes=tuple(notes))


def _images(folder: Path, notes: list[str]) -> list[Path]:
    """Lists the images of one class, and notes what is no image."""
    paths = visible(folder)
    inner = [path for path in paths if path.is_dir()]
    images = [path for path in paths if is_image(path) and path not in inner]
    known = {*inner, *images}
    others = [path for path in paths if path not in known and suffix(path) not in VOXEL_SUFFIXES]
    if not images:
        fact = f"no image, but {others[0].name} for example" if others else "no file"
        fact = f"folders, such as {inner[0].name}, and no image" if inner else fact
        mend = f"Give {folder}, or images right inside it." if inner else "Add images, or take the folder away."
        raise MedmomError(f"{folder}: the class folder holds {fact}. {mend}")
    if others:
        notes.append(f"{len(others)} files of {folder.name}, such as {others[0].name}, are no images: passed over")
    if inner:
        notes.append(f"the folders inside {folder.name}, such as {inner[0].name}, are not looked into")
    return images


def _with_rows(folder: Path, entries: Sequence[ClassEntry], table: Table, group: str | None) -> list[ClassEntry]:
    """Adds group and fold of each image from the table that names it."""
    check_group_column(table, group)
    column = group or (PATIENT if PATIENT in table.columns else None)
    rows = _rows(folder, entries, table) if column or "fold" in table.columns else {}
    found = []
    for entry in entries:
        row = rows.get(entry.images[0], {})
        if column and not row.get(column):
            raise MedmomError(f"{table.path}: no {column} for {entry.images[0].relative_to(folder)}. Fill it in.")
        fold = spell_fold(row["fold"]) if row.get("fold") else entry.fold
        if fold is None:
            raise MedmomError(
                f"{table.path}: the fold {row['fold']!r} is neither train, val, test nor a number. Mend it."
            )
        found.append(entry._replace(group=row[column] if column else "", fold=fold))
    return found


def _rows(folder: Path, entries: Iterable[ClassEntry], table: Table) -> dict[Path, Mapping[str, str]]:
    """Finds the image that each row means: by its path from the folder or its file name, with or without suffix."""
    column = next((name for name in NAME_COLUMNS if name in table.columns), None)
    if column is None:
        raise MedmomError(
            f"{table.path}: none of the columns {', '.join(table.columns)} names the image. Add a column 'file'."
        )
    meant: dict[str, set[Path]] = defaultdict(set)
    for entry in entries:
        image = entry.images[0]
        short = image.relative_to(folder)
        for path in (short, Path(*short.parts[-2:]), Path(short.name)):
            meant[path.as_posix()].add(image)
            meant[path.with_name(stem(path)).as_posix()].add(image)
    rows: dict[Path, Mapping[str, str]] = {}
    for row in table.rows:
        images = meant.get(row[column].replace("\\", "/"), set())
        if len(images) > 1:
            raise MedmomError(
                f"{table.path}: {row[column]} is the name of {len(images)} images, such as {min(images)}. "
                "Write the path from the folder, as class/image."
            )
        for image in images:
            if image in rows:
                raise MedmomError(f"{table.path}: two rows name {image.relative_to(folder)}. Keep one.")
            rows[image] = row
    return rows


def _folders(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir()]


def visible(folder: Path) -> list[Path]:
    """Lists a folder by name, without hidden files and the ``._`` twins that macOS leaves."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from error
