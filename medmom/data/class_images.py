"""Whole images as a network classifies them: read, prepared, cut to the patch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from medmom.data.cache import Entry
from medmom.data.case import Case
from medmom.data.casefiles import CaseFiles
from medmom.data.class_items import open_items, read_item, unpack_items
from medmom.data.files import content_files, read_images
from medmom.data.nifti import HEADER_SUFFIXES, VOXEL_SUFFIXES, suffix
from medmom.data.preparation import Preparation, prepare
from medmom.errors import MedmomError

T = TypeVar("T")

LAYOUT = 1
"""Number of the layout of a prepared volume; raise it when what is stored changes."""


@dataclass(frozen=True)
class ClassImage:
    """An image to be classified, ready to be opened.

    Attributes:
        files: The case.
        preparation: How it is brought to the working grid.
        items: Folder of the unpacked images, where it is one of many in a file.
        entry: Where it lies prepared; None for pictures, which are prepared anew each time.
    """

    files: CaseFiles
    preparation: Preparation
    items: Path | None = None
    entry: Entry | None = None

    def open(self) -> np.ndarray:
        """Gives the image on the working grid, shape (C, X, Y, Z), float32; not to be written to.

        Raises:
            MedmomError: It cannot be read.
        """
        if self.entry is not None:
            # Opened anew each time: a mapping holds a file descriptor.
            prepared: np.ndarray = self.entry.load()["image"]
            return prepared
        arrays = None if self.items is None else open_items(self.items)
        return prepare(read_class_case(self.files, arrays), self.preparation).image


def read_class_case(files: CaseFiles, arrays: Sequence[np.ndarray] | None = None) -> Case:
    """Reads a case without a label map: a picture, a volume, or one image of a file of many.

    Args:
        files: The case.
        arrays: As for ``read_item``.

    Raises:
        MedmomError: It cannot be read.
    """
    volume = read_images(files.images) if files.item is None else read_item(files.images[0], files.item, arrays)
    return Case(files.name, volume.array, None, volume.geometry, ())


def prepare_images(
    cases: Sequence[CaseFiles], preparation: Preparation, cache: Path, *, quiet: bool = False
) -> list[ClassImage]:
    """Readies images to be opened many times: volumes are prepared on disk, files of many images are unpacked.

    Args:
        cases: Which.
        preparation: Fitted.
        cache: Folder for what is stored.
        quiet: Whether to leave out the progress bar.

    Returns:
        One image a case, in the same order.

    Raises:
        MedmomError: A volume cannot be read, or the cache cannot be written.
    """
    items = unpack_all(cases, cache)

    def ready(files: CaseFiles) -> ClassImage:
        if files.item is not None:
            return ClassImage(files, preparation, items=items[files.name])
        if not is_volume(files.images[0]):
            return ClassImage(files, preparation)
        key = hashlib.sha256(json.dumps([LAYOUT, identity(files), asdict(preparation)]).encode()).hexdigest()[:24]
        return ClassImage(files, preparation, entry=_prepared(cache / "images" / key, files, preparation))

    return each(cases, ready, "Preparing", quiet=quiet)


def unpack_all(cases: Sequence[CaseFiles], cache: Path) -> dict[str, Path]:
    """Unpacks the files of many images that cases lie in, and gives their folders by case name."""
    packed = {case.name: case.images[0] for case in cases if case.item is not None}
    folders = {path: unpack_items(path, cache) for path in dict.fromkeys(packed.values())}
    return {name: folders[path] for name, path in packed.items()}


def each(cases: Sequence[CaseFiles], work: Callable[[CaseFiles], T], what: str, *, quiet: bool) -> list[T]:
    """Does something with every case, with a progress bar; two volumes at a time, more pictures."""
    if not cases:
        return []
    # Threads, not processes: an exception arrives whole, and nobody dies unseen. A large CT takes gigabytes.
    volumes = any(is_volume(case.images[0]) for case in cases)
    threads = min(2 if volumes else 8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        results = pool.map(work, cases)
        return list(tqdm(results, desc=what, total=len(cases), unit="case", disable=quiet, leave=False))


def is_volume(path: Path) -> bool:
    """Whether a file is of a format for volumes."""
    return suffix(path) in (".nii", ".nii.gz", *HEADER_SUFFIXES, *VOXEL_SUFFIXES)


def identity(files: CaseFiles) -> list[str | int | None]:
    """Tells one state of a case's files from every other: paths, sizes, times of change, and the item.

    Raises:
        MedmomError: A file is not there.
    """
    found: list[str | int | None] = [files.item]
    for path in files.images:
        for half in content_files(path):
            try:
                stat = half.stat()
            except OSError as error:
                raise MedmomError(f"{half}: {error.strerror}. Put the file back where it was.") from error
            found += [os.path.join(_resolved(half.parent), half.name), stat.st_size, stat.st_mtime_ns]  # noqa: PTH118
    return found


def fit_to_patch(image: np.ndarray, patch: Sequence[int], rng: np.random.Generator | None = None) -> np.ndarray:
    """Cuts the first axes of an image to a size, or fills them up with the lowest value of each channel.

    Args:
        image: Shape (C, X, Y, ...).
        patch: Voxels wanted along X, Y, ...; further axes stay as they are.
        rng: Where to cut and to fill is drawn; None: about the centre.

    Returns:
        Shape (C, *patch, ...), a new array.
    """
    cut, shape = [slice(None)], list(image.shape)
    place = [slice(None)]
    for axis, wanted in enumerate(patch, start=1):
        spare = image.shape[axis] - wanted
        start = abs(spare) // 2 if rng is None else int(rng.integers(abs(spare) + 1))
        cut.append(slice(start, start + wanted) if spare > 0 else slice(None))
        place.append(slice(start, start + image.shape[axis]) if spare < 0 else slice(None))
        shape[axis] = wanted
    inside = image[tuple(cut)]
    if inside.shape == tuple(shape):
        return np.array(inside)
    lowest = image.reshape(len(image), -1).min(axis=1).reshape(-1, *[1] * (image.ndim - 1))
    result = np.broadcast_to(lowest, shape).astype(image.dtype)
    result[tuple(place)] = inside
    return result


def choose_slices(num_slices: int, wanted: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Chooses slices of a volume, in order.

    Args:
        num_slices: How many it has.
        wanted: How many are looked at.
        rng: For training: one slice is drawn from each of ``wanted`` equal parts of the volume, the likelier the closer
            to the part's middle; a volume with fewer slices shows some twice. None: the middle of each part; a
            volume with fewer slices shows each once.

    Returns:
        Indices, increasing; ``wanted`` of them, or ``min(wanted, num_slices)`` without ``rng``.
    """
    if rng is None and num_slices <= wanted:
        return np.arange(num_slices)
    offset = 0.5 if rng is None else rng.triangular(0, 0.5, 1, wanted)
    places = np.floor((np.arange(wanted) + offset) * num_slices / wanted).astype(int)
    return np.asarray(np.minimum(places, num_slices - 1))


@lru_cache(maxsize=1 << 17)
def _prepared(folder: Path, files: CaseFiles, preparation: Preparation) -> Entry:
    """Prepares a volume where that is not done; remembered, for the checksums of many take minutes."""
    entry = Entry(folder)
    if not entry.is_sound():
        entry.write({"image": prepare(read_class_case(files), preparation).image})
    return entry


@lru_cache(maxsize=4096)
def _resolved(folder: Path) -> str:
    return str(folder.resolve())
