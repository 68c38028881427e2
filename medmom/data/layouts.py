"""The folder layouts that are read as they are: which files make a case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medmom.data.dataset_json import Dataset, read_dataset
from medmom.data.files import find_series, is_image, is_picture, is_series, picture_channels, series_name, stem
from medmom.data.table import Table, read_table
from medmom.errors import MedmomError
from medmom.labels import Labels

CHANNEL = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's file stem of one channel: case name and channel number."""

FOLDERS = {"imagesTr": ("labelsTr",), "images": ("labels", "masks")}
"""Image folders and the label folders that belong to them."""


class Entry(NamedTuple):
    """One case as a layout lists it."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Layout:
    """What a folder lists.

    Attributes:
        folder: Where relative paths start.
        dataset: Its ``dataset.json``.
        entries: The cases, as listed.
        unused: Image and label files that belong to no case.
        table: The CSV file with one row a case, where there is one.
        rows: The table's row of each case, by name.
        notes: Lines to tell the user about what was taken for granted.
    """

    folder: Path
    dataset: Dataset
    entries: tuple[Entry, ...]
    unused: tuple[Path, ...] = ()
    table: Table | None = None
    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_layout(folder: Path) -> Layout:
    """Finds out how a folder is laid out and lists its cases.

    In this order: a CSV file; the decathlon (``training`` in ``dataset.json``); nnU-Net (``imagesTr``,
    ``labelsTr``); ``images`` and ``labels`` or ``masks``; a folder with one CSV file that has an image column.

    Raises:
        MedmomError: There is no such folder, or it is laid out in no known way.
    """
    if folder.is_file() and folder.suffix.lower() == ".csv":
        return _from_table(folder)
    if not folder.is_dir():
        fact = "a file, not a folder or a .csv" if folder.exists() else "no such folder"
        raise MedmomError(f"{folder}: {fact}. Give the folder that holds dataset.json.")
    if (folder / "dataset.json").is_file():
        dataset = read_dataset(folder / "dataset.json")
        if isinstance(dataset.content.get("training"), list):
            return _decathlon(folder, dataset)
    for images, labels in FOLDERS.items():
        if (folder / images).is_dir():
            return _two_folders(folder / images, _label_folder(folder, labels))
    tables = [path for path in _visible(folder) if path.suffix.lower() == ".csv" and _has_images(path)]
    if len(tables) == 1:
        return _from_table(tables[0])
    raise MedmomError(
        f"{folder}: neither imagesTr, images, a dataset.json with training nor one CSV file with a column image "
        "lies in it. Give the folder that holds one of them."
    )


def _two_folders(images: Path, labels: Path) -> Layout:
    folder, files = images.parent, _by_stem(images)
    if not files:
        other = next((path.name for path in _visible(images) if path.is_file()), None)
        fact = f"no NIfTI file and no picture, but {other} for example" if other else "no file"
        raise MedmomError(f"{images}: the folder holds {fact}. Put .nii.gz images or pictures there.")
    notes: tuple[str, ...] = ()
    path = folder / "dataset.json"
    if path.is_file() or images.name != "images" or not all(map(is_picture, files.values())):
        dataset = read_dataset(path)
    else:
        dataset = _plain_dataset(path, list(files.values()))
        notes = (
            f"no dataset.json: black (0) in masks is background, white (255) or 1 is foreground; channels "
            f"{', '.join(dataset.channels)} as in the first picture",
        )
    entries, unused = _gather(images, files, _by_stem(labels), len(dataset.channels))
    return _with_rows(Layout(folder, dataset, entries, unused, notes=notes))


def _label_folder(folder: Path, names: Sequence[str]) -> Path:
    """Chooses the folder with label maps; one of the names may hold boxes or other annotations."""
    found = [folder / name for name in names if _images(folder / name)]
    if len(found) > 1:
        raise MedmomError(f"{found[1]}: {found[0].name} beside it holds label maps too. Keep one of the two folders.")
    return found[0] if found else folder / names[0]


def _plain_dataset(path: Path, pictures: Sequence[Path]) -> Dataset:
    """Stands in for the dataset.json of pictures and black and white masks."""
    channels: tuple[str, ...] = ("R", "G", "B")
    for picture in pictures:
        # A damaged picture is for reading to name.
        with suppress(MedmomError):
            channels = channels if picture_channels(picture) == 3 else ("grey",)
            break
    return Dataset(path, Labels(("background", "foreground"), (0, 1)), channels, {})


def _decathlon(folder: Path, dataset: Dataset) -> Layout:
    entries = []
    for item in dataset.content["training"]:
        if not isinstance(item, dict) or not isinstance(item.get("image"), str | list) or not item["image"]:
            raise MedmomError(
                f'{dataset.path}: the training entry {item!r} names no image. Write {{"image": ..., "label": ...}}.'
            )
        listed = [item["image"]] if isinstance(item["image"], str) else item["image"]
        images = tuple(folder / str(path) for path in listed)
        if not images[0].name.startswith("."):
            label = folder / str(item["label"]) if item.get("label") else None
            entries.append(Entry(stem(images[0]), _split_files(images, len(dataset.channels)), label))
    used = {path.resolve() for entry in entries for path in (*entry.images, entry.label) if path}
    unused = [p for name in ("imagesTr", "labelsTr") for p in _images(folder / name) if p.resolve() not in used]
    return _with_rows(Layout(folder, dataset, tuple(entries), tuple(unused)))


def _split_files(images: tuple[Path, ...], num_channels: int) -> tuple[Path, ...]:
    """Follows nnU-Net's first version, whose list leaves out the ``_0000`` of the files on disk."""
    if len(images) > 1 or _is_there(images[0]):
        return images
    ending = images[0].name[len(stem(images[0])) :]
    split = tuple(images[0].with_name(f"{stem(images[0])}_{k:04d}{ending}") for k in range(num_channels))
    return split if _is_there(split[0]) else images


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name that the disk refuses: reading the case will say so.
        return False


def _gather(
    folder: Path, images: Mapping[str, Path], labels: Mapping[str, Path], num_channels: int
) -> tuple[tuple[Entry, ...], tuple[Path, ...]]:
    """Pairs images and labels of two folders by name; returns the cases and the files left over."""
    if _named_by_channel(images, labels, num_channels):
        cases = _join_channels(folder, images, num_channels)
    else:
        cases = {name: (path,) for name, path in images.items()}
    entries = tuple(Entry(name, files, labels.get(name)) for name, files in sorted(cases.items()))
    used = {path for entry in entries for path in entry.images}
    unused = [path for path in images.values() if path not in used]
    return entries, (*unused, *(path for name, path in labels.items() if name not in cases))


def _named_by_channel(images: Iterable[str], labels: Mapping[str, Path], num_channels: int) -> bool:
    """Whether file names end in nnU-Net's channel number rather than in a number of the case."""
    matches = [CHANNEL.fullmatch(name) for name in images]
    if not all(matches) or any(name in labels for name in images):
        return False
    found = [match for match in matches if match]
    return any(match[1] in labels for match in found) or all(int(match[2]) < num_channels for match in found)


def _join_channels(folder: Path, images: Mapping[str, Path], num_channels: int) -> dict[str, tuple[Path, ...]]:
    """Gives each case the files of its channels, also those that should be there and are not."""
    cases: dict[str, tuple[Path, ...]] = {}
    for full, path in images.items():
        name = full.rpartition("_")[0]
        ending = path.name[len(full) :]
        expected = [f"{name}_{channel:04d}" for channel in range(num_channels)]
        if is_picture(path) and not any(part in images for part in expected[1:]):
            # A picture holds red, green and blue itself.
            expected = expected[:1]
        cases.setdefault(name, tuple(images.get(part, folder / f"{part}{ending}") for part in expected))
    return cases


def _from_table(path: Path) -> Layout:
    """Reads cases from a CSV file with ``image`` or ``image_0``, ``image_1``, ..., and ``label``, ``name``."""
    table, dataset = read_table(path), read_dataset(path.parent / "dataset.json")
    columns = _image_columns(table.columns)
    if not columns:
        raise MedmomError(
            f"{path}: no column image among {', '.join(table.columns)}. Add it, with paths from this folder."
        )
    entries = []
    for number, row in enumerate(table.rows, start=2):
        if not all(row[column] for column in columns):
            raise MedmomError(
                f"{path}: case {number - 1} has an empty cell in {', '.join(columns)}. Give the image's path."
            )
        images = tuple(path.parent / row[column] for column in columns)
        label = path.parent / row["label"] if row.get("label") else None
        entries.append(Entry(row.get("name") or row.get("case") or stem(images[0]), images, label))
    rows = {entry.name: row for entry, row in zip(entries, table.rows, strict=True)}
    return Layout(path.parent, dataset, tuple(entries), table=table, rows=rows)


def _with_rows(layout: Layout) -> Layout:
    """Adds ``cases.csv`` where it lies in the folder."""
    path = layout.folder / "cases.csv"
    if not path.is_file():
        return layout
    table = read_table(path)
    rows = table.by_case()
    known = {e.name: rows.get(e.name) or rows.get(stem(e.images[0])) for e in layout.entries}
    found = {name: row for name, row in known.items() if row is not None}
    return Layout(layout.folder, layout.dataset, layout.entries, layout.unused, table, found)


def _image_columns(columns: Iterable[str]) -> list[str]:
    numbered = [name for name in columns if re.fullmatch(r"image_\d+", name)]
    return ["image"] if "image" in columns else sorted(numbered, key=lambda name: int(name[6:]))


def _has_images(path: Path) -> bool:
    return bool(_image_columns(read_table(path).columns))


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _images(folder):
        name = series_name(path) if is_series(path) else stem(path)
        if name in files:
            raise MedmomError(f"{path}: {files[name].name} beside it has the same case name. Keep one of the two.")
        files[name] = path
    return files


def _images(folder: Path) -> list[Path]:
    """Lists image files, and the DICOM series that lie in a folder or in the folders in it."""
    if not folder.is_dir():
        return []
    visible = _visible(folder)
    images = [path for path in visible if is_image(path) and not is_series(path)]
    for inner in (folder, *(path for path in visible if path.is_dir())):
        if any(path.is_file() and is_series(path) for path in _visible(inner)):
            images += find_series(inner)
    return images


def _visible(folder: Path) -> list[Path]:
    """Lists a folder by name, without hidden files and the ``._`` twins that macOS leaves."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from error
