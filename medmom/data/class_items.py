"""Images of a MedMNIST ``.npz`` file: many in one file, each with its class and its part of the split."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from medmom.data.atomic import cache_draft, take_place
from medmom.data.class_cases import ClassEntry, Listing
from medmom.data.files import Volume
from medmom.errors import MedmomError
from medmom.geometry import Geometry

PARTS = ("train", "val", "test")

ORGANS = (
    "bladder,femur-left,femur-right,heart,kidney-left,kidney-right,liver,lung-left,lung-right,pancreas,spleen"
).split(",")
ORGANS_3D = (
    "liver,kidney-right,kidney-left,femur-right,femur-left,bladder,heart,lung-right,lung-left,spleen,pancreas"
).split(",")

NAMES: Mapping[str, Sequence[str]] = {
    "organamnist": ORGANS,
    "organcmnist": ORGANS,
    "organsmnist": ORGANS,
    "organmnist3d": ORGANS_3D,
}
"""Classes by number, of the sets that need no guess; the volumes number their organs otherwise than the slices.

Source:
    Yang et al. 2023, doi:10.1038/s41597-022-01721-8, and the table of the medmnist package, version 2.1.
"""

WHOLE_16_BIT = 257.0
"""Brings 16-bit grey values to the scale of 8 bits."""


def read_items(path: Path) -> Listing:
    """Lists the images of a MedMNIST file: ``train_images``, ``train_labels`` and the same of ``val`` and ``test``.

    Images are (N, H, W), (N, H, W, 3), or (N, D, H, W) for volumes; labels are (N, 1) class numbers, or (N, L) of 0
    and 1 where an image may be of several classes. Items count through the parts in the order train, val, test.

    Raises:
        MedmomError: The file is damaged or holds something else.
    """
    labels = {}
    with _opened(path) as file:
        for part in _parts(path, file):
            labels[part] = _labels(path, file, part)
            _check_images(path, file, part, len(labels[part]))
    widths = {found.shape[1] for found in labels.values()}
    if len(widths) > 1:
        raise MedmomError(f"{path}: labels of {sorted(widths)} columns. Give all parts the same number of classes.")
    numbers = np.concatenate(list(labels.values()))
    names, classes = _named(path, numbers)
    folds = [part for part, found in labels.items() for _ in found]
    entries = tuple(ClassEntry((path,), classes[k], _case_name(path, k), folds[k], "", k) for k in range(len(classes)))
    return Listing(path, path, entries, names, numbers.shape[1] > 1)


def read_item(path: str | Path, item: int, arrays: Sequence[np.ndarray] | None = None) -> Volume:
    """Reads one image of a MedMNIST file, as ``read_image`` reads a file of its own.

    Args:
        path: The ``.npz`` file.
        item: Number of the image, counted through train, val and test.
        arrays: Images of these parts, such as ``open_items`` gives; None: read from the file and kept in memory.

    Returns:
        Shape (C, X, Y, 1) for a picture, x the column from the left and y the row from the top; (1, X, Y, Z) for a
        volume stored (D, H, W). Values on the scale 0 to 255, affine the identity, no header.

    Raises:
        MedmomError: The file is damaged, has no such item, or the image is constant or not finite.
    """
    path, place = Path(path), item
    for images in _in_memory(path, *_stat(path)) if arrays is None else arrays:
        if 0 <= place < len(images):
            array = _as_image(images[place])
            low, high = float(array.min()), float(array.max())
            if low == high or not np.isfinite((low, high)).all():
                fact = f"every voxel is {low:g}" if low == high else "a voxel is not finite"
                raise MedmomError(
                    f"{path}: item {item}: {fact}. Leave it out with --data.leave_out '[{_case_name(path, item)}]'."
                )
            return Volume(path, array, Geometry(array.shape[1:], np.eye(4)), None)
        place -= len(images)
    raise MedmomError(f"{path}: there is no item {item}. Give the file that the case was listed from.")


def unpack_items(path: Path, cache: Path) -> Path:
    """Unpacks the images into a folder of the cache, once, so that they can be mapped and not read as a whole.

    Returns:
        The folder, for ``open_items``.

    Raises:
        MedmomError: The file is damaged, or the cache cannot be written.
    """
    key = hashlib.sha256(f"{path.resolve()} {_stat(path)}".encode()).hexdigest()[:24]
    folder = cache / "items" / key
    if folder.is_dir():
        return folder
    with cache_draft(folder) as draft:
        with _opened(path) as file:
            for number, part in enumerate(_parts(path, file)):
                with _member(path, file, f"{part}_images") as source, (draft / f"{number}.npy").open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        take_place(draft, folder)
    return folder


@lru_cache(maxsize=4)
def open_items(folder: Path) -> tuple[np.ndarray, ...]:
    """Maps the images of the parts that ``unpack_items`` wrote into memory; what is not touched is not read."""
    paths = sorted(folder.glob("*.npy"))
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)


@lru_cache(maxsize=1)
def _in_memory(path: Path, size: int, changed: int) -> tuple[np.ndarray, ...]:
    with _opened(path) as file:
        return tuple(_array(path, file, f"{part}_images") for part in _parts(path, file))


def _case_name(path: Path, item: int) -> str:
    return f"{path.stem}-{item:06d}"


def _named(path: Path, numbers: np.ndarray) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Gives the names of the classes that occur, in the order of their numbers, and those of each image."""
    if numbers.shape[1] > 1:
        names = [str(k) for k in range(numbers.shape[1])]
        return tuple(names), [tuple(names[k] for k in np.flatnonzero(row)) for row in numbers]
    present = np.unique(numbers)
    # MedMNIST's larger sizes are called organamnist_128 and so on.
    known = NAMES.get(re.sub(r"_\d+$", "", path.stem.lower()), ())
    spelt = {int(k): known[k] if present.max() < len(known) else str(k) for k in present}
    return tuple(spelt.values()), [(spelt[int(k)],) for k in numbers[:, 0]]


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    _stat(path)
    with ExitStack() as stack:
        try:
            # numpy would leave a file that it opened itself open where it is damaged.
            stream = stack.enter_context(path.open("rb"))
            file = np.load(stream, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise MedmomError(f"{path}: not an .npz file, or cut off ({error}). Fetch it again.") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise MedmomError(
                f"{path}: one array, not an .npz file of several. Save images and labels with numpy.savez."
            )
        yield stack.enter_context(file)


def _parts(path: Path, file: np.lib.npyio.NpzFile) -> list[str]:
    found = [part for part in PARTS if f"{part}_images" in file]
    if "train" not in found:
        raise MedmomError(f"{path}: no array train_images, so not a MedMNIST file. Give images in folders, or a CSV.")
    return found


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise MedmomError(f"{path}: the array {name} is missing or damaged ({error}). Fetch the file again.") from error


def _array(path: Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    with _told(path, name):
        return np.asarray(file[name])


@contextmanager
def _member(path: Path, file: np.lib.npyio.NpzFile, name: str) -> Iterator[IO[bytes]]:
    """Opens the stored ``.npy`` of an array."""
    assert file.zip is not None
    with _told(path, name), file.zip.open(f"{name}.npy") as stream:
        yield stream


def _labels(path: Path, file: np.lib.npyio.NpzFile, part: str) -> np.ndarray:
    name = f"{part}_labels"
    labels = _array(path, file, name)
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.ndim != 2 or labels.dtype.kind not in "iub" or not labels.size:
        raise MedmomError(
            f"{path}: {name} has shape {labels.shape} and type {labels.dtype}. Store whole numbers (images, 1 or more)."
        )
    labels = labels.astype(np.int64)
    top = 1 if labels.shape[1] > 1 else 9999
    if labels.min() < 0 or labels.max() > top:
        raise MedmomError(
            f"{path}: {name} reaches from {labels.min()} to {labels.max()}. "
            "Store class numbers from 0 in one column, or 0 and 1 in a column for each class."
        )
    return labels


def _check_images(path: Path, file: np.lib.npyio.NpzFile, part: str, num_labels: int) -> None:
    """Checks shape and type from the header: the images of a large file fill the memory."""
    name = f"{part}_images"
    with _member(path, file, name) as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    if len(shape) not in (3, 4) or 0 in shape or dtype.kind not in "iufb":
        raise MedmomError(
            f"{path}: {name} has shape {shape} and type {dtype}. Store numbers (N, H, W), (N, H, W, 3) or (N, D, H, W)."
        )
    if shape[0] != num_labels:
        raise MedmomError(f"{path}: {shape[0]} images and {num_labels} labels in {part}. Store one label an image.")


def _as_image(stored: np.ndarray) -> np.ndarray:
    """Turns (H, W), (H, W, 1 or 3) or (D, H, W) into channels first and x, y, z."""
    scale = WHOLE_16_BIT if stored.dtype == np.uint16 else 1.0
    if stored.ndim == 2:
        turned = stored.T[None, :, :, None]
    elif stored.shape[-1] in (1, 3):
        turned = stored.transpose(2, 1, 0)[..., None]
    else:
        turned = stored.transpose(2, 1, 0)[None]
    return np.ascontiguousarray(turned, dtype=np.float32) / np.float32(scale)
