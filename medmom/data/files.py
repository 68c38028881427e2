"""Image files in and out: the only place that knows a file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.atomic import atomic_file, read_json, write_json, write_text
from medmom.data.header import spell_edges
from medmom.data.nifti import HEADER_SUFFIXES, SINGLE_SUFFIXES, open_nifti, read_voxels, suffix, write_label_voxels
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

__all__ = [
    "Volume",
    "atomic_file",
    "check_same_grid",
    "is_image",
    "read_geometry",
    "read_image",
    "read_images",
    "read_json",
    "read_label",
    "stem",
    "write_json",
    "write_label",
    "write_text",
]

# Slices converted together: few enough for little memory, enough to fill the cache lines written to.
SLAB = 16

# Rounding of a stored scale factor stays far below, a blended label far above.
WHOLE_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Volume:
    """One image or label map in memory, with its grid.

    Attributes:
        path: The file it was read from.
        array: An image: float32, shape (C, X, Y, Z). A label map: integers, shape (X, Y, Z).
        geometry: The grid.
        header: nibabel's header, for the codes and units of a result on the same grid.
    """

    path: Path
    array: np.ndarray
    geometry: Geometry
    header: Any


def is_image(path: str | Path) -> bool:
    """Whether a file name is one of an image; a pair counts once, by its ``.hdr``. Upper case counts too."""
    return suffix(Path(path)) in SINGLE_SUFFIXES + HEADER_SUFFIXES


def stem(path: str | Path) -> str:
    """Gives the file name without its image suffix: ``case.v1.nii.gz`` is ``case.v1``."""
    path = Path(path)
    return path.name[: -len(suffix(path))] if suffix(path) else path.stem


def read_geometry(path: str | Path) -> Geometry:
    """Reads the grid alone, from the header, with the checks of ``read_image`` on it."""
    return open_nifti(Path(path)).geometry


def read_image(path: str | Path) -> Volume:
    """Reads an image as float32 channels, with its scale factors applied.

    NIfTI-1 and NIfTI-2, single files and pairs, either byte order, any integer or float type. Volumes
    along the fourth axis are channels; trailing axes of length 1 are dropped.

    What could be read either way is decided so:
        * The bytes, not the name, say whether a file is compressed: a plain file named ``.nii.gz`` and a
          compressed one named ``.nii`` are read, and compressed pairs too.
        * Neither qform nor sform set: read, with the affine that nibabel gives it, and a warning.
        * qform and sform disagree: refused where they mirror each other, or claim the same space (equal
          codes) and put a voxel more than half an edge apart; otherwise the sform counts.
        * Shear of more than one degree, gantry tilt included: refused.
        * A voxel edge of 0 mm that the affine depends on: refused.
        * One slice, and two axes only: read, as one slice (X, Y, 1). Four axes of which the first has one
          voxel: refused, the channels seem to come first.
        * A constant image: refused, it shows nothing; one blank channel among others is read.
        * Analyze 7.5: refused, it does not tell left from right. MGZ, AFNI, MINC, PAR/REC and every
          other format: refused.
        * Lengths in metres or micrometres: refused.

    Args:
        path: The file; for a pair, either half.

    Returns:
        The volume, array of shape (C, X, Y, Z).

    Raises:
        MedmomError: The file is missing, damaged or no image volume, or a voxel is not finite.
    """
    volume = _read_channels(Path(path))
    _check_contrast(volume)
    return volume


def read_images(paths: Sequence[str | Path]) -> Volume:
    """Reads one case whose channels may lie in several files; the header is that of the first.

    Raises:
        MedmomError: As ``read_image``; or a file lies on another grid than the first.
    """
    volumes = [_read_channels(Path(path)) for path in paths]
    for other in volumes[1:]:
        check_same_grid(volumes[0], other)
    array = volumes[0].array if len(volumes) == 1 else np.concatenate([volume.array for volume in volumes])
    volume = replace(volumes[0], array=array)
    _check_contrast(volume)
    return volume


def read_label(path: str | Path) -> Volume:
    """Reads a label map as integers of shape (X, Y, Z); a float file is fine where its values are whole.

    Raises:
        MedmomError: As ``read_image`` (a constant map is fine); or there are several volumes, or a value
            that is not a whole number.
    """
    file = open_nifti(Path(path))
    if file.num_channels > 1:
        raise MedmomError(f"{path}: a label map with {file.num_channels} volumes. Store one volume of class numbers.")
    raw, slope, inter = read_voxels(file)
    if raw.dtype.kind in "iu" and (slope, inter) == (1.0, 0.0):
        array = raw[..., 0].astype(raw.dtype.newbyteorder("="), order="C")
    else:
        array = _wholespell_edges(file.path, raw[..., 0], slope, inter)
    return Volume(file.path, array, file.geometry, file.header)


def check_same_grid(first: Volume, second: Volume) -> None:
    """Demands one grid of two volumes, to a twentieth of the smallest voxel edge.

    Raises:
        MedmomError: The shapes differ, or a voxel lies elsewhere.
    """
    ours, theirs = first.geometry, second.geometry
    if theirs.is_close(ours, tolerance=0.05 * min(ours.spacing)):
        return
    if ours.shape != theirs.shape:
        fact = f"shape {' x '.join(map(str, theirs.shape))} instead of {' x '.join(map(str, ours.shape))}"
    elif not np.allclose(ours.spacing, theirs.spacing, rtol=1e-3):
        fact = f"spacing {spell_edges(theirs.spacing)} mm instead of {spell_edges(ours.spacing)} mm"
    else:
        apart = np.linalg.norm(ours.corners() - theirs.corners(), axis=1).max()
        fact = f"same shape, but voxels up to {apart:.3g} mm away"
    raise MedmomError(f"{second.path}: another grid than {first.path} ({fact}). Export both on one grid.")


def write_label(path: str | Path, label: np.ndarray, labels: Labels, like: Volume) -> None:
    """Writes a label map on the grid of ``like``, or leaves the disk as it was.

    Affine, qform and sform with their codes, voxel edges and units are those of ``like``, and so is the
    number of axes of a flat image. The type is the smallest integer type for ``labels``; the class names
    stand in a header extension, as the label table that TotalSegmentator writes and reads.

    Args:
        path: ``.nii.gz`` (compressed at level 1) or ``.nii``; missing folders are made.
        label: Stored values, shape (X, Y, Z).
        labels: The table they come from.
        like: The image that was segmented.

    Raises:
        MedmomError: ``path`` is the image itself, has another suffix, or cannot be written.
        ValueError: ``label`` has another shape, or values beyond the type.
    """
    path = Path(path)
    if suffix(path) not in SINGLE_SUFFIXES:
        raise MedmomError(f"{path}: label maps are written as .nii.gz or .nii. Give the output such a name.")
    if _is_same_file(path, like.path):
        raise MedmomError(f"{path}: the output would replace its own input. Give another output.")
    stored = label.astype(labels.dtype)
    if label.shape != like.geometry.shape or not np.array_equal(stored, label):
        raise ValueError(f"a label map {label.shape} {label.dtype} for {like.geometry.shape} {labels.dtype}")
    with atomic_file(path) as stream:
        write_label_voxels(stream, stored, labels, like.header, compress=suffix(path) != ".nii")


def _read_channels(path: Path) -> Volume:
    """Reads float32 channels and refuses voxels that are not finite."""
    file = open_nifti(path)
    raw, slope, inter = read_voxels(file)
    array = np.empty((file.num_channels, *file.geometry.shape), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in range(file.num_channels):
            for start in range(0, raw.shape[2], SLAB):
                part = raw[:, :, start : start + SLAB, channel]
                scaled = part if (slope, inter) == (1.0, 0.0) else part.astype(np.float64) * slope + inter
                array[channel, :, :, start : start + SLAB] = scaled
    # Both carry nan and infinity out without an array of flags.
    if not np.isfinite((array.min(), array.max())).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise MedmomError(
            f"{path}: {count} voxels are NaN, infinite or beyond 32-bit range. Replace them and save again."
        )
    return Volume(path, array, file.geometry, file.header)


def _check_contrast(volume: Volume) -> None:
    if volume.array.min() == volume.array.max():
        value = float(volume.array.flat[0])
        raise MedmomError(f"{volume.path}: every voxel is {value:g}, the image shows nothing. Give the true image.")


def _is_same_file(first: Path, second: Path) -> bool:
    """Whether both names lead to one file; links count, a file that is not there does not."""
    try:
        return first.samefile(second)
    except OSError:
        return False


def _wholespell_edges(path: Path, raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Rounds scaled or float values to the smallest integer type that holds them."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = raw.astype(np.float64, order="C") * slope + inter
        whole = np.rint(values)
        wrong = ~(np.abs(values - whole) <= WHOLE_TOLERANCE)
    if wrong.any():
        first = float(values[wrong][0])
        raise MedmomError(
            f"{path}: {int(wrong.sum())} label values are not whole numbers, such as {first:.6g}. "
            "Export labels without interpolation (nearest neighbour)."
        )
    low, high = int(whole.min()), int(whole.max())
    if low < -(2**31) or high >= 2**32:
        raise MedmomError(f"{path}: label values from {low} to {high}. Number the classes from 0 on.")
    return whole.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))
